"""Objects of flax.nnx, if it was imported: without it there are none, and it is slow to import."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

__all__ = [
    'child_of',
    'children_of',
    'collection_of',
    'holders_below',
    'is_collection',
    'is_module',
    'is_state',
    'is_variable',
    'key_name',
    'paths_below',
]


# What modules hold most, and is no tree.
_LEAVES = (str, bytes, int, float, complex, type, types.FunctionType, np.ndarray, jax.Array)


def _is_a(value: Any, name: str) -> bool:
    kind = getattr(sys.modules.get('flax.nnx'), name, None)  # it may be about to be imported
    return kind is not None and isinstance(value, kind)


def is_variable(value: Any) -> bool:
    """Say whether a value is a Variable."""
    return _is_a(value, 'Variable')


def is_module(value: Any) -> bool:
    """Say whether a value is a module, or another object of Variables."""
    return _is_a(value, 'Pytree')


def is_state(value: Any) -> bool:
    """Say whether a value is a State."""
    return _is_a(value, 'State')


def collection_of(kind: type) -> str:
    """Return the collection of a type of Variable, that of the nearest base which has one."""
    name_of = sys.modules['flax.nnx'].variable_name_from_type
    for base in kind.__mro__:
        with contextlib.suppress(ValueError):
            name = name_of(base)
            # NNX registers a type by its own name when it happens to meet it, which says nothing.
            if name != base.__name__:
                return name
    return kind.__name__


def is_collection(name: str) -> bool:
    """Say whether there is a type of Variable whose collection has a name."""
    nnx = sys.modules['flax.nnx']
    with contextlib.suppress(ValueError):
        nnx.variable_type_from_name(name)
        return True
    kinds = [nnx.Variable]
    while kinds:
        kinds += kinds.pop().__subclasses__()
        if kinds and kinds[-1].__name__ == name:
            return True
    return False


def paths_below(node: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the Variables below a module, or in a list or dict, each at all of its paths."""

    def visit(node: Any, path: tuple[str, ...], above: tuple[int, ...]) -> Iterator[Any]:
        if is_variable(node):
            yield path, node
        elif id(node) not in above:
            for key, child in children_of(node):
                yield from visit(child, (*path, str(key)), (*above, id(node)))

    return visit(node, (), ())


def holders_below(node: Any) -> list[dict | list]:
    """Return the dicts and lists in which things are kept that can change, from a module down."""
    found: dict[int, dict | list] = {}

    def visit(node: Any) -> None:
        if is_variable(node) or isinstance(node, _LEAVES):
            return
        held = vars(node) if is_module(node) else node
        if isinstance(held, (dict, list)):
            if id(held) in found:
                return
            found[id(held)] = held
        for _, child in children_of(node):
            visit(child)

    visit(node)
    return list(found.values())


def child_of(node: Any, name: str) -> Any:
    """Return what lies at a name in a module, a State or another tree, or raise KeyError."""
    if isinstance(node, Mapping) and name in node:
        return node[name]
    if not is_variable(node):
        for key, child in children_of(node):
            if str(key) == name:
                return child
    raise KeyError(name)


def children_of(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yield what lies in a module, or a tree, one level below."""
    if is_module(node):
        return iter([(k, v) for k, v in vars(node).items() if not k.startswith('_pytree__')])
    if isinstance(node, Mapping):
        return iter(node.items())
    if isinstance(node, _LEAVES):
        return iter(())
    found, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda each: each is not node)
    return ((key_name(keys[0]), child) for keys, child in found if keys)  # a leaf has no key


def key_name(key: Any) -> str:
    """Return a key of JAX's paths as text."""
    for attribute in ('key', 'name', 'idx'):  # of a dict, of a dataclass, of a sequence
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
