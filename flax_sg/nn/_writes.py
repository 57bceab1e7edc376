"""Writes under open transforms: what a read gave is not what is stored."""

from __future__ import annotations

from typing import Any

import jax

from flax_sg._compat import linen as linen_compat
from flax_sg._compat.linen import Scope
from flax_sg._errors import FrozenVariableError, UsageError
from flax_sg._filters.variables import VariableInfo, walk
from flax_sg._transforms.block import OpenBlock
from flax_sg._transforms.cache_keys import in_body, own_cache_key
from flax_sg._transforms.thread_state import state
from flax_sg.nn._reads import Reads, identical
from flax_sg.nn._scope_flags import FLAG, Place

__all__ = ['write']


def write(scope: Scope, collection: str, name: str, value: Any) -> Any:
    """Return what to store where a module writes a value.

    What a read in a block gave is not what is stored, and must not be stored in its place: a module
    that writes back what it has read changes nothing.

    Raises:
      FrozenVariableError: an open transform forbids to change the variable.
      UsageError: the value may have been made of what a block reads in its place.
    """
    if state.publishing is not None:
        return state.publishing(scope, collection, name, value)
    if not state.stack and FLAG not in scope.flags:
        return value
    if not scope.has_variable(collection, name):
        return value
    if in_body():
        own_cache_key()
    place = Place(scope)
    reads = Reads(place, collection)
    if reads.idle:
        return value
    path = (*place.path, name)
    tree = linen_compat.stored(scope, collection, path)
    found = [(info.absolute_path, stored) for info, stored in walk(tree, collection, path)]
    originals = {}
    for at, stored in found:
        pairs = zip(jax.tree.leaves(reads.given(at, stored)), jax.tree.leaves(stored), strict=False)
        originals.update((id(given), (given, old)) for given, old in pairs)
    restored = jax.tree.map(lambda leaf: originals.get(id(leaf), (leaf, leaf))[1], value)
    if identical(restored, tree):
        return tree
    for at, stored in found:
        for block in (*reads.flags.applied_blocks, *reads.inside):
            _check_write(block, place, block.info(at, collection, stored), name)
    return value if identical(restored, value) else restored


def _check_write(block: OpenBlock, place: Place, info: VariableInfo, name: str) -> None:
    """Raise an error if a block is against a change of a variable."""
    transform = block.transform
    if not (transform.freezes or transform.changes_values) or not block.selects(info):
        return
    what = (
        f"{transform!r}: {name!r} of module '/{'/'.join(place.path)}' "
        f'(collection {info.collection!r}) was to be written in this block, '
    )
    if transform.freezes:
        raise FrozenVariableError(
            f'{what}in which it is constant. Write it outside of the block, or narrow the '
            'predicate or collections=.'
        )
    flags, key = place.flags, (info.collection, info.absolute_path)
    if (
        block.was_read(place.application, *key)
        or block in flags.applied_blocks
        and key in flags.copies
    ):
        raise UsageError(
            f'{what}which reads something else in its place: what was made of that would replace '
            'what is stored. Write it outside of the block, let the module not update it '
            '(use_running_average=True), or narrow the predicate or collections=.'
        )
