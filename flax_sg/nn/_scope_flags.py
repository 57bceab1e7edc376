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

__all__ = [
    'APPLICATION',
    'FLAG',
    'Place',
    'ScopeFlags',
    'application_of',
    'flags_of',
    'new_application',
    'set_flags',
]

FLAG, APPLICATION = 'flax_sg', 'flax_sg_application'


class ScopeFlags:
    """What a scope carries in its flags, which Flax hands on to child scopes and lifted ones.

    Attributes:
      root_id: the identity of the root outside all lifted transforms.
      variables: the variables of that root.
      transformed_collections: those whose values were transformed when a lifted transform handed
        them in.
      copies: for the others, by collection and path: the stored value that was handed in, and what
        a read of it gave.
      applied_blocks: those that were applied to these; the body applies them to what it creates or
        writes.
      module_blocks: those of lifted modules, for every read through the scope and below.
      trace: the JAX trace of the lifted body, of those to a jaxpr.
      split: a body around sees a part of each variable: one layer of a scan, one example of a map.
    """

    __slots__ = (
        'applied_blocks',
        'copies',
        'module_blocks',
        'root_id',
        'split',
        'trace',
        'transformed_collections',
        'variables',
    )

    def __init__(
        self,
        root_id: Any,
        variables: dict,
        transformed_collections: frozenset[str] = frozenset(),
        copies: Mapping[tuple, tuple] = FrozenDict(),
        applied_blocks: tuple[OpenBlock, ...] = (),
        module_blocks: tuple[OpenBlock, ...] = (),
        trace: Any = None,
        split: bool = False,
    ):
        self.root_id, self.variables = root_id, variables
        self.transformed_collections, self.copies = transformed_collections, copies
        self.applied_blocks, self.module_blocks = applied_blocks, module_blocks
        self.trace, self.split = trace, split

    def with_module_blocks(self, blocks: tuple[OpenBlock, ...]) -> ScopeFlags:
        return ScopeFlags(
            self.root_id,
            self.variables,
            self.transformed_collections,
            self.copies,
            self.applied_blocks,
            blocks,
            self.trace,
            self.split,
        )

    # nn.jit hashes a scope's flags into its cache key: flags compare by meaning. Which variables
    # there are copies of is in the structure of what nn.jit hands to its function.
    def _value(self) -> tuple:
        blocks = (tuple(e.key for e in es) for es in (self.applied_blocks, self.module_blocks))
        return (self.transformed_collections, self.split, *blocks)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ScopeFlags) and self._value() == other._value()

    def __hash__(self) -> int:
        return hash(self._value())


def flags_of(scope: Scope) -> ScopeFlags:
    """Return the flags that a scope carries, or some that say nothing."""
    return scope.flags.get(FLAG) or ScopeFlags(
        application_of(scope).life, linen_compat.root_variables(scope)
    )


class Place:
    """Where a read or a write takes place: what a scope says of itself, asked once.

    Attributes:
      scope: the scope.
      path: its path in the variables.
      flags: what it carries.
      application: the application of a model that it is of.
    """

    __slots__ = ('application', 'flags', 'path', 'scope')

    def __init__(self, scope: Scope):
        self.scope, self.path = scope, linen_compat.scope_path(scope)
        self.flags, self.application = flags_of(scope), application_of(scope)


def set_flags(scope: Scope, flags: ScopeFlags) -> None:
    """Let a scope carry flags."""
    scope.flags = scope.flags.copy({FLAG: flags})


@jax_compat.tap(Scope, '__init__')
def _init(original, self, /, *args, **kwargs):
    original(self, *args, **kwargs)
    if self.parent is None and APPLICATION not in self.flags:
        inner = (
            state.inside
            or linen_compat.current_module() is not None
            or (bool(state.stack) and module_of(sys._getframe()) is not None)
        )
        self.flags = self.flags.copy({APPLICATION: new_application(inner)})


def new_application(inner: bool) -> Application:
    """Begin an application of a model; `inner` says that it is a running module's own affair."""
    return Application(inner=inner, reads_closed=tracing.reads_closed)


def application_of(scope: Scope) -> Application:
    """Return the application of a model that a scope is of."""
    found = scope.flags.get(APPLICATION)
    if found is None:  # it was made before this library was imported
        root = scope.root
        found = root.flags.get(APPLICATION) or new_application(False)
        root.flags, scope.flags = (s.flags.copy({APPLICATION: found}) for s in (root, scope))
    return found
