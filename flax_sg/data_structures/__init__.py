"""Haiku's ``hk.data_structures`` on Flax trees: the same functions on nested dicts of any depth.

``from flax_sg import data_structures`` takes the place of ``hk.data_structures``: arguments and
results are the same on two-level dicts, except that `partition`, `partition_n` and `merge` keep
empty sub-dicts, which Haiku drops (so that ``merge(*partition_n(f, t, n))`` is always t), that
`to_immutable_dict` returns a `flax.core.FrozenDict`, and that every error is a ValueError.

The code is in `_trees.py`. It imports nothing of the library.
"""

from flax_sg.data_structures._tree_kinds import (
    to_haiku_dict,
    to_immutable_dict,
    to_mutable_dict,
    tree_bytes,
    tree_size,
)
from flax_sg.data_structures._trees import (
    filter,
    is_subset,
    map,
    merge,
    partition,
    partition_n,
    traverse,
)

__all__ = [
    'filter',
    'is_subset',
    'map',
    'merge',
    'partition',
    'partition_n',
    'to_haiku_dict',
    'to_immutable_dict',
    'to_mutable_dict',
    'traverse',
    'tree_bytes',
    'tree_size',
]
