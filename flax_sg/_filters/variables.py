"""Variables by name: what a predicate may know of one, and walks over trees of them.

A variable is what a collection holds at a name: an array, a box, or any value that is no mapping.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax.core import meta

from flax_sg._filters.mappings import children_of, rebuilt
from flax_sg._filters.of_nnx import collection_of, is_variable, key_name, paths_below

__all__ = [
    'IdentifiedInfo',
    'Path',
    'VariableInfo',
    'filled',
    'map_tree',
    'names_of',
    'relative',
    'walk',
]

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class VariableInfo:
    """What a predicate may know of a variable: its names, shape and dtype, never its value.

    Attributes:
      path: the variable's path, relative to the module that opened the block. Variables outside
        that module have leading ``'..'`` parts, as a relative file path has.
      absolute_path: the path from the root of the variables.
      collection: the Flax collection, such as ``'params'`` or ``'batch_stats'``.
      shape: the unboxed array's shape, or None where the variable is no single array.
      dtype: the unboxed array's dtype, or None likewise.

    >>> info = VariableInfo(('gln', 'kernel'), ('net', 'gln', 'kernel'), 'params', (2, 3))
    >>> info.name, info.absolute_name
    ('gln/kernel', 'net/gln/kernel')
    """

    path: Path
    absolute_path: Path
    collection: str = 'params'
    shape: tuple[int, ...] | None = None
    dtype: Any = None

    @property
    def name(self) -> str:
        """The relative path, joined by '/'."""
        return '/'.join(self.path)

    @property
    def names(self) -> tuple[VariableInfo, ...]:
        """All that it goes by: a variable of flax.nnx may lie at several paths."""
        return (self,)

    @property
    def absolute_name(self) -> str:
        """The absolute path, joined by '/', without a leading one."""
        return '/'.join(self.absolute_path)

    @classmethod
    def of(cls, path: Path, absolute_path: Path, collection: str, value: Any) -> VariableInfo:
        """Describe a stored value, a box included; a variable of flax.nnx says its collection."""
        if is_variable(value):
            collection = collection_of(type(value))
        if _is_box(value):  # `unbox` might add a sharding constraint
            leaves = jax.tree.leaves(value)
            value = leaves[0] if len(leaves) == 1 else None
        shape = getattr(value, 'shape', None)
        return cls(path, absolute_path, collection, shape, getattr(value, 'dtype', None))


@dataclasses.dataclass(frozen=True, slots=True)
class IdentifiedInfo(VariableInfo):
    """What is known of a variable that modules are asked about, which know it by identity."""

    within: Callable[[tuple], bool] = dataclasses.field(default=bool, compare=False, repr=False)
    others: tuple[VariableInfo, ...] = ()

    @property
    def names(self) -> tuple[VariableInfo, ...]:
        return (self, *self.others)

    @property
    def plain(self) -> VariableInfo:
        """The same without the variable, for what is kept."""
        return VariableInfo(self.path, self.absolute_path, self.collection, self.shape, self.dtype)

    @classmethod
    def of_variable(
        cls, path: Path, variable: Any, value: Any, within: Callable[[tuple], bool] | None = None
    ) -> IdentifiedInfo:
        """Describe a Variable of flax.nnx; ``within`` says whether it lies below some modules."""
        shape, dtype = getattr(value, 'shape', None), getattr(value, 'dtype', None)
        if within is None:
            below = lambda objects: (each for node in objects for _, each in paths_below(node))
            within = lambda objects: any(each is variable for each in below(objects))
        return cls(path, path, collection_of(type(variable)), shape, dtype, within)

    def lies_in(self, objects: tuple[Any, ...]) -> bool:
        """Say whether it is one of some Variables, or below one of some modules."""
        return self.within(objects)


def walk(
    tree: Any, collection: str = 'params', start: Path = ()
) -> Iterator[tuple[VariableInfo, Any]]:
    """Yield each variable of a nested mapping, which is at the path ``start``, with its info."""

    def visit(node: Any, names: Path) -> Iterator[tuple[VariableInfo, Any]]:
        if isinstance(node, Mapping):
            for name in node:
                yield from visit(node[name], (*names, str(name)))
        else:
            yield VariableInfo.of(names, names, collection, node), node

    return visit(tree, start)


def map_tree(fn: Callable[[VariableInfo, Any], Any], tree: Any, collection: str = 'params') -> Any:
    """Apply ``fn`` to each variable of a nested mapping; each mapping keeps its kind and order."""

    def visit(node: Any, names: Path) -> Any:
        if not isinstance(node, Mapping):
            return fn(VariableInfo.of(names, names, collection, node), node)
        children = children_of(node)
        return rebuilt(node, {k: visit(v, (*names, str(k))) for k, v in children.items()})

    return visit(tree, ())


def filled(variable: Any, value: Any) -> Any:
    """Return ``value`` for every array of a variable, in the variable's box.

    A variable of flax.nnx gives the bare value: a State of these is a prefix of the State and of
    the arrays in it, and ``nnx.Optimizer`` hands optax now the one and now the other.
    """
    if is_variable(variable):
        return value
    return jax.tree.map(lambda _: value, variable)


def names_of(tree: Any) -> tuple[list[VariableInfo], list[Any], Any]:
    """Return the names of the leaves of any pytree, the leaves, and the tree's structure.

    Names do not show boxes, nor the variables of flax.nnx; these say their collection.
    """
    boxed, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_box)
    infos = []
    for keys, box in boxed:
        path = tuple(map(key_name, keys))
        collection = collection_of(type(box)) if is_variable(box) else 'params'
        inner, _ = jax.tree_util.tree_flatten_with_path(box)
        for more, leaf in inner:
            names = path if len(inner) == 1 else (*path, *map(key_name, more))
            infos.append(VariableInfo.of(names, names, collection, leaf))
    leaves, treedef = jax.tree.flatten(tree)
    return infos, leaves, treedef


def _is_box(node: Any) -> bool:
    return isinstance(node, meta.AxisMetadata) or is_variable(node)


def relative(path: Path, start: Path) -> Path:
    """Return ``path`` as seen from ``start``, with '..' parts for what lies outside."""
    common = 0
    for a, b in zip(path, start, strict=False):
        if a != b:
            break
        common += 1
    return ('..',) * (len(start) - common) + path[common:]
