"""Sizes of trees of nested mappings, and the kinds of mapping that they are made of.

Unlike `_trees.py`, nothing here calls a user's function.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax.core import FrozenDict

from flax_sg.data_structures._trees import Tree, check_mapping, copy_tree

__all__ = []


def tree_size(tree: Any) -> int:
    """Count the elements of all arrays in a pytree.

    Use it for the number of parameters. Shapes from `jax.eval_shape` will do.

    >>> import jax.numpy as jnp
    >>> from flax_sg import data_structures as ds
    >>> ds.tree_size({'mlp': {'out': {'w': jnp.ones((3, 2)), 'b': jnp.ones(2)}}})
    8

    Args:
        tree: any pytree of arrays or `jax.ShapeDtypeStruct`.
    Returns: the number of elements.
    Raises: ValueError, if a leaf is no array.
    Source: Haiku's ``hk.data_structures``; google/flax issue 1857.
    """
    return sum(array.size for array in _arrays('tree_size', tree))


def tree_bytes(tree: Any) -> int:
    """Count the bytes of all arrays in a pytree, without padding.

    Use it to estimate memory. Shapes from `jax.eval_shape` will do.

    >>> import jax.numpy as jnp
    >>> from flax_sg import data_structures as ds
    >>> ds.tree_bytes({'mlp': {'w': jnp.ones((3, 2), 'float32'), 'b': jnp.ones(2, 'bfloat16')}})
    28

    Args:
        tree: any pytree of arrays or `jax.ShapeDtypeStruct`.
    Returns: the number of bytes.
    Raises: ValueError, if a leaf is no array.
    Source: Haiku's ``hk.data_structures``; google/flax issue 1857.
    """
    return sum(array.size * array.dtype.itemsize for array in _arrays('tree_bytes', tree))


def to_haiku_dict(structure: Tree) -> dict[str, Any]:
    """Copy a tree into plain dicts, with copies of its lists and other containers.

    Use it for a tree that can be changed without changing the original. Arrays are shared.

    >>> from flax.core import FrozenDict
    >>> from flax_sg import data_structures as ds
    >>> ds.to_haiku_dict(FrozenDict({'mlp': {'w': [1, 2]}}))
    {'mlp': {'w': [1, 2]}}

    Args:
        structure: a tree of nested mappings.
    Returns: a tree of dicts.
    Raises: ValueError, if `structure` is no mapping.
    Source: Haiku's ``hk.data_structures``; google/flax issue 1857.
    """
    check_mapping('to_haiku_dict', structure)
    return copy_tree(structure)


def to_mutable_dict(mapping: Tree) -> dict[str, Any]:
    """Turn every mapping of a tree into a plain dict; leaves stay the same objects.

    Use it to edit what `to_immutable_dict` or `flax.core.freeze` made.

    >>> from flax.core import FrozenDict
    >>> from flax_sg import data_structures as ds
    >>> ds.to_mutable_dict(FrozenDict({'mlp': {'w': 1}}))
    {'mlp': {'w': 1}}

    Args:
        mapping: a tree of nested mappings.
    Returns: a tree of new dicts.
    Raises: ValueError, if `mapping` is no mapping.
    Source: Haiku's ``hk.data_structures``; google/flax issue 1857.
    """
    check_mapping('to_mutable_dict', mapping, 'mapping')
    return _thaw(mapping)


def to_immutable_dict(mapping: Tree) -> FrozenDict[str, Any]:
    """Turn every mapping of a tree into Flax's immutable one; leaves stay the same objects.

    Use it to guard a tree against edits. Haiku has an immutable mapping of its own in this place.

    >>> from flax_sg import data_structures as ds
    >>> ds.to_immutable_dict({'mlp': {'w': 1}})['mlp']
    FrozenDict({
        w: 1,
    })

    Args:
        mapping: a tree of nested mappings.
    Returns: a `flax.core.FrozenDict`; `mapping` itself where it is one.
    Raises: ValueError, if `mapping` is no mapping.
    Source: Haiku's ``hk.data_structures``; google/flax issue 1857.
    """
    check_mapping('to_immutable_dict', mapping, 'mapping')
    return mapping if isinstance(mapping, FrozenDict) else FrozenDict(_thaw(mapping))


def _thaw(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _thaw(item) for key, item in value.items()}
    return value


def _arrays(caller: str, tree: Any) -> Iterator[Any]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not (hasattr(leaf, 'size') and hasattr(leaf, 'dtype')):
            raise ValueError(
                f'{caller}: the leaf at tree{jax.tree_util.keystr(path)} is {leaf!r}; '
                'expected an array. Filter it out, or make it an array.'
            )
        yield leaf
