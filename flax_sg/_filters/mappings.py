"""Mappings of every kind, taken apart by name and put together again as the same kind.

`jax.tree.map` does so by position, knows only what is registered with it, and sorts a dict. Here
names count, and a mapping keeps its order; one that cannot be made anew is an error, not a dict.
"""

from __future__ import annotations

import collections
import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax.core import FrozenDict

from flax_sg._errors import UsageError
from flax_sg._filters.of_nnx import is_state

__all__ = ['children_of', 'rebuilt']


_PLAIN = (dict, collections.OrderedDict)


def children_of(node: Mapping) -> dict[Any, Any]:
    """Return what a mapping holds by name, in its order.

    An ``nnx.State`` shows the dicts that it holds as States. Here they are dicts, as JAX sees them.
    """
    if is_state(node):
        return dict(node.raw_mapping)
    return {name: node[name] for name in node}


def rebuilt(node: Mapping, children: Mapping[Any, Any]) -> Any:
    """Return a mapping of the kind of ``node``, in its order, that holds other values.

    >>> rebuilt(collections.UserDict(b=1, a=2), {'a': 3, 'b': 4})
    {'b': 4, 'a': 3}

    Args:
      node: any mapping. One that is registered with JAX is made anew by JAX, so that the result
        has the same structure; any other by its class, called with a dict.
      children: the new values by the names that ``node`` has, see `children_of`.

    Returns:
      The new mapping.

    Raises:
      UsageError: no mapping of this kind can be made of a dict.
    """
    items = {name: children[name] for name in node}
    kind = type(node)
    if kind in _PLAIN or isinstance(node, FrozenDict) or is_state(node):
        return kind(items)
    if kind is collections.defaultdict:
        return kind(node.default_factory, items)
    found = None
    for out in (_by_class if _is_leaf(node) else _by_jax)(node, items):
        if _holds(out, node, items) and (
            found is None or jax.tree.structure(out) == jax.tree.structure(found)
        ):
            found = out
            if list(out) == list(node):  # JAX sorts some; then see what the class itself does
                return out
    if found is not None:
        return found
    names = ', '.join(map(repr, list(items)[:5]))
    raise UsageError(
        f'a mapping of type {kind.__name__} with {names} cannot be made with other values: '
        f'{kind.__name__}(dict) gives no mapping of these alone, nor does JAX. Register it with '
        'jax.tree_util.register_pytree_node, its items being its children, or pass a dict.'
    )


def _is_leaf(node: Any) -> bool:
    return jax.tree_util.all_leaves([node])


def _by_jax(node: Mapping, items: dict[Any, Any]) -> Iterator[Any]:
    """Make a mapping of new children by JAX, and one by its class if that loses nothing.

    JAX's children of some mappings are all the leaves below them, as of Haiku's FlatMap.
    """
    with contextlib.suppress(Exception):  # of a class that looks into its values
        yield _by_position(node, items)
    with contextlib.suppress(Exception):
        old = type(node)(children_of(node))
        count = len(jax.tree.leaves([node[name] for name in node]))  # values may be no items
        if jax.tree.structure(old) == jax.tree.structure(node) and count == len(
            jax.tree.leaves(node)
        ):
            yield from _by_class(node, items)


def _by_position(node: Mapping, items: dict[Any, Any]) -> Any:
    """JAX's names of children need not be those of the mapping: a mapping of marks is asked."""
    children, structure = jax.tree.flatten(node, is_leaf=lambda other: other is not node)
    marks = [object() for _ in children]
    probe = structure.unflatten(marks)
    new = {id(probe[name]): child for name, child in items.items()}
    return structure.unflatten([new[id(mark)] for mark in marks])


def _by_class(node: Mapping, items: dict[Any, Any]) -> Iterator[Any]:
    with contextlib.suppress(Exception):
        out = type(node)(items)
        for name, value in getattr(node, '__dict__', {}).items():
            if isinstance(value, (str, int, float)):  # nothing that holds an old value
                vars(out).setdefault(name, value)
        yield out
    if isinstance(node, dict):  # not of others: their copies may share what they hold
        with contextlib.suppress(Exception):
            out = copy.copy(node)
            for name, child in items.items():
                dict.__setitem__(out, name, child)
            yield out


def _holds(out: Any, node: Mapping, items: dict[Any, Any]) -> bool:
    """Say whether a new mapping is of the kind, and has the new values and none of the old ones."""
    if type(out) is not type(node) or {*out} != {*items}:
        return False
    old = {id(node[name]) for name in node} - set(map(id, items.values()))
    kept = getattr(out, '__dict__', {}).values()  # in which a class may keep them a second time
    return all(_same(out[name], child) for name, child in items.items()) and not any(
        id(value) in old for value in kept
    )


def _same(value: Any, child: Any) -> bool:
    """Say whether a mapping gives back a child, or shows it as an object made for that."""
    values, children = jax.tree.flatten(value), jax.tree.flatten(child)
    return values[1] == children[1] and all(
        a is b for a, b in zip(values[0], children[0], strict=True)
    )
