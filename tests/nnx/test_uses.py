"""Classes, methods, mirrors and trees of flax.nnx; names, and what is refused."""

import pickle
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_sg as sg
from flax_sg import nnx
from nnx_programs import MODES, PARAMS, Net, Part, X, compare, f, stop


class Twice(Net):
    """Its method calls another one of its own, and reads a property."""

    @property
    def inner(self):
        return self.a.w[...]

    def hidden(self, x):
        return jnp.tanh(self.inner * x)

    def __call__(self, x):
        return self.hidden(x) * self.b.w[...] + self.inner**2


def half(v):
    return 0.5 * v + stop(0.5 * v)


@pytest.mark.parametrize('mode', [None, *MODES])
def test_a_class_reads_each_variable_once_in_its_block(mode):
    """Its own methods call each other in the block that is open."""
    Half = sg.scale_gradient('a', 0.5)(Twice)
    assert Half.__name__ == 'Twice' and issubclass(Half, Twice)

    def program(model):
        call = lambda model: model(X)
        run = nnx.jit(call, **MODES[mode]) if mode else call
        made = Half(model.a.w.get_raw_value(), model.b.w.get_raw_value())
        return run(made)

    compare(program, lambda p: f(half(p[0]), p[1], X), orders=2)


def test_a_class_that_lies_in_itself():
    """Each of the two opens a block of its own."""

    class Outer(nnx.Module):
        def __init__(self, w, inner=None):
            self.w, self.inner = nnx.Param(w), inner

        def __call__(self, x):
            return self.w[...] * (x if self.inner is None else self.inner(x))

    Half = sg.scale_gradient('w', 0.5)(Outer)

    def program(v, w):
        return nnx.jit(lambda m: m(3.0))(Half(v, Half(w)))

    assert jax.grad(program, (0, 1))(5.0, 7.0) == (0.5 * 7 * 3, 0.5 * 5 * 3)


@pytest.mark.parametrize('lift', ['plain', 'jit inside', 'jit outside', 'remat inside'])
def test_methods(lift):
    before = {'jit inside': nnx.jit, 'remat inside': nnx.remat}.get(lift, lambda fn: fn)
    after = {'jit outside': nnx.jit}.get(lift, lambda fn: fn)

    class Held(Net):
        @after
        @sg.stop_gradient('a')
        @before
        def held(self, x):
            return Net.__call__(self, x)

    def program(model):
        held = Held(model.a.w.get_raw_value(), model.b.w.get_raw_value())
        return held.held(X) + 2 * held(X)

    compare(program, lambda p: f(stop(p[0]), p[1], X) + 2 * f(*p, X))


def test_a_bound_method_and_a_function_of_a_module():
    run = sg.stop_gradient('a')

    def program(model):
        return run(model.__call__)(X) + 2 * run(lambda m, x: m(x))(model, X)

    compare(program, lambda p: 3 * f(stop(p[0]), p[1], X))
    with pytest.raises(sg.UsageError, match='be a flax.linen.Module or flax.nnx.Module; got float'):
        run(lambda x: x)(1.0)


def test_a_mirror_has_the_live_values():
    model = Net()
    held = sg.stop_gradient('a')(model)
    assert type(held) is Net and held.b.w is model.b.w and held.a.w is not model.a.w
    model.a.w[...] = jnp.float32(3)
    assert held.a.w[...] == 3
    held.a.w[...] = jnp.float32(4)
    assert model.a.w[...] == 4
    nnx.update(model, nnx.state(Net()))
    assert held.a.w[...] == PARAMS[0]
    assert 'flax_sg' not in str(jax.tree.structure(nnx.state(held)))


@pytest.mark.parametrize('mode', MODES)
def test_a_mirror_beside_the_live_model(mode):
    """What a function gives back of the mirror is older than what it gives back of the model.

    In tree mode NNX takes no Variable twice, and those that are not selected are the live ones.
    """
    to_b = sg.everything if mode == 'tree' else sg.nothing
    read_b = stop if mode == 'tree' else (lambda b: b)

    class Pair(nnx.Module):
        def __init__(self, live):
            self.live = live
            self.held = sg.stop_gradient(sg.path('a') | sg.path('b') & to_b)(live)

        def __call__(self, x):
            return self.live(x) + 2 * self.held(x)

    def train(pair):
        pair.live.a.w[...] = pair.live.a.w[...] + 1
        return pair(X)

    pair = Pair(Net())
    nnx.jit(train, **MODES[mode])(pair)
    assert pair.live.a.w[...] == pair.held.a.w[...] == PARAMS[0] + 1

    def program(model):
        return nnx.jit(lambda pair: pair(X), **MODES[mode])(Pair(model))

    compare(program, lambda p: f(*p, X) + 2 * f(stop(p[0]), read_b(p[1]), X), orders=2)


def test_a_mirror_of_a_mirror_and_a_mirror_in_a_block():
    def program(model):
        both = sg.scale_gradient('a', 0.5)(sg.scale_gradient(True, 0.5)(model))
        with sg.scale_gradient('b', 0.5).on(model):
            inside = sg.scale_gradient('b', 0.5)(model)(X)
        return both(X) + inside

    def oracle(params):
        a, b = params
        return f(half(half(a)), half(b), X) + f(a, half(half(b)), X)

    compare(program, oracle)


def test_a_write_to_a_mirror_in_a_function_that_is_traced_is_refused():
    def write(model):
        model.a.w[...] = jnp.float32(1)

    with pytest.raises(sg.UsageError, match='a Param of a mirror was written in a function'):
        nnx.jit(write)(sg.stop_gradient('a')(Net()))


TREES = {
    'state': lambda m: nnx.state(m),
    'pure dict': lambda m: nnx.to_pure_dict(nnx.state(m)),
    'tuple': lambda m: (nnx.state(m)['a'], [m.b.w]),
}


@pytest.mark.parametrize('tree', TREES.values(), ids=TREES)
def test_trees(tree):
    held = '0' if tree is TREES['tuple'] else 'a'

    def program(model):
        made, plain = sg.stop_gradient(held)(tree(model)), tree(model)
        assert jax.tree.structure(made) == jax.tree.structure(plain)
        a, b = jax.tree.leaves(made)
        return f(a, b, X)

    compare(program, lambda p: f(stop(p[0]), p[1], X))
    with pytest.raises(sg.UnmatchedPathError, match="matches 'c'"):
        sg.stop_gradient('c')(tree(Net()))


def test_tied_variables_are_selected_by_any_of_their_names():
    class Tied(nnx.Module):
        def __init__(self, w):
            self.a = Part(w)
            self.b, self.c = self.a, nnx.List([self.a.w])

    for predicate, selected in {
        'a': True,
        'b': True,
        'c/0': True,
        ~sg.path('b'): False,
        sg.path('a') & 'b' & 'c': True,
        ~sg.path('a') | 'c': True,
    }.items():

        def program(w, predicate=predicate):
            model = Tied(w)
            with sg.stop_gradient(predicate).on(model):
                return model.a.w[...] * model.c[0][...]

        assert jax.grad(program)(jnp.float32(3)) == (0 if selected else 6)


@pytest.mark.parametrize(
    ('predicate', 'gradient'), [('a', 2), (True, 0), (~sg.path('a'), 0), ('..', 0), ('../...', 0)]
)
def test_a_variable_outside_the_module(predicate, gradient):
    def program(w):
        one, other = Net(), Net(w)
        with sg.stop_gradient(predicate, allow_unmatched=True).on(one):
            return other.a.w[...] * 2

    assert jax.grad(program)(jnp.float32(1)) == gradient


MISTAKES = {
    'a name without a module': (
        lambda m: sg.stop_gradient('a'),
        sg.UsageError,
        r"stop_gradient\('a'\) asks for names, and a Param of flax.nnx was read in its block: a "
        r'Variable has no name of its own. Say of which module the names are: with '
        r"stop_gradient\('a'\).on\(module\), or select by module: ",
    ),
    'a source without a module': (
        lambda m: sg.replace_values(True, {}),
        sg.UsageError,
        r'replace_values\(everything, <tree>\) asks for names, .*\.on\(module\)\.$',
    ),
    'a typo': (
        lambda m: sg.stop_gradient('c').on(m),
        sg.UnmatchedPathError,
        r"stop_gradient\('c'\).on\(Net\): no variable of the module matches 'c'. There are: 'a",
    ),
    'a callable': (
        lambda m: sg.stop_gradient(lambda v: v.name == 'c').on(m),
        sg.UnmatchedPathError,
        'selects no variable of the module',
    ),
    'a module without variables': (
        lambda m: sg.stop_gradient(nnx.Dropout(0.5, rngs=nnx.Rngs(0))).on(m),
        sg.UnmatchedPathError,
        r'within\(Dropout\) selects no variable of the module',
    ),
    'no module': (
        lambda m: sg.stop_gradient('a').on(jnp.ones(2)),
        sg.UsageError,
        r'\.on: got an object of type ArrayImpl; expected a flax.linen.Module or flax.nnx.Module',
    ),
}


@pytest.mark.parametrize(('block', 'error', 'match'), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(block, error, match):
    model = Net()
    for _ in range(2):  # with warm caches as with cold ones
        with pytest.raises(error, match=match), block(model):
            nnx.jit(lambda m: m(X))(model)
    assert model(X) == f(*PARAMS, X)


def test_within_is_of_modules():
    for wrong in (3, 'a', Net):
        with pytest.raises(
            sg.PredicateError, match='within: got .*; expected modules or Variables'
        ):
            sg.within(wrong)
    with pytest.raises(sg.PredicateError, match='within: got nothing'):
        sg.within()
    with pytest.raises(
        sg.PredicateError, match="asked about 'a', which is known by its name alone"
    ):
        sg.stop_gradient(sg.within(Net()))({'a': 1.0})


def test_a_block_in_which_nothing_is_read_warns():
    with pytest.warns(sg.UnreadBlockWarning), sg.scale_gradient(True, 0.125):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model = Net()
        step = nnx.jit(lambda m: m(X))
        for _ in range(2):
            with sg.stop_gradient():
                step(model)


def test_a_block_leaves_no_trace():
    model = Net()
    before = jax.tree.structure(model), model.a.w.get_metadata(), vars(nnx.Param).keys()
    with sg.stop_gradient('a').on(model):
        model(X)
        nnx.jit(lambda m: m(X))(model)
        grads = nnx.grad(lambda m: m(X))(model)
        assert model.a.w.get_metadata() == before[1]
    assert (jax.tree.structure(model), model.a.w.get_metadata(), vars(nnx.Param).keys()) == before
    assert jax.tree.structure(grads) == jax.tree.structure(nnx.state(model))
    assert jax.tree.structure(pickle.loads(pickle.dumps(model.a.w))) == jax.tree.structure(
        model.a.w
    )


def test_an_exception_leaves_the_model_as_it_was():
    model = Net()
    with pytest.raises(ZeroDivisionError), sg.map_values('a', lambda info, v: 2 * v).on(model):
        model(X)
        raise ZeroDivisionError
    assert model(X) == f(*PARAMS, X)


def test_threads_do_not_see_each_others_blocks():
    model, opened, done, seen = Net(), threading.Event(), threading.Event(), []

    def other():
        with sg.map_values(True, lambda info, v: 0 * v).on(model):
            opened.set()
            done.wait(60)
            seen.append(model(X))

    thread = threading.Thread(target=other)
    thread.start()
    try:
        assert opened.wait(60)
        seen.append(model(X))
        seen.append(nnx.jit(lambda m: m(X))(model))
    finally:
        done.set()
        thread.join()
    np.testing.assert_allclose(seen, [f(*PARAMS, X), f(*PARAMS, X), 0], rtol=1e-6)


LIFTS = {
    'nnx.jit': nnx.jit,
    'nnx.jit, tree': lambda fn: nnx.jit(fn, **MODES['tree']),
    'nnx.remat': nnx.remat,
    'jax.jit': jax.jit,
    'jax.checkpoint': jax.checkpoint,
}


@pytest.mark.parametrize('lift', LIFTS.values(), ids=LIFTS)
def test_no_stale_traces_in_any_order(lift):
    run = lift(lambda model, x: model(x))

    def grads(block):
        def program(params):
            model = Net(*params)
            with block(model):
                return run(model, X)

        return tuple(bool(g) for g in jax.grad(program)(PARAMS))

    check_orders(grads)


@pytest.mark.parametrize('lift', [jax.jit, jax.checkpoint, jax.vmap])
def test_no_stale_traces_of_a_captured_model(lift):
    model, cell = Net(), []
    run = lift(lambda x: model(x) + cell[0](x))

    def grads(block):
        """The function is the same, and has the Variables of the model at hand."""

        def program(params):
            cell[:] = [Net(*params)]
            with block(cell[0]):
                return jnp.sum(run(jnp.ones(1)))

        jax.clear_caches() if lift is not jax.vmap else None
        return tuple(bool(g) for g in jax.grad(program)(PARAMS))

    check_orders(grads, ORDER[:6] if lift is not jax.vmap else ORDER)


def test_no_stale_traces_of_a_captured_model_that_stays():
    """Its values are constants of the traces; functions of them tell the blocks apart."""
    model = Net()
    run = jax.jit(lambda x: model(x))
    other = Net()
    blocks = [
        (lambda: sg.map_values(True, lambda info, v: 2 * v).on(model), (2, 2)),
        (lambda: sg.map_values('a', lambda info, v: 2 * v).on(model), (2, 1)),
        (lambda: sg.map_values(model.b, lambda info, v: 2 * v), (1, 2)),
        (lambda: sg.map_values('a', lambda info, v: 2 * v).on(other), (1, 1)),
        (lambda: sg.map_values(other.b, lambda info, v: 2 * v), (1, 1)),
        (lambda: sg.map_values(sg.nothing, lambda info, v: 2 * v), (1, 1)),
    ]
    for i in ORDER:
        block, (a, b) = blocks[i]
        with block():
            got = run(X)
        np.testing.assert_allclose(got, f(a * PARAMS[0], b * PARAMS[1], X), rtol=1e-6)
        assert run(X) == f(*PARAMS, X)


ORDER = (0, 1, 2, 3, 4, 5, 3, 0, 5, 1, 4, 2, 0, 0)


def check_orders(grads, order=ORDER):
    other = Net()
    blocks = [
        (lambda m: sg.stop_gradient(m.a), (False, True)),
        (lambda m: sg.stop_gradient('b').on(m), (True, False)),
        (lambda m: sg.stop_gradient(sg.nothing), (True, True)),
        (lambda m: sg.stop_gradient(), (False, False)),
        (lambda m: sg.stop_gradient(other.a), (True, True)),
        (lambda m: sg.stop_gradient('a').on(other), (True, True)),
    ]
    for i in order:
        block, live = blocks[i]
        assert grads(block) == live, i


def test_equal_blocks_do_not_trace_again():
    model, traced = Net(), []

    @nnx.jit
    def step(model, x):
        traced.append(x)
        return model(x)

    for _ in range(3):
        with sg.stop_gradient(model.a):
            step(model, X)
        with sg.stop_gradient('b').on(model):
            step(model, X)
        with sg.stop_gradient(~sg.within(model.a)):
            step(model, X)
        with sg.stop_gradient():
            step(model, X)
        step(model, X)
    assert len(traced) <= 4  # the second and the third hold the same


def test_equal_layers_are_traced_once():
    traced = []

    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(2, 2, rngs=rngs)

        @sg.stop_gradient('linear/bias')
        def __call__(self, x):
            return run(self.linear, x)

    @nnx.jit
    def run(linear, x):
        traced.append(1)
        return linear(x)

    layers = nnx.List([Layer(nnx.Rngs(i)) for i in range(4)])
    x = jnp.ones((1, 2))
    for layer in layers:
        x = layer(x)
    assert len(traced) == 1
    with sg.stop_gradient('0').on(layers):
        for layer in layers:
            x = layer(x)
    assert len(traced) <= 4
