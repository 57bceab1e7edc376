"""Random programs of flax.nnx compared with their meaning, in value, gradients and state."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import linecache
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_sg import nnx
from nnx_programs import MODES
from oracle import assert_same, scalar
from random_nnx.generator import WRITTEN
from random_nnx.machine import held_by, meaning, module_of
from random_nnx.source import Emitter, call_source, mask_source
from random_nnx.syntax import Class, Mask, Program, Stack
from random_nnx.transforms import NAMES, WIDTH
from random_programs.checks import IllConditioned
from random_programs.evaluation import traced

X = jnp.array([0.7, -1.1, 0.4])
RUN: dict[str, Callable] = {'traced': traced, 'eager': lambda fn: fn, 'jit': jax.jit}
_built = itertools.count()


class Refused(Exception):
    """NNX itself does not run a program, with none of the library's transforms in it."""


def build(program: Program, *, plain: bool = False) -> type:
    """Return the class of the model, compiled from its source."""
    source = Emitter(program, plain=plain).source
    name = f'<random program of nnx {next(_built)}>'
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    space = {**NAMES, '__name__': 'random_program'}
    exec(compile(source, name, 'exec', dont_inherit=True), space)
    return space['Model']


@contextlib.contextmanager
def blocks(masks: list[Mask], model: Any) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for mask in masks:
            stack.enter_context(eval(mask_source(mask, 'model'), {**NAMES, 'model': model}))
        yield


def names_of(cls: Class, at: str = '', lead: tuple[int, ...] = ()) -> dict[str, tuple[int, ...]]:
    """Return what a model's Variables are given, by name, and their shapes."""
    shapes = {'vec': (WIDTH,), 'mat': (WIDTH, WIDTH)}
    found = {at + name: (*lead, *shapes[rank]) for name, rank in cls.params.items()}
    if cls.stat:
        found[at + 'n'] = (*lead, WIDTH)
    for name, sub in cls.subs.items():
        if isinstance(sub, (list, dict)):
            for key in sub if isinstance(sub, dict) else range(len(sub)):
                found |= names_of(sub[key], f'{at}{name}/{key}/', lead)
        elif isinstance(sub, Stack):
            found |= names_of(sub.cls, f'{at}{name}/', (2, *lead))
        else:
            found |= names_of(sub, f'{at}{name}/', lead)
    return found


def values_of(program: Program) -> tuple[dict, dict]:
    """Return what parameters and statistics start with."""
    draw, params, stats = np.random.default_rng(0), {}, {}
    for name, shape in names_of(program.root).items():
        which = stats if name.split('/')[-1] == 'n' else params
        which[name] = jnp.asarray(draw.uniform(-1, 1, shape).astype(np.float32))
    return params, stats


def state_of(model: Any) -> dict[str, Any]:
    """Return what a model's Variables hold, by each of their paths."""
    found: dict[str, Any] = {}

    def visit(node: Any, path: tuple[str, ...]) -> None:
        if isinstance(node, nnx.Variable):
            found['/'.join(path)] = node.get_raw_value()
        elif not isinstance(node, nnx.Rngs):
            children = enumerate(node) if isinstance(node, nnx.List) else vars(node).items()
            for key, child in children:
                if isinstance(child, (nnx.Variable, nnx.Pytree)):
                    visit(child, (*path, str(key)))

    visit(model, ())
    return found


def run_of(program: Program, model: Any, masks: list[Mask], x: jax.Array) -> dict[str, Any]:
    with blocks(masks, model):
        y = eval(call_source(program), {**NAMES, 'model': model})(x)
    return {'y': y} if program.views else {'y': y, **state_of(model)}


def derivatives(program: Program, Model: type) -> Callable:
    """Return ``f(params, stats, x)``: for each run its output, and its gradients."""
    lift = MODES[program.mode]
    around = lambda masks: masks if program.around else []
    inside = lambda masks: [] if program.around else masks

    def by_values(params: dict, stats: dict, x: jax.Array) -> list:
        def loss(params, x, masks):
            model = Model({**params, **stats})
            out = run_of(program, model, inside(masks), x)
            return scalar(lambda: out)(), (out, state_of(model))

        return [jax.grad(loss, (0, 1), has_aux=True)(params, x, masks) for masks in program.runs]

    starts = held_by(module_of(program.root, {n: n for n in names_of(program.root)}))

    def gradients_of(grads: Any) -> dict[str, jax.Array]:
        flat = nnx.to_flat_state(grads if isinstance(grads, nnx.State) else nnx.state(grads))
        found = {'/'.join(map(str, path)): leaf for path, leaf in flat}
        values = {starts[path]: leaf.get_raw_value() for path, leaf in found.items()}
        return {name: value for name, value in values.items() if name.split('/')[-1] != 'n'}

    def by_nnx(params: dict, stats: dict, x: jax.Array) -> list:
        pure = not program.root.effects['__call__'] & WRITTEN
        made = lambda: Model({**params, **stats})
        one = made()

        def of_loss(masks):
            def loss(model, x):
                out = run_of(program, model, masks, x)
                return scalar(lambda: out)(), out

            grad = nnx.grad(loss, argnums=(0, 1), has_aux=True, **lift)
            step = lambda model, x: grad(model, x)
            return nnx.jit(step, **lift) if program.form.startswith('jit') else step

        steps = {str(inside(masks)): of_loss(inside(masks)) for masks in program.runs}
        results = []
        for masks in program.runs:
            model = one if pure else made()
            with blocks(around(masks), model):
                (grads, of_x), out = steps[str(inside(masks))](model, x)
            results.append(((gradients_of(grads), of_x), (out, state_of(model))))
        return results

    def by_split(params: dict, stats: dict, x: jax.Array) -> list:
        model = Model({**params, **stats})
        graph, state, rest = nnx.split(model, nnx.Param, ...)
        results = []
        for masks in program.runs:

            def loss(state, x, masks=masks):
                out = run_of(program, nnx.merge(graph, state, rest, copy=True), inside(masks), x)
                return scalar(lambda: out)(), out

            with blocks(around(masks), model):
                (grads, of_x), out = jax.grad(loss, (0, 1), has_aux=True)(state, x)
            results.append(((gradients_of(grads), of_x), (out, state_of(model))))
        return results

    if program.form == 'values':
        return by_values
    return by_split if program.form == 'split' else by_nnx


def meant(program: Program, *, plain: bool = False) -> Callable:
    """Return the same by hand; `plain` leaves all transforms of the library out."""

    def run(params: dict, stats: dict, x: jax.Array) -> list:
        def loss(params, x, masks):
            out, after = meaning(program, masks, {**params, **stats}, x, plain=plain)
            return scalar(lambda: out)(), (out, after)

        return [jax.grad(loss, (0, 1), has_aux=True)(params, x, masks) for masks in program.runs]

    return run


def check(program: Program, mode: str = 'traced') -> bool:
    """Compare a program with its meaning; return whether a block of it changed a gradient."""
    params, stats = values_of(program)
    run = RUN[mode]
    wanted = run(meant(program))(params, stats, X)
    plain = run(meant(program, plain=True))(params, stats, X)
    try:
        got = run(derivatives(program, build(program)))(params, stats, X)
    except Exception:
        check_runs(program, params, stats)
        raise
    try:
        for i, ((grads, out), (by_hand, value)) in enumerate(zip(got, wanted, strict=True)):
            assert_same(out, value, f'run {i}, value', rtol=1e-3)
            assert_same(grads, by_hand, f'run {i}, gradient', rtol=1e-3)
    except AssertionError:
        check_condition(run(meant(program)), params, stats, wanted)
        raise
    leaves = [jax.tree.leaves([grads for grads, _ in each]) for each in (wanted, plain)]
    return any(bool((a != b).any()) for a, b in zip(*leaves, strict=True))


def check_runs(program: Program, params: dict, stats: dict) -> None:
    """Raise Refused if a program without the library's transforms does not run."""
    alone = dataclasses.replace(program, runs=[[]], views=None)
    try:
        jax.make_jaxpr(derivatives(alone, build(program, plain=True)))(params, stats, X)
    except Exception as error:
        raise Refused from error


def check_condition(fn: Callable, params: dict, stats: dict, wanted: Any) -> None:
    near = jax.tree.map(lambda v: v * np.float32(1 + 1e-6), params)
    try:
        assert_same(fn(near, stats, X), wanted, 'condition', rtol=1e-3)
    except AssertionError as error:
        raise IllConditioned from error
