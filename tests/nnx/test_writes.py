"""Writes of Variables in blocks, eager and in functions that are traced; constants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_sg as sg
from flax_sg import nnx
from nnx_programs import KINDS, MODES, PARAMS, XS, Net, X, compare, f, stop


def scaled(v):
    return KINDS['scale'][1](v)


BY_HAND = {'stop': stop, 'scale': scaled}


def step(model, x=X):
    """Write a, which depends on b, and read it again."""
    model.a.w[...] = model.a.w[...] * 2 * model.b.w[...]
    return model(x)


@pytest.mark.parametrize('how', ['eager', *MODES])
@pytest.mark.parametrize('kind', BY_HAND)
def test_what_is_written_in_a_block_is_kept_and_live_after_it(kind, how):
    run = step if how == 'eager' else nnx.jit(step, **MODES[how])

    def program(model):
        with KINDS[kind][0]('a').on(model):
            out = run(model)
        return out + 3 * model(X)

    def oracle(params):
        (a, b), read = params, BY_HAND[kind]
        a = read(a) * 2 * b
        return f(read(a), b, X) + 3 * f(a, b, X)

    compare(program, oracle)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('kind', BY_HAND)
def test_writes_in_a_loop(kind, mode):
    def body(state, x):
        total, model = state
        return (total + step(model, x), model), x

    def program(model):
        run = nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0), **MODES[mode])
        with KINDS[kind][0]('a').on(model):
            (total, out), _ = run((jnp.float32(0), model), XS)
        return total + 3 * out(X)

    def oracle(params):
        (a, b), total, read = params, 0, BY_HAND[kind]
        for x in XS:
            a = read(a) * 2 * b
            total += f(read(a), b, x)
        return total + 3 * f(a, b, X)

    compare(program, oracle)


def test_a_part_that_is_written_leaves_the_rest_live():
    class Vector(nnx.Module):
        def __init__(self, w):
            self.w = nnx.Param(w)

    def program(w):
        model = Vector(w)
        for run in (lambda m: m, nnx.jit(lambda m: m)):
            with nnx.stop_gradient(model):
                run(model).w[0] = 5.0 * model.w[1]
        return (model.w[...] * jnp.arange(1.0, 4.0)).sum()

    np.testing.assert_array_equal(jax.grad(program)(jnp.ones(3)), [0, 2, 3])


@pytest.mark.parametrize('mode', MODES)
def test_a_training_step_in_a_block(mode):
    def train(model):
        grads = nnx.grad(lambda m: m(X) ** 2, **MODES[mode])(model)
        grads = nnx.state(grads)
        for part in ('a', 'b'):
            variable = getattr(model, part).w
            variable[...] = variable[...] - 0.1 * grads[part]['w'][...]

    def program(model):
        with sg.stop_gradient('a').on(model):
            nnx.jit(train, **MODES[mode])(model)
        return model(X)

    def oracle(params):
        a, b = params
        by_a, by_b = jax.grad(lambda a, b: f(stop(a), b, X) ** 2, (0, 1))(a, b)
        return f(stop(a) - 0.1 * by_a, b - 0.1 * by_b, X)

    compare(program, oracle)


def test_a_loop_over_states():
    def sgd(read, state, x):
        loss = lambda state: read(state)(x)
        value, grads = jax.value_and_grad(loss)(state)
        return jax.tree.map(lambda p, g: p - 0.1 * g, state, grads), value

    def program(model):
        graph, state = nnx.split(model)
        with sg.stop_gradient():
            return jax.lax.scan(lambda s, x: sgd(lambda s: nnx.merge(graph, s), s, x), state, XS)[
                1
            ].sum()

    def oracle(params):
        read = lambda p: lambda x: f(*map(stop, p), x)
        run = lambda p, x: sgd(read, tuple(map(stop, p)), x)
        return jax.lax.scan(run, params, XS)[1].sum()

    compare(program, oracle)


def test_what_was_read_is_not_stored():
    """A module that writes back what it has read changes nothing."""

    def program(model):
        with sg.map_values(True, lambda info, v: 2 * v).on(model):
            model.a.w[...] = model.a.w[...]
            model.b.w.set_value(model.b.w.get_value())
        return model(X)

    compare(program, lambda params: f(*params, X))


@pytest.mark.parametrize('kind', ['map', 'replace'])
@pytest.mark.parametrize('how', ['eager', *MODES])
def test_what_was_made_of_another_value_is_not_stored(how, kind):
    model = Net()
    run = step if how == 'eager' else nnx.jit(step, **MODES[how])
    with (
        pytest.raises(
            sg.UsageError, match="the Param 'a/w' was to be written in this block, which"
        ),
        KINDS[kind][0]('a').on(model),
    ):
        run(model)
    assert model.a.w[...] == PARAMS[0]


def set_raw(model):
    model.a.w.set_raw_value(jnp.float32(9))


def set_value(model):
    model.a.w.set_value(jnp.float32(9))


def set_item(model):
    model.a.w[...] = jnp.float32(9)


def update(model):
    nnx.update(model, jax.tree.map(lambda v: v + 1, nnx.state(model)))


def update_by_name(model):
    from flax.nnx import update

    update(model, nnx.to_pure_dict(nnx.state(Net(jnp.float32(4), jnp.float32(5)))))


WRITES = {
    **{write.__name__: write for write in (set_raw, set_value, set_item, update, update_by_name)},
    **{f'nnx.jit, {mode}': nnx.jit(step, **how) for mode, how in MODES.items()},
}


@pytest.mark.parametrize(
    'block', [lambda m: sg.constant('a').on(m), lambda m: sg.constant(m.a), lambda m: sg.constant()]
)
@pytest.mark.parametrize('write', WRITES.values(), ids=WRITES)
def test_constants_refuse_writes_and_nothing_is_half_changed(write, block):
    model = Net()
    with pytest.raises(sg.FrozenVariableError, match='in which it is constant'), block(model):
        write(model)
    assert (model.a.w[...], model.b.w[...]) == PARAMS
    write(model)
    assert model.a.w[...] != PARAMS[0]


def test_constants_of_collections():
    model, x = nnx.BatchNorm(2, rngs=nnx.Rngs(0)), jnp.arange(4.0).reshape(2, 2)
    with sg.constant():
        model(x)
    mean = model.mean[...]
    assert mean.any()
    with pytest.raises(sg.FrozenVariableError), sg.constant(collections=['batch_stats']):
        model(x)
    np.testing.assert_array_equal(model.mean[...], mean)


def test_what_is_made_in_a_block_of_constants():
    with sg.constant(collections=True):
        Net(), nnx.clone(Net()), nnx.merge(*nnx.split(Net()))
        nnx.jit(lambda model: model(X))(Net())
