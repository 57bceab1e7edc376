"""Transforms that are a function of the user's: of the value, or of the cotangent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax

from flax_sg._callables import describe_callable
from flax_sg._errors import UsageError
from flax_sg._filters import Predicate
from flax_sg._info import VariableInfo
from flax_sg._slips import arguments_of, swapped
from flax_sg._transform import Transform, make

__all__ = ['Mapped', 'make_mapped']


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Mapped(Transform):
    """A transform with a function ``fn(info, array) -> array``, which is compared by value."""

    fn: Callable[[VariableInfo, jax.Array], jax.Array]

    def more(self, of_predicate: Callable, of_function: Callable) -> tuple[Hashable, ...]:
        return (of_function(self.fn),)

    def shown(self) -> tuple[str, ...]:
        return (describe_callable(self.fn),)


def make_mapped(kind: type[Mapped], predicate: Predicate, collections: Any, allow_unmatched: bool,
                fn: Any, argument: str) -> Transform:
    """Make such a transform of what a user wrote, or raise PredicateError or UsageError."""
    if not callable(fn) or isinstance(fn, type):
        raise UsageError(
            f'{kind.name}: got an object of type {type(fn).__name__} for fn; expected a callable '
            f'fn(info, {argument}) that returns an array.{swapped(kind.name, predicate, fn)}')
    made = make(kind, predicate, collections, allow_unmatched, fn)
    names, fits = arguments_of(fn, ('info', argument))
    if not fits:
        raise UsageError(
            f'{kind.name}: got {describe_callable(fn)} for fn, a callable of ({", ".join(names)}); '
            f'expected one of (info, {argument}) that returns an array.')
    return made
