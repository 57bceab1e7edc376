"""Trees of mappings that are neither dict nor FrozenDict: each keeps its kind, order and leaves."""

import collections
import types

import haiku as hk
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from haiku._src.data_structures import frozendict as old_haiku_dict

import flax_sg as sg
from flax_sg import nn
from internals import put_together_again

W = jnp.array(3.0)


@jax.tree_util.register_pytree_node_class
class Named(dict):
    """A dict that JAX knows, with children in the order of insertion and one value beside them."""

    note = 'none'

    def tree_flatten(self):
        return tuple(self.values()), (tuple(self), self.note)

    @classmethod
    def tree_unflatten(cls, aux, children):
        out = cls(zip(aux[0], children, strict=True))
        out.note = aux[1]
        return out


class Items(collections.abc.Mapping):
    """What the mappings below have in common."""

    def __getitem__(self, name):
        return self._items[name]

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return len(self._items)


class Sorted(Items):
    """A mapping that JAX knows by position, sorted, and with an attribute."""

    def __init__(self, items, scale=2.0):
        self._items, self.scale = dict(items), scale


def _rebuild_sorted(names, children):
    values = dict(zip(sorted(names[0]), children, strict=True))
    return Sorted({name: values[name] for name in names[0]}, names[1])


jax.tree_util.register_pytree_node(
    Sorted, lambda s: ([s[name] for name in sorted(s)], (tuple(s), s.scale)), _rebuild_sorted
)


class More(dict):
    """A dict that JAX knows, with a child that is no item of it."""

    more = 5.0


jax.tree_util.register_pytree_node(
    More,
    lambda m: ([*m.values(), m.more], tuple(m)),
    lambda names, children: More(zip(names, children[:-1], strict=True)),
)


class Flat(collections.abc.Mapping):
    """A mapping whose children for JAX are all the leaves below it, as of Haiku's FlatMap."""

    def __init__(self, tree):
        self.leaves, self.structure = jax.tree.flatten(tree)

    def _tree(self):
        return jax.tree.unflatten(self.structure, self.leaves)

    def __getitem__(self, name):
        return self._tree()[name]

    def __iter__(self):
        return iter(self._tree())

    def __len__(self):
        return len(self._tree())


def _rebuild_flat(structure, leaves):
    flat = Flat({})
    flat.structure, flat.leaves = structure, list(leaves)
    return flat


jax.tree_util.register_pytree_node(Flat, lambda f: (f.leaves, f.structure), _rebuild_flat)


class Titled(Items):
    """A mapping that JAX knows, which looks at its values, so that JAX cannot make one of marks."""

    def __init__(self, items, title='none'):
        assert all(isinstance(value, (jax.Array, str, bool)) for value in items.values())
        self._items, self.title = dict(items), title


jax.tree_util.register_pytree_node(
    Titled,
    lambda t: (tuple(t.values()), (tuple(t), t.title)),
    lambda aux, values: Titled(dict(zip(aux[0], values, strict=True)), aux[1]),
)


class Attributes(dict):
    """The dict of many configurations, whose attributes are its items. JAX does not know it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class Keywords(dict):
    """A dict that is not made of a dict, with an attribute. JAX does not know it."""

    def __init__(self, *, title):
        self.title = title


class Opaque(collections.abc.Mapping):
    """A mapping that cannot be made of a dict. JAX does not know it."""

    def __init__(self, one, other):
        self.one, self.other = one, other

    def __getitem__(self, name):
        return vars(self)[name]

    def __iter__(self):
        return iter(('one', 'other'))

    def __len__(self):
        return 2


class Stale(dict):
    """A dict whose copies keep the old values a second time. JAX does not know it."""

    def __init__(self, b, a):
        super().__init__(b=b, a=a)
        self.first = b


def keywords(items):
    out = Keywords(title='weights')
    out.update(items)
    return out


def named(items):
    out = Named(items)
    out.note = 'kept'
    return out


KNOWN = {  # to JAX
    'dict': dict,
    'FrozenDict': FrozenDict,
    'OrderedDict': collections.OrderedDict,
    'defaultdict': lambda items: collections.defaultdict(list, items),
    'Named': named,
    'Sorted': Sorted,
    'Flat': Flat,
    'haiku': lambda items: hk.data_structures.to_immutable_dict({'m': items})['m'],
    'old haiku': old_haiku_dict,
    'State': nnx.State,
}
UNKNOWN = {
    'proxy': types.MappingProxyType,
    'UserDict': collections.UserDict,
    'Attributes': Attributes,
    'ChainMap': collections.ChainMap,
    'Counter': collections.Counter,
    'Keywords': keywords,
}
KINDS = {**KNOWN, **UNKNOWN}


def same_kinds(one, other):
    """Say whether two trees have equal kinds and orders of mappings all the way down."""
    if not isinstance(one, collections.abc.Mapping):
        return not isinstance(other, collections.abc.Mapping)
    return (
        type(one) is type(other)
        and list(one) == list(other)
        and all(same_kinds(one[name], other[name]) for name in one)
    )


def tree_of(outer, inner, b, a):
    """Return a tree whose names are not sorted, and which has a list, a box and an empty dict."""
    return KINDS[outer](
        dict(
            b=KINDS[inner](dict(y=b, x=a)),
            a=a,
            empty={},
            layers=[a, b],
            box=nn.Partitioned(a, names=()),
        )
    )


@pytest.mark.parametrize('inner', KINDS)
@pytest.mark.parametrize('outer', KINDS)
def test_a_transformed_tree_keeps_the_kind_and_order_of_each_mapping(outer, inner):
    tree = tree_of(outer, inner, 5.0, W)
    out = sg.map_values(['a', 'b/x', 'box'], lambda info, value: value * 2)(tree)
    assert same_kinds(out, tree)
    assert jax.tree.structure(out['b']['x']) == jax.tree.structure(W)
    if outer in KNOWN and inner in KNOWN:
        assert jax.tree.structure(out) == jax.tree.structure(tree)
    assert (out['a'], out['b']['x'], out['b']['y'], out['box'].value) == (6, 6, 5, 6)
    assert out['layers'] == [3, 5] and tree['a'] == 3  # the tree itself is as it was


@pytest.mark.parametrize('inner', KNOWN)
@pytest.mark.parametrize('outer', KNOWN)
def test_gradients_masks_and_labels_have_the_structure_of_the_tree(outer, inner):
    tree = tree_of(outer, inner, 5.0, 3.0)
    t = sg.stop_gradient('b/x')

    def loss(tree):
        tree = t(tree)
        return tree['b']['x'] * tree['b']['y'] * tree['a']

    grads = jax.grad(loss)(tree)  # 3 * 5 * 3
    assert (grads['b']['x'], grads['b']['y'], grads['a']) == (0, 9, 15)
    mask = sg.path('b/x').mask(tree)
    assert same_kinds(mask, tree) and jax.tree.structure(mask) == jax.tree.structure(tree)
    assert (mask['b']['x'], mask['b']['y'], mask['a'], mask['box'].value) == (True, False, False, 0)
    named = sg.labels({'held': 'b/x'}, tree, default='rest')
    assert same_kinds(named, tree) and jax.tree.structure(named) == jax.tree.structure(tree)
    assert (named['b']['x'], named['b']['y'], named['layers']) == ('held', 'rest', ['rest'] * 2)


@pytest.mark.parametrize('kind', [kind for kind in KNOWN if kind != 'haiku'])  # nor optax's own
def test_optax_takes_masks_and_labels_of_every_kind(kind):
    tree = KINDS[kind](dict(b=KINDS[kind](dict(y=5.0, x=3.0)), a=W))
    ones = jax.tree.map(jnp.ones_like, tree)
    masked = optax.masked(optax.scale(7.0), sg.path('b/x').mask)
    updates, _ = masked.update(ones, masked.init(tree))
    assert (updates['b']['x'], updates['b']['y'], updates['a']) == (7, 1, 1)
    parts = optax.partition(
        {'held': optax.set_to_zero(), 'rest': optax.sgd(1.0)},
        sg.labels({'held': 'b/x'}, tree, default='rest'),
    )
    updates, _ = parts.update(ones, parts.init(tree))
    assert (updates['b']['x'], updates['b']['y'], updates['a']) == (0, -1, -1)


def test_what_a_mapping_holds_beside_its_items_stays():
    out = sg.map_values('a', lambda info, value: value * 2)(named(dict(b=W, a=W)))
    assert out.note == 'kept'
    out = sg.map_values('a', lambda info, value: value * 2)(keywords(dict(b=W, a=W)))
    assert out.title == 'weights'
    tree = collections.UserDict(b=W, a=W)
    tree.title = 'biases'
    assert sg.map_values('a', lambda info, value: value * 2)(tree).title == 'biases'
    out = sg.map_values('a', lambda info, value: value * 2)(Sorted(dict(b=W, a=W), scale=4.0))
    assert out.scale == 4.0
    default = sg.stop_gradient('a')(collections.defaultdict(list, a=W))
    assert default['new'] == []


def test_attributes_that_are_items_are_transformed_too():
    out = sg.map_values('a/x', lambda info, value: value * 2)(Attributes(a=Attributes(x=W)))
    assert out.a.x == 6


def test_names_that_cannot_be_sorted_are_no_hindrance_to_a_dict():
    tree = {1: W, 'a': W}
    assert list(sg.map_values('1', lambda info, value: value * 2)(tree).items()) == [
        (1, 6),
        ('a', 3),
    ]


def test_a_number_and_its_text_are_two_names():
    tree = {1: {'w': W}, '1': {'w': jnp.ones(2)}}
    assert sg.where(lambda v: v.shape == ()).mask(tree) == {1: {'w': True}, '1': {'w': False}}
    assert sg.labels({'x': lambda v: v.shape == ()}, tree, default='y') == {
        1: {'w': 'x'},
        '1': {'w': 'y'},
    }


@pytest.mark.parametrize(
    'use',
    [
        lambda tree: sg.stop_gradient(True)(tree),
        lambda tree: sg.everything.mask(tree),
        lambda tree: sg.labels({'x': True}, tree),
    ],
    ids=['tree', 'mask', 'labels'],
)
@pytest.mark.parametrize(
    'make, text',
    [
        (
            lambda w: Opaque(w, w),
            r"a mapping of type Opaque with 'one', 'other' cannot be made with "
            r'other values: Opaque\(dict\) gives no mapping of these alone, nor '
            r'does JAX. Register it '
            'with jax.tree_util.register_pytree_node, its items being its '
            'children, or pass a dict.',
        ),
        (lambda w: Stale(w, w), "a mapping of type Stale with 'b', 'a' cannot be made with other"),
        (lambda w: More(b=w), "a mapping of type More with 'b' cannot be made with other values"),
        (
            lambda w: Titled(dict(b=w), 'mine'),
            "a mapping of type Titled with 'b' cannot be made with",
        ),
    ],
    ids=['Opaque', 'Stale', 'More', 'Titled'],
)
def test_a_mapping_that_cannot_be_made_anew_is_an_error(use, make, text):
    with pytest.raises(sg.UsageError, match=text):
        jax.jit(lambda w: jax.tree.leaves(use({'deep': make(w)})) and w)(W)


@pytest.mark.parametrize('kind', KINDS)
def test_a_mapping_put_together_from_its_children_is_equal(kind):
    tree = tree_of(kind, kind, 5.0, W)
    out = put_together_again(tree)
    assert same_kinds(out, tree) and jax.tree.structure(out) == jax.tree.structure(tree)
    empty = KINDS[kind]({})
    assert same_kinds(put_together_again(empty), empty)


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.gln = nnx.Linear(2, 3, rngs=rngs)
        self.bn = nnx.BatchNorm(3, use_running_average=True, rngs=rngs)
        self.code = nnx.List([nnx.Linear(3, 1, rngs=rngs)])

    def __call__(self, x):
        return self.code[0](self.bn(self.gln(x)))


def test_a_state_stays_a_state_and_its_variables_stay_variables():
    graph, params, rest = nnx.split(Net(), nnx.Param, ...)
    x = jnp.array([[1.0, 2.0], [0.5, -1.0]])

    def loss(params, hold):
        return (nnx.merge(graph, hold(params), rest)(x) ** 2).sum()

    held = jax.grad(loss)(params, sg.stop_gradient(['gln', 'code/0/bias']))
    live = jax.grad(loss)(params, lambda params: params)
    assert jax.tree.structure(held) == jax.tree.structure(params)
    for path, gradient in nnx.to_flat_state(held):
        stopped = path[0] == 'gln' or path == ('code', 0, 'bias')
        assert (
            not gradient[...].any()
            if stopped
            else (gradient[...] == dict(nnx.to_flat_state(live))[path][...]).all()
        )
    out = sg.stop_gradient('gln')(params)
    assert type(out['gln']) is nnx.State and type(out['gln']['kernel']) is nnx.Param


def test_a_change_to_the_result_does_not_change_the_variables_of_the_state():
    state = nnx.state(Net(), nnx.Param)
    out = sg.stop_gradient('gln')(state)
    out['code'][0]['bias'][...] = jnp.ones(1)
    assert state['code'][0]['bias'][...] == 0


def test_labels_of_a_state_drive_an_optimiser_of_nnx():
    model = Net()
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state = nnx.state(model, nnx.Param)
    labels = sg.labels({'gln': 'gln', 'code': 'code'}, state, default='rest')
    assert type(labels['gln']) is nnx.State and list(labels) == list(state)
    optimiser = nnx.Optimizer(
        model,
        optax.partition(
            {'gln': optax.set_to_zero(), 'code': optax.sgd(1.0), 'rest': optax.set_to_zero()},
            labels,
        ),
        wrt=nnx.Param,
    )
    optimiser.update(model, jax.tree.map(jnp.ones_like, state))
    moved = jax.tree.map(
        lambda new, old: float((old - new).mean()),
        nnx.to_pure_dict(nnx.state(model, nnx.Param)),
        before,
    )
    assert moved['gln'] == {'bias': 0, 'kernel': 0}
    assert moved['code'][0] == pytest.approx({'bias': 1, 'kernel': 1})


@pytest.mark.parametrize('pure', [False, True])
def test_optax_takes_a_mask_of_a_state_with_variables_and_without(pure):
    state = nnx.state(Net(), nnx.Param)
    mask = sg.path('gln').mask(state)
    assert type(mask) is nnx.State and mask['gln']['kernel'] is True
    ones = jax.tree.map(jnp.ones_like, nnx.as_pure(state) if pure else state)
    for freeze in (
        optax.masked(optax.set_to_zero(), mask),
        optax.freeze(mask),
        optax.masked(optax.set_to_zero(), sg.path('gln').mask),
        optax.selective_transform(optax.identity(), freeze_mask=mask),
    ):
        updates, _ = freeze.update(ones, freeze.init(ones))
        assert jax.tree.structure(updates) == jax.tree.structure(ones)
        updates = nnx.to_pure_dict(updates)
        assert not updates['gln']['kernel'].any() and updates['bn']['scale'].all()


def test_the_collection_of_a_variable_is_that_of_its_type():
    class Own(nnx.Param):
        pass

    state = nnx.State(
        {
            'bn': nnx.state(Net())['bn'].raw_mapping,
            'own': Own(W),
            'mine': nnx.Variable(W),
            'key': nnx.RngKey(jax.random.key(0)),
        }
    )
    seen = {}
    sg.where(lambda v: not seen.update({v.name: (v.collection, v.shape)})).mask(state)
    assert seen == {
        'bn/bias': ('params', (3,)),
        'bn/scale': ('params', (3,)),
        'bn/mean': ('batch_stats', (3,)),
        'bn/var': ('batch_stats', (3,)),
        'own': ('params', ()),
        'mine': ('Variable', ()),
        'key': ('RngKey', ()),
    }
    mask = sg.from_nnx(nnx.BatchStat).mask(state)
    assert (mask['bn']['mean'], mask['bn']['scale']) == (True, False)


def test_a_state_of_raw_arrays_is_a_tree_like_any_other():
    state = nnx.State(nnx.to_pure_dict(nnx.state(Net())))
    out = sg.map_values('code/0/bias', lambda info, value: value + 2)(state)
    assert jax.tree.structure(out) == jax.tree.structure(state)
    assert out['code'][0]['bias'] == 2
