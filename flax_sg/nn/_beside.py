"""What reads give, beside the stored variables that a lifted body may write.

They go in under names that the body does not see, and through what Flax does with its variables: a
scan slices them, and the user's functions of `nn.map_variables` map them too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from flax_sg._compat import linen as linen_compat
from flax_sg._filters.variables import Path
from flax_sg._transforms.thread_state import state

__all__ = ['BESIDE', 'LEFT', 'changed_part', 'value_at', 'without_beside']

BESIDE = 'flax_sg: '  # before the name of a collection: what reads of its variables give
LEFT = ()  # what is there cannot be said beforehand: it is transformed at each read inside


@linen_compat.tap_map_variables
def _map_variables(
    original,
    fn,
    mapped_collections,
    map_in_fn=lambda x: x,
    map_out_fn=lambda x: x,
    init=False,
    *args,
    **kwargs,
):
    # With init, what the body has left goes through both once more.
    map_out = _mapping(map_out_fn) if init else lambda variables: map_out_fn(_stored(variables))
    return original(fn, mapped_collections, _mapping(map_in_fn), map_out, init, *args, **kwargs)


def _mapping(fn: Callable) -> Callable:
    """Make a map of variables map what reads of them give as well."""

    def mapped(variables):
        beside = {name: variables[name] for name in variables if name.startswith(BESIDE)}
        before = _effects()
        out = fn(_stored(variables))
        if beside and _effects() == before and LEFT not in beside.values():
            seen = fn(_beside_in_place(variables))
            return {**out, **{BESIDE + name: tree for name, tree in seen.items()}}
        return {**out, **dict.fromkeys(beside, LEFT)}

    return mapped


def _stored(variables: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tree for name, tree in variables.items() if not name.startswith(BESIDE)}


def _effects() -> tuple:
    """Return what shows whether a function has drawn random numbers or touched variables."""
    module = linen_compat.current_module()
    if module is None:
        return (state.writes,)
    names = sum(map(len, module.scope.reservations.values()))
    return state.writes, linen_compat.draws(module.scope.root), names


def without_beside(written: tuple) -> tuple:
    """Leave out of what a body returns the collections that it does not see."""
    return jax.tree.map(_stored, written, is_leaf=lambda node: isinstance(node, Mapping))


def _beside_in_place(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return collections with what reads of their variables give in place of what is stored."""
    out = {}
    for name, tree in variables.items():
        if not name.startswith(BESIDE):
            beside = variables.get(BESIDE + name)
            out[name] = tree if beside is None else _laid_over(tree, beside)
    return out


def _laid_over(tree: Any, over: Any) -> Any:
    if not isinstance(over, Mapping):
        return over
    return {**tree, **{name: _laid_over(tree[name], value) for name, value in over.items()}}


def changed_part(tree: Any, seen: Any) -> Any:
    """Return the part of a tree in which reads give something else, or None."""
    if not isinstance(tree, Mapping):
        return None if seen is tree else seen
    parts = {name: changed_part(value, seen[name]) for name, value in tree.items()}
    return {name: part for name, part in parts.items() if part is not None} or None


def value_at(tree: Any, path: Path, default: Any) -> Any:
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            return default
        tree = tree[name]
    return tree
