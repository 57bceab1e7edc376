"""flax_sg.data_structures: call by call against Haiku on two-level dicts, then on Flax trees."""

import inspect
import zlib
from collections import OrderedDict
from collections.abc import Mapping

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict, freeze
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_sg import data_structures as ds

haiku_ds = hk.data_structures
NAMES = [
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

KEY = jax.random.key(0)
ARRAYS = [
    None,
    np.ones((2, 3)),
    np.arange(3, dtype=np.int8),
    np.float32(3),
    KEY,
    jnp.zeros((2,), jnp.bfloat16),
    jax.ShapeDtypeStruct((4,), jnp.float16),
]
UNBOXED = [*ARRAYS, 0, 7, True, 2.5, 'text', (), [1, 2], (np.ones(2, np.float32), None)]
LEAVES = [*UNBOXED, nn.Partitioned(jnp.ones((2, 2)), ('x', None))]
# 'a/b' beside 'a' with 'b' in it: the joined names collide, the paths do not.
keys = st.sampled_from(['a', 'b', 'a/b', 'w', 'linear_1', 'linear_10', '~', ''])


def two_level(leaves=LEAVES, min_size=1):
    """Haiku dicts; `min_size=0` has empty modules too."""
    return st.dictionaries(keys, st.dictionaries(keys, st.sampled_from(leaves), min_size=min_size))


def extend(children):
    nested = st.dictionaries(keys, children, max_size=3)
    return nested | nested.map(freeze)


nodes = st.recursive(st.sampled_from(LEAVES), extend, max_leaves=12)
deep = st.dictionaries(keys, nodes, max_size=4).flatmap(lambda t: st.sampled_from([t, freeze(t)]))


def chooser(seed, n, calls=None):
    """A class index from names, value and seed alone; `calls` records what it was asked."""

    def fn(module_name, name, value):
        if calls is not None:
            calls.append((module_name, name, exact(value)))
        return zlib.crc32(repr((module_name, name, exact(value), seed)).encode()) % n

    return fn


def exact(x):
    """A value to compare results with: types, key order and array contents included."""
    if isinstance(x, Mapping):
        return type(x).__name__, [(key, exact(value)) for key, value in x.items()]
    if isinstance(x, (list, tuple)):
        return type(x).__name__, [exact(item) for item in x]
    if isinstance(x, nn.Partitioned):
        return 'box', x.names, exact(x.value)
    if isinstance(x, jax.ShapeDtypeStruct):
        return 'shape', x.shape, str(x.dtype)
    if hasattr(x, 'dtype'):
        data = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return type(x).__name__, str(x.dtype), x.shape, np.asarray(data).tobytes()
    return type(x).__name__, x


def in_order(x):
    """The tree with its keys sorted at every level, each mapping of its own type."""
    if isinstance(x, Mapping):
        kind = FrozenDict if isinstance(x, FrozenDict) else dict
        return kind({key: in_order(x[key]) for key in sorted(x)})
    return x


# Against Haiku.


@pytest.mark.parametrize('name', NAMES)
def test_signature_is_haikus(name):
    ours, theirs = (inspect.signature(getattr(m, name)).parameters for m in (ds, haiku_ds))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


def test_names_are_haikus():
    assert ds.__all__ == sorted(haiku_ds.__all__) == NAMES


@pytest.mark.parametrize('kind', [dict, OrderedDict, haiku_ds.to_immutable_dict])
@pytest.mark.parametrize('name', ['partition', 'partition_n', 'filter', 'map'])
@given(tree=two_level(), seed=st.integers(0, 9), n=st.integers(2, 5))
@settings(deadline=None)
def test_functions_with_a_callable_equal_haikus(name, kind, tree, seed, n):
    tree = kind(tree)
    args = (tree, n) if name == 'partition_n' else (tree,)
    calls, haiku_calls = [], []
    got = getattr(ds, name)(chooser(seed, n, calls), *args)
    want = getattr(haiku_ds, name)(chooser(seed, n, haiku_calls), *args)
    assert exact(got) == exact(want)
    assert calls == haiku_calls


@pytest.mark.parametrize('name', ['filter', 'map'])
@given(tree=two_level(min_size=0), seed=st.integers(0, 9))
@settings(deadline=None)
def test_filter_and_map_drop_empty_modules_like_haiku(name, tree, seed):
    got, want = (getattr(m, name)(chooser(seed, 2), tree) for m in (ds, haiku_ds))
    assert exact(got) == exact(want)


@pytest.mark.parametrize('value', [{'x': {'y': 1}}, {}, FrozenDict(x=1), OrderedDict(x=[1])])
def test_map_takes_mappings_for_an_answer_like_haiku(value):
    got, want = (m.map(lambda *_: value, {'a': {'w': 1}}) for m in (ds, haiku_ds))
    assert exact(got) == exact(want)


@pytest.mark.parametrize('check', [False, True])
@given(trees=st.lists(two_level(UNBOXED), max_size=4))
@settings(deadline=None)
def test_merge_equals_haikus(check, trees):
    def run(module):
        try:
            return exact(module.merge(*trees, check_duplicates=check))
        except ValueError:
            return 'refused'

    # Without boxes: Haiku sees no shape in a box and lets any pass; ours looks inside.
    assert run(ds) == run(haiku_ds)


@given(tree=two_level(min_size=0), other=two_level(min_size=0))
@settings(deadline=None)
def test_other_functions_equal_haikus(tree, other):
    for one in (tree, haiku_ds.to_immutable_dict(tree)):
        assert exact(list(ds.traverse(one))) == exact(list(haiku_ds.traverse(one)))
        for name in ('to_haiku_dict', 'to_mutable_dict'):
            got, want = (getattr(m, name)(one) for m in (ds, haiku_ds))
            assert exact(got) == exact(want)
        assert exact(ds.to_immutable_dict(one)) == exact(FrozenDict(tree))
    part = ds.filter(chooser(0, 2), tree)
    for subset, superset in [(part, tree), (tree, part), (tree, other), (other, tree)]:
        got, want = (m.is_subset(subset=subset, superset=superset) for m in (ds, haiku_ds))
        assert got is want
    assert inspect.isgenerator(ds.traverse(tree))


@given(tree=two_level(ARRAYS, min_size=0))
@settings(deadline=None)
def test_sizes_equal_haikus(tree):
    for one in (tree, haiku_ds.to_immutable_dict(tree)):
        assert ds.tree_size(one) == haiku_ds.tree_size(one)
        assert ds.tree_bytes(one) == haiku_ds.tree_bytes(one)


@pytest.mark.parametrize('index', [True, np.int8(1), np.array(1), jnp.array(1)])
def test_indices_that_haiku_accepts(index):
    tree, n = {'a': {'w': 3}}, np.int64(2)
    got, want = (m.partition_n(lambda *_: index, tree, n) for m in (ds, haiku_ds))
    assert got == want == ({}, tree)


def test_partition_n_into_none_of_nothing():
    # Haiku's documented idiom is n=len(structure).
    assert ds.partition_n(lambda *_: 0, {}, 0) == haiku_ds.partition_n(lambda *_: 0, {}, 0) == ()


def test_to_immutable_dict_equals_haikus_in_value():
    tree = {'b': {'w': [1]}, 'a': {}}
    assert ds.to_immutable_dict(tree) == haiku_ds.to_immutable_dict(tree) == tree


# On trees of any depth.

TREE = {'net': {'gln': {'w': 1, 'b': 2}, 'w': 3}, 'scale': 4, 'a/b': {'w': 5}}


@pytest.mark.parametrize('kind', [dict, FrozenDict])
def test_names_are_the_path_of_the_parent_and_the_last_key(kind):
    assert list(ds.traverse(kind(TREE))) == [
        ('a/b', 'w', 5),
        ('net/gln', 'b', 2),
        ('net/gln', 'w', 1),
        ('net', 'w', 3),
        ('', 'scale', 4),
    ]


def test_partition_filter_and_map_by_hand():
    in_gln = lambda module_name, name, value: module_name == 'net/gln'  # noqa: E731
    gln = {'net': {'gln': {'w': 1, 'b': 2}}}
    rest = {'net': {'w': 3}, 'scale': 4, 'a/b': {'w': 5}}
    assert ds.partition(in_gln, TREE) == (gln, rest)
    assert ds.filter(in_gln, TREE) == gln
    assert ds.map(lambda m, n, v: 10 * v, gln) == {'net': {'gln': {'w': 10, 'b': 20}}}
    assert ds.partition_n(lambda m, n, v: v - 1, TREE, 6) == (
        {'net': {'gln': {'w': 1}}},
        {'net': {'gln': {'b': 2}}},
        {'net': {'w': 3}},
        {'scale': 4},
        {'a/b': {'w': 5}},
        {},
    )
    assert ds.merge(rest, gln) == TREE


@given(tree=deep, seed=st.integers(0, 9), n=st.integers(1, 40))
@settings(deadline=None, max_examples=300)
def test_merge_of_partition_n_is_the_tree(tree, seed, n):
    parts = ds.partition_n(chooser(seed, n), tree, n)
    back = ds.merge(*parts)
    assert len(parts) == n
    assert exact(in_order(back)) == exact(in_order(tree))
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert all(x is y for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True))
    # Each leaf is in the part that fn named, and in no other.
    for i, part in enumerate(parts):
        assert type(part) is type(tree)
        assert all(chooser(seed, n)(*entry) == i for entry in ds.traverse(part))
    assert sum(len(list(ds.traverse(part))) for part in parts) == len(list(ds.traverse(tree)))


@given(tree=deep, seed=st.integers(0, 9))
@settings(deadline=None)
def test_filter_is_first_of_partition(tree, seed):
    selected, rest = ds.partition(chooser(seed, 2), tree)
    assert exact(ds.filter(chooser(seed, 2), tree)) == exact(selected)
    assert exact(in_order(ds.merge(selected, rest))) == exact(in_order(tree))


@given(tree=deep)
@settings(deadline=None)
def test_map_to_the_same_is_the_tree_without_empty_dicts(tree):
    same = ds.map(lambda module_name, name, value: value, tree)
    assert exact(list(ds.traverse(same))) == exact(list(ds.traverse(tree)))
    assert exact(same) == exact(ds.filter(lambda *_: True, tree))
    assert all(x is y for x, y in zip(jax.tree.leaves(same), jax.tree.leaves(tree), strict=True))


@given(tree=deep)
@settings(deadline=None)
def test_conversions(tree):
    plain = ds.to_mutable_dict(tree)
    assert exact(plain) == exact(ds.to_haiku_dict(tree))
    assert exact(plain) == exact(haiku_ds.to_haiku_dict(tree))
    assert 'FrozenDict' not in str(jax.tree.structure(plain))
    assert exact(ds.to_immutable_dict(tree)) == exact(freeze(plain))
    assert ds.is_subset(subset=plain, superset=tree) and ds.is_subset(subset=tree, superset=plain)


def test_is_subset_compares_paths_of_leaves():
    assert ds.is_subset(subset={'a': {'b': {}}}, superset={})
    assert not ds.is_subset(subset={'a': 1}, superset={'a': {}})
    assert not ds.is_subset(subset={'a/b': {'w': 1}}, superset={'a': {'b': {'w': 1}}})


def test_conversions_share_or_copy_lists_like_haiku():
    tree = {'a': {'w': [1]}}
    assert ds.to_mutable_dict(tree)['a']['w'] is tree['a']['w']
    assert ds.to_immutable_dict(tree)['a']['w'] is tree['a']['w']
    assert ds.to_haiku_dict(tree)['a']['w'] is not tree['a']['w']
    assert ds.map(lambda m, n, v: v, tree)['a']['w'] is not tree['a']['w']
    frozen = FrozenDict(tree)
    assert ds.to_immutable_dict(frozen) is frozen


@pytest.mark.parametrize(
    ('tree', 'first', 'last'),
    [
        ({}, {}, {}),
        ({'a': {}, 'b': {'w': 1}}, {'b': {'w': 1}}, {'a': {}}),
        ({'a': {'b': {'c': {}}, 'w': 1}}, {'a': {'w': 1}}, {'a': {'b': {'c': {}}}}),
    ],
)
def test_empty_dicts_go_to_the_last_part(tree, first, last):
    assert ds.partition_n(lambda *_: 0, tree, 3) == (first, {}, last)
    assert ds.merge(first, last) == tree
    assert haiku_ds.merge({'a': {}}) == {} != ds.merge({'a': {}})  # Why Haiku cannot be followed.


def test_merge_of_mixed_types():
    one, two = {'a': {'w': 1}}, FrozenDict({'a': {'b': 2}, 'c': {'w': 3}})
    both = {'a': {'b': 2, 'w': 1}, 'c': {'w': 3}}
    assert exact(in_order(ds.merge(one, two))) == exact(both)
    assert exact(in_order(ds.merge(two, one))) == exact(FrozenDict(both))
    assert exact(ds.merge(one, {'d': two})['d']) == exact(two)
    assert exact(in_order(ds.merge({'d': one}, {'d': two})['d'])) == exact(both)
    assert exact(in_order(ds.merge({'d': two}, {'d': one})['d'])) == exact(FrozenDict(both))
    assert ds.merge() == {} and one == {'a': {'w': 1}}


def test_predicates_and_functions_get_boxes_as_they_are_stored():
    box = nn.Partitioned(jnp.ones((2, 3)), ('in', 'out'))
    tree = {'net': {'dense': {'kernel': box, 'bias': 1}}}
    assert [entry[2] is box for entry in ds.traverse(tree)] == [False, True]
    boxed, rest = ds.partition(lambda m, n, value: isinstance(value, nn.Partitioned), tree)
    assert rest == {'net': {'dense': {'bias': 1}}}
    assert boxed['net']['dense']['kernel'].names == ('in', 'out')
    names = ds.map(lambda m, n, value: value.names, boxed)
    assert names == {'net': {'dense': {'kernel': ('in', 'out')}}}
    assert ds.tree_size(boxed) == 6 and ds.tree_bytes(boxed) == 24


def test_train_a_part_as_in_haiku():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1, use_bias=False, name='b')(nn.Dense(1, use_bias=False, name='a')(x))

    params = {'params': {'a': {'kernel': jnp.array([[2.0]])}, 'b': {'kernel': jnp.array([[3.0]])}}}
    live, stopped = ds.partition(lambda module_name, *_: module_name == 'params/b', params)
    loss = lambda live: Net().apply(ds.merge(live, stopped), jnp.array([5.0]))[0]  # noqa: E731
    # y = x a b, so dy/db = x a = 10; a is not differentiated and has no entry.
    grads = jax.jit(jax.grad(loss))(live)
    assert jax.tree.map(lambda g: g.item(), grads) == {'params': {'b': {'kernel': 10.0}}}


# Errors.


def fail_with(message, fn, *args, **kwargs):
    with pytest.raises(ValueError) as caught:
        fn(*args, **kwargs)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ('returned', 'shown', 'way_out'),
    [
        (3, '3', 'Fix fn, or pass n=4.'),
        (np.int64(7), 'np.int64(7)', 'Fix fn, or pass n=8.'),
        (-1, '-1', 'Fix fn.'),
        (1.0, '1.0', 'Fix fn.'),
        (None, 'None', 'Fix fn.'),
    ],
)
def test_class_index_outside(returned, shown, way_out):
    fail_with(
        f"partition_n: fn('mlp/linear', 'w', ...) returned {shown}; expected an int in "
        f'[0, 3). {way_out}',
        ds.partition_n,
        lambda *_: returned,
        {'mlp': {'linear': {'w': 1}}},
        3,
    )


def test_class_index_of_a_top_level_leaf_and_of_a_traced_value():
    fail_with(
        "partition_n: fn('', 'w', ...) returned True; expected an int in [0, 1). Fix fn, or "
        'pass n=2.',
        ds.partition_n,
        lambda *_: True,
        {'w': 1},
        1,
    )
    with pytest.raises(ValueError, match=r"partition_n: fn\('a', 'w', ...\) returned .*Tracer"):
        jax.jit(lambda x: ds.partition_n(lambda m, n, v: v, {'a': {'w': x}}, 2))(0)


@pytest.mark.parametrize(
    ('tree', 'n', 'shown'),
    [
        (TREE, 0, '0; expected an int >= 1'),
        ({'a': {}}, 0, '0; expected an int >= 1'),
        ({}, -1, '-1; expected an int >= 0'),
        (TREE, 2.0, '2.0; expected an int >= 1'),
    ],
)
def test_wrong_n(tree, n, shown):
    fail_with(
        f'partition_n: n is {shown}. Pass the number of trees that you want.',
        ds.partition_n,
        lambda *_: 0,
        tree,
        n,
    )


@pytest.mark.parametrize(
    ('name', 'args', 'argument'),
    [
        ('partition', (bool, 3), 'structure'),
        ('partition_n', (int, 3, 2), 'structure'),
        ('filter', (bool, 3), 'structure'),
        ('map', (bool, 3), 'structure'),
        ('merge', ({}, 3), 'structures[1]'),
        ('traverse', (3,), 'structure'),
        ('to_haiku_dict', (3,), 'structure'),
        ('to_mutable_dict', (3,), 'mapping'),
        ('to_immutable_dict', (3,), 'mapping'),
    ],
)
def test_not_a_mapping(name, args, argument):
    fail_with(
        f"{name}: {argument} is of type int; expected a mapping like {{'mlp': {{'w': ...}}}}"
        '. Pass a nested dict or FrozenDict.',
        getattr(ds, name),
        *args,
    )


@pytest.mark.parametrize('argument', ['subset', 'superset'])
def test_is_subset_of_no_mapping(argument):
    trees = {'subset': {}, 'superset': {}, argument: None}
    fail_with(
        f"is_subset: {argument} is of type NoneType; expected a mapping like {{'mlp': "
        "{'w': ...}}. Pass a nested dict or FrozenDict.",
        ds.is_subset,
        **trees,
    )


@pytest.mark.parametrize('fn', [lambda t: list(ds.traverse(t)), ds.merge])
def test_keys_that_cannot_be_sorted(fn):
    fail_with(
        "data_structures: the keys [1, 'w'] at 'a/b' cannot be sorted; expected keys of one "
        'type. Make them all str.',
        fn,
        {'a': {'b': {1: 2, 'w': 3}}},
    )


@pytest.mark.parametrize('subtree', [{'w': 1}, {}, FrozenDict(w=1)])
def test_merge_of_leaf_and_subtree(subtree):
    one, two = {'a': {'b': 3}}, {'a': {'b': subtree}}
    fail_with(
        "merge: 'a/b' is a sub-tree in structures[1] and a leaf in an earlier one; expected "
        'one kind. Rename or filter one of them.',
        ds.merge,
        one,
        two,
    )
    fail_with(
        "merge: 'a/b' is a leaf in structures[1] and a sub-tree in an earlier one; expected "
        'one kind. Rename or filter one of them.',
        ds.merge,
        two,
        one,
    )


@pytest.mark.parametrize(
    ('before', 'now', 'shown'),
    [
        (np.ones(2), np.ones((2, 3), np.int8), 'int8[2,3] in structures[1] and float64[2]'),
        (np.ones(2), np.ones(2, np.int8), 'int8[2] in structures[1] and float64[2]'),
        (np.ones(2), 'text', "'text' in structures[1] and float64[2]"),
        (
            nn.Partitioned(np.ones(2), ('x',)),
            np.ones(3),
            'float64[3] in structures[1] and float64[2]',
        ),
    ],
)
def test_merge_of_unlike_duplicates(before, now, shown):
    trees = {'a': {'b': {'w': before}}}, {'a': {'b': {'w': now}}}
    fail_with(
        f"merge: 'a/b/w' is {shown} in an earlier one; expected one shape and dtype. Rename "
        'or filter one of them, or pass check_duplicates=False.',
        ds.merge,
        *trees,
        check_duplicates=True,
    )
    assert exact(ds.merge(*trees)) == exact(trees[1])
    assert exact(ds.merge(trees[0], trees[0], check_duplicates=True)) == exact(trees[0])


@pytest.mark.parametrize('name', ['tree_size', 'tree_bytes'])
def test_size_of_a_leaf_that_is_no_array(name):
    fail_with(
        f"{name}: the leaf at tree['a']['w'] is 'text'; expected an array. Filter it out, or "
        'make it an array.',
        getattr(ds, name),
        {'a': {'w': 'text'}},
    )
