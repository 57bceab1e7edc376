"""What Flax's lifted transforms hand to their bodies while blocks are open.

A lifted transform is a read of all that it hands in, outside its loop or checkpoint: the values of
collections that the body cannot write are transformed there. What it may write goes in as it is and
is transformed at each read inside (`_scope`), or the body would hand transformed values back.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax.core.scope import DenyList, in_filter

from flax_sg import _compat, _scope
from flax_sg._active import Application, claim_key, lifted, state
from flax_sg._compat import Scope
from flax_sg._scope import (
    APPLICATION,
    FLAG,
    Mark,
    effective,
    mark_of,
    meet,
    set_mark,
    transformed,
)

__all__: list[str] = []  # it taps Flax


@_compat.tap_pack
def _pack(original, fn, in_filters, out_filters, rng_filters, name=None, enable_kwargs=False):
    def packed(scope_tree, *args, **kwargs):
        def body(scope_fn, repack_fn, groups, rngs, *args, **kwargs):
            lift = _Lifted(scope_tree, in_filters, out_filters, name)
            groups = lift.read(groups)
            with lift.keyed():
                out = fn(lift.bind(scope_fn), repack_fn, groups, rngs, *args, **kwargs)
            state.publishing = True
            return out
        run = original(body, in_filters, out_filters, rng_filters, name, enable_kwargs)
        before = state.publishing
        try:
            return run(scope_tree, *args, **kwargs)
        finally:
            state.publishing = before
    return packed


class _Lifted:
    """One call of a lifted transform: what it hands to its body, and in what state."""

    def __init__(self, scope_tree: Any, in_filters: Any, out_filters: Any, name: str | None):
        self.scopes, self.treedef = jax.tree.flatten(scope_tree)
        self.packed = _compat.packed_scopes(self.scopes)
        self.out_filters = out_filters
        derives = name in ('vjp', 'jvp', 'custom_vjp')
        self.given = in_filters[0] if derives and self._in_block() else False
        self.stack = state.stack  # JAX traces the rules of a custom_vjp after the block has ended
        self.applied: frozenset[str] = frozenset()

    def _in_block(self) -> bool:
        """Say whether variables that exist, and may be read in the body, are in an open block."""
        return any(effective(scope, own=False) and not scope.get_flag('initializing', False)
                   for scope in self.packed)

    def _writable(self, scope: Scope, collection: str) -> bool:
        # A derivative in a block is one with respect to what the block hands in, and that cannot be
        # handed back (test_an_explicit_derivative_in_a_block).
        return not in_filter(self.given, collection) and scope.is_mutable_collection(
            collection) and any(in_filter(f, collection) for f in self.out_filters)

    def read(self, groups: tuple) -> tuple:
        """Transform the values that the body cannot write."""
        def read(scope: Scope, collection: str, tree: Any) -> Any:
            if self._writable(scope, collection):
                return tree
            self.applied |= {collection}
            entries = effective(scope, collection, own=False)
            if not entries:
                return tree
            meet(scope, entries)
            return transformed(entries, scope, _compat.scope_path(scope), collection, tree)
        return tuple(
            tuple({col: read(scope, col, tree) for col, tree in group.items()}
                  for scope, group in zip(self.packed, groups_of_scopes, strict=True))
            for groups_of_scopes in groups)

    def bind(self, scope_fn: Callable) -> Callable:
        """Make ``scope_fn`` mark the body's scopes with what was done and what is left to do."""
        if self.given:
            scope_fn = functools.partial(scope_fn, mutable_filter=DenyList(self.given))

        def bound(*args, **kwargs):
            inner = self.treedef.flatten_up_to(scope_fn(*args, **kwargs))
            return self.treedef.unflatten(map(self._bind, self.scopes, inner))
        return bound

    def _bind(self, outer: Scope, inner: Scope) -> Scope:
        mark = mark_of(outer)
        open_now = tuple(e for e in self.stack if e.covers(mark.family))
        done = tuple(dict.fromkeys((*mark.done, *open_now)))
        pending = tuple(dict.fromkeys((*mark.pending, *open_now)))
        plain = Mark(mark.family, self.applied, done, pending, trace=_compat.trace_state())
        flags = {FLAG: plain, APPLICATION: Application()}
        scope: Scope | None = inner
        while scope is not None:
            scope.flags = scope.flags.copy(flags)
            scope = scope.parent
        if mark.own:
            # The same scope may be handed in twice, as a live module's and as its mirror's.
            inner = inner.rewound()
            set_mark(inner, plain.with_own(mark.own))
        return inner

    def keyed(self) -> contextlib.AbstractContextManager:
        """Add the scopes' paths to JAX's cache keys where the body's trace depends on them.

        nn.jit shares one trace among modules that differ in their path alone.
        """
        pending = any(
            entry.transform.in_collections(col)
            for scope in self.packed
            for entry in effective(scope, own=False)
            for col in _compat.root_variables(scope) if self._writable(scope, col))
        if pending:
            claim_key()
        if not (pending or _scope.positional()):
            return contextlib.nullcontext()
        return lifted(tuple(map(_compat.scope_path, self.scopes)))
