"""Programs of each kind of fault that reviews of the NNX front end found."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

import flax_sg as sg
from flax_sg import nnx
from internals import library_expected
from nnx_programs import MODES, Net, X, compare, f, stop


class Pair(nnx.Module):
    def __init__(self, a=2.0, b=3.0):
        self.a, self.b = nnx.Param(jnp.float32(a)), nnx.Param(jnp.float32(b))

    def __call__(self, x):
        return self.a[...] * x + self.b[...]


def grads_of(loss, *args):
    return tuple(float(g) for g in jax.tree.leaves(jax.grad(loss)(*args)))


# JAX keeps the structure of what a function returns, and with it what a block said.

LIFTS = {
    'jit': jax.jit,
    'checkpoint': jax.checkpoint,
    'scan': lambda fn: lambda m: jax.lax.scan(lambda m, _: (fn(m), None), m, None, length=1)[0],
    'fori_loop': lambda fn: lambda m: jax.lax.fori_loop(0, 1, lambda i, m: fn(m), m),
    'cond': lambda fn: lambda m: jax.lax.cond(True, fn, fn, m),
}
HELD = {
    'variable': lambda m: sg.stop_gradient(m.a),
    'name': lambda m: sg.stop_gradient('a').on(m),
    'complement': lambda m: sg.stop_gradient(~sg.within(m.b)),
}


@pytest.mark.parametrize('block', HELD.values(), ids=HELD)
@pytest.mark.parametrize('lift', LIFTS.values(), ids=LIFTS)
def test_a_model_that_comes_back_of_a_trace_that_jax_has_kept(lift, block):
    same = lift(lambda m: m)

    def loss(m):
        with block(m):
            m = same(same(m))
            return m.a[...] * 5 + m.b[...] * 7

    model = Pair()
    for _ in range(3):
        assert grads_of(loss, model) == (0, 7)
        assert grads_of(jax.jit(loss), model) == (0, 7)


def test_a_chain_of_calls_that_return_the_model():
    apply = jax.jit(lambda m, x: (m(x), m))

    def loss(m):
        with sg.stop_gradient(m.a):
            x, m = apply(m, 1.0)
            return apply(m, x)[0]

    assert [grads_of(loss, Pair()) for _ in range(3)] == [(0, 3)] * 3


def test_a_captured_model_that_a_function_returns():
    model = Pair()
    same = jax.jit(lambda: model)
    for name in 'abbaab':
        with sg.map_values(name, lambda info, v: v + 100).on(model):
            out = same()
            assert (out.a[...], out.b[...]) == ((102, 3) if name == 'a' else (2, 103))


def test_values_and_writes_of_what_comes_back():
    model, same = Pair(), jax.jit(lambda m: m)
    for _ in range(2):
        with sg.map_values(model, lambda info, v: v + 100):
            assert same(model).a[...] == 102
        with pytest.raises(sg.FrozenVariableError), sg.constant(model):
            same(model).a[...] = 1.0


# What was read before is not what is read now.


@pytest.mark.parametrize(
    'lift', [lambda fn: fn, *(functools.partial(nnx.jit, **m) for m in MODES.values())]
)
def test_a_variable_that_is_restored(lift):
    def perturb(m):
        old = m.a[...]
        m.a[...] = old * m.b[...]
        there = m.a[...]
        m.a[...] = old
        return there

    def loss(m):
        with sg.stop_gradient(m.a):
            there = lift(perturb)(m)
        return m.a[...] ** 2 + 0 * there

    model = Pair()
    value, grads = nnx.value_and_grad(loss)(model)
    assert value == 4 and model.a[...] == 2 and grads['b'][...] == 0


def test_a_state_that_is_reset():
    start = jnp.float32(1)
    state = nnx.Dict(h=nnx.BatchStat(start))
    with sg.stop_gradient(state.h, collections=True):
        state.h[...] = state.h[...] + 1
        state.h[...] = start
    assert state.h[...] == 1


def test_an_entry_of_a_dict_that_is_written():
    variable = nnx.Param({'a': jnp.float32(1)})
    with sg.map_values(variable, lambda info, v: v + 100):
        assert variable['a'] == 101
    with sg.stop_gradient(variable):
        before = variable['a']
        variable['a'] = jnp.float32(9)
        assert (before, variable['a']) == (1, 9)
    assert variable['a'] == 9


# A mirror of a part, in the model.


@pytest.mark.parametrize('name', ['encoder', 'zencoder'])
@pytest.mark.parametrize('lift', [lambda fn: fn, nnx.jit])
def test_an_optimiser_of_a_model_with_a_mirror_of_its_own_part(lift, name):
    class Model(nnx.Module):
        def __init__(self):
            setattr(self, name, Pair())
            self.target = sg.stop_gradient()(getattr(self, name))

    @lift
    def train(model, optimizer):
        loss = lambda m: getattr(m, name).a[...] ** 2 + m.target.a[...]
        optimizer.update(model, nnx.grad(loss)(model))

    model = Model()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    train(model, optimizer)
    np.testing.assert_allclose(getattr(model, name).a[...], 1.6, rtol=1e-6)
    assert model.target.a[...] == getattr(model, name).a[...]


# A copy that is made in a function that is traced is read there.

COPIES = {
    'map': lambda m: jax.tree.map(lambda x: x * 1, m),
    'clone': nnx.clone,
    'map of nothing': lambda m: jax.tree.map(lambda x: x, m),
}
INNER = {
    'jit': jax.jit,
    'checkpoint': jax.checkpoint,
    'nnx.jit': nnx.jit,
    'cond': lambda fn: lambda m: jax.lax.cond(True, fn, fn, m),
    'vmap': lambda fn: (
        lambda m: jax.tree.map(
            lambda v: v[0], jax.vmap(lambda m, _: fn(m), in_axes=(None, 0))(m, jnp.ones(1))
        )
    ),
}


@pytest.mark.parametrize('after', [False, True])
@pytest.mark.parametrize('copy', COPIES.values(), ids=COPIES)
@pytest.mark.parametrize('lift', INNER.values(), ids=INNER)
def test_a_copy_that_comes_back_is_read_once(lift, copy, after):
    made = lift(copy)

    def loss(m):
        with sg.scale_gradient(m, -0.5):
            m = made(m)
            out = m.a[...]
        return m.a[...] if after else out

    for _ in range(2):
        assert grads_of(loss, Pair()) == (-0.5, 0)


# What is in a module may change.


def test_a_block_knows_what_is_in_its_module_now():
    def grads(block):
        def loss(model):
            run, holder = jax.jit(lambda: model.a[...] * 5 + model.b[...] * 7), nnx.Dict()
            for name in 'ab':
                holder.part = getattr(model, name)
                with block(holder):
                    out = run()
            return out

        return grads_of(loss, Pair())

    assert grads(sg.stop_gradient) == (5, 0)
    assert grads(lambda holder: sg.stop_gradient('part').on(holder)) == (5, 0)


# What is computed in a block of what it holds is held in that part alone.


def test_fast_weights():
    def program(model):
        rate, state = model.b.w[...], nnx.state(model.a)
        with sg.stop_gradient(model.a):
            fast = jax.tree.map(lambda p: p - rate, state)
            inside = fast['w'][...] * X
        return inside + fast['w'][...]

    compare(program, lambda p: (stop(p[0]) - p[1]) * X + stop(p[0]) - p[1])


def test_fast_weights_in_a_block_about_all_that_is_read():
    def program(model):
        rate, state = model.b.w[...], nnx.state(model.a)
        with sg.stop_gradient():
            return jax.tree.map(lambda p: p - rate, state)['w'][...] + 0 * model(X)

    compare(program, lambda p: stop(p[0] - p[1]) + 0 * f(*map(stop, p), X))


def by_somebody_else(fn):
    """Take arguments apart and put them together again, as libraries around JAX do."""

    def run(model):
        leaves, structure = jax.tree.flatten(model)
        return jax.jit(jax.grad(lambda leaves: fn(structure.unflatten(leaves))))(leaves)

    return run


@pytest.mark.parametrize('block', HELD.values(), ids=HELD)
def test_a_derivative_that_another_library_takes(block):
    """A function that reads the model reads it in the block, whoever has put it together."""
    model = Pair()
    with block(model):
        by_a, by_b = by_somebody_else(lambda m: m.a[...] * 5 + m.b[...] * 7)(model)
        flat, back = jax.flatten_util.ravel_pytree(model)
        by_flat = jax.grad(lambda flat: back(flat)(2.0))(flat)
    assert (by_a, by_b) == (0, 7)
    np.testing.assert_array_equal(by_flat, [0, 1])


# JAX hands some on to be read when the program runs.


def test_callbacks_see_what_the_block_reads():
    seen = []

    @nnx.jit
    def run(model):
        with sg.map_values(True, lambda info, v: v + 100):
            kind = jax.ShapeDtypeStruct((), jnp.float32)
            jax.debug.callback(lambda w: seen.append(float(w[...])), model.a)
            return jax.pure_callback(lambda w: w[...] * 1, kind, model.a)

    assert run(Pair()) == 102
    jax.effects_barrier()
    assert seen == [102]


def test_partial_methods_and_cached_properties_of_a_class():
    class Model(Pair):
        twice = functools.partialmethod(lambda self, k: k * self.a[...], 2.0)

        @functools.cached_property
        def square(self):
            return self.a[...] ** 2

    Held = sg.stop_gradient('a')(Model)

    def loss(a, b):
        model = Held(a, b)
        return model.twice() + model.square + model.b[...]

    assert jax.grad(loss, (0, 1))(2.0, 3.0) == (0, 1)
    assert Held().twice() == 4 and Held().square == 4
    assert Net()(X) == f(Net().a.w[...], Net().b.w[...], X)


# What is done is done by one block, and another one that is equal has still to do it.


def clone_in_a_block(model):
    with sg.scale_gradient(model, 0.5):
        return nnx.clone(model)


@pytest.mark.parametrize('factor', [0.5, 0.25])
@pytest.mark.parametrize('run', [lambda fn: fn, *INNER.values()])
def test_a_copy_of_one_block_in_another_one(run, factor):
    """Equal blocks are two."""
    read = run(lambda m: m)

    def loss(m):
        copy = clone_in_a_block(m)
        with sg.scale_gradient(copy, factor):
            return read(copy).a[...]

    assert grads_of(loss, Pair()) == (0.5 * factor, 0)


@pytest.mark.parametrize('run', [lambda fn: fn, *INNER.values()])
def test_a_mirror_in_an_equal_block(run):
    read = run(lambda m: m)

    def loss(m):
        with sg.scale_gradient(m, 0.5):
            return read(sg.scale_gradient(True, 0.5)(m)).a[...]

    assert grads_of(loss, Pair()) == (0.25, 0)


def test_a_copy_is_differentiated_in_another_block():
    copy = clone_in_a_block(Pair())
    with sg.scale_gradient(copy, 0.25):
        assert grads_of(lambda m: m.a[...], copy) == (0.25, 0)


# Names are part of what a block is, and so is what a callable says.


def test_a_block_knows_which_name_is_whose():
    model = Pair()
    run = jax.jit(lambda: model.a[...] * 5 + model.b[...] * 7)
    for one, other in ['ab', 'ba'] * 2:
        holder = nnx.Dict(x=getattr(model, one), y=getattr(model, other))
        want = 5 * (2 + 200 * (one == 'a')) + 7 * (3 + 200 * (one == 'b'))
        with sg.map_values('x', lambda info, v: v + 200).on(holder):
            assert run() == want


def test_a_callable_that_changes_its_mind():
    model, held = Pair(), {'a'}
    run = jax.jit(lambda: (model.a[...], model.b[...]))
    for name in 'abab':
        held.clear(), held.add(name)
        t = sg.map_values(lambda info: info.name in held, lambda info, v: v + 100)
        with t.on(model):
            assert run() == ((102, 3) if name == 'a' else (2, 103))


# A block that has ended does nothing.


def test_a_structure_that_is_used_after_its_block():
    model = Pair()
    with sg.stop_gradient('a').on(model) as _:
        flat, back = jax.flatten_util.ravel_pytree(model)
    assert (jax.grad(lambda flat: back(flat)(2.0))(flat) == jnp.array([2, 1])).all()


@pytest.mark.parametrize('lift', [nnx.jit, nnx.remat, nnx.vmap, nnx.grad])
def test_metadata_that_a_function_changes(lift):
    """NNX takes it over, or does not, as without a block."""

    def changed(block):
        model = Pair()

        def run(model):
            model.a.set_metadata('tag', 'changed')
            return model.a[...] * 1.0

        with block(model):
            (nnx.vmap(run, in_axes=None, axis_size=1) if lift is nnx.vmap else lift(run))(model)
        return model.a.get_metadata()

    assert changed(lambda m: sg.stop_gradient('a').on(m)) == changed(
        lambda m: sg.stop_gradient(sg.nothing, allow_unmatched=True)
    )
    assert 'flax_sg' not in changed(lambda m: sg.stop_gradient('a').on(m))


# What is no parameter has nothing to say to a block by name.


def test_other_variables_in_a_block_by_name():
    state, rngs = nnx.BatchStat(jnp.float32(1)), nnx.Rngs(0)
    with sg.stop_gradient('encoder', allow_unmatched=True):
        assert state[...] == 1
        rngs.params()
    with pytest.warns(sg.UnreadBlockWarning), sg.scale_gradient(True, 0.375):
        state[...] + 1


# JAX's own solvers compute with what they take apart.


def test_a_solver_of_jax_with_a_state():
    def solve(model):
        state = nnx.state(model)
        system = lambda s: jax.tree.map(lambda v: 2 * v, s)
        return jax.scipy.sparse.linalg.cg(system, state, maxiter=3)[0]

    def loss(model):
        with sg.stop_gradient('a').on(model):
            out = solve(model)
        return out['a'][...] * 5 + out['b'][...] * 7

    assert grads_of(loss, Pair()) == (0, 3.5)


def test_a_property_keeps_its_other_parts():
    class Model(Pair):
        @property
        def first(self):
            """The first."""
            return self.a[...]

        @first.setter
        def first(self, value):
            self.a[...] = value

        @first.deleter
        def first(self):
            self.a[...] = 0.0

    model = sg.stop_gradient('a')(Model)()
    model.first = jnp.float32(4)
    assert model.first == 4 and type(model).first.__doc__ == 'The first.'
    del model.first
    assert model.a[...] == 0


# A module may hold Variables in trees of any kind.


class Box(struct.PyTreeNode):
    w: nnx.Param


@pytest.mark.parametrize(
    'block',
    [
        sg.stop_gradient,
        lambda m: sg.stop_gradient('part').on(m),
        lambda m: sg.stop_gradient('part/w').on(m),
        lambda m: sg.stop_gradient(~sg.within(m.other)),
    ],
)
def test_variables_in_a_tree_that_jax_knows(block):
    class Holder(nnx.Module):
        def __init__(self):
            self.part = nnx.data(Box(nnx.Param(jnp.float32(2))))
            self.other = nnx.Linear(1, 1, rngs=nnx.Rngs(0))

        def __call__(self):
            return self.part.w[...] ** 2

    def loss(model):
        with block(model):
            return nnx.jit(lambda m: m())(model)

    grads = nnx.grad(loss)(Holder())
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads))


def test_a_front_end_that_could_not_be_imported_is_tried_again(monkeypatch):
    """A block would be about nothing of its library, without a word."""
    with library_expected(monkeypatch, 'json', 'flax_sg.no_such_front_end'):
        for _ in range(2):
            with pytest.raises(ModuleNotFoundError), sg.stop_gradient():
                pass
