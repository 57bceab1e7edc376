"""Blocks at a module's scope; and those of lifted modules, attached to a view of their scope."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from flax.core import DenyList

from flax_sg._compat import linen as linen_compat
from flax_sg._compat.linen import Scope
from flax_sg._transforms.block import OpenBlock
from flax_sg._transforms.open_blocks import opened
from flax_sg.nn._scope_flags import flags_of, set_flags

if TYPE_CHECKING:
    pass

__all__ = ['attach', 'module_block', 'block_at', 'may_create', 'open_at', 'without']


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
    return (
        OpenBlock(transform, ())
        if scope is None
        else _opened_at(transform, scope, around_of(scope, by))
    )


def _opened_at(
    transform: Any, scope: Scope, around: tuple[OpenBlock, ...], owner: Any = None
) -> OpenBlock:
    flags = flags_of(scope)
    return OpenBlock(
        transform,
        linen_compat.scope_path(scope),
        flags.root_id,
        variables=flags.variables,
        around=around,
        owner=owner,
        initializing=bool(scope.get_flag('initializing', False)),
    )


def around_of(scope: Scope, by: Scope | None) -> tuple[OpenBlock, ...]:
    """Return those of a scope's attached blocks in which the module that opens a block lies too.

    The block is inside them, and around the others.
    """
    own = flags_of(scope).module_blocks
    return (
        () if by is None else tuple(block for block in own if block in flags_of(by).module_blocks)
    )


def running_scope() -> Scope | None:
    module = linen_compat.current_module()
    return None if module is None else module.scope


def attach(scope: Scope, owner: Any, transform: Any, *, mirror: bool = False) -> Scope:
    """Return a view of the scope through which every read is transformed.

    The view shares variables, names and random streams with the scope. A scope that carries the
    owner's transform already, as inside a lifted method, is returned as it is. That of a mirror is
    around what was attached to the scope before.
    """
    if linen_compat.in_scratch_root(scope) or module_block(scope, owner) is not None:
        return scope
    flags = flags_of(scope)
    around = around_of(scope, running_scope()) if mirror else flags.module_blocks
    inside = tuple(block for block in flags.module_blocks if block not in around)
    view = scope.rewound()
    view.reservations = scope.reservations
    set_flags(
        view,
        flags.with_module_blocks((*around, _opened_at(transform, scope, around, owner), *inside)),
    )
    return view


def module_block(scope: Scope, owner: Any) -> OpenBlock | None:
    """Return the block that `attach` gave the scope for an owner, or None."""
    flags, path = flags_of(scope), linen_compat.scope_path(scope)
    return next(
        (
            e
            for e in flags.module_blocks
            if e.owner == owner and e.opener == path and e.root_id is flags.root_id
        ),
        None,
    )


def without(scope: Scope, owners: set) -> Scope:
    """Return a view of the scope that carries nothing of some owners."""
    view, flags = scope.rewound(), flags_of(scope)
    set_flags(
        view,
        flags.with_module_blocks(tuple(e for e in flags.module_blocks if e.owner not in owners)),
    )
    return view
