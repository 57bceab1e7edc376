"""A program of a real package, masked by flax_sg in each use and by hand, compared.

A `Program` is a loss of parameters. By hand, a function such as `jax.lax.stop_gradient` is put on
the selected leaves of each model's tree of parameters before the loss reads them; which leaves
those are is asked of `fnmatch`, not of flax_sg.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import flax_sg as sg

__all__ = ['Mask', 'Program', 'Verdict', 'compare', 'masks', 'remade']

TOLERANCE = 1e-5
FACTOR = -2.0
# The programs are tiny: machine code that is not optimised compiles in half the time.
QUICK = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}


def one_model(fn: Callable, params: Any) -> Any:
    return fn(params)


class Program(NamedTuple):
    """A loss that reads models.

    `loss(lift, params)` reads models whose classes it has handed to `lift`. `parts` are globs that
    select in every model. `each_model(fn, params)` puts `fn(tree)` for each model's tree.
    """

    loss: Callable[[Callable, Any], Any]
    params: Any
    parts: tuple[str, ...]
    each_model: Callable[[Callable, Any], Any] = one_model
    eager: bool = False


class Verdict(NamedTuple):
    """How a masked program compares: 'same', 'bits', 'close', 'WRONG' or 'ERROR', and more."""

    transform: str
    predicate: str
    use: str
    verdict: str
    detail: str = ''


class Mask(NamedTuple):
    """One transform of flax_sg, and the function by hand on the leaves that `chooses`."""

    name: str
    predicate: str
    transform: Any
    on_leaf: Callable
    chooses: Callable[[tuple[str, ...]], bool]

    def by_hand(self, tree: Any) -> Any:
        def of(path: tuple, leaf: Any) -> Any:
            return self.on_leaf(leaf) if self.chooses(tuple(map(name_of, path))) else leaf

        return jax.tree_util.tree_map_with_path(of, tree)


def remade(module: Any, lift: Callable) -> Any:
    """Make a module of the lifted class with the fields of this one."""
    fields = {
        name: getattr(module, name)
        for name, field in type(module).__dataclass_fields__.items()
        if field.init
    }
    return lift(type(module))(**fields | {'parent': None})


def name_of(key: Any) -> str:
    return str(getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', ''))))


def selects(pattern: str, names: tuple[str, ...]) -> bool:
    """Whether a glob matches a path or a leading part of it; `**/` may begin it."""
    starts = range(1)
    if pattern.startswith('**/'):
        pattern, starts = pattern[3:], range(len(names))
    wanted = pattern.split('/')
    return any(
        len(names) - start >= len(wanted) and all(map(fnmatch.fnmatchcase, names[start:], wanted))
        for start in starts
    )


@jax.custom_vjp
def scaled(x: jax.Array) -> jax.Array:
    """Return x, whose cotangent is multiplied."""
    return x


scaled.defvjp(lambda x: (x, None), lambda _, cotangent: (FACTOR * cotangent,))


def halved(x: jax.Array) -> jax.Array:
    return x / 2


def masks(parts: tuple[str, ...]) -> Iterator[Mask]:
    """Yield stop_gradient of each part, its complement and everything; two of its siblings."""

    def all_but(part: str) -> Callable:
        return lambda names: not selects(part, names)

    def stop(predicate: str, where: Any, chooses: Callable) -> Mask:
        return Mask(
            'stop_gradient', predicate, sg.stop_gradient(where), jax.lax.stop_gradient, chooses
        )

    for part in parts:
        yield stop(part, part, functools.partial(selects, part))
        yield stop(f'~{part}', ~sg.path(part), all_but(part))
    yield stop('everything', sg.everything, lambda names: True)
    yield Mask(
        'scale_gradient',
        f'~{parts[0]}',
        sg.scale_gradient(~sg.path(parts[0]), FACTOR),
        scaled,
        all_but(parts[0]),
    )
    yield Mask(
        'map_values',
        'everything',
        sg.map_values(sg.everything, lambda info, value: halved(value)),
        halved,
        lambda names: True,
    )


def unlifted(module_class: type) -> type:
    return module_class


class Step(NamedTuple):
    """A loss to differentiate, in a block around the gradient or none."""

    loss: Callable[[Any], Any]
    around: Any = None
    eager: bool = False

    def __call__(self, params: Any) -> tuple[Any, Any]:
        with self.around or contextlib.nullcontext():
            return jax.value_and_grad(self.loss)(params)


def uses(program: Program, transform: Any) -> dict[str, Step]:
    """Make the program masked by the transform, in each of its uses."""

    def block(params: Any) -> Any:
        with transform:
            return program.loss(unlifted, params)

    def loss(params: Any) -> Any:
        return program.loss(unlifted, params)

    steps = {
        'block': Step(block),
        'around grad': Step(loss, around=transform),
        'class': Step(lambda params: program.loss(transform, params)),
        'tree': Step(lambda params: program.loss(unlifted, program.each_model(transform, params))),
    }
    if program.eager:
        steps |= {'block, eager': Step(block, eager=True)}
    return steps


class Ran(NamedTuple):
    text: str
    value: Any = None


def run(step: Step, params: Any, known: Ran | None = None) -> Ran:
    """Run a step, jitted or not; a program of a known text is not compiled again."""
    if step.eager:
        return Ran('', jax.device_get(step(params)))
    lowered = jax.jit(step.__call__).lower(params)
    text = lowered.as_text()
    if known is not None and text == known.text:
        return known
    return Ran(text, jax.device_get(lowered.compile(compiler_options=QUICK)(params)))


def difference(ours: Any, by_hand: Any) -> tuple[str, str]:
    """Say how two pairs of a value and a gradient differ."""
    left, right = jax.tree.leaves(ours), jax.tree.leaves(by_hand)
    if jax.tree.structure(ours) != jax.tree.structure(by_hand):
        return 'WRONG', 'another tree'
    if all(np.array_equal(a, b) for a, b in zip(left, right, strict=True)):
        return 'bits', ''
    size = max(float(np.max(np.abs(b), initial=0)) for b in right)
    worst = max(float(np.max(np.abs(a - b), initial=0)) for a, b in zip(left, right, strict=True))
    leaks = sum(bool(np.any(a)) for a, b in zip(left, right, strict=True) if not np.any(b))
    if leaks or not worst <= TOLERANCE * size:
        more = f', {leaks} leaves are not zero' if leaks else ''
        return 'WRONG', f'{worst / size:.1e} of the largest{more}'
    return 'close', f'{worst / size:.1e}'


def checked(program: Program) -> Iterator[Verdict]:
    """Yield what would make the comparison vacuous: a part or a rest without a gradient."""
    _, gradient = run(Step(lambda params: program.loss(unlifted, params)), program.params).value
    for part in program.parts:
        for label, chosen in ((part, True), (f'~{part}', False)):
            found = []

            def collect(tree: Any, found=found, part=part, chosen=chosen) -> Any:
                for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                    if selects(part, tuple(map(name_of, path))) is chosen:
                        found.append(leaf)
                return tree

            program.each_model(collect, gradient)
            if not any(np.any(leaf) for leaf in found):
                yield Verdict('none', label, 'unmasked', 'WRONG', 'its gradient is zero: vacuous')
            if not all(np.all(jnp.isfinite(leaf)) for leaf in found):
                yield Verdict('none', label, 'unmasked', 'WRONG', 'its gradient is not finite')


def compare(
    program: Program, chosen: list[Mask], progress: Callable[[str], None]
) -> Iterator[Verdict]:
    """Yield the verdict of each mask and use of a program."""
    yield from checked(program)
    for mask in chosen:
        start = time.monotonic()

        def by_hand(params: Any, mask: Mask = mask) -> Any:
            return program.loss(unlifted, program.each_model(mask.by_hand, params))

        known = run(Step(by_hand), program.params)
        for use, step in uses(program, mask.transform).items():
            yield Verdict(
                mask.name, mask.predicate, use, *judged(step, by_hand, known, program.params)
            )
        progress(f'{mask.name}({mask.predicate}) {time.monotonic() - start:.0f} s')


def judged(step: Step, by_hand: Callable, known: Ran, params: Any) -> tuple[str, str]:
    try:
        if step.eager:
            known = run(Step(by_hand, eager=True), params)
        ours = run(step, params, known)
    except Exception as error:  # whatever a package raises is a row of the table
        return 'ERROR', f'{type(error).__name__}: {str(error).strip()[:300]}'
    return ('same', '') if ours is known else difference(ours.value, known.value)
