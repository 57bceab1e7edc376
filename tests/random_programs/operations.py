"""What random programs are written with; the arithmetic is the machine's too."""

from __future__ import annotations

import itertools
import linecache
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from jax import lax

import flax_sg
from random_programs.masks import bend, centre, named, shift
from random_programs.source import Emitter
from random_programs.syntax import Program

WIDTH = 3

OPS: dict[str, Callable] = {  # in jax.lax, which traces faster than jax.numpy
    'mul': lambda x, v: lax.mul(lax.cos(x), v),
    'add': lambda x, v: lax.add(lax.sin(x), v),
    'wave': lambda x, v: lax.add(lax.sin(lax.mul(x, v)), x),
    'mat': lambda x, v: lax.sin(lax.dot(x, v)),
    'tied': lambda x, v: lax.add(lax.mul(x, v), v),
    'ruled': lambda x, v: lax.add(lax.mul(x, v), v),
    'exp': lambda v: lax.exp(lax.sin(v)),
    'sine': lambda v: lax.add(lax.sin(v), v),
}


class _Inner(linen.Module):
    """A model that a module applies by itself, to a value that it has read."""

    @linen.compact
    def __call__(self, x):
        return OPS['tied'](x, self.param('w', lambda key: x))


def _tied(x: jax.Array, v: jax.Array) -> jax.Array:
    return _Inner(parent=None).apply({'params': {'w': v}}, x)


def _ruled(x: jax.Array, v: jax.Array) -> jax.Array:
    """Apply it in a function with a rule of its own, which applies it again."""
    f = jax.custom_jvp(lambda x, v: _tied(x, v))
    f.defjvp(lambda primals, tangents: jax.jvp(_tied, primals, tangents))
    return f(x, v)


noises: list[jax.Array] = []


def _draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw numbers below 1 in few operations: Flax traces an initialiser at every use."""
    bits = lax.convert_element_type(jax.random.bits(key, shape), jnp.float32)
    return lax.mul(bits, np.full(shape, 2.0**-32, np.float32))


def _noise(mdl: linen.Module, x: jax.Array) -> jax.Array:
    noises.append(_draw(mdl.make_rng('noise'), (WIDTH,)))
    return x + noises[-1]


def _stat(mdl: linen.Module, var: Any, x: jax.Array) -> jax.Array:
    if mdl.is_mutable_collection('batch_stats'):
        var.value = 0.9 * var.value + 0.1 * x
    return x + var.value


def _raw(run: Callable) -> Callable:
    def outside_init(mdl, body, x):
        return body(x)[0] if mdl.is_initializing() else run(body, x)

    return outside_init


def put(x: jax.Array, index: tuple[int, ...], value: jax.Array) -> jax.Array:
    if not index:
        return value
    i, *rest = index
    return jnp.stack([put(y, tuple(rest), value) if j == i else y for j, y in enumerate(x)])


def pair(x: jax.Array) -> jax.Array:
    return jnp.stack([x, 0.5 * x])


def _yes(x: jax.Array) -> jax.Array:
    return jnp.sum(x) > -1e9


# The stream of noise goes in too, or Flax fails where nn.jit in such a body has met it outside.
_scan_b = {
    'variable_broadcast': 'params',
    'variable_carry': 'batch_stats',
    'split_rngs': {'params': False, 'noise': False},
}
_scan_s = {
    'variable_axes': {'params': 0, 'batch_stats': 0},
    'split_rngs': {'params': True, 'noise': False},
}
_vmap_b = {
    'variable_axes': {'params': None, 'batch_stats': 0},
    'split_rngs': {'params': False, 'noise': False},
}


def _lifted_scan(mdl, body, x):
    if mdl.is_initializing():
        return body(mdl, x)[0]
    return linen.scan(body, length=2, **_scan_b)(mdl, x, None)[0]


def _lifted_cond(mdl, body, x):
    if mdl.is_initializing():
        return body(mdl, x)[0]
    return linen.cond(_yes(x), body, lambda mdl, x: (x, None), mdl, x)[0]


NAMES: dict[str, Any] = {
    'nn': linen,
    'sg': flax_sg,
    're': re,
    **OPS,
    'tied': _tied,
    'ruled': _ruled,
    'noise': _noise,
    'stat': _stat,
    'pair': pair,
    'vec_init': lambda key: lax.add(_draw(key, (WIDTH,)), np.full(WIDTH, 0.5, np.float32)),
    'mat_init': lambda key: 2 * _draw(key, (WIDTH, WIDTH)) - 1,
    'ones': lambda: jnp.ones(WIDTH),
    'double': lambda info, cotangent: 2 * cotangent,
    'bend': bend,
    'shift': shift,
    'named': named,
    'centre': centre,
    'remat': linen.remat,
    'jit': linen.jit,
    'scan_b': lambda c: linen.scan(c, length=2, **_scan_b),
    'scan_s': lambda c: linen.scan(c, length=2, **_scan_s),
    'vmap_b': lambda c: linen.vmap(c, axis_size=2, **_vmap_b),
    'vmap_s': lambda c: linen.vmap(c, axis_size=2, **_scan_s),
    'raw_scan': _raw(lambda body, x: lax.scan(body, x, None, length=2)[0]),
    'raw_checkpoint': _raw(lambda body, x: jax.checkpoint(body)(x)[0]),
    'raw_jit': _raw(lambda body, x: jax.jit(body)(x)[0]),
    'raw_vmap': _raw(lambda body, x: jax.vmap(body)(pair(x))[0].sum(0)),
    'raw_cond': _raw(lambda body, x: lax.cond(_yes(x), body, lambda x: (x, None), x)[0]),
    'raw_plain': _raw(lambda body, x: body(x)[0]),
    'lifted_scan': _lifted_scan,
    'lifted_remat': lambda mdl, body, x: linen.remat(body)(mdl, x)[0],
    'lifted_jit': lambda mdl, body, x: linen.jit(body)(mdl, x)[0],
    'lifted_cond': _lifted_cond,
}

_built = itertools.count()


def build(program: Program, *, plain: bool) -> linen.Module:
    """Return the root module of a program, compiled from its source."""
    source = Emitter(program, plain).source()
    name = f'<random program {next(_built)}>'
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    space = {**NAMES, '__name__': 'random_program'}
    exec(compile(source, name, 'exec', dont_inherit=True), space)
    return space['model']
