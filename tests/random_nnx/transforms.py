"""What random programs of flax.nnx are written with."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import flax_sg
from flax_sg import nnx
from nnx_programs import MODES
from random_programs.masks import bend, shift
from random_programs.operations import OPS, pair

WIDTH = 3


def draw(key: jax.Array) -> jax.Array:
    bits = lax.convert_element_type(jax.random.bits(key, (WIDTH,)), jnp.float32)
    return bits * jnp.float32(2.0**-32)


def like(variable: Any, x: jax.Array) -> jax.Array:
    """Return something of x in the shape of a parameter."""
    return 0.1 * jnp.broadcast_to(lax.sin(x), variable.shape)


def yes(x: jax.Array) -> jax.Array:
    return jnp.sum(x) > -1e9


def _scan(fn, module, x, **mode):
    run = nnx.scan(
        lambda x, m: fn(m, x), length=2, in_axes=(nnx.Carry, None), out_axes=nnx.Carry, **mode
    )
    return run(x, module)


def _scan_carrying(fn, module, x, **mode):
    def step(carry, _):
        module, x = carry
        return module, fn(module, x)

    run = nnx.scan(step, length=2, in_axes=(nnx.Carry, None), out_axes=nnx.Carry, **mode)
    return run((module, x), None)[1]


def _fori(fn, module, x, **mode):
    return nnx.fori_loop(0, 2, lambda i, c: (c[0], fn(*c)), (module, x), **mode)[1]


def _grad_of_input(fn, module, x, **mode):
    return x + nnx.grad(lambda x, m: jnp.sin(fn(m, x)).sum(), **mode)(x, module)


def _grad_of_model(fn, module, x, **mode):
    grads = nnx.grad(lambda m, x: jnp.sin(fn(m, x)).sum(), **mode)(module, x)
    return x + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(grads)) * 0.1


def _of_state(lift):
    def run(fn, module, x, **mode):
        graph, state = nnx.split(module)
        return lift(lambda state, x: fn(nnx.merge(graph, state), x))(state, x)

    return run


def _in_mode(run):
    return lambda fn, module, x, mode: run(fn, module, x, **MODES[mode])


traced: dict[str, Callable] = {
    name: _in_mode(run)
    for name, run in {
        'jit': lambda fn, m, x, **mode: nnx.jit(fn, **mode)(m, x),
        'remat': lambda fn, m, x, **mode: nnx.remat(fn, **mode)(m, x),
        'vmap': lambda fn, m, x, **mode: nnx.vmap(fn, in_axes=(None, 0), **mode)(m, pair(x)).sum(0),
        'scan': _scan,
        'scan, carrying': _scan_carrying,
        'fori_loop': _fori,
        'cond': lambda fn, m, x, **mode: nnx.cond(yes(x), fn, lambda m, x: x, m, x, **mode),
        'switch': lambda fn, m, x, **mode: nnx.switch(
            jnp.int32(1), [lambda m, x: x, fn], m, x, **mode
        ),
        'grad of input': _grad_of_input,
        'grad of model': _grad_of_model,
        'stacked scan': lambda fn, m, x, **mode: nnx.scan(
            lambda x, m: fn(m, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, **mode
        )(x, m),
        'stacked vmap': lambda fn, m, x, **mode: nnx.vmap(fn, in_axes=(0, 0), **mode)(
            m, pair(x)
        ).sum(0),
    }.items()
}
OF_STATES = {
    'jax.jit': _of_state(jax.jit),
    'jax.checkpoint': _of_state(jax.checkpoint),
    'jax.vmap': _of_state(
        lambda fn: lambda s, x: jax.vmap(fn, in_axes=(None, 0))(s, pair(x)).sum(0)
    ),
    'lax.scan': _of_state(
        lambda fn: lambda s, x: lax.scan(lambda x, _: (fn(s, x), None), x, length=2)[0]
    ),
    'lax.cond': _of_state(lambda fn: lambda s, x: lax.cond(yes(x), fn, lambda s, x: x, s, x)),
}
traced |= {
    name: _in_mode(lambda fn, m, x, run=run, **_: run(fn, m, x)) for name, run in OF_STATES.items()
}
captured: dict[str, Callable] = {
    'jit': lambda fn, x: jax.jit(fn)(x),
    'checkpoint': lambda fn, x: jax.checkpoint(fn)(x),
    'scan': lambda fn, x: lax.scan(lambda x, _: (fn(x), None), x, length=2)[0],
    'vmap': lambda fn, x: jax.vmap(fn)(pair(x)).sum(0),
    'cond': lambda fn, x: lax.cond(yes(x), fn, lambda x: x, x),
    'plain': lambda fn, x: fn(x),
    'nnx.jit': lambda fn, x: nnx.jit(fn)(x),
}
NAMES: dict[str, Any] = {
    'nnx': nnx,
    'sg': flax_sg,
    're': re,
    'jax': jax,
    'jnp': jnp,
    'copy': copy,
    'functools': functools,
    **{name: OPS[name] for name in ('mul', 'add', 'wave', 'mat')},
    'double': lambda info, cotangent: 2 * cotangent,
    'bend': bend,
    'shift': shift,
    'draw': draw,
    'like': like,
    'traced': traced,
    'captured': captured,
}
