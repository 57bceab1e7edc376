"""Functions on trees of nested mappings: split, filter, map, merge and walk them.

A node is any ``Mapping``; everything else is a leaf: an array, None, a tuple of arrays, or a box
such as ``nn.Partitioned``, which is handed over as it is stored. `_filters` decides by patterns
and knows no values; the functions here call a plain ``fn(module_name, name, value)``, where
``module_name`` is the '/'-joined path of the parent ('' at the top) and ``name`` the last key.
`_tree_kinds.py` measures and converts; `data_structures.py` is the public face of both.

Results are new trees: a ``FrozenDict`` gives a ``FrozenDict``, every other mapping a ``dict``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import jax
from flax.core import FrozenDict
from flax.core.meta import AxisMetadata

__all__ = ['Tree', 'check_mapping', 'copy_tree']

Tree = Mapping[str, Any]
Path = tuple[str, ...]


def traverse(structure: Tree) -> Generator[tuple[str, str, Any], None, None]:
    """Iterate over the leaves of a tree, sorted by key at every level.

    Use it to list or inspect parameters. Empty sub-dicts have no leaves and do not show.

    >>> from flax_sg import data_structures as ds
    >>> list(ds.traverse({'mlp': {'out': {'w': 1, 'b': 2}}, 'scale': 3}))
    [('mlp/out', 'b', 2), ('mlp/out', 'w', 1), ('', 'scale', 3)]

    Args:
        structure: a tree of nested mappings.
    Returns: a generator of ``(module_name, name, value)``.
    Raises: ValueError, if `structure` is no mapping, or its keys cannot be sorted.
    Source: Haiku's ``hk.data_structures``; google/flax issue 1857.
    """
    check_mapping('traverse', structure)
    return ((*_names(path), value) for path, value in _leaves(structure))


def partition(predicate: Callable[[str, str, Any], bool], structure: Tree) -> tuple[Tree, Tree]:
    """Split a tree in two: the leaves that a predicate selects, and the rest.

    Use it to differentiate or optimise a part of the parameters. Empty sub-dicts go to the rest,
    so that `merge` puts the whole tree back together.

    >>> from flax_sg import data_structures as ds
    >>> params = {'encoder': {'dense': {'w': 1, 'b': 2}}, 'head': {'w': 3}}
    >>> ds.partition(lambda module_name, name, value: module_name == 'head', params)
    ({'head': {'w': 3}}, {'encoder': {'dense': {'b': 2, 'w': 1}}})

    Args:
        predicate: called as ``predicate(module_name, name, value)``, once for each leaf.
        structure: a tree of nested mappings.
    Returns: two trees, selected and rest.
    Raises: ValueError, if `structure` is no mapping, or its keys cannot be sorted.
    Source: Haiku's ``hk.data_structures``; google/flax issue 1857.
    """
    check_mapping('partition', structure)
    return partition_n(lambda *entry: int(not predicate(*entry)), structure, 2)


def partition_n(fn: Callable[[str, str, Any], int], structure: Tree, n: int) -> tuple[Tree, ...]:
    """Split a tree into n trees by a class index for each leaf.

    Use it for groups with optimisers or losses of their own. ``merge(*partition_n(f, t, n))`` is
    t, for every f and t: empty sub-dicts, which have no leaf to ask for, go to the last tree.

    >>> from flax_sg import data_structures as ds
    >>> params = {'mlp': {'in': {'w': 1}, 'out': {'w': 2}}, 'scale': 3}
    >>> groups = ['mlp/in', 'mlp/out', '']
    >>> ds.partition_n(lambda module_name, name, value: groups.index(module_name), params, 3)
    ({'mlp': {'in': {'w': 1}}}, {'mlp': {'out': {'w': 2}}}, {'scale': 3})

    Args:
        fn: called as ``fn(module_name, name, value)``, once for each leaf; returns an int (also a
            bool or a NumPy integer) in ``[0, n)``.
        structure: a tree of nested mappings.
        n: the number of trees; at least 1, or 0 for an empty tree.
    Returns: a tuple of n trees; tree i has the leaves for which `fn` returned i.
    Raises: ValueError, if an index is no int in ``[0, n)``, `n` is too small or no int, `structure`
        is no mapping, or its keys cannot be sorted.
    Source: Haiku's ``hk.data_structures``; google/flax issue 1857.
    """
    check_mapping('partition_n', structure)
    size, least = _as_int(n), 1 if structure else 0
    if size is None or size < least:
        raise ValueError(
            f'partition_n: n is {n!r}; expected an int >= {least}. '
            'Pass the number of trees that you want.'
        )
    parts: list[dict[str, Any]] = [{} for _ in range(size)]
    for path, value in _entries(structure):
        # The last: then `partition` selects what `filter` does (test_filter_is_first_of_partition).
        index = size - 1 if isinstance(value, Mapping) else _class_index(fn, path, value, size)
        _insert(parts[index], path, value)
    frozen = set(_frozen_paths(structure))
    return tuple(_freeze(part, frozen) for part in parts)


def filter(predicate: Callable[[str, str, Any], bool], structure: Tree) -> Tree:
    """Keep the leaves that a predicate selects.

    Use it when the rest is not needed; otherwise `partition`. Sub-dicts without a selected leaf
    are left out.

    >>> from flax_sg import data_structures as ds
    >>> ds.filter(lambda module_name, name, value: name == 'w', {'mlp': {'out': {'w': 1, 'b': 2}}})
    {'mlp': {'out': {'w': 1}}}

    Args:
        predicate: called as ``predicate(module_name, name, value)``, once for each leaf.
        structure: a tree of nested mappings.
    Returns: a tree with the selected leaves.
    Raises: ValueError, if `structure` is no mapping, or its keys cannot be sorted.
    Source: Haiku's ``hk.data_structures``; google/flax issue 1857.
    """
    check_mapping('filter', structure)
    out: dict[str, Any] = {}
    for path, value in _leaves(structure):
        if predicate(*_names(path), value):
            _insert(out, path, value)
    return _freeze(out, set(_frozen_paths(structure)))


def map(fn: Callable[[str, str, Any], Any], structure: Tree) -> Tree:
    """Replace every leaf by what a function returns for it.

    Use it in place of `jax.tree.map` when the function needs names, or when tuples and boxes are
    to stay whole. Empty sub-dicts are left out, as in Haiku.

    >>> from flax_sg import data_structures as ds
    >>> ds.map(lambda module_name, name, value: f'{module_name}.{name}', {'mlp': {'out': {'w': 1}}})
    {'mlp': {'out': {'w': 'mlp/out.w'}}}

    Args:
        fn: called as ``fn(module_name, name, value)``, once for each leaf.
        structure: a tree of nested mappings.
    Returns: a tree with the new leaves.
    Raises: ValueError, if `structure` is no mapping, or its keys cannot be sorted.
    Source: Haiku's ``hk.data_structures``; google/flax issue 1857.
    """
    check_mapping('map', structure)
    out: dict[str, Any] = {}
    for path, value in _leaves(structure):
        _insert(out, path, fn(*_names(path), value))
    return _freeze(out, set(_frozen_paths(structure)))


def merge(*structures: Tree, check_duplicates: bool = False) -> Tree:
    """Merge trees at every depth; where two have the same leaf, the last one counts.

    Use it to put back together what `partition` took apart. Empty sub-dicts are kept.

    >>> from flax_sg import data_structures as ds
    >>> ds.merge({'mlp': {'out': {'w': 1}}}, {'mlp': {'out': {'b': 2}, 'in': {}}})
    {'mlp': {'out': {'w': 1, 'b': 2}, 'in': {}}}

    Args:
        *structures: trees of nested mappings.
        check_duplicates: refuse a leaf that several trees have with unlike shapes or dtypes.
    Returns: one tree; where types of mappings differ, the first tree that has the node counts.
    Raises: ValueError, if a path is a leaf in one tree and a sub-tree in another, a duplicate is
        refused, a tree is no mapping, or its keys cannot be sorted.
    Source: Haiku's ``hk.data_structures``; google/flax issue 1857.
    """
    out: dict[str, Any] = {}
    frozen: set[Path] = {()} if isinstance(next(iter(structures), None), FrozenDict) else set()
    for i, structure in enumerate(structures):
        check_mapping('merge', structure, f'structures[{i}]')
        _merge_into(out, frozen, structure, (), f'structures[{i}]', check_duplicates)
    return _freeze(out, frozen)


def is_subset(*, subset: Tree, superset: Tree) -> bool:
    """Tell whether every leaf of one tree has a leaf at the same path in another.

    Use it to check that a checkpoint has what a model needs. Values are not compared.

    >>> from flax_sg import data_structures as ds
    >>> ds.is_subset(subset={'mlp': {'out': {'w': 1}}}, superset={'mlp': {'out': {'w': 2, 'b': 3}}})
    True

    Args:
        subset: a tree of nested mappings; one without leaves is a subset of all.
        superset: a tree of nested mappings.
    Returns: True or False.
    Raises: ValueError, if an argument is no mapping, or its keys cannot be sorted.
    Source: Haiku's ``hk.data_structures``; google/flax issue 1857.
    """
    check_mapping('is_subset', subset, 'subset')
    check_mapping('is_subset', superset, 'superset')
    return {path for path, _ in _leaves(subset)} <= {path for path, _ in _leaves(superset)}


def _entries(tree: Tree, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield (path, value) of the leaves and of the empty sub-mappings, sorted by key."""
    for key in _sorted_keys(tree, path):
        value = tree[key]
        if isinstance(value, Mapping) and value:
            yield from _entries(value, (*path, key))
        else:
            yield (*path, key), value


def _leaves(tree: Tree) -> Iterator[tuple[Path, Any]]:
    return ((path, value) for path, value in _entries(tree) if not isinstance(value, Mapping))


def _sorted_keys(tree: Tree, path: Path) -> list[str]:
    try:
        return sorted(tree)
    except TypeError as error:
        raise ValueError(
            f'data_structures: the keys {list(tree)!r} at {_join(path)!r} cannot be '
            'sorted; expected keys of one type. Make them all str.'
        ) from error


def _join(path: Path) -> str:
    return '/'.join(str(key) for key in path)


def _names(path: Path) -> tuple[str, str]:
    """Return module_name and name; a single parent is handed over as it is, as in Haiku."""
    *parent, name = path
    return parent[0] if len(parent) == 1 else _join(parent), name


def _class_index(fn: Callable[[str, str, Any], int], path: Path, value: Any, n: int) -> int:
    module_name, name = _names(path)
    returned = fn(module_name, name, value)
    index = _as_int(returned)
    if index is not None and 0 <= index < n:
        return index
    way_out = 'Fix fn.' if index is None or index < 0 else f'Fix fn, or pass n={index + 1}.'
    raise ValueError(
        f'partition_n: fn({module_name!r}, {name!r}, ...) returned {returned!r}; '
        f'expected an int in [0, {n}). {way_out}'
    )


def _as_int(value: Any) -> int | None:
    try:
        return operator.index(value)
    except TypeError:  # Also what a traced value raises.
        return None


def _insert(out: dict[str, Any], path: Path, value: Any) -> None:
    for key in path[:-1]:
        out = out.setdefault(key, {})
    out[path[-1]] = copy_tree(value)


def _merge_into(
    out: dict[str, Any], frozen: set[Path], tree: Tree, path: Path, origin: str, check: bool
) -> None:
    """Add `tree` to `out`, and to `frozen` the paths of new nodes that `_freeze` is to freeze."""
    for key in _sorted_keys(tree, path):
        value, here = tree[key], (*path, key)
        is_node = isinstance(value, Mapping)
        if key in out and is_node != isinstance(out[key], Mapping):
            now, before = ('sub-tree', 'leaf') if is_node else ('leaf', 'sub-tree')
            raise ValueError(
                f'merge: {_join(here)!r} is a {now} in {origin} and a {before} in an '
                'earlier one; expected one kind. Rename or filter one of them.'
            )
        if is_node:
            # Not below a FrozenDict: there, what holds it decides (test_merge_of_mixed_types).
            topmost = isinstance(value, FrozenDict) and not isinstance(tree, FrozenDict)
            if topmost and key not in out:
                frozen.add(here)
            _merge_into(out.setdefault(key, {}), frozen, value, here, origin, check)
            continue
        if check and key in out and _signature(value) != _signature(out[key]):
            raise ValueError(
                f'merge: {_join(here)!r} is {_describe(value)} in {origin} and '
                f'{_describe(out[key])} in an earlier one; expected one shape and dtype. '
                'Rename or filter one of them, or pass check_duplicates=False.'
            )
        out[key] = copy_tree(value)


def _signature(leaf: Any) -> Any:
    """Return the shape and dtype of an array, boxed or not, and None for anything else."""
    if isinstance(leaf, AxisMetadata):  # Not unbox(): it may apply a sharding constraint.
        boxed = jax.tree.leaves(leaf)
        return _signature(boxed[0]) if len(boxed) == 1 else [_signature(part) for part in boxed]
    is_array = hasattr(leaf, 'shape') and hasattr(leaf, 'dtype')
    return (leaf.shape, leaf.dtype) if is_array else None


def _describe(leaf: Any) -> str:
    signature = _signature(leaf)
    if not isinstance(signature, tuple):
        return repr(leaf)
    shape, dtype = signature
    return f'{dtype}[{",".join(str(size) for size in shape)}]'


def _frozen_paths(tree: Tree, path: Path = ()) -> Iterator[Path]:
    """Yield the paths of the topmost FrozenDicts."""
    if isinstance(tree, FrozenDict):
        yield path
        return
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _frozen_paths(value, (*path, key))


def _freeze(built: dict[str, Any], frozen: set[Path], path: Path = ()) -> Tree:
    """Make FrozenDicts of the nodes of `built` at the paths in `frozen`."""
    if path in frozen:
        return FrozenDict(built)
    for key, value in built.items():
        if frozen and isinstance(value, dict):
            built[key] = _freeze(value, frozen, (*path, key))
    return built


def copy_tree(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: copy_tree(item) for key, item in value.items()}
    return jax.tree.map(lambda leaf: leaf, value)


def check_mapping(caller: str, tree: Any, argument: str = 'structure') -> None:
    if not isinstance(tree, Mapping):
        raise ValueError(
            f'{caller}: {argument} is of type {type(tree).__name__}; expected a '
            "mapping like {'mlp': {'w': ...}}. Pass a nested dict or FrozenDict."
        )
