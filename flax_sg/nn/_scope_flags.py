"""What scopes carry in their flags, which Flax hands on to child scopes and lifted ones."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from flax.core import FrozenDict

from flax_sg._compat import jax as jax_compat
from flax_sg._compat import linen as linen_compat
from flax_sg._compat.linen import Scope
from flax_sg._transforms.block import Application, OpenBlock
from flax_sg._transforms.thread_state import state
from flax_sg._views.masks import tracing
from flax_sg.nn._running_code import module_of

__all__ = ['APPLICATION', 'FLAG', 'Mark', 'application_of', 'mark_of', 'new_application', 'set_mark']

FLAG, APPLICATION = 'flax_sg', 'flax_sg_application'


class Mark:
    """What a scope carries in its flags, which Flax hands on to child scopes and lifted ones.

    Attributes:
      family: the identity of the root outside all lifted transforms.
      variables: the variables of that root.
      applied: collections whose values were transformed when a lifted transform handed them in.
      copies: for the others, by collection and path: the stored value that was handed in, and what
        a read of it gave.
      outer: the entries that were applied to those; the body applies them to what it creates or
        writes.
      own: entries of lifted modules, for every read through the scope and below.
      trace: the JAX trace of the lifted body, of those to a jaxpr.
      split: a body around sees a part of each variable: one layer of a scan, one example of a map.
    """

    __slots__ = ('applied', 'copies', 'family', 'outer', 'own', 'split', 'trace', 'variables')

    def __init__(self, family: Any, variables: dict, applied: frozenset[str] = frozenset(),
                 copies: Mapping[tuple, tuple] = FrozenDict(), outer: tuple[OpenBlock, ...] = (),
                 own: tuple[OpenBlock, ...] = (), trace: Any = None, split: bool = False):
        self.family, self.variables = family, variables
        self.applied, self.copies = applied, copies
        self.outer, self.own, self.trace, self.split = outer, own, trace, split

    def with_own(self, own: tuple[OpenBlock, ...]) -> Mark:
        return Mark(self.family, self.variables, self.applied, self.copies, self.outer, own,
                    self.trace, self.split)

    # nn.jit hashes a scope's flags into its cache key: marks compare by meaning. Which variables
    # there are copies of is in the structure of what nn.jit hands to its function.
    def _value(self) -> tuple:
        entries = (tuple(e.key for e in es) for es in (self.outer, self.own))
        return (self.applied, self.split, *entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mark) and self._value() == other._value()

    def __hash__(self) -> int:
        return hash(self._value())


def mark_of(scope: Scope) -> Mark:
    """Return the mark that a scope carries, or one that says nothing."""
    return scope.flags.get(FLAG) or Mark(
        application_of(scope).life, linen_compat.root_variables(scope))


def set_mark(scope: Scope, mark: Mark) -> None:
    """Let a scope carry a mark."""
    scope.flags = scope.flags.copy({FLAG: mark})


@jax_compat.tap(Scope, '__init__')
def _init(original, self, /, *args, **kwargs):
    original(self, *args, **kwargs)
    if self.parent is None and APPLICATION not in self.flags:
        inner = state.inside or linen_compat.current_module() is not None or (
            bool(state.stack) and module_of(sys._getframe()) is not None)
        self.flags = self.flags.copy({APPLICATION: new_application(inner)})


def new_application(inner: bool) -> Application:
    """Begin an application of a model; `inner` says that it is a running module's own affair."""
    return Application(inner=inner, linearizing=tracing.linearizing)


def application_of(scope: Scope) -> Application:
    """Return the application of a model that a scope is of."""
    found = scope.flags.get(APPLICATION)
    if found is None:  # it was made before this library was imported
        root = scope.root
        found = root.flags.get(APPLICATION) or new_application(False)
        root.flags, scope.flags = (s.flags.copy({APPLICATION: found}) for s in (root, scope))
    return found
