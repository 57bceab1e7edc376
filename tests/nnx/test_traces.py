"""Functions that NNX and JAX trace, with a block around them and around their derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_sg as sg
from flax_sg import nnx
from nnx_programs import (
    FEW,
    KINDS,
    MODES,
    NAMINGS,
    PARAMS,
    SIBLINGS,
    XS,
    Net,
    X,
    around_and_live,
    f,
    read,
)


def call(model, x):
    return model(x)


def scanned(lift, model):
    carry = nnx.Carry
    run = lift(nnx.scan, in_axes=(carry, None, 0), out_axes=(carry, 0))
    return run(lambda c, m, x: (c + m(x), m(x)))(jnp.float32(0), model, XS)[1].sum()


def carried(lift, model):
    run = lift(nnx.scan, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    return run(lambda m, x: (m, m(x)))(model, XS)[1].sum()


def looped(lift, model):
    def body(i, state):
        model, total = state
        return model, total + model(XS[i])

    return nnx.fori_loop(0, 3, body, (model, jnp.float32(0)), **lift.mode)[1]


def layers(lift, model):
    run = lift(nnx.scan, in_axes=(nnx.Carry, None, None, 0), out_axes=(nnx.Carry, 0))

    def body(c, m, _, x):
        return c, lift(nnx.remat)(call)(m, x)

    return lift(nnx.jit)(lambda m: run(body)(jnp.float32(0), m, None, XS)[1].sum())(model)


# By name: what is run, given what makes a transform of a mode; and what it computes.
TRANSFORMS = {
    'jit': lambda lift, m: lift(nnx.jit)(call)(m, X),
    'jit of jit': lambda lift, m: lift(nnx.jit)(lambda m: lift(nnx.jit)(call)(m, X))(m),
    'remat': lambda lift, m: lift(nnx.remat)(call)(m, X),
    'vmap': lambda lift, m: lift(nnx.vmap, in_axes=(None, 0))(call)(m, XS).sum(),
    'scan': scanned,
    'scan, carried': carried,
    'fori_loop': looped,
    'jit of scan of remat': layers,
    'cond': lambda lift, m: nnx.cond(True, lambda m: m(X), lambda m: m(2 * X), m, **lift.mode),
    'switch': lambda lift, m: nnx.switch(
        jnp.int32(0), [lambda m: m(X), lambda m: m(2 * X)], m, **lift.mode
    ),
    'grad of an input': lambda lift, m: lift(nnx.grad)(lambda x, m: m(x))(X, m),
    'value_and_grad': lambda lift, m: lift(nnx.value_and_grad)(lambda x, m: m(x))(X, m)[0],
    'jit of grad': lambda lift, m: lift(nnx.jit)(lambda m: lift(nnx.grad)(lambda x, m: m(x))(X, m))(
        m
    ),
    'jax.jit': lambda lift, m: jax.jit(call)(m, X),
    'jax.jit of a state': lambda lift, m: of_state(jax.jit, m),
    'jax.checkpoint of a state': lambda lift, m: of_state(jax.checkpoint, m),
    'jax.vmap of a state': lambda lift, m: of_state(
        lambda fn: lambda s: jax.vmap(lambda s, _: fn(s), in_axes=(None, 0))(s, XS)[0], m
    ),
    'lax.scan of a state': lambda lift, m: jax.lax.scan(
        lambda s, x: (s, nnx.merge(nnx.graphdef(m), s)(x)), nnx.state(m), XS
    )[1].sum(),
    'lax.cond of a state': lambda lift, m: of_state(
        lambda fn: lambda s: jax.lax.cond(True, fn, lambda s: jnp.float32(0), s), m
    ),
}
ONLY_TREES = {
    'vjp': lambda lift, m: lift(nnx.vjp)(call, m, X)[0],
    'jvp': lambda lift, m: lift(nnx.jvp)(lambda x: m(x), (X,), (X,))[0],
}


def of_state(lift, model):
    graph, state = nnx.split(model)
    return lift(lambda state: nnx.merge(graph, state)(X))(state)


def by_hand(name):
    if 'scan' in name or name in ('vmap', 'fori_loop'):
        return lambda a, b: f(a, b, XS).sum()
    if 'grad' in name and name != 'value_and_grad':
        return lambda a, b: jax.grad(f, argnums=2)(a, b, X)
    return lambda a, b: f(a, b, X)


class Lift:
    def __init__(self, mode):
        self.mode = MODES[mode]

    def __call__(self, transform, **kwargs):
        return functools.partial(transform, **kwargs, **self.mode)


CASES = [
    *((name, mode) for name in TRANSFORMS if not name.startswith(('jax', 'lax')) for mode in MODES),
    *((name, 'tree') for name in TRANSFORMS if name.startswith(('jax', 'lax'))),
    *((name, mode) for name in ONLY_TREES for mode in ('graph', 'tree')),
]


def program(name, mode):
    return functools.partial({**TRANSFORMS, **ONLY_TREES}[name], Lift(mode))


@pytest.mark.thinned(13)
@pytest.mark.parametrize('naming', NAMINGS)
@pytest.mark.parametrize(('name', 'mode'), CASES)
def test_around(name, mode, naming):
    around_and_live('stop', naming, program(name, mode), by_hand(name))


@pytest.mark.thinned(101)
@pytest.mark.parametrize(('kind', 'naming'), FEW)
@pytest.mark.parametrize(('name', 'mode'), CASES)
def test_around_by_siblings(name, mode, kind, naming):
    around_and_live(kind, naming, program(name, mode), by_hand(name))


@pytest.mark.thinned(79)
@pytest.mark.parametrize(('kind', 'naming'), [('stop', 'path'), *FEW])
@pytest.mark.parametrize(('name', 'mode'), CASES)
def test_second_order(name, mode, kind, naming):
    around_and_live(kind, naming, program(name, mode), by_hand(name), orders=2)


def of_nnx_grad(mode):
    def derive(model):
        grads = nnx.grad(call, **MODES[mode])(model, X)
        return grads['a']['w'], grads['b']['w']

    def derive_tree(model):
        grads = nnx.grad(call, **MODES[mode])(model, X)
        return grads.a.w, grads.b.w

    return derive if mode == 'graph with updates' else derive_tree


def of_diff_state(model):
    wrt = nnx.DiffState(0, nnx.All(nnx.Param, lambda path, value: 'a' in path))
    return (nnx.grad(call, argnums=wrt)(model, X)['a']['w'],)


def of_jax_grad(model):
    graph, state = nnx.split(model)
    grads = jax.grad(lambda state: nnx.merge(graph, state)(X))(state)
    return grads['a']['w'], grads['b']['w']


def of_vjp(model):
    graph, state = nnx.split(model)
    out, pull = jax.vjp(lambda state: nnx.merge(graph, state)(X), state)
    (grads,) = pull(jnp.ones_like(out))
    return grads['a']['w'], grads['b']['w']


DERIVATIVES = {
    **{f'nnx.grad, {mode}': of_nnx_grad(mode) for mode in MODES},
    'nnx.jit of nnx.grad': lambda m: nnx.jit(of_nnx_grad('graph with updates'))(m),
    'nnx.jit of nnx.grad, tree': lambda m: nnx.jit(of_nnx_grad('tree'), **MODES['tree'])(m),
    'DiffState': of_diff_state,
    'jax.grad of a state': of_jax_grad,
    'jax.jit of jax.grad': lambda m: (
        lambda graph, state: jax.jit(lambda state: of_jax_grad(nnx.merge(graph, state)))(state)
    )(*nnx.split(m)),
    'jax.grad of a module': lambda m: (lambda g: (g.a.w, g.b.w))(jax.grad(call)(m, X)),
    'jax.vjp': of_vjp,
    'jax.jacrev': lambda m: (lambda g: (g.a.w, g.b.w))(jax.jacrev(call)(m, X)),
}


@pytest.mark.thinned(7)
@pytest.mark.parametrize('name', DERIVATIVES)
@pytest.mark.parametrize(('kind', 'naming'), [*(('stop', naming) for naming in NAMINGS), *SIBLINGS])
def test_around_a_derivative(kind, naming, name):
    """What is selected has the gradient that it would have with the reads by hand in the loss."""
    check_derivative(kind, naming, DERIVATIVES[name])


def check_derivative(kind, naming, derive):
    got = NAMINGS[naming].use(KINDS[kind][0], Net(), derive)
    want = jax.grad(lambda params: f(*read(kind, naming)(params), X))(PARAMS)
    for g, w in zip(got, want, strict=False):
        np.testing.assert_allclose(g.get_raw_value(), w, rtol=1e-5)


def of_a_clone(model):
    return of_nnx_grad('graph with updates')(nnx.clone(model))


@pytest.mark.parametrize('kind', ['stop', 'scale', 'map_gradient', 'replace'])
def test_around_a_derivative_of_a_copy(kind):
    """What the block did to the copy lies outside of the derivative, and is done again."""
    check_derivative(kind, 'path', of_a_clone)


def test_a_derivative_of_a_copy_with_a_changed_value_is_refused():
    """What the function was given is not known any more."""
    with pytest.raises(sg.UsageError, match="with respect to a copy of 'a/w' that was made in the"):
        NAMINGS['path'].use(KINDS['map'][0], Net(), of_a_clone)
