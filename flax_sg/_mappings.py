"""Mappings of every kind, taken apart by name and put together again as the same kind.

`jax.tree.map` does so by position, knows only what is registered with it, and sorts a dict. Here
names count, and a mapping keeps its order; one that cannot be made anew is an error, not a dict.
"""

from __future__ import annotations

import collections
import contextlib
import copy
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import jax
from flax.core import FrozenDict

from flax_sg._errors import UsageError

__all__ = ['children_of', 'rebuilt']

_PLAIN = (dict, collections.OrderedDict)


def children_of(node: Mapping) -> dict[Any, Any]:
    """Return what a mapping holds by name, in its order.

    A FrozenDict and an ``nnx.State`` show the dicts that they hold as mappings of their own kind.
    Here a dict is a dict, as JAX sees it.
    """
    if isinstance(node, (dict, FrozenDict)) or _is_leaf(node):
        return {name: node[name] for name in node}
    children, _ = _one_level(node)
    places = _places(node)
    if places is None:
        return {name: node[name] for name in node}
    return {name: children[places[name]] for name in node}


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
    if kind in _PLAIN or isinstance(node, FrozenDict):
        return kind(items)
    if kind is collections.defaultdict:
        return kind(node.default_factory, items)
    for out in (_by_class if _is_leaf(node) else _by_jax)(node, items):
        if _holds(out, node, items):
            return out
    names = ', '.join(map(repr, list(items)[:5]))
    raise UsageError(
        f'a mapping of type {kind.__name__} with {names} cannot be made with other values: '
        f'{kind.__name__}(dict) gives no equal mapping. Register it with '
        'jax.tree_util.register_pytree_node, or pass a dict.')


def _is_leaf(node: Any) -> bool:
    return jax.tree_util.all_leaves([node])


def _one_level(node: Any) -> tuple[list, Any]:
    return jax.tree.flatten(node, is_leaf=lambda other: other is not node)


def _places(node: Mapping) -> dict[Any, int] | None:
    """Return which child of JAX's each name is, or None where a child is no value of a name.

    JAX's names of children need not be those of the mapping. So it is asked for a mapping of marks.
    """
    children, structure = _one_level(node)
    marks = {id(mark): (mark, i) for i, mark in enumerate(object() for _ in children)}
    with contextlib.suppress(Exception):  # of a class that looks into its values
        probe = structure.unflatten([mark for mark, _ in marks.values()])
        return {name: marks[id(probe[name])][1] for name in node}
    return None


def _by_jax(node: Mapping, items: dict[Any, Any]) -> Iterator[Any]:
    places = _places(node)
    if places is not None:
        children, structure = _one_level(node)
        for name, child in items.items():
            children[places[name]] = child
        yield _in_order(structure.unflatten(children), node)
    with contextlib.suppress(Exception):
        yield _by_leaves(node, items)
    yield from _by_class(node, items)


def _by_leaves(node: Mapping, items: dict[Any, Any]) -> Any:
    """Make a mapping whose children for JAX are all the leaves below it, as of Haiku's FlatMap."""
    leaves, structure = jax.tree.flatten(node)
    marks = [object() for _ in leaves]
    place = {id(mark): i for i, mark in enumerate(marks)}
    probe = structure.unflatten(marks)
    for name, child in items.items():
        new = jax.tree.structure(node[name]).flatten_up_to(child)
        for mark, leaf in zip(jax.tree.leaves(probe[name]), new, strict=True):
            leaves[place[id(mark)]] = leaf
    return structure.unflatten(leaves)


def _in_order(out: Any, node: Mapping) -> Any:
    if list(out) != list(node) and isinstance(out, MutableMapping):
        for name in node:
            out[name] = out.pop(name)
    return out


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
    if type(out) is not type(node) or list(out) != list(items):
        return False
    held = {id(child) for child in items.values()}
    old = {id(node[name]) for name in node} - held
    kept = getattr(out, '__dict__', {}).values()  # in which a class may keep them a second time
    return all(_same(out[name], child) for name, child in items.items()) and not any(
        id(value) in old for value in kept)


def _same(value: Any, child: Any) -> bool:
    """Say whether a mapping gives back a child, or shows the mapping that it is."""
    if isinstance(child, Mapping) and isinstance(value, Mapping):
        return list(value) == list(child) and all(_same(value[k], child[k]) for k in child)
    return value is child
