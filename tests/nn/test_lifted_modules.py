"""The transform on classes, instances, methods: names, parameters, sharing, what they cover."""

import copy
import dataclasses
import functools
import pickle
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_sg as sg
from flax_sg import nn
from models import Scale

ones = nn.initializers.ones


class Net(nn.Module):
    """Docs of Net."""

    width: int = 1
    inner: nn.Module | None = None

    def setup(self):
        self.a = self.param('a', ones, ())
        self.exp = jnp.exp(self.a)
        self.layers = [Leaf(), Leaf()]

    def __call__(self, x):
        return self.half(x) + self.layers[1](x)

    def half(self, x):
        return self.a * x + self.layers[0](x)

    @property
    def double(self):
        return 2 * self.a

    @nn.nowrap
    def helper(self, x):
        return self.layers[0](x)

    def __getitem__(self, i):
        return self.layers[i].b


class Leaf(nn.Module):
    def setup(self):
        self.b = self.param('b', ones, ())

    def __call__(self, x):
        return self.b * x


PARAMS = {'params': {'a': 1.0, 'layers_0': {'b': 1.0}, 'layers_1': {'b': 1.0}}}
ALL = 'a layers_0/b layers_1/b'


def live(f, params=PARAMS):
    leaves = jax.tree_util.tree_leaves_with_path(jax.grad(f)(params)['params'])
    return ' '.join(
        jax.tree_util.keystr(k, simple=True, separator='/') for k, g in leaves if g != 0
    )


def test_a_lifted_class_keeps_its_name_parameters_and_docs():
    Held = sg.stop_gradient('a')(Net)
    assert issubclass(Held, Net) and Held.__name__ == 'Net' and Held.__doc__ == 'Docs of Net.'
    assert (Held.__module__, Held.__qualname__) == (Net.__module__, Net.__qualname__)
    assert [f.name for f in dataclasses.fields(Held)] == [f.name for f in dataclasses.fields(Net)]
    key = jax.random.key(0)
    jax.tree.map(np.testing.assert_array_equal, Held(3).init(key, 1.0), Net(3).init(key, 1.0))

    class Outer(nn.Module):
        cls: type

        @nn.compact
        def __call__(self, x):
            return self.cls()(x) + self.cls(name='named')(x)

    held, plain = Outer(Held).init(key, 1.0), Outer(Net).init(key, 1.0)
    assert jax.tree.structure(held) == jax.tree.structure(plain)
    assert set(held['params']) == {'Net_0', 'named'}
    assert live(lambda p: Outer(Held).apply(p, 1.0), held) == ' '.join(
        f'{n}/{b}' for n in ('Net_0', 'named') for b in ('layers_0/b', 'layers_1/b')
    )


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    'method, live_plain',
    [
        ('__call__', ALL),
        ('half', 'a layers_0/b'),
        ('helper', 'layers_0/b'),
        (lambda m, x: m.double, 'a'),
        (lambda m, x: m.a, 'a'),
        (lambda m, x: m.exp, 'a'),
        (lambda m, x: m[1], 'layers_1/b'),
        (lambda m, x: m.layers[1](x), 'layers_1/b'),
        (lambda m, x: m.layers[1].b, 'layers_1/b'),
        (lambda m, x: m.variables['params']['a'], 'a'),
        (lambda m, x: m.get_variable('params', 'a'), 'a'),
        (lambda m, x: m.get_variable('params', 'layers_0')['b'], 'layers_0/b'),
        (lambda m, x: jax.checkpoint(lambda x: m(x))(x), ALL),
        (lambda m, x: nn.jit(lambda m, x: m(x))(m, x), ALL),
        (lambda m, x: nn.jit(lambda m, x: m.a)(m, x), 'a'),
        (lambda m, x: nn.remat(lambda m, x: m.layers[0](x))(m, x), 'layers_0/b'),
    ],
)
@pytest.mark.parametrize('how', ['class', 'instance', 'bound', 'mirror'])
def test_every_way_into_a_lifted_module_is_masked(how, method, live_plain):
    def use(p, t):
        if how == 'class':
            return t(Net)().apply(p, 1.0, method=method)
        if how == 'instance':
            return t(Net()).apply(p, 1.0, method=method)
        bound = Net().bind(p)
        held = t(bound)
        if how == 'mirror':
            bound(1.0)  # the live one is set up first
        return method(held, 1.0) if callable(method) else getattr(held, method)(1.0)

    def nothing(target):
        return target

    assert live(lambda p: use(p, nothing)) == live_plain
    assert live(lambda p: use(p, sg.stop_gradient(True))) == ''
    want = ' '.join(n for n in live_plain.split() if n != 'a')
    assert live(lambda p: use(p, sg.stop_gradient('a'))) == want
    want = ' '.join(n for n in live_plain.split() if n == 'a')
    assert live(lambda p: use(p, sg.stop_gradient('layers_*'))) == want
    assert use(PARAMS, nothing) == use(PARAMS, sg.stop_gradient(True))


def test_a_mirror_leaves_the_live_module_live():
    def f(p):
        bound = Net().bind(p)
        held = sg.stop_gradient(True)(bound)
        held(1.0), held.a
        y = bound(1.0) + bound.a + bound.exp
        with sg.stop_gradient(True):
            bound(1.0)
        return y + held(1.0) + bound.layers[0].b

    assert live(f) == ALL
    assert jax.grad(f)(PARAMS)['params']['layers_0']['b'] == 2


def test_a_mirror_inside_a_module():
    class Outer(nn.Module):
        def setup(self):
            self.net = Net()
            self.held = sg.stop_gradient(True)(self.net)

        def __call__(self, x):
            return self.held(x) + self.net.layers[0](x) + self.held.exp

    params = Outer().init(jax.random.key(0), 1.0)
    assert set(params['params']) == {'net'}
    assert live(lambda p: Outer().apply(p, 1.0), params) == 'net/layers_0/b'

    class Compact(nn.Module):
        @nn.compact
        def __call__(self, x):
            net = Net(name='net')
            return sg.stop_gradient('a')(net)(x) + 0 * net(x)

    assert live(lambda p: Compact().apply(p, 1.0), params) == 'net/layers_0/b net/layers_1/b'


class Tied(nn.Module):
    """Reads a module that it is handed, which is not below it, in each kind of member."""

    leaf: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.leaf(x) * self.param('w', ones, ())

    def method(self, x):
        return self.leaf(x)

    @property
    def read(self):
        """Docs of read."""
        return self.leaf.b

    @functools.cached_property
    def cached(self):
        return self.leaf.b

    @nn.nowrap
    def helper(self, x):
        return self.leaf(x)

    def __getitem__(self, x):
        return self.leaf(x)


class Inherits(Tied):
    def method(self, x):
        return 3 * super().method(x)


MEMBERS = {
    '__call__': lambda m: m(1.0),
    'method': lambda m: m.method(1.0),
    'read': lambda m: m.read,
    'cached': lambda m: m.cached,
    'helper': lambda m: m.helper(1.0),
    'item': lambda m: m[1.0],
}


@pytest.mark.parametrize('how', ['mirror', 'class', 'unbound'])
@pytest.mark.parametrize('cls', [Tied, Inherits])
def test_every_member_covers_what_the_module_is_handed(cls, how):
    mask = sg.stop_gradient(True)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self):
            leaf = Leaf(name='leaf')
            made = {'class': mask(cls), 'unbound': lambda leaf, name: mask(cls(leaf, name=name))}
            tied = made.get(how, cls)(leaf, name='tied')
            held = mask(tied) if how == 'mirror' else tied
            assert type(held).read.__doc__ == 'Docs of read.' and held.parent is tied.parent
            return {name: read(held) for name, read in MEMBERS.items()}, leaf(2.0)

    params = Outer().init(jax.random.key(0))['params']
    assert set(params) == {'leaf', 'tied'}
    values, _ = Outer().apply({'params': params})
    assert values == {**dict.fromkeys(MEMBERS, 1), 'method': 3 if cls is Inherits else 1}
    for name in MEMBERS:
        grads = jax.grad(lambda p, name=name: Outer().apply({'params': p})[0][name])(params)
        assert grads == {'leaf': {'b': 0}, 'tied': {'w': 0}}, name
    assert jax.grad(lambda p: Outer().apply({'params': p})[1])(params)['leaf'] == {'b': 2}


def test_a_mirror_of_a_module_with_modules_as_fields():
    params = {
        'params': {'net': {**PARAMS['params'], 'inner': {**PARAMS['params'], 'inner': {'b': 1.0}}}}
    }

    class Outer(nn.Module):
        def setup(self):
            self.net = Net(inner=Net(inner=Leaf()))

        def __call__(self, x):
            held, live = sg.stop_gradient(True)(self.net), self.net.inner
            below = held.inner.inner.b + held.inner.inner(x)
            return held.inner(x) + held.inner.a + below + 10 * live.inner(x) + 100 * live.a

    grads = jax.grad(lambda p: Outer().apply(p, 1.0))(params)['params']['net']
    assert jax.tree.leaves(grads) == [0, 100, 10, *[0] * 4]  # net/a, net/inner/a, .../inner/b


def test_transforms_stack():
    def f(p, *ts):
        net = Net().bind(p)
        for t in ts:
            net = t(net)
        return net(1.0)

    a, b = sg.stop_gradient('a'), sg.stop_gradient('layers_0')
    assert live(lambda p: f(p, a, b)) == live(lambda p: f(p, b, a)) == 'layers_1/b'
    assert live(lambda p: f(p, a, a)) == 'layers_0/b layers_1/b'
    assert live(lambda p: a(b(Net))().apply(p, 1.0)) == 'layers_1/b'
    assert live(lambda p: a(b(Net)()).apply(p, 1.0)) == 'layers_1/b'


def test_equal_transforms_of_a_class_are_one_class():
    make = lambda name: sg.stop_gradient(lambda v: v.name == name)
    assert make('a')(Net) is make('a')(Net)
    assert make('a')(Net) is not make('b')(Net)
    assert make('a')(Net)(2) == make('a')(Net)(2) != Net(2)
    assert hash(make('a')(Net)(2)) == hash(make('a')(Net)(2))


def test_lifted_modules_clone_copy_and_pickle():
    t = sg.stop_gradient('a')
    held = t(Net(width=3, name='n'))
    want = 'layers_0/b layers_1/b'
    for other in (
        held.clone(),
        held.copy(name='n'),
        copy.copy(held),
        copy.deepcopy(held),
        pickle.loads(pickle.dumps(held)),
        held.clone(width=4),
    ):
        assert type(other) is type(held) and other.name == 'n'
        assert live(lambda p, other=other: other.apply(p, 1.0)) == want
    assert held.clone(width=4).width == 4
    assert pickle.loads(pickle.dumps(t)) == t
    bound = held.bind(PARAMS)
    module, variables = bound.unbind()
    assert variables == PARAMS and live(lambda p: module.apply(p, 1.0)) == want


@pytest.mark.parametrize(
    'lift',
    [
        nn.jit,
        nn.remat,
        functools.partial(
            nn.vmap,
            in_axes=None,
            axis_size=2,
            out_axes=0,
            variable_axes={'params': None},
            split_rngs={'params': False},
        ),
    ],
    ids=['jit', 'remat', 'vmap'],
)
@pytest.mark.parametrize('first', ['mask', 'lift'])
def test_lifted_by_flax_and_by_us_in_both_orders(lift, first):
    t = sg.stop_gradient('a')
    cls = lift(t(Net)) if first == 'mask' else t(lift(Net))
    f = lambda p: jnp.sum(cls().apply(p, 1.0))
    assert live(f) == 'layers_0/b layers_1/b'
    assert live(jax.jit(f)) == 'layers_0/b layers_1/b'


def test_constructors_of_the_users_own():
    class Custom(nn.Module):
        width: int = 2

        def __post_init__(self):
            self.width = max(self.width, 6)
            super().__post_init__()

        @nn.compact
        def __call__(self, x):
            return self.param('w', ones, (self.width,)).sum() * x

    params = {'params': {'w': jnp.ones(6)}}
    held = sg.stop_gradient(True)(Custom)(3)
    assert held.apply(params, 1.0) == 6
    assert not jax.grad(lambda p: held.apply(p, 1.0))(params)['params']['w'].any()

    class Setter(nn.Module):
        def setup(self):
            self.gain = 2.0

        @property
        def gain(self):
            return self.stored

        @gain.setter
        def gain(self, value):
            self.stored = 3 * value

        def __call__(self):
            return self.gain

    assert sg.stop_gradient(True)(Setter)().apply({}) == Setter().apply({}) == 6

    class Keyword(nn.Module, kw_only=True):
        width: int

        @nn.compact
        def __call__(self, x):
            return self.param('w', ones, (self.width,)).sum() * x

    held = sg.stop_gradient(True)(Keyword)(width=6)
    assert not jax.grad(lambda p: held.apply(p, 1.0))(params)['params']['w'].any()


# The order of transforms --------------------------------------------------------------------------
# A class, an instance and a method run their body in the block. So what is around them comes first:
# at w = 5 a `plus` in a `times` makes 5 · 2 + 1 = 11, and a `times` in a `plus` (5 + 1) · 2 = 12.


def plus(path='w'):
    return sg.map_values(path, lambda info, v: v + 1)


def times(path='w'):
    return sg.map_values(path, lambda info, v: v * 2)


NESTS = [(times, plus, 11), (plus, times, 12)]
W = {'params': {'w': jnp.float32(5)}}
IN_MODULE = {'params': {'m': W['params']}}


class Reads(nn.Module):
    """Every method gives w."""

    inner: object = None

    def setup(self):
        self.w = self.param('w', ones, ())
        self.derived = 3 * self.w

    def __call__(self):
        return self.w

    def stored(self):
        return self.get_variable('params', 'w')

    def tree(self):
        return self.variables['params']['w']

    def computed(self):
        return self.derived / 3

    def jitted(self):
        return nn.jit(lambda m: m.w)(self)

    def rematted(self):
        return nn.remat(lambda m: m.get_variable('params', 'w'))(self)

    def looped(self):
        body = lambda m, c, _: (m.w, None)
        return nn.scan(body, variable_broadcast='params', split_rngs={'params': False}, length=2)(
            self, 0.0, None
        )[0]

    def in_a_block(self):
        with self.inner:
            return self.w

    def mirrored(self):
        return self.inner(self)()

    def mirrored_in_a_body(self):
        return nn.remat(lambda m: self.inner(m)())(self)


WAYS = ['__call__', 'stored', 'tree', 'computed', 'jitted', 'rematted', 'looped']


class Holds(nn.Module):
    """Opens a block around a submodule that is lifted in one way."""

    outer: object
    inner: object
    how: str
    way: str

    def setup(self):
        kinds = {'class': self.inner(Reads), 'unbound': lambda: self.inner(Reads())}
        self.m = kinds.get(self.how, Reads)()
        self.held = self.inner(self.m) if self.how == 'mirror' else self.m

    def __call__(self):
        with self.outer:
            return getattr(self.held, self.way)()


class HasReads(nn.Module):
    """Holds a class that is lifted, by the transform that may lift this one too."""

    mask: object

    def setup(self):
        self.m = self.mask(Reads)()

    def __call__(self):
        return self.m()


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('outer, inner, want', NESTS, ids=['11', '12'])
def test_a_block_around_a_lifted_module_comes_first(outer, inner, want, way):
    read, bound, alone = lambda m: getattr(m, way)(), Reads().bind(W), 6 if inner is plus else 10
    inner = inner()
    before, used = inner(bound), inner(bound)
    assert read(used) == alone
    with inner:  # once more
        assert read(used) == (7 if alone == 6 else 20)
    with outer():
        assert read(before) == read(used) == read(inner(bound)) == want
        assert inner(Reads)().apply(W, method=way) == inner(Reads()).apply(W, method=way) == want
        assert read(inner(Reads)().bind(W)) == want
        assert inner(getattr(Reads, way))(bound) == inner(getattr(bound, way))() == want
    assert read(used) == read(before) == alone


@pytest.mark.parametrize('mutable', [False, ['params']])
@pytest.mark.parametrize('how', ['class', 'unbound', 'mirror'])
@pytest.mark.parametrize('outer, inner, want', NESTS, ids=['11', '12'])
def test_a_block_in_a_module_around_a_lifted_one_comes_first(outer, inner, want, how, mutable):
    for way in ('__call__', 'computed', 'rematted', 'looped'):
        out = Holds(outer('m/w'), inner(), how, way).apply(IN_MODULE, mutable=mutable)
        assert (out[0] if mutable else out) == want, way
        if mutable:
            assert out[1] == IN_MODULE  # and nothing is stored back


@pytest.mark.parametrize('outer, inner, want', NESTS, ids=['11', '12'])
def test_the_order_of_lifts_of_lifts_and_of_blocks_inside(outer, inner, want):
    far, outer, inner, bound = outer('m/w'), outer(), inner(), Reads().bind(W)
    for way in ('__call__', 'tree', 'jitted'):
        for module in (outer(inner(Reads))(), outer(inner(Reads)()), outer(inner(Reads()))):
            assert module.apply(W, method=way) == getattr(module.bind(W), way)() == want, way
        assert getattr(outer(inner(bound)), way)() == want, way
        Sub = type('Sub', (inner(Reads),), {})
        assert outer(Sub)().apply(W, method=way) == getattr(outer(Sub().bind(W)), way)() == want
        assert outer(inner(getattr(Reads, way)))(bound) == want
        assert outer(getattr(Reads, way))(inner(bound)) == want  # a method of a mirror
    for module in (outer(inner(Reads))(), outer(inner(Reads)()), outer(Sub)(), outer(Sub())):
        assert module.bind(W).w == outer(inner(bound)).w == want  # read by no method of its own
    with outer:
        assert inner(bound).w == inner(Reads)().bind(W).w == Sub().bind(W).w == want
    assert far(HasReads)(inner).apply(IN_MODULE) == want
    for module in (far(HasReads(inner).bind(IN_MODULE)), far(HasReads)(inner).bind(IN_MODULE)):
        assert module.m.w == module() == want
    both = plus('**/w')
    assert both(HasReads)(both).apply(IN_MODULE) == both(HasReads(both).bind(IN_MODULE))() == 7
    for way in ('mirrored', 'mirrored_in_a_body'):
        with plus():  # an equal one is no reason to leave out the mirror's
            assert Reads(plus()).apply(W, method=way) == 7
    held = Reads(inner)  # which opens a block itself, inside the lifted module's own
    assert outer(Reads)(inner).apply(W, method='in_a_block') == want
    assert outer(held).apply(W, method='in_a_block') == want
    assert outer(held.bind(W)).in_a_block() == want


class Part(nn.Module):
    """Opens a block around reads of its own."""

    mask: sg.Transform

    def setup(self):
        self.w = self.param('w', ones, ())

    def __call__(self):
        with self.mask:
            return self.w

    def method(self):
        return self.mask(type(self).read)(self)

    def read(self):
        return self.get_variable('params', 'w')

    @nn.remat
    def body(self):
        with self.mask:
            return self.w

    def around_a_body(self):
        with self.mask:
            return nn.remat(type(self).read)(self)

    def around_a_scan(self):
        scan = nn.scan(
            lambda m, c, _: (c, m.w),
            variable_broadcast='params',
            length=1,
            split_rngs={'params': False},
        )
        with self.mask:
            return scan(self, None, None)[1].sum()

    def mirror(self):
        return self.mask(self).read()

    @property
    def prop(self):
        with self.mask:
            return self.w


class HasPart(nn.Module):
    part: nn.Module

    def __call__(self):
        return self.part()


@pytest.mark.thinned(5)
@pytest.mark.parametrize('mutable', [False, ['params']])
@pytest.mark.parametrize('how', ['class', 'mirror', 'mirror of a mirror'])
@pytest.mark.parametrize(
    'way',
    ['__call__', 'method', 'body', 'around_a_body', 'around_a_scan', 'mirror', 'prop', 'lifted'],
)
@pytest.mark.parametrize('outer, inner, want', NESTS, ids=['11', '12'])
def test_a_block_in_a_part_of_a_lifted_module_is_inside_it(outer, inner, want, way, how, mutable):
    """Also where the part is used from outside, and no method of the lifted module runs."""
    lift, cls = outer('**/w'), inner()(Part) if way == 'lifted' else Part
    method = '__call__' if way == 'lifted' else way
    nothing = sg.map_values(sg.nothing, lambda info, value: value)
    read = lambda part: part.prop if way == 'prop' else getattr(part, method)()

    class Root(nn.Module):
        def setup(self):
            mask = nothing if way == 'lifted' else inner()
            self.m = (lift(HasPart) if how == 'class' else HasPart)(cls(mask))

        def __call__(self):
            m = self.m
            if how != 'class':
                m = lift(m)
            if how == 'mirror of a mirror':
                m = nothing(m)
            with sg.map_values('m/part/w', lambda info, v: v + 100):
                around = read(m.part)
            return read(m.part), around

    variables = {'params': {'m': {'part': W['params']}}}
    out = Root().apply(variables, mutable=mutable)
    got, around = out[0] if mutable else out
    assert got == want
    assert around == want + (200 if outer is times or inner is times else 100)
    if mutable:
        assert out[1] == variables


class Mirrors(nn.Module):
    """Makes a mirror of its part, and reads through that."""

    mask: sg.Transform

    def setup(self):
        self.part = Reads()

    def __call__(self):
        return self.mask(self.part)()


@pytest.mark.parametrize('outer, inner, want', NESTS, ids=['11', '12'])
def test_what_is_around_a_part_of_a_lifted_module(outer, inner, want):
    """What the lifted module itself does to a part is inside; what others do is around."""
    variables = {'params': {'part': W['params']}}
    for lift in (outer('**/w'), outer('part')):
        assert lift(Mirrors)(inner()).apply(variables) == want
        assert lift(Mirrors)(inner()).bind(variables)() == lift(Mirrors(inner()).bind(variables))()
    lift, around, outer = inner('**/w'), outer('**/w'), outer()
    for lifted in (lift(Mirrors)(inner()).bind(variables), lift(Mirrors(inner()).bind(variables))):
        assert outer(lifted.part)() == outer(lifted.part).w == want
        assert outer(Reads.__call__)(lifted.part) == outer(lifted.part.computed)() == want
        with around:
            assert lifted.part.w == lifted.part() == want


# Methods ------------------------------------------------------------------------------------------


class Sub(sg.stop_gradient('a')(Net)):
    def more(self, x):
        return self.half(x) + self.a + self.layers[1](x)


def test_a_subclass_of_a_lifted_class():
    for method in ('__call__', 'more', lambda m, x: m.a + m.layers[0](x) + m[1]):
        want = 'layers_0/b layers_1/b'
        assert live(lambda p, method=method: Sub().apply(p, 1.0, method=method)) == want
    again = pickle.loads(pickle.dumps(Sub()))
    assert type(again) is Sub and live(lambda p: again.apply(p, 1.0)) == want
    deeper = sg.stop_gradient('layers_0')(Sub)
    assert live(lambda p: deeper().apply(p, 1.0, method='more')) == 'layers_1/b'


def test_lifted_many_times():
    cls, mirrored = Net, lambda p: Net().bind(p)
    for pattern, want in [
        ('a', 'layers_0/b layers_1/b'),
        ('layers_0', 'layers_1/b'),
        ('layers_1', ''),
        ('a', ''),
    ]:
        transform = sg.stop_gradient(pattern)
        cls = transform(cls)
        mirrored = functools.partial(lambda p, t, of: t(of(p)), t=transform, of=mirrored)
        again = pickle.loads(pickle.dumps(cls()))
        for f in (cls().apply, again.apply, lambda p, x, of=mirrored: of(p)(x)):
            assert live(lambda p, f=f: f(p, 1.0)) == want


class FromTwo(sg.stop_gradient('a')(Net), sg.stop_gradient('layers_0')(Net)):
    pass


def test_a_subclass_of_two_lifted_classes_has_the_transforms_of_both():
    for method in ('__call__', lambda m, x: m.a + m.layers[0](x) + m[1]):
        assert live(lambda p, method=method: FromTwo().apply(p, 1.0, method=method)) == 'layers_1/b'


class Methods(nn.Module):
    def setup(self):
        self.a = self.param('a', ones, ())
        self.leaf = Leaf()

    @sg.stop_gradient('a')
    def __call__(self, x):
        return self.free(x)

    def free(self, x):
        return self.a * x + self.leaf(x)

    @sg.stop_gradient('leaf')
    @sg.stop_gradient('a', allow_unmatched=True)
    def both(self, x):
        return self.free(x)

    @nn.jit
    @sg.stop_gradient('a')
    def jitted(self, x):
        return self.free(x)

    @sg.stop_gradient('a')
    @nn.remat
    def rematted(self, x):
        return self.free(x)


METHODS = {'params': {'a': 1.0, 'leaf': {'b': 1.0}}}


@pytest.mark.parametrize(
    'method, want',
    [
        ('__call__', 'leaf/b'),
        ('free', 'a leaf/b'),
        ('both', ''),
        ('jitted', 'leaf/b'),
        ('rematted', 'leaf/b'),
    ],
)
def test_methods(method, want):
    assert live(lambda p: Methods().apply(p, 1.0, method=method), METHODS) == want
    assert live(lambda p: getattr(Methods().bind(p), method)(1.0), METHODS) == want
    f = lambda p: sum(Methods().apply(p, 1.0, method=m) for m in (method, 'free', method))
    assert live(f, METHODS) == 'a leaf/b'


@pytest.mark.parametrize('below', [True, False])
def test_compact_methods_in_both_orders_of_decorators(below):
    t = sg.stop_gradient('w')

    def call(self, x):
        return self.param('w', ones, ()) * x + Leaf(name='leaf')(x)

    class Compact(nn.Module):
        __call__ = nn.compact(t(call)) if below else t(nn.compact(call))

    params = Compact().init(jax.random.key(0), 1.0)
    assert set(params['params']) == {'w', 'leaf'}
    assert live(lambda p: Compact().apply(p, 1.0), params) == 'leaf/b'


def test_a_bound_method_and_a_function_of_a_module():
    t = sg.stop_gradient('a')

    def g(p):
        bound = Methods().bind(p)
        return t(bound.free)(1.0) + t(lambda m, x: m.free(x))(bound, 1.0)

    assert live(g, METHODS) == 'leaf/b'
    assert jax.grad(g)(METHODS)['params']['leaf']['b'] == 2


def test_a_decorated_function_wants_a_module_first():
    @sg.stop_gradient('a')
    def f(x):
        return x

    with pytest.raises(
        sg.UsageError,
        match=(
            r"stop_gradient\('a'\) decorates 'f', whose first argument should be a "
            'flax.linen.Module( or flax.nnx.Module)?; got float. Decorate a method of a Module, or '
            'open a block with `with`.'
        ),
    ):
        f(1.0)
    with pytest.raises(sg.UsageError, match='got no argument'):
        f()


class Helped(nn.Module):
    """Its helpers are called on a module that is not bound, and apply it."""

    @nn.compact
    def __call__(self, x=1.0):
        return self.param('a', ones, ()) * x + self.param('b', ones, ())

    @nn.nowrap
    def loss(self, params):
        return self.apply(params)


FLAX_METHODS = {
    'apply': lambda t, p: t(Helped().apply)(p, 1.0),
    'apply of the class': lambda t, p: t(Helped.apply)(Helped(), p, 1.0),
    'apply of a bound one': lambda t, p: t(Helped().bind(p).apply)(p, 1.0),
    'apply, jitted': lambda t, p: jax.jit(t(Helped().apply))(p, 1.0),
    'bind': lambda t, p: t(Helped().bind)(p)(1.0),
    'unbind': lambda t, p: (lambda module, values: module.apply(values))(
        *t(Helped().bind(p).unbind)()
    ),
    'get_variable': lambda t, p: sum(
        t(Helped().bind(p).get_variable)('params', name) for name in 'ab'
    ),
    'method=': lambda t, p: Helped().apply(p, method=t(Helped().__call__)),
    'a helper': lambda t, p: t(Helped.loss)(Helped(), p),
    'a helper of an instance': lambda t, p: t(Helped().loss)(p),
    'a helper of a lifted class': lambda t, p: t(Helped)().loss(p),
}


@pytest.mark.parametrize('how', FLAX_METHODS)
def test_methods_that_flax_gives_a_module_and_helpers_of_unbound_ones(how):
    use = FLAX_METHODS[how]
    params = {'params': {'a': jnp.ones(()), 'b': jnp.ones(())}}
    grads = lambda t: jax.grad(lambda p: use(t, p))(params)['params']
    assert grads(sg.stop_gradient('a')) == {'a': 0, 'b': 1}
    assert grads(sg.scale_gradient('a', 3.0)) == {'a': 3, 'b': 1}
    assert use(sg.map_values('a', lambda info, w: w + 1), params) == 3
    with pytest.raises(sg.UnmatchedPathError, match=r"no variable of '/' matches 'typo'"):
        use(sg.stop_gradient('typo'), params)
    assert grads(sg.stop_gradient('typo', allow_unmatched=True)) == {'a': 1, 'b': 1}


def test_a_lifted_part_of_a_lifted_module_is_unbound_in_what_is_around_it():
    class Outer(nn.Module):
        def setup(self):
            self.part = sg.scale_gradient('a', 3.0)(Helped)()

        def __call__(self):
            return self.part()

    def run(p):
        outer = sg.scale_gradient('part/a', 5.0)(Outer)().bind({'params': {'part': p}})
        module, variables = outer.part.unbind()
        return module.apply(variables) + 100 * module.apply({'params': p})

    params = {'a': jnp.ones(()), 'b': jnp.ones(())}
    assert jax.grad(run)(params) == {'a': 315, 'b': 101}


@pytest.mark.parametrize('how', ['apply', 'decorated', 'bound'])
def test_a_helper_of_an_unbound_module_that_a_running_module_calls(how):
    t = sg.scale_gradient('a', 3.0)

    class Decorated(Helped):
        @t
        @nn.nowrap
        def loss(self, params):
            return self.apply(params)

    class Outer(nn.Module):
        helper: nn.Module = Decorated(parent=None)

        @nn.compact
        def __call__(self):
            part = Helped(name='part')
            if self.is_initializing():
                return part()
            values = {'params': part.variables['params']}
            helper = Decorated(parent=None)
            return {
                'apply': lambda: t(helper.apply)(values),
                'decorated': lambda: helper.loss(values),
                'bound': lambda: t(helper.bind)(values)(),
            }[how]()

    params = Outer().init(jax.random.key(0))
    for _ in range(2):
        assert jax.grad(Outer().apply)(params)['params']['part'] == {'a': 3, 'b': 1}
        assert jax.grad(Decorated().loss)({'params': params['params']['part']})['params'] == {
            'a': 3,
            'b': 1,
        }


def test_methods_of_flax_that_read_and_create_in_a_module():
    class Net(nn.Module):
        t: object

        @nn.compact
        def __call__(self):
            a = self.t(self.param)('a', ones, ())
            b = self.t(self.variable)('params', 'b', jnp.ones, ()).value
            return a + b + self.t(self.get_variable)('params', 'a')

    t = sg.scale_gradient('a', 3.0, allow_unmatched=True)
    params = Net(lambda f: f).init(jax.random.key(0))
    assert Net(t).init(jax.random.key(0)) == params
    assert jax.grad(Net(t).apply)(params)['params'] == {'a': 6, 'b': 1}


# A user's subclass of a lifted class ------------------------------------------------------------


class WithPart(nn.Module):
    part: nn.Module

    def __call__(self, x=1.0):
        return self.part(x)


def by_descriptor(kind, lifted):
    class Below(lifted):
        @kind
        def run(self):
            return self.part(1.0)

        def __call__(self, x=1.0):
            return self.run

    return Below


def by_method(lifted):
    class Below(lifted):
        activation: object = lambda x: x  # a field, and no method

        def run(self, x):
            return self.activation(self.part(x))

        def __call__(self, x=1.0):
            return self.run(x)

    return Below


def by_super(lifted):
    class Below(lifted):
        def __call__(self, x=1.0):
            return super().__call__(x)

    return Below


def by_subclass(lifted):
    class Further(by_method(lifted)):
        @nn.compact
        def __call__(self, x=1.0):
            return self.part(x) + 0 * self.param('own', ones, ())

    return Further


def by_compact_and_remat(lifted):
    class Below(lifted):
        @nn.remat
        @nn.compact
        def __call__(self, x=1.0):
            return self.part(x) + 0 * self.param('own', ones, ())

    return Below


def by_alias(lifted):
    class Below(lifted):
        def run(self, x=1.0):
            return self.part(x)

        __call__ = run

    return Below


class CallsPart:
    """No module, but a part of some."""

    def __call__(self, x=1.0):
        return self.part(x)

    @property
    def read(self):
        return self.part(1.0)

    def run(self, x):
        return self.part(x)


def by_mixin(lifted):
    class Below(CallsPart, lifted):
        pass

    return Below


def by_another_module(lifted):
    class Calls(nn.Module):
        def __call__(self, x=1.0):
            return self.part(x)

    class Below(Calls, lifted):
        pass

    return Below


BELOW = [
    lambda lifted: lifted,
    functools.partial(by_descriptor, property),
    by_method,
    by_super,
    by_subclass,
    by_compact_and_remat,
    functools.partial(by_descriptor, functools.cached_property),
    by_alias,
    by_mixin,
    by_another_module,
]


@pytest.mark.parametrize('below', BELOW)
@pytest.mark.parametrize(
    't, want',
    [
        (sg.stop_gradient(True), 0),
        (sg.scale_gradient(True, 3.0), 3),
        (sg.constant(True), 0),
        (sg.map_gradient(True, lambda info, ct: ct + 4), 5),
    ],
    ids=['stop', 'scale', 'constant', 'map'],
)
def test_methods_of_a_subclass_cover_what_the_module_is_handed(below, t, want):
    cls = below(t(WithPart))

    class Outer(nn.Module):
        def setup(self):
            self.shared = Leaf()
            self.head = cls(self.shared)

        def __call__(self):
            return self.head() + 100 * self.shared(1.0)

    params = Outer().init(jax.random.key(0))
    assert jax.grad(Outer().apply)(params)['params']['shared'] == {'b': 100 + want}


class WithMixin(CallsPart, nn.Module):
    part: nn.Module
    activation: object = lambda x: x


@pytest.mark.parametrize(
    'read', [lambda m: m(), lambda m: m.read, lambda m: m.run(1.0), lambda m: m.activation(m())]
)
@pytest.mark.parametrize('use', ['class', 'mirror', 'subclass'])
def test_methods_of_a_mixin_cover_what_the_module_is_handed(use, read):
    t = sg.scale_gradient(True, 3.0)

    class Outer(nn.Module):
        def setup(self):
            self.shared = Leaf()
            cls = {
                'class': t(WithMixin),
                'subclass': type('Below', (t(WithMixin),), {'__module__': __name__}),
            }.get(use, WithMixin)
            self.head = cls(self.shared)
            self.lifted = t(self.head) if use == 'mirror' else self.head

        def __call__(self):
            return read(self.lifted) + 100 * self.shared(1.0)

    params = {'params': {'shared': {'b': jnp.ones(())}}}
    assert jax.grad(Outer().apply)(params)['params']['shared'] == {'b': 103}


class ReadsPart:
    def __get__(self, module, owner=None):
        return self if module is None else module.part(1.0)


class ReadsPartAndIsSet(ReadsPart):
    def __set__(self, module, value):
        raise AttributeError('not to be set')


class Callback:
    def __get__(self, module, owner=None):
        return self if module is None else functools.partial(self, module)

    def __call__(self, module, x):
        return module.part(x)


class Described(nn.Module):
    part: nn.Module
    value, set_value, callback = ReadsPart(), ReadsPartAndIsSet(), Callback()
    partial = functools.partialmethod(lambda self, x, k: self.part(x) * k, k=1.0)

    @functools.singledispatchmethod
    def dispatched(self, x):
        return self.part(x)

    @staticmethod
    def static(module, x):
        return module.part(x)

    def __call__(self):
        return self.static(self, 1.0)


@pytest.mark.parametrize(
    'read',
    [
        lambda m: m.value,
        lambda m: m.set_value,
        lambda m: m.callback(1.0),
        lambda m: m.partial(1.0),
        lambda m: m.dispatched(1.0),
        lambda m: m(),
    ],
)
@pytest.mark.parametrize('use', ['class', 'mirror', 'subclass', 'mixin'])
def test_descriptors_cover_what_the_module_is_handed(use, read):
    t = sg.scale_gradient(True, 3.0)
    made = {'__module__': __name__}
    mixin = type(
        'Mixin',
        (),
        {
            name: member
            for name, member in vars(Described).items()
            if name
            in ('value', 'set_value', 'callback', 'partial', 'dispatched', '__call__', 'static')
        },
    )
    cls = {
        'class': lambda: t(Described),
        'mirror': lambda: Described,
        'subclass': lambda: type('Below', (t(Described),), made),
        'mixin': lambda: type('Below', (mixin, t(WithPart)), made),
    }[use]()

    class Outer(nn.Module):
        def setup(self):
            self.shared = Leaf()
            self.head = cls(self.shared)
            self.lifted = t(self.head) if use == 'mirror' else self.head

        def __call__(self):
            return read(self.lifted) + 100 * self.shared(1.0)

    params = {'params': {'shared': {'b': jnp.ones(())}}}
    assert jax.grad(Outer().apply)(params)['params']['shared'] == {'b': 103}


def test_methods_of_a_mixin_are_as_unknown_to_flax_as_without_the_transform():
    def seen(cls):
        calls = []

        def note(call, args, kwargs, context):
            calls.append((type(context.module).__name__, context.method_name))
            return call(*args, **kwargs)

        module = cls(Leaf(name='part')).bind({'params': {'part': {'b': jnp.ones(())}}})
        with nn.intercept_methods(note):
            module.run(1.0)
        return calls

    assert seen(sg.stop_gradient(True)(WithMixin)) == seen(WithMixin) != []


def test_a_transformed_method_of_flax_in_a_module():
    class Outer(nn.Module):
        t: object

        @nn.compact
        def __call__(self):
            part = Helped(name='part')
            if self.is_initializing():
                return part()
            return self.t(part.apply)({'params': part.variables['params']})

    params = Outer(None).init(jax.random.key(0))['params']
    grads = lambda t: jax.grad(lambda p: Outer(t).apply({'params': p}))(params)['part']
    assert grads(sg.stop_gradient('a')) == {'a': 0, 'b': 1}
    assert grads(sg.scale_gradient('a', 3.0)) == {'a': 3, 'b': 1}
    with pytest.raises(sg.UnmatchedPathError, match='typo'):
        grads(sg.stop_gradient('typo'))


def test_a_method_of_an_unbound_module_runs():
    class Config(nn.Module):
        width: int = 3

        @sg.stop_gradient(True)
        def doubled(self):
            return self.width * 2

        def start(self, key):
            return self.init(key)

        @nn.compact
        def __call__(self):
            return self.param('w', ones, ())

    assert Config().doubled() == 6
    assert sg.stop_gradient(True)(Config)().doubled() == 6
    assert sg.stop_gradient('w')(Config)().start(jax.random.key(0)) == {'params': {'w': 1.0}}


def test_unmatched_patterns_of_lifted_modules():
    for use in (
        lambda t: t(Net)().apply(PARAMS, 1.0),
        lambda t: t(Net().bind(PARAMS))(1.0),
        lambda t: t(Net()).apply(PARAMS, 1.0),
        lambda t: t(Net().bind(PARAMS)).get_variable('params', 'a'),
        lambda t: t(Net)().bind(PARAMS).variables['params']['a'],
        lambda t: t(Net.half)(Net().bind(PARAMS), 1.0),
    ):
        with pytest.raises(
            sg.UnmatchedPathError,
            match=(r"^stop_gradient\('b'\): no variable of '/' matches 'b'\. Perhaps '"),
        ):
            use(sg.stop_gradient('b'))
        assert use(sg.stop_gradient('b', allow_unmatched=True)) > 0
        assert use(sg.stop_gradient('layers_1')) > 0


# Mirrors and lifted classes in Flax's lifted functions ----------------------------------------


class Step(nn.Module):
    def setup(self):
        self.w = self.param('w', ones, ())
        self.v = self.param('v', ones, ())

    def __call__(self, c, _):
        return c * self.w + self.v, None


class Steps(nn.Module):
    body: object

    def setup(self):
        self.step = Step()
        self.held = sg.stop_gradient('w')(self.step)

    def __call__(self):
        return self.body(self.step, self.held)


def scanned(module):
    scan = nn.scan(
        lambda m, c, x: m(c, x), variable_broadcast='params', split_rngs={'params': False}, length=2
    )
    return scan(module, 1.0, None)[0]


@pytest.mark.parametrize(
    'body, want',
    [  # w² + w v + v, or w + v
        (lambda step, held: scanned(step), {'w': 3, 'v': 2}),
        (lambda step, held: scanned(held), {'w': 0, 'v': 2}),
        (lambda step, held: scanned(held) + scanned(step), {'w': 3, 'v': 4}),
        (
            lambda step, held: nn.remat(lambda a, b: a(1.0, None)[0] + 10 * b(1.0, None)[0])(
                held, step
            ),
            {'w': 10, 'v': 11},
        ),
        (
            lambda step, held: nn.remat(lambda a, b: a(1.0, None)[0] + 10 * b(1.0, None)[0])(
                step, held
            ),
            {'w': 1, 'v': 11},
        ),
        (lambda step, held: nn.jit(lambda a, b: a.w + 10 * b.w)(step, held), {'w': 1, 'v': 0}),
    ],
)
def test_mirrors_handed_to_lifted_functions(body, want):
    params = Steps(body).init(jax.random.key(0))
    assert set(params['params']) == {'step'}
    assert jax.grad(lambda p: Steps(body).apply(p))(params)['params']['step'] == want


@pytest.mark.parametrize('first', ['mask', 'lift'])
def test_a_scan_over_layers_of_a_lifted_class(first):
    t = sg.stop_gradient('w')
    scan = functools.partial(
        nn.scan, variable_axes={'params': 0}, split_rngs={'params': True}, length=3
    )
    Layers = scan(t(Step)) if first == 'mask' else t(scan(Step))

    class Net(nn.Module):
        @nn.compact
        def __call__(self):
            return Layers(name='layers')(1.0, None)[0]

    grads = jax.grad(lambda p: Net().apply(p))(Net().init(jax.random.key(0)))['params']['layers']
    assert not grads['w'].any() and grads['v'].tolist() == [1, 1, 1]


class Scaled(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x * self.param('w', nn.initializers.ones, (3,)), None


PER_LAYER = dict(variable_axes={'params': 0}, split_rngs={'params': True})
REPEATED = {
    'scan': lambda cls: nn.scan(cls, length=2, **PER_LAYER),
    'scan of remat': lambda cls: nn.scan(nn.remat(cls), length=2, **PER_LAYER),
    'remat of scan': lambda cls: nn.remat(nn.scan(cls, length=2, **PER_LAYER)),
    'vmap': lambda cls: nn.vmap(cls, in_axes=None, axis_size=2, **PER_LAYER),
    'methods': lambda cls: nn.scan(cls, length=2, methods=['__call__'], **PER_LAYER),
}


def below(cls):
    class Below(cls):
        def __call__(self, x):
            return super().__call__(x)

    return Below


def shrink(info, value):
    return value / (1 + jnp.sum(value**2))


@pytest.mark.thinned(7)
@pytest.mark.parametrize(
    'sees, make',
    [
        ('a layer', lambda t, other, repeat: repeat(t(Scaled))),
        ('a layer', lambda t, other, repeat: repeat(below(t(Scaled)))),
        ('a layer', lambda t, other, repeat: below(repeat(t(Scaled)))),
        ('a layer', lambda t, other, repeat: repeat(other(t(Scaled)))),
        ('a layer', lambda t, other, repeat: repeat(t(other(Scaled)))),
        ('a layer', lambda t, other, repeat: other(repeat(t(Scaled)))),
        ('a layer', lambda t, other, repeat: other(below(repeat(t(Scaled))))),
        ('a layer', lambda t, other, repeat: below(other(repeat(t(Scaled))))),
        ('all layers', lambda t, other, repeat: t(repeat(Scaled))),
        ('all layers', lambda t, other, repeat: below(t(repeat(Scaled)))),
        ('all layers', lambda t, other, repeat: t(repeat(other(Scaled)))),
    ],
)
@pytest.mark.parametrize('repeat', REPEATED)
@pytest.mark.parametrize('method', ['map_values', 'map_gradient'])
def test_a_lifted_class_opens_in_the_body_of_what_repeats_it(method, repeat, sees, make):
    cls = make(getattr(sg, method)(True, shrink), sg.scale_gradient(True, 1.0), REPEATED[repeat])
    weights, x = jnp.linspace(1.0, 2.0, 6).reshape(2, 3), jnp.arange(1.0, 4.0)
    whole = functools.partial(shrink, None)
    shrunk = whole if sees == 'all layers' else jax.vmap(whole)

    def masked(weights):
        return jnp.sum(cls().apply({'params': {'w': weights}}, x)[0] ** 2)

    def by_hand(weights):
        weights = shrunk(weights) if method == 'map_values' else weights
        out = x * weights if repeat == 'vmap' else x * weights[0] * weights[1]
        return jnp.sum(out**2)

    want = jax.grad(by_hand)(weights)
    want = shrunk(want) if method == 'map_gradient' else want
    np.testing.assert_allclose(jax.grad(masked)(weights), want, rtol=1e-5)


class Pair(nn.Module):
    def setup(self):
        self.a, self.b = Scale(), Scale()

    def __call__(self, x):
        return self.a(x) * self.b(x)


class SharesField(nn.Module):
    """Shares its scope with a module that it was given: Flax compares scopes as objects."""

    inner: nn.Module

    def setup(self):
        nn.share_scope(self, self.inner)

    def __call__(self, x):
        return self.inner(x) + self.inner.a(x)


class SharesDeeper(SharesField):
    def setup(self):
        nn.share_scope(self, self.inner.a)


class HandsIn(nn.Module):
    """Hands in a module of its own, which lies beside the one that shares its scope with it."""

    make: Callable

    @nn.compact
    def __call__(self, x):
        return self.make(Pair())(x)


def mapped_alike(cls):
    return nn.vmap(cls, variable_axes={'params': None}, split_rngs={'params': False})


@pytest.mark.parametrize(
    't',
    [sg.stop_gradient('**/b'), sg.map_values('**/b/w', lambda info, w: 2 * w)],
    ids=['stop', 'map'],
)
@pytest.mark.parametrize('lift', [nn.jit, nn.remat, mapped_alike])
@pytest.mark.parametrize('cls', [SharesField, SharesDeeper])
@pytest.mark.parametrize('handed_in', [False, True])
def test_scopes_lie_in_one_another_in_a_lifted_body(handed_in, cls, lift, t):
    """The names are those of the plain program; values and gradients those of the tree."""
    makes = {
        'lift of class': lambda of: lift(t(cls))(of),
        'class of lift': lambda of: t(lift(cls))(of),
        'both': lambda of: lift(sg.stop_gradient(sg.nothing)(t(cls)))(of),
        'instance': lambda of: t(lift(cls)(of)),
    }
    x = jnp.arange(1.0, 3.0)

    def model(make):
        return HandsIn(make) if handed_in else make(Pair())

    plain = model(lift(cls))
    variables = plain.init(jax.random.key(0), x)
    params = jax.tree.map(lambda w: w + 2, variables['params'])

    def loss(make):
        return lambda params: model(make).apply({'params': params}, x).sum()

    def oracle(params):
        return plain.apply({'params': t(params)}, x).sum()

    for make in makes.values():
        initial = model(make).init(jax.random.key(0), x)
        assert jax.tree.structure(initial) == jax.tree.structure(variables)
        for run in (lambda f: f, jax.grad):
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=1e-6),
                run(loss(make))(params),
                run(oracle)(params),
            )
