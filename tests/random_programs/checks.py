"""Random programs compared with their meaning, in value and in gradients."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from flax.core import lift
from jax import lax

from oracle import assert_same, scalar
from random_programs.evaluation import traced
from random_programs.machine import meaning
from random_programs.masks import Mask
from random_programs.operations import NAMES, build, noises
from random_programs.orders import check_second_order, gradients
from random_programs.source import report
from random_programs.syntax import Program

X = jnp.array([0.7, -1.1, 0.4])
KEYS = {'params': jax.random.key(1), 'noise': jax.random.key(2)}

MODES: dict[str, Callable] = {'traced': traced, 'eager': lambda fn: fn, 'jit': jax.jit}


@contextlib.contextmanager
def blocks(masks: list[Mask]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for mask in masks:
            stack.enter_context(eval(mask.source(), dict(NAMES)))
        yield


def application(
    program: Program,
    model: linen.Module,
    masks: list[Mask],
    views: Callable = lambda target: target,
) -> Callable:
    """Return ``f(params, stats, x) -> (loss, (out, noises))`` for one application of the module."""
    mutable = ['batch_stats', *['params'] * program.mutable_params]
    inside = [] if program.around_grad else masks

    def apply(params, stats, x):
        noises.clear()
        variables, rngs = {'params': params, 'batch_stats': stats}, {'noise': KEYS['noise']}
        with blocks(inside):
            if program.bind:
                bound = model.bind(variables, rngs=rngs, mutable=mutable)
                y = views(bound)(x)
            else:
                y, variables = model.apply(
                    variables, x, rngs=rngs, mutable=mutable, method=views(type(model).__call__)
                )
        if program.bind:
            variables = bound.variables
        out = {'y': y, 'stats': variables.get('batch_stats', {})}
        if program.mutable_params:
            out['params'] = variables['params']
        seen = [] if isinstance(y, dict) else list(noises)  # those of views are of another trace
        return scalar(lambda: out)(), (out, seen)

    return apply


def around(program: Program, masks: list[Mask], fn: Callable) -> Callable:
    def run(*args):
        with blocks(masks if program.around_grad else []):
            return fn(*args)

    return run


def check(program: Program, modes: tuple[str, ...] = ('traced',), *, second: bool = False) -> bool:
    """Compare a program with its meaning; return whether a block of it stopped anything."""
    masked, plain = build(program, plain=False), build(program, plain=True)
    source = report(program)
    bent, forward = 'map_values' in source, 'map_gradient' not in source

    def init(model: linen.Module) -> Any:
        variables = traced(lambda x: model.init(KEYS, x))(X)
        return variables['params'] if bent and 'params' in variables else variables

    with streams_told_apart():
        variables = traced(lambda x: plain.init(KEYS, x))(X)
        expected = init(plain)
    assert_same(init(masked), expected, 'init')
    if program.runs[0]:
        with blocks(program.runs[0]):
            assert_same(init(masked), expected, 'init in a block')
    args = (variables.get('params', {}), variables.get('batch_stats', {}), X)
    # A derived value is computed once in setup, and at each read in the machine.
    # A scaled gradient is a sum of two in the machine, and a mapped value is read once in a block.
    exact = not (
        re.search(r'scan|vmap|jit|remat|raw|lifted|scale_|map_|tied|ruled|steps', source)
        or any(c.derived for c in program.classes)
    )
    differs = False
    for mode in modes:
        run, plain_fn = MODES[mode], application(program, plain, [])
        with streams_told_apart():
            plain_grads, (plain_out, noise) = run(gradients(plain_fn))(*args)
        seen: dict[int, Any] = {}
        for masks in program.runs:
            fn = application(program, masked, masks)
            grads, (out, drawn) = run(around(program, masks, gradients(fn)))(*args)
            # What setup derives may be computed again in a block, in a function that is compiled.
            tolerance = 1e-3 if mode == 'jit' or mode == 'eager' and not exact else 0.0
            if not bent:
                assert_same((out, drawn), (plain_out, noise), f'{mode} value', rtol=tolerance)
            if id(masks) in seen:
                assert_same(grads, seen[id(masks)], f'{mode} gradient, again', rtol=0.0)
                continue
            seen[id(masks)] = grads

            def two_copies(params, stats, x, bar, masks=masks, noise=noise):
                out = meaning(program, masks, params, bar, stats, x, noise)
                return scalar(lambda: out)(), (out, ())

            wanted, (meant, _) = run(gradients(two_copies))(*args, args[0])
            tolerance = 0.0 if exact and mode != 'jit' else 1e-3
            try:
                assert_same(out, meant, f'{mode} value', rtol=1e-3 if bent else tolerance)
                assert_same(grads, wanted, f'{mode} gradient', rtol=tolerance)
            except AssertionError:
                if bent or not exact:
                    check_condition(run(gradients(two_copies)), args)
                raise
            differs |= any(
                bool((a != b).any())
                for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(plain_grads), strict=True)
            )
            if second and forward:
                check_second_order(fn, two_copies, args, around(program, masks, lambda f: f()))
    return differs


class IllConditioned(Exception):
    """A program that has no meaning to compare with.

    Rounding alone changes its results by more than two programs may differ; or Flax's `nn.jit`
    gives it random numbers that depend on what ran before.
    """


@contextlib.contextmanager
def streams_told_apart() -> Iterator[None]:
    """Raise IllConditioned where `nn.jit` takes one function of a module for another.

    It counts the random numbers that a jitted function draws by the module alone, so that the
    second of two functions moves the module's streams as far as the first one did.
    """
    original, caches = lift._restore_rng_counters, lift._side_effect_cache.cache

    def restore(scopes: Any, fingerprint: Any, before: Any) -> None:
        count = lambda: [
            lift.CountsHolder.make(s.rng_counters).flat_d for s in jax.tree.leaves(scopes)
        ]
        known, after = fingerprint in caches, count()
        drawn = after != [c.flat_d for c in jax.tree.leaves(before, is_leaf=_has_counts)]
        original(scopes, fingerprint, before)
        if known and drawn and count() != after:
            raise IllConditioned

    lift._restore_rng_counters = restore
    try:
        yield
    finally:
        lift._restore_rng_counters = original


def _has_counts(node: Any) -> bool:
    return isinstance(node, lift.CountsHolder)


def check_condition(fn: Callable, args: tuple) -> None:
    """Raise IllConditioned if a millionth of its parameters moves a program's meaning too far."""
    near = jax.tree.map(lambda v: lax.mul(v, np.full(v.shape, 1 + 1e-6, np.float32)), args[0])
    try:
        assert_same(fn(near, *args[1:], near), fn(*args, args[0]), 'condition', rtol=1e-3)
    except AssertionError as error:
        raise IllConditioned from error
