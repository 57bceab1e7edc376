"""Programs that people write with flax.nnx: layers, stacks, bridges, rules; and what is refused."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import flax_sg as sg
from flax_sg import nnx
from nnx_programs import PARAMS, XS, Net, X, compare, f, stop


def half(v):
    return 0.5 * v + stop(0.5 * v)


def rngs():
    return nnx.Rngs(0)


class Attends(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(5, 4, rngs=rngs())
        self.head = nnx.Linear(4, 4, rngs=rngs())

    def __call__(self, x):
        return self.embed.attend(self.head(self.embed(jnp.arange(3)) * x.sum()))


def recurrent(cell):
    return nnx.RNN(cell(4, 4, rngs=rngs()))


# By name: what makes a model of inputs of shape (2, 3, 4), and a pattern that selects a part of it.
LAYERS = {
    'Linear': (lambda: nnx.Linear(4, 2, rngs=rngs()), 'bias'),
    'LinearGeneral': (lambda: nnx.LinearGeneral(4, (2, 2), rngs=rngs()), 'kernel'),
    'Einsum': (lambda: nnx.Einsum('btd,dh->bth', (4, 2), rngs=rngs()), 'kernel'),
    'Conv': (lambda: nnx.Conv(4, 2, (3,), rngs=rngs()), 'kernel'),
    'LayerNorm': (lambda: nnx.LayerNorm(4, rngs=rngs()), 'scale'),
    'RMSNorm': (lambda: nnx.RMSNorm(4, rngs=rngs()), 'scale'),
    'GroupNorm': (lambda: nnx.GroupNorm(4, num_groups=2, rngs=rngs()), 'bias'),
    'BatchNorm': (lambda: nnx.BatchNorm(4, rngs=rngs()), 'scale'),
    'Embed': (Attends, 'embed'),
    'MultiHeadAttention': (
        lambda: nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs()),
        'query',
    ),
    'LSTM': (lambda: recurrent(nnx.OptimizedLSTMCell), '**/dense_h'),
    'GRU': (lambda: recurrent(nnx.GRUCell), 'cell'),
    'LoRA': (
        lambda: nnx.LoRA(4, 2, 4, base_module=nnx.Linear(4, 4, rngs=rngs()), rngs=rngs()),
        'base_module',
    ),
    'Sequential': (
        lambda: nnx.Sequential(
            nnx.Linear(4, 4, rngs=rngs()), nnx.relu, nnx.Dropout(0.5, rngs=rngs()),
            nnx.Linear(4, 2, rngs=rngs()),
        ),
        'layers/0',
    ),
}  # fmt: skip


@pytest.mark.thinned(5)
@pytest.mark.parametrize('where', ['around', 'inside', 'mirror'])
@pytest.mark.parametrize('name', LAYERS)
def test_layers_of_flax(name, where):
    make, held = LAYERS[name]
    t, x = (sg.stop_gradient(held), jnp.ones((2, 3, 4)))
    x = x * jnp.arange(4.0)

    def loss(model, x):
        return jnp.sin(model(x)).sum()

    def inside(model, x):
        with t.on(model):
            return loss(model, x)

    def by_hand(model, x):
        graph, state = nnx.split(model)
        return loss(nnx.merge(graph, t(state)), x)

    derive = lambda fn: nnx.value_and_grad(fn, argnums=(0, 1))
    model = make()
    if where == 'around':
        with t.on(model):
            got = derive(loss)(model, x)
    elif where == 'mirror':
        got = derive(lambda model, x: loss(t(model), x))(model, x)
    else:
        got = derive(inside)(model, x)
    want = derive(by_hand)(make(), x)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(close, got, want)
    assert any(not leaf.any() for leaf in jax.tree.leaves(got[1][0]))
    assert any(leaf.any() for leaf in jax.tree.leaves(got[1]))


def test_a_stack_of_layers():
    def program(model):
        a, b = (part.w.get_raw_value() for part in (model.a, model.b))
        layers = nnx.vmap(Net)(jnp.stack([a, 2 * a]), jnp.stack([b, 3 * b]))
        run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        with sg.stop_gradient('a').on(layers):
            out = run(X, layers)
        return out + run(X, layers)

    def oracle(params):
        a, b = params
        run = lambda read: f(read(2 * a), 3 * b, f(read(a), b, X))
        return run(stop) + run(lambda v: v)

    compare(program, oracle, orders=2)


def test_functions_see_the_stack():
    layers, seen = nnx.vmap(Net)(jnp.ones(3), jnp.ones(3)), []
    run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    with sg.map_values('a', lambda info, v: (seen.append((info.name, info.shape)), v)[1]).on(
        layers
    ):
        jax.tree.leaves(layers)
        run(X, layers)
    assert ('a/w', (3,)) in seen


def test_blocks_in_the_body_of_a_scan():
    def program(model):
        @nnx.scan(in_axes=(nnx.Carry, None, 0), out_axes=(nnx.Carry, 0))
        def run(total, model, x):
            with nnx.stop_gradient(model.a):
                y = model(x)
            with nnx.stop_gradient('b').on(model):
                y = y + model(x)
            return total + y + model(x), x

        return run(jnp.float32(0), model, XS)[0]

    def oracle(params):
        a, b = params
        return sum(f(stop(a), b, x) + f(a, stop(b), x) + f(a, b, x) for x in XS)

    compare(program, oracle)


@pytest.mark.parametrize('lift', [nnx.jit, nnx.remat])
def test_a_block_in_a_function_in_a_block(lift):
    def program(model):
        @lift
        def run(model, x):
            with sg.scale_gradient(model.a, 0.5):
                return model(x)

        with sg.scale_gradient('a', 0.5).on(model):
            return run(model, X) + model(X)

    compare(program, lambda p: f(half(half(p[0])), p[1], X) + f(half(p[0]), p[1], X), orders=2)


def test_shard_map():
    mesh = jax.make_mesh((1,), ('d',), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def program(model):
        run = nnx.shard_map(
            lambda m, x: m(x), mesh=mesh, in_specs=(spec(), spec('d')), out_specs=spec('d')
        )
        captured = jax.shard_map(
            lambda x: model(x), mesh=mesh, in_specs=spec('d'), out_specs=spec('d')
        )
        with sg.stop_gradient('a').on(model):
            return run(model, XS).sum() + captured(XS).sum()

    compare(program, lambda p: 2 * f(stop(p[0]), p[1], XS).sum())


@pytest.mark.parametrize('derive', [jax.jacfwd, jax.jacrev, jax.hessian])
def test_derivatives_of_a_state(derive):
    """Their structures are put together of the arguments', in the block."""
    model = Net()
    graph, state = nnx.split(model)
    with sg.stop_gradient('a').on(model):
        got = derive(lambda state: nnx.merge(graph, state)(X))(state)
    want = derive(lambda p: f(stop(p[0]), p[1], X))(PARAMS)
    np.testing.assert_allclose(jax.tree.leaves(got), jax.tree.leaves(want), rtol=1e-6)


def test_a_pullback_that_is_used_after_the_block():
    def program(model):
        graph, state = nnx.split(model)
        with sg.stop_gradient('a').on(model):
            out, pull = jax.vjp(lambda state: nnx.merge(graph, state)(X), state)
        (grads,) = pull(out)
        assert jax.tree.structure(grads) == jax.tree.structure(state)
        return out + grads['a']['w'][...] + grads['b']['w'][...]

    def oracle(params):
        out, pull = jax.vjp(lambda a, b: f(stop(a), b, X), *params)
        return out + sum(pull(out))

    compare(program, oracle)


@jax.custom_vjp
def with_vjp(state, x):
    return state['a']['w'][...] * x + state['b']['w'][...]


with_vjp.defvjp(
    lambda state, x: (with_vjp(state, x), state),
    lambda state, ct: (jax.tree.map(lambda v: 3 * ct * v, state), ct),
)


@jax.custom_jvp
def with_jvp(state, x):
    return state['a']['w'][...] * x + state['b']['w'][...]


@with_jvp.defjvp
def _(primals, tangents):
    (state, x), (t, _) = primals, tangents
    return with_jvp(state, x), 2 * (t['a']['w'][...] * x + 3 * t['b']['w'][...])


@pytest.mark.parametrize('lift', [lambda fn: fn, jax.jit, jax.checkpoint])
def test_rules_of_ones_own(lift):
    """They say what becomes of the derivative of an argument: the block stands before it."""

    def program(model):
        with sg.stop_gradient('a').on(model):
            state = nnx.state(model)
            return lift(with_vjp)(state, X) + lift(with_jvp)(state, X)

    def got(params):
        return program(Net(*params))

    by_a, by_b = jax.grad(got)(PARAMS)
    assert by_a == 0
    np.testing.assert_allclose(by_b, 3 * PARAMS[1] + 6, rtol=1e-6)


def test_variables_whose_values_lie_in_refs():
    def program(model):
        with nnx.var_defaults(ref=True):
            refs = Net(jnp.float32(0), jnp.float32(0))
        refs.a.w[...], refs.b.w[...] = model.a.w[...], model.b.w[...]
        with sg.stop_gradient('a').on(refs):
            out = refs(X) + nnx.jit(lambda m: m(X))(refs)
        return out + refs(X)

    compare(program, lambda p: 2 * f(stop(p[0]), p[1], X) + f(*p, X))
    with nnx.var_defaults(ref=True):
        model = Net()
    with sg.map_values('a', lambda info, v: 2 * v).on(model):
        assert nnx.as_pure(nnx.state(model))['a']['w'] == 2 * PARAMS[0]
        assert jax.tree.leaves(model)[0] == 2 * PARAMS[0]
        assert nnx.clone(model).a.w[...] == 2 * PARAMS[0]
    assert model.a.w[...] == PARAMS[0]


def test_a_hijax_variable_is_refused():
    with nnx.var_defaults(hijax=True):
        model = Net()
    for block in (lambda: sg.stop_gradient('a').on(model), sg.stop_gradient):
        with pytest.raises(sg.UsageError, match='a hijax Variable of flax.nnx was met'), block():
            model(X)
    with pytest.raises(sg.UsageError, match='a hijax Variable'):
        sg.stop_gradient('a')(model)


def test_functions_that_keep_what_they_know_of_a_model_are_refused():
    model = Net()
    run = nnx.cached_partial(nnx.jit(lambda model, x: model(x)), model)
    want = run(X)
    with (
        pytest.raises(
            sg.UsageError, match='a function of nnx.cached_partial was called in a block'
        ),
        sg.stop_gradient('a').on(model),
    ):
        run(X)
    assert run(X) == want


def test_jit_partial():
    def program(model):
        run = nnx.jit_partial(lambda model, x: model(x), model, graph=False)
        with sg.stop_gradient('a').on(model):
            out = run(X)
        return out + run(X)

    compare(program, lambda p: f(stop(p[0]), p[1], X) + f(*p, X))


def test_a_model_of_linen_in_one_of_nnx():
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return self.param('w', nn.initializers.ones, ()) * x

    def program(model):
        bridge = nnx.bridge.ToNNX(Linen(), rngs=rngs()).lazy_init(X)
        bridge.w.set_raw_value(model.a.w.get_raw_value())
        with sg.scale_gradient(bridge, 0.5):
            out = bridge(X)
        with sg.scale_gradient(True, 0.5):
            out = out + bridge(X) * model.b.w[...]
        with sg.scale_gradient('w', 0.5).on(bridge):
            return out + nnx.jit(lambda m: m(X))(bridge)

    compare(program, lambda p: half(p[0]) * X + half(p[0]) * X * half(p[1]) + half(p[0]) * X)


def test_a_model_of_nnx_in_one_of_linen():
    class Inner(nnx.Module):
        def __init__(self, rngs):
            self.w = nnx.Param(jnp.float32(1))

        def __call__(self, x):
            return self.w[...] * x

    linen = nnx.bridge.to_linen(Inner)
    variables = linen.init(jax.random.key(0), X)

    def program(model):
        w = {**variables, 'params': {'w': model.a.w.get_raw_value()}}
        with sg.scale_gradient(True, 0.5):
            out = linen.apply(w, X)
        with sg.stop_gradient('w'):
            out = out + linen.apply(w, X)
        return out + linen.apply(w, X) + model.b.w[...]

    compare(program, lambda p: (half(p[0]) + stop(p[0]) + p[0]) * X + p[1])


def test_both_worlds_under_one_block():
    linen = nn.Dense(1, use_bias=False)

    def loss(kernel, model):
        return (linen.apply({'params': {'kernel': kernel}}, jnp.ones((1, 1))) * model(X)).sum()

    model = Net()
    with sg.stop_gradient():
        by_kernel = jax.grad(loss)(jnp.ones((1, 1)), model)
        by_model = nnx.grad(loss, argnums=1)(jnp.ones((1, 1)), model)
    assert not by_kernel.any() and not any(leaf.any() for leaf in jax.tree.leaves(by_model))
    assert jax.grad(loss)(jnp.ones((1, 1)), model).any()


def test_forward_values_and_random_streams_stay():
    def make():
        return nnx.Sequential(nnx.Dropout(0.5, rngs=rngs()), nnx.BatchNorm(8, rngs=rngs()))

    held, live, x = make(), make(), jnp.arange(16.0).reshape(2, 8)
    for _ in range(2):
        with sg.stop_gradient():
            got = held(x)
        np.testing.assert_array_equal(got, live(x))
    assert all(map(jnp.array_equal, *(jax.tree.leaves(nnx.state(m)) for m in (held, live))))


@pytest.mark.parametrize('lift', [lambda fn: fn, nnx.jit])
def test_an_optimiser_in_a_block(lift):
    model = nnx.Linear(2, 1, rngs=rngs())
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    kernel = model.kernel[...]

    @lift
    def train(model, optimizer):
        grads = nnx.grad(lambda m: (m(jnp.ones((1, 2))) ** 2).sum())(model)
        optimizer.update(model, grads)

    for _ in range(2):
        with sg.stop_gradient(model.kernel):
            train(model, optimizer)
    np.testing.assert_array_equal(model.kernel[...], kernel)
    assert model.bias[...].all()


def test_filters_of_a_module_are_filters_of_nnx():
    model = Net()
    frozen = nnx.All(nnx.Param, sg.within(model.a))
    assert [path for path, _ in nnx.to_flat_state(nnx.state(model, frozen))] == [('a', 'w')]
    wrt = nnx.DiffState(0, nnx.All(nnx.Param, ~sg.path('a')))
    assert [*nnx.grad(lambda m: m(X), argnums=wrt)(model)] == ['b']
    labels = sg.labels({'a': 'a'}, nnx.state(model, nnx.Param), default='rest')
    assert isinstance(labels, nnx.State) and labels['b']['w'] == 'rest'


def test_dataclasses():
    @nnx.dataclass
    class Scale(nnx.Pytree):
        w: nnx.Param = nnx.data()
        by: int = nnx.static(default=3)

        def __call__(self, x):
            return self.w[...] * x * self.by

    def program(model):
        scale = Scale(w=nnx.Param(model.a.w.get_raw_value()))
        held = sg.stop_gradient('w')(Scale)(w=nnx.Param(model.b.w.get_raw_value()))
        with sg.stop_gradient(scale):
            out = scale(X)
        return out + scale(X) + held(X)

    compare(program, lambda p: 3 * X * (stop(p[0]) + p[0] + stop(p[1])))


def test_an_implicit_layer():
    def program(model):
        solve = lambda run, x: model.a.w[...] / model.b.w[...]
        with sg.stop_gradient(model.a):
            return jax.lax.custom_root(
                lambda x: x * model.b.w[...] - model.a.w[...],
                0.1,
                solve,
                lambda run, y: y / run(1.0),
            )

    compare(program, lambda p: stop(p[0]) / p[1])


def test_metadata_of_shardings():
    make = nnx.with_partitioning(nnx.initializers.ones, (None, None))
    with nnx.use_eager_sharding(False):
        model = nnx.Linear(2, 2, kernel_init=make, rngs=rngs())
    before = model.kernel.get_metadata()
    with nnx.stop_gradient('kernel').on(model):
        grads = nnx.grad(lambda m: m(jnp.ones((1, 2))).sum())(model)
    assert not grads['kernel'][...].any() and grads['bias'][...].all()
    assert grads['kernel'].get_metadata() == model.kernel.get_metadata() == before


def test_a_loop_of_steps_keeps_nothing():
    models, traced = [], []

    @nnx.jit
    def step(model):
        traced.append(1)
        return model(X)

    for _ in range(6):
        model = Net()
        models.append(weakref.ref(model))
        for block in (
            sg.stop_gradient(model.a),
            sg.stop_gradient(lambda info: info.name == 'a/w').on(model),
            sg.stop_gradient(~sg.within(model.a)),
        ):
            with block:
                step(model)
        sg.stop_gradient('a')(model)(X)
        nnx.grad(lambda m: sg.stop_gradient('a')(m)(X))(model)
    del model, block
    gc.collect()
    assert not any(ref() for ref in models)
    assert len(traced) <= 3
