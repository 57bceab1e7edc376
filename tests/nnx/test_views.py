"""One forward pass of a module of flax.nnx, and an output for each of several losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_sg as sg
from flax_sg import nnx
from nnx_programs import MODES, PARAMS, XS, Net, Part, X, compare, f, stop


class Counting(Net):
    """It writes a state, draws numbers, and has methods."""

    def __init__(self, a=PARAMS[0], b=PARAMS[1]):
        super().__init__(a, b)
        self.runs = nnx.Variable(jnp.int32(0))
        self.seen = nnx.BatchStat(jnp.float32(0))
        self.rngs = nnx.Rngs(noise=0)

    def run(self, x):
        self.runs[...] += 1
        self.seen[...] = self.a.w[...] * 2
        return Net.__call__(self, x) + 0 * jax.random.normal(self.rngs.noise(), ())


def entries(a, b):
    return {'a': a, 'b': b}


BY_NAME, VIEWS = entries('a', 'b'), sg.gradient_views(entries('a', 'b'))
TARGETS = {
    'bound method': lambda m: VIEWS(m.run)(X),
    'method': lambda m: VIEWS(Counting.run)(m, X),
    'function': lambda m: VIEWS(lambda m, x: m.run(x))(m, X),
    'by module': lambda m: sg.gradient_views(entries(m.a, m.b.w))(m.run)(X),
    'complement': lambda m: sg.gradient_views(entries(~sg.within(m.b), 'b'))(m.run)(X),
}


def losses(out):
    return jnp.sin(out['a']) + out['b'] ** 3


def of_views(params):
    a, b = params
    return losses({'a': f(a, stop(b), X), 'b': f(stop(a), b, X)})


@pytest.mark.thinned(4)
@pytest.mark.parametrize('lift', ['plain', *MODES, 'jax.jit', 'jax.checkpoint'])
@pytest.mark.parametrize('target', TARGETS.values(), ids=TARGETS)
def test_views(target, lift):
    lifts = {'plain': lambda fn: fn, 'jax.jit': jax.jit, 'jax.checkpoint': jax.checkpoint}
    lifts |= {mode: functools.partial(nnx.jit, **how) for mode, how in MODES.items()}

    def program(model):
        made = Counting(model.a.w.get_raw_value(), model.b.w.get_raw_value())
        return lifts[lift](lambda m: losses(target(m)))(made)

    compare(program, of_views, orders=2)


def test_an_instance_and_a_class():
    def program(model):
        Viewed = VIEWS(Net)
        made = Viewed(model.a.w.get_raw_value(), model.b.w.get_raw_value())
        return losses(VIEWS(model)(X)) + losses(made(X))

    compare(program, lambda p: 2 * of_views(p), orders=2)


def test_state_is_updated_and_numbers_are_drawn_once():
    model, plain = Counting(), Counting()
    for _ in range(2):
        VIEWS(model.run)(X)
        plain.run(X)
    assert model.runs[...] == 2
    assert all(map(jnp.array_equal, *(jax.tree.leaves(nnx.state(m)) for m in (model, plain))))
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(nnx.state(plain))

    def loss(model):
        VIEWS(model.run)(X)
        return model.seen[...] * 1.0

    grads = nnx.grad(loss)(Counting())
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads))  # what is written is no entry's


def test_the_target_runs_once():
    model, runs = Net(), []

    def run(model, x):
        runs.append(1)
        return jax.lax.fori_loop(0, 3, lambda i, x: jnp.cos(model(x)), x)

    graph, state = nnx.split(model)
    loss = lambda state: losses(VIEWS(run)(nnx.merge(graph, state), X))
    text = str(jax.make_jaxpr(loss)(state))
    assert len(runs) == 1 and text.count('cos') == 1


def test_an_optimisers_step_inside_and_a_block_around():
    def program(model):
        with sg.stop_gradient('a').on(model):
            return losses(VIEWS(lambda m, x: m(x))(model, X))

    compare(program, lambda p: losses({'a': f(*map(stop, p), X), 'b': f(stop(p[0]), p[1], X)}))


def test_tied_variables():
    class Tied(nnx.Module):
        def __init__(self, w):
            self.a = Part(w)
            self.b = self.a

    def program(w):
        out = sg.gradient_views(entries('a', 'b'))(lambda m: m.a.w[...] * m.b.w[...])(Tied(w))
        return out['a'] + 10 * out['b']

    assert jax.grad(program)(jnp.float32(3)) == 66


def test_a_scan_that_feeds_several_losses():
    def run(model, xs):
        step = nnx.scan(
            lambda c, m, x: (c * m(x), c), in_axes=(nnx.Carry, None, 0), out_axes=(nnx.Carry, 0)
        )
        return step(jnp.float32(1), model, xs)[0]

    def by_hand(a, b):
        return jax.lax.scan(lambda c, x: (c * f(a, b, x), c), jnp.float32(1), XS)[0]

    def program(model):
        return losses(VIEWS(run)(model, XS))

    compare(
        program,
        lambda p: losses({'a': by_hand(p[0], stop(p[1])), 'b': by_hand(stop(p[0]), p[1])}),
        orders=2,
    )


def test_mistakes():
    with pytest.raises(sg.UnmatchedPathError, match="matches 'c'"):
        sg.gradient_views({'a': 'a', 'c': 'c'})(Net())(X)
    model = Counting()
    with pytest.raises(ZeroDivisionError):
        VIEWS(lambda m: (m.run(X), 1 / 0))(model)
    assert model.runs[...] == 0
    np.testing.assert_array_equal(model(X), f(*PARAMS, X))
