"""Equal layers under nn.jit share one trace: what asks for a name must have one of its own.

Each program has layers a and b, the weights of which have the gradients 1 and 3 where they are
live. By hand, they are two calls of a function with two copies of the parameters.
"""

import jax
import jax.numpy as jnp
import pytest

import flax_sg as sg
from flax_sg import nn
from models import Scale

ones, one = nn.initializers.ones, jnp.ones(())


def net(layer):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layer(name='a')(x) + 3 * layer(name='b')(x)

    return Net()


PARAMS = {name: {'d': {'w': one}} for name in 'ab'}


def slopes(model, params=PARAMS, mutable=False, **variables):
    def loss(params):
        out = model.apply({'params': params, **variables}, 1.0, mutable=mutable)
        return out if mutable is False else out[0]

    grads = jax.grad(loss)(params)
    return tuple(float(sum(jax.tree.leaves(grads[name]))) for name in 'ab')


def block(t):
    """Open a block in the body."""

    def body(self, x):
        with t:
            return Scale(name='d')(x)

    return body


def klass(t):
    """Lift a class outside of the body."""
    held = t(Scale)
    return lambda self, x: held(name='d')(x)


def klass_inside(t):
    """Lift it in the body."""
    return lambda self, x: t(Scale)(name='d')(x)


def mirror(t):
    return lambda self, x: t(Scale(name='d'))(x)


def method(t):
    return lambda self, x: t(lambda module, x: module(x))(Scale(name='d'), x)


def decorated(t):
    @t
    def body(self, x):
        return Scale(name='d')(x)

    return body


USES = [block, klass, klass_inside, mirror, method, decorated]
first = lambda info: info.absolute_path[0] == 'a'
ASK = {
    'absolute glob': sg.stop_gradient('/a', allow_unmatched=True),
    'name': sg.stop_gradient(lambda v: v.absolute_name.startswith('a'), allow_unmatched=True),
    'path': sg.stop_gradient(first, allow_unmatched=True),
    'map_values': sg.map_values(True, lambda info, w: w * (0 if first(info) else 1)),
    'map_gradient': sg.map_gradient(True, lambda info, ct: ct * (0 if first(info) else 1)),
    'repr': sg.map_values(True, lambda info, w: w * ("'a'" not in repr(info))),
    'all but one': sg.stop_gradient(~sg.path('/b'), allow_unmatched=True),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    'mutable',
    [
        pytest.param(False, id='fixed'),
        pytest.param(['params'], id='mutable', marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize('ask', ASK)
@pytest.mark.parametrize(
    'use',
    [
        pytest.param(use, marks=[pytest.mark.long] * (use in (klass_inside, method, decorated)))
        for use in USES
    ],
)
def test_what_asks_for_absolute_names_in_the_body(use, ask, mutable):
    class Layer(nn.Module):
        __call__ = nn.jit(nn.compact(use(ASK[ask])))

    for _ in range(2):
        assert slopes(net(Layer), mutable=mutable) == (0, 3)


def test_each_function_under_nn_jit_has_its_own_answers():
    class Asks(nn.Module):
        __call__ = nn.jit(nn.compact(block(ASK['absolute glob'])))

    class Nested(nn.Module):
        """It calls what asks, and so asks too."""

        @nn.jit
        @nn.compact
        def __call__(self, x):
            return Asks(name='d')(x)

    params = {name: {'d': {'d': {'w': one}}} for name in 'ab'}
    assert slopes(net(Nested), params) == (0, 3)
    assert slopes(net(Asks)) == (0, 3)
    assert slopes(net(Nested), params) == (0, 3)


def test_a_function_inside_that_was_traced_before_tells_the_one_around_it():
    """The inner trace is found in JAX's caches, so nothing is asked while the outer is made."""

    class Inner(nn.Module):
        __call__ = nn.jit(nn.compact(block(ASK['path'])))

    class Outer(nn.Module):
        inner: nn.Module

        @nn.jit
        @nn.compact
        def __call__(self, x):
            return self.inner.clone(name='d', parent=self)(x)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            warm = Inner(name='warm')(x)
            return (
                0 * warm
                + Outer(Inner(parent=None), name='a')(x)
                + 3 * Outer(Inner(parent=None), name='b')(x)
            )

    params = {'warm': {'d': {'w': one}}, **{n: {'d': {'d': {'w': one}}} for n in 'ab'}}
    assert slopes(Net(), params) == (0, 3)


@pytest.mark.parametrize('order', ['ab', 'ba', 'aab', 'abab'])
@pytest.mark.parametrize(
    'predicate',
    ['a', lambda v: v.name.startswith('a'), sg.regex('^a/')],
    ids=['glob', 'callable', 'regex'],
)
def test_a_collection_that_the_body_creates(order, predicate):
    class Layer(nn.Module):
        @nn.jit
        @nn.compact
        def __call__(self, x):
            return self.variable('cache', 'v', lambda: self.param('w', ones, ()) * x).value

    class Net(nn.Module):
        layer: str

        @nn.compact
        def __call__(self, x):
            with nn.stop_gradient(predicate, collections='cache', allow_unmatched=True):
                return Layer(name=self.layer)(x)

    for name in order:
        grads = jax.grad(lambda p, n=name: Net(n).apply({'params': p}, 1.0, mutable=['cache'])[0])(
            {name: {'w': one}}
        )
        assert float(grads[name]['w']) == (name != 'a')


@pytest.mark.parametrize('order', ['ab', 'ba'])
def test_gradients_through_init(order):
    """What init creates in a body is asked about by the name that it has there."""

    class Layer(nn.Module):
        @nn.jit
        @nn.compact
        def __call__(self, x):
            return self.param('w', lambda key: x) * 1.0

    class Net(nn.Module):
        @nn.compact
        def __call__(self, xs):
            with nn.stop_gradient('a'):
                return sum(w * Layer(name=n)(xs[n]) for n, w in zip(order, (1, 3), strict=True))

    grads = jax.grad(lambda xs: Net().init_with_output(jax.random.key(0), xs)[0])(
        {'a': one, 'b': one}
    )
    want = dict(zip(order, (1, 3), strict=True))
    assert float(grads['a']) == 0 and float(grads['b']) == want['b']


def counted():
    traces = []

    class Layer(nn.Module):
        @nn.jit
        @nn.compact
        def __call__(self, x):
            traces.append(1)
            return nn.Dense(4, use_bias=False)(x)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(6):
                x = Layer()(x)
            return x

    return Net(), traces


@pytest.mark.thinned(5)
@pytest.mark.parametrize(
    'predicate',
    [
        True,
        sg.nothing,
        'Layer_*',
        '**/kernel',
        'nowhere',
        lambda v: False,
        sg.path('Layer_*') & ~sg.path('**/bias'),
    ],
    ids=['all', 'nothing', 'layers', 'kernels', 'nowhere', 'callable', 'combination'],
)
@pytest.mark.parametrize('where', ['init', 'mutable', 'fixed', 'init inside'])
def test_equal_layers_are_traced_once_in_a_block_as_they_are_without(where, predicate):
    model, traces = counted()
    x = jnp.ones((2, 4))
    params = model.init(jax.random.key(0), x)
    t = sg.stop_gradient(predicate, allow_unmatched=True)
    run = {
        'init': lambda: model.init(jax.random.key(0), x),
        'init inside': lambda: jax.jit(model.init)(jax.random.key(0), x),
        'mutable': lambda: jax.grad(lambda p: model.apply(p, x, mutable=True)[0].sum())(params),
        'fixed': lambda: jax.grad(lambda p: model.apply(p, x).sum())(params),
    }[where]
    counts = []
    for open_it in (False, True):
        jax.clear_caches()
        traces.clear()
        if open_it:
            with t:
                run()
        else:
            run()
        counts.append(len(traces))
    assert counts[1] == counts[0] <= 2


def test_layers_of_which_some_are_selected_are_traced_once_for_each_answer():
    model, traces = counted()
    x = jnp.ones((2, 4))
    params = model.init(jax.random.key(0), x)
    traces.clear()
    with sg.stop_gradient(['Layer_1', 'Layer_3']):
        grads = jax.grad(lambda p: model.apply(p, x, mutable=['params'])[0].sum())(params)['params']
    assert len(traces) == 2
    held = {name for name, layer in grads.items() if not layer['Dense_0']['kernel'].any()}
    assert held == {'Layer_1', 'Layer_3'}


def test_a_program_without_blocks_is_traced_as_often_whatever_ran_before_it():
    model, traces = counted()
    x = jnp.ones((2, 4))
    params = model.init(jax.random.key(0), x)

    def count():
        traces.clear()
        jax.clear_caches()
        jax.make_jaxpr(model.apply)(params, x)
        return len(traces)

    class Other(nn.Module):
        @nn.jit
        @nn.compact
        def __call__(self, x):
            with nn.stop_gradient(lambda v: v.absolute_name == 'b'):
                return x * self.param('b', ones, ())

    before = count()
    with sg.stop_gradient(lambda v: v.absolute_path[0] == 'Layer_0'):
        model.apply(params, x, mutable=True)
    Other().apply(Other().init(jax.random.key(0), 1.0), 1.0)
    assert count() == before == 1


@pytest.mark.parametrize('first', ['block', 'none'])
def test_a_function_asks_in_some_blocks_and_not_in_others(first):
    class Layer(nn.Module):
        __call__ = nn.jit(nn.compact(lambda self, x: Scale(name='d')(x)))

    asks = sg.map_values(True, lambda info, w: w * (0 if first_of(info) else 1))
    first_of = lambda info: info.absolute_path[0] == 'a'

    def masked():
        def loss(params):
            with asks:
                return net(Layer).apply({'params': params}, 1.0, mutable=['params'])[0]

        grads = jax.grad(loss)(PARAMS)
        return tuple(float(grads[n]['d']['w']) for n in 'ab')

    live = lambda: slopes(net(Layer), mutable=['params'])
    for run, want in [(masked, (0, 3)), (live, (1, 3))][:: 1 if first == 'block' else -1] * 2:
        assert run() == want


def test_two_scopes_handed_to_one_function_and_a_path_between_them():
    """A relative path from one module to the other changes with where both are."""

    class Pair(nn.Module):
        other: nn.Module

        @nn.jit
        @nn.compact
        def __call__(self, x):
            with nn.stop_gradient('../a', allow_unmatched=True):
                return self.other(x) + 0 * self.param('v', ones, ())

    class Net(nn.Module):
        def setup(self):
            self.a, self.b = Scale(), Scale()
            self.pair_a, self.pair_b = Pair(self.a), Pair(self.b)

        def __call__(self, x):
            return self.pair_a(x) + 3 * self.pair_b(x)

    params = {'a': {'w': one}, 'b': {'w': one}, 'pair_a': {'v': one}, 'pair_b': {'v': one}}
    grads = jax.grad(lambda p: Net().apply({'params': p}, 1.0))(params)
    assert float(grads['a']['w']) == 0 and float(grads['b']['w']) == 3


def test_one_function_with_another_number_of_scopes():
    class Layer(nn.Module):
        extra: object = None

        @nn.jit
        @nn.compact
        def __call__(self, x):
            with nn.stop_gradient('d'):
                y = Scale(name='d')(x)
            return y if self.extra is None else self.extra(y)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Layer(name='a')(x) + Layer(extra=Scale(name='s'), name='b')(x)

    params = {'a': {'d': {'w': one}}, 'b': {'d': {'w': one}}, 's': {'w': one}}
    for _ in range(2):
        grads = jax.grad(lambda p: Net().apply({'params': p}, 1.0))(params)
        assert [float(sum(jax.tree.leaves(grads[n]))) for n in 'abs'] == [0, 0, 1]


@pytest.mark.parametrize('jit', [lambda f: f, nn.jit], ids=['plain', 'jit'])
def test_the_info_that_a_function_gets_is_an_ordinary_one(jit):
    import copy
    import dataclasses
    import pickle

    want = sg.VariableInfo(('d', 'w'), ('a', 'd', 'w'), 'params', (), jnp.dtype('float32'))
    seen = []

    def fn(info, w):
        assert info == want and want == info and hash(info) == hash(want) and {want: 1}[info] == 1
        assert isinstance(info, sg.VariableInfo) and repr(want)[12:] in repr(info)
        for other in (dataclasses.replace(info), copy.copy(info), pickle.loads(pickle.dumps(info))):
            assert type(other) is sg.VariableInfo and other == want
        seen.append(dataclasses.asdict(info) == dataclasses.asdict(want))
        return w

    class Layer(nn.Module):
        __call__ = jit(nn.compact(block(sg.map_values('d', fn))))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Layer(name='a')(x)

    Net().apply({'params': {'a': {'d': {'w': one}}}}, 1.0)
    assert seen == [True]


class Noisy(nn.Module):
    def setup(self):
        self.w = self.param('w', nn.initializers.normal(), ())
        self.noisy = self.w + jax.random.normal(self.make_rng('noise'))
        self.child = Child()

    def __call__(self, x):
        return x * self.noisy


class Child(nn.Module):
    def setup(self):
        self.b = self.param('b', nn.initializers.normal(), ())


def in_block(layer, get):
    with sg.stop_gradient('layer'):
        return get(layer)


@pytest.mark.parametrize(
    'get',
    [lambda layer: layer.noisy, lambda layer: layer.child.b, lambda layer: layer(1.0)],
    ids=['derived', 'child', 'called'],
)
@pytest.mark.parametrize(
    'read', [in_block, lambda layer, get: get(sg.stop_gradient()(layer))], ids=['block', 'mirror']
)
@pytest.mark.parametrize('of', [lambda cls: cls, nn.jit, nn.remat], ids=['plain', 'jit', 'remat'])
def test_random_streams_of_a_layer_that_was_called(of, read, get):
    """Flax gives a scope other streams while a method of a jitted class is called."""
    layer = of(Noisy)

    class Root(nn.Module):
        masked: bool

        @nn.compact
        def __call__(self):
            at = layer(name='layer')
            return at(1.0) + (read if self.masked else lambda layer, get: get(layer))(at, get)

    keys = {'params': jax.random.key(0), 'noise': jax.random.key(1)}
    plain, masked = Root(False).init_with_output(keys), Root(True).init_with_output(keys)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), plain, masked))
