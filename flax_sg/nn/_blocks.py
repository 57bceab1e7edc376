"""Blocks at a module's scope; and those of lifted modules, attached to a view of their scope."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from flax.core import DenyList

from flax_sg._compat import linen as linen_compat
from flax_sg._compat.linen import Scope
from flax_sg._transforms.block import OpenBlock
from flax_sg._transforms.open_blocks import opened
from flax_sg.nn._scope_flags import mark_of, set_mark

if TYPE_CHECKING:
    pass

__all__ = [
    'attach', 'attached_entry', 'block_at', 'may_create', 'open_at', 'without',
]


def may_create(scope: Scope, transform: Any) -> bool:
    """Say whether variables that a transform is about may still be created."""
    mutable = scope.mutable
    if isinstance(mutable, (bool, DenyList)):
        return mutable is not False
    names = [mutable] if isinstance(mutable, str) else mutable
    return any(map(transform.in_collections, names))


def open_at(transform: Any, scope: Scope | None) -> contextlib.AbstractContextManager[None]:
    """Open a transform at a module's scope, or outside all modules."""
    return opened(block_at(transform, scope, running_scope()))


def block_at(transform: Any, scope: Scope | None, by: Scope | None) -> OpenBlock:
    """Return an opening of a transform at a module's scope, or outside all modules.

    ``by`` is the scope of the module whose code opens it.
    """
    return OpenBlock(transform, ()) if scope is None else entry_of(transform, scope, around_of(scope, by))


def entry_of(transform: Any, scope: Scope, around: tuple[OpenBlock, ...], owner: Any = None) -> OpenBlock:
    mark = mark_of(scope)
    return OpenBlock(transform, linen_compat.scope_path(scope), mark.family, variables=mark.variables,
                 around=around, owner=owner,
                 initializing=bool(scope.get_flag('initializing', False)))


def around_of(scope: Scope, by: Scope | None) -> tuple[OpenBlock, ...]:
    """Return those of a scope's attached entries in which the module that opens a block lies too.

    The block is inside them, and around the others.
    """
    own = mark_of(scope).own
    return () if by is None else tuple(entry for entry in own if entry in mark_of(by).own)


def running_scope() -> Scope | None:
    module = linen_compat.current_module()
    return None if module is None else module.scope


def attach(scope: Scope, owner: Any, transform: Any, *, mirror: bool = False) -> Scope:
    """Return a view of the scope through which every read is transformed.

    The view shares variables, names and random streams with the scope. A scope that carries the
    owner's transform already, as inside a lifted method, is returned as it is. That of a mirror is
    around what was attached to the scope before.
    """
    if linen_compat.in_scratch_root(scope) or attached_entry(scope, owner) is not None:
        return scope
    mark = mark_of(scope)
    around = around_of(scope, running_scope()) if mirror else mark.own
    inside = tuple(entry for entry in mark.own if entry not in around)
    view = scope.rewound()
    view.reservations = scope.reservations
    set_mark(view, mark.with_own((*around, entry_of(transform, scope, around, owner), *inside)))
    return view


def attached_entry(scope: Scope, owner: Any) -> OpenBlock | None:
    """Return the entry that `attach` gave the scope for an owner, or None."""
    mark, path = mark_of(scope), linen_compat.scope_path(scope)
    return next((e for e in mark.own if e.owner == owner and e.opener == path
                 and e.family is mark.family), None)


def without(scope: Scope, owners: set) -> Scope:
    """Return a view of the scope that carries nothing of some owners."""
    view, mark = scope.rewound(), mark_of(scope)
    set_mark(view, mark.with_own(tuple(e for e in mark.own if e.owner not in owners)))
    return view
