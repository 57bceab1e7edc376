"""Rules of the user's own for derivatives and batches run in the blocks of the call.

By hand: the function is called on ``stop_gradient(params)`` where the block selects.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

import flax_sg as sg
from flax_sg import nn
from models import Scale

one = jnp.ones(())
PARAMS = {'params': {'w': 2 * one}}
run = lambda p, x: Scale().apply(p, x)


def vjp_function(recompute=False):
    f = jax.custom_vjp(run)
    if recompute:
        f.defvjp(lambda p, x: (run(p, x), (p, x)), lambda res, ct: jax.vjp(run, *res)[1](ct))
    else:
        f.defvjp(lambda p, x: jax.vjp(run, p, x), lambda pull, ct: pull(ct))
    return f


def jvp_function():
    f = jax.custom_jvp(run)
    f.defjvp(lambda primals, tangents: jax.jvp(run, primals, tangents))
    return f


def nondiff_function():
    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def call(f, p, x):
        return f(p, x)

    call.defvjp(lambda f, p, x: (f(p, x), (p, x)), lambda f, res, ct: jax.vjp(f, *res)[1](ct))
    return functools.partial(call, run)


def gradient_function():
    @jax.custom_gradient
    def f(p, x):
        return run(p, x), lambda ct: jax.vjp(run, p, x)[1](ct)

    return f


def linear_function():
    """Linear in x; its transpose applies the model."""

    def f(p, x):
        return jax.custom_derivatives.linear_call(run, lambda p, ct: run(p, ct), p, x)

    return f


FUNCTIONS = {
    'residuals': vjp_function,
    'recomputed': functools.partial(vjp_function, True),
    'jvp': jvp_function,
    'nondiff': nondiff_function,
    'custom_gradient': gradient_function,
}
SCAN = lambda f: lambda p, x: jax.lax.scan(lambda c, _: (c + f(p, x), None), 0.0, None, length=1)[0]
WRAPS = {
    'eager': lambda f: f,
    'jit': jax.jit,
    'checkpoint': jax.checkpoint,
    'scan': SCAN,
    'jit scan': lambda f: jax.jit(SCAN(f)),
    'remat scan': lambda f: SCAN(jax.checkpoint(f)),
    'cond': lambda f: lambda p, x: jax.lax.cond(x > 0, f, lambda p, x: 0.0, p, x),
    'vmap': lambda f: lambda p, x: jax.vmap(f, (None, 0))(p, x[None])[0],
}


def masked(f, t):
    def loss(p, x):
        with t:
            return f(p, x)

    return loss


@pytest.mark.thinned(3)
@pytest.mark.parametrize('order', ['block in', 'block out'])
@pytest.mark.parametrize(
    'wrap',
    [
        wrap
        if wrap in ('eager', 'jit', 'checkpoint', 'scan')
        else pytest.param(wrap, marks=pytest.mark.long)
        for wrap in WRAPS
    ],
)
@pytest.mark.parametrize('kind', FUNCTIONS)
def test_first_order(kind, wrap, order):
    f, w = FUNCTIONS[kind](), WRAPS[wrap]
    t = sg.stop_gradient('w')
    loss = w(masked(f, t)) if order == 'block in' else masked(w(f), t)
    live = lambda p, x: w(f)(p, x)
    for way, want in ((loss, (0, 2)), (live, (3, 2)), (loss, (0, 2))):
        gp, gx = jax.grad(way, (0, 1))(PARAMS, 3 * one)
        assert (float(gp['params']['w']), float(gx)) == want


@pytest.mark.parametrize('kind', FUNCTIONS)
def test_a_pullback_that_runs_in_another_block_or_in_none(kind):
    f = FUNCTIONS[kind]()
    live, pull = jax.vjp(lambda p: jax.jit(f)(p, 3 * one), PARAMS)
    with sg.stop_gradient('w', allow_unmatched=True):
        assert float(pull(one)[0]['params']['w']) == 3
    masked_, pull = jax.vjp(
        lambda p: masked(jax.jit(f), sg.stop_gradient(True))(p, 3 * one), PARAMS
    )
    with sg.scale_gradient('w', 10.0, allow_unmatched=True):
        assert float(pull(one)[0]['params']['w']) == 0
    assert live == masked_ == 6


@pytest.mark.parametrize('kind', FUNCTIONS)
def test_siblings_count_once(kind):
    f = FUNCTIONS[kind]()
    for t, want in (
        (sg.scale_gradient('w', 10.0), 30),
        (sg.map_values('w', lambda i, w: w * 5), 15),
        (sg.map_gradient('w', lambda i, ct: ct * 7), 21),
    ):
        got = jax.grad(masked(jax.jit(f), t))(PARAMS, 3 * one)
        assert float(got['params']['w']) == want


@pytest.mark.parametrize('kind', ['recomputed', 'jvp', 'nondiff'])
def test_second_order(kind):
    """d²/dx dw of w x³ where the model is x -> w x; zero in the block, 3x² outside."""
    f = FUNCTIONS[kind]()
    loss = lambda p, x: f(p, x) * x**2
    for way, want in ((masked(loss, sg.stop_gradient(True)), 0), (loss, 27)):
        second = jax.grad(lambda x, way=way: jax.grad(way)(PARAMS, x)['params']['w'])(3 * one)
        assert float(second) == want


def test_forward_mode():
    loss = masked(jvp_function(), sg.stop_gradient(True))
    t = {'params': {'w': one}}
    assert jax.jvp(lambda p: loss(p, 3 * one), (PARAMS,), (t,))[1] == 0
    assert jax.jit(lambda: jax.jvp(lambda p: loss(p, 3 * one), (PARAMS,), (t,))[1])() == 0


def test_a_batching_rule():
    @jax.custom_batching.custom_vmap
    def f(p, x):
        return run(p, x)

    @f.def_vmap
    def rule(size, batched, p, x):
        return run(p, x), True

    loss = masked(f, sg.map_values('w', lambda i, w: w * 5))
    xs = jnp.array([1.0, 2.0])
    assert jax.vmap(jax.jit(loss), (None, 0))(PARAMS, xs).tolist() == [10, 20]
    assert jax.vmap(jax.jit(f), (None, 0))(PARAMS, xs).tolist() == [2, 4]


def test_a_transpose_of_a_linear_call():
    f = linear_function()
    loss = masked(f, sg.map_values('w', lambda i, w: w * 5))
    assert float(jax.grad(jax.jit(loss), 1)(PARAMS, 3 * one)) == 10
    assert float(jax.grad(jax.jit(f), 1)(PARAMS, 3 * one)) == 2


class Layer(nn.Module):
    """A block in model code, around a function whose rules read the module."""

    @nn.compact
    def __call__(self, x):
        dense = Scale(name='d')
        f = jax.custom_jvp(lambda x: dense(x))
        f.defjvp(lambda primals, tangents: jax.jvp(dense, primals, tangents))
        with nn.scale_gradient('d', 10.0):
            y = f(x)
        return y + f(x)


def test_a_rule_that_reads_a_module():
    apply = lambda p, x: Layer().apply({'params': {'d': p}}, x)
    # d/dx is 2 w; its derivative with respect to w is 10 from the block and 1 from outside.
    second = jax.grad(lambda p: jax.grad(apply, 1)(p, 3 * one))
    assert float(second({'w': 2 * one})['w']) == 11


def test_an_implicit_layer():
    """z = w z / 2 + x, so z = x / (1 - w/2), dz/dw = x / 2 / (1 - w/2)^2, dz/dx = 1/(1 - w/2)."""
    model = nn.Dense(1, use_bias=False)
    f = lambda p, x, z: 0.5 * model.apply(p, z) + x

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def solve(f, p, x):
        return jax.lax.fori_loop(0, 99, lambda _, z: f(p, x, z), jnp.zeros_like(x))

    def forward(f, p, x):
        z = solve(f, p, x)
        return z, (p, x, z)

    def backward(f, res, ct):
        p, x, z = res
        pull = jax.vjp(lambda z: f(p, x, z), z)[1]
        u = jax.lax.fori_loop(0, 99, lambda _, u: ct + pull(u)[0], ct)
        return jax.vjp(lambda p, x: f(p, x, z), p, x)[1](u)

    solve.defvjp(forward, backward)
    p, x = {'params': {'kernel': jnp.ones((1, 1))}}, jnp.ones((1, 1))
    loss = lambda p, x: solve(f, p, x).sum()
    for way, want in ((masked(loss, sg.stop_gradient('kernel')), 0), (loss, 2)):
        for run in (way, jax.jit(way)):
            gp, gx = jax.grad(run, (0, 1))(p, x)
            assert float(gp['params']['kernel'][0, 0]) == pytest.approx(want)
            assert float(gx[0, 0]) == pytest.approx(2)


def test_a_call_in_nested_blocks_and_in_a_class():
    held = sg.stop_gradient('w')(Scale)
    f = jax.custom_vjp(lambda p, x: held().apply(p, x))
    f.defvjp(
        lambda p, x: (f(p, x), (p, x)),
        lambda res, ct: jax.vjp(lambda p, x: held().apply(p, x), *res)[1](ct),
    )
    with sg.scale_gradient('w', 3.0):
        grads = jax.grad(jax.jit(f))(PARAMS, 3 * one)
    assert float(grads['params']['w']) == 0

    g = vjp_function(True)

    def loss(p, x):
        with sg.scale_gradient('w', 3.0):
            inner = masked(g, sg.scale_gradient('w', 5.0))(p, x)
            return inner + g(p, x)

    assert float(jax.grad(jax.jit(loss))(PARAMS, one)['params']['w']) == 15 + 3


def test_the_function_itself_is_left_alone():
    f = vjp_function()
    before = dict(vars(f))
    masked(f, sg.stop_gradient(True))(PARAMS, one)
    assert dict(vars(f)) == before


# What a rule leaves behind ------------------------------------------------------------------------


def scale_of(p):
    return float(jax.grad(lambda p: Scale().apply({'params': p}, 1.0))(p)['w'])


def test_a_rule_that_raises_leaves_nothing_open():
    f = jax.custom_vjp(lambda p: run(p, 1.0))

    def backward(res, ct):
        raise KeyError('mine')

    f.defvjp(lambda p: (f(p), p), backward)
    with sg.scale_gradient('w', 2.0):
        with pytest.raises(KeyError, match='mine'):
            jax.grad(masked(lambda p, x: f(p), sg.stop_gradient('w')))(PARAMS, one)
        assert scale_of({'w': one}) == 2
    assert scale_of({'w': one}) == 1


TS = [
    sg.stop_gradient('w', allow_unmatched=True),
    sg.scale_gradient('w', 5.0, allow_unmatched=True),
    sg.scale_gradient('w', 7.0, allow_unmatched=True),
]
IDLE = sg.stop_gradient('zzz', allow_unmatched=True)


def test_a_rule_that_runs_in_a_trace_does_not_hide_what_the_trace_depends_on():
    plain = jax.custom_vjp(lambda x: x)
    plain.defvjp(lambda x: (x, ()), lambda _, ct: (ct,))

    @jax.jit
    def f(p):
        pull = jax.vjp(plain, 1.0)[1]
        with IDLE:
            pull(1.0)
        return Scale().apply({'params': p}, 1.0)

    for t, want in zip(TS * 2, (0, 5, 7) * 2, strict=True):
        assert (
            float(jax.grad(lambda p, t=t: masked(lambda p, x: f(p), t)(p, one))({'w': one})['w'])
            == want
        )


def reads_backwards():
    """A function that reads the model in its backward rule alone."""
    f = jax.custom_vjp(lambda p, x: x)
    f.defvjp(
        lambda p, x: (x, p),
        lambda p, ct: (jax.grad(lambda p: Scale().apply({'params': p}, ct))(p), ct),
    )
    return f


@pytest.mark.parametrize('wrap', [lambda f: f, jax.jit])
def test_a_rule_alone_reads_the_model(wrap):
    f = wrap(reads_backwards())
    for t, want in zip(TS * 2, (0, 5, 7) * 2, strict=True):
        assert float(jax.grad(masked(f, t))({'w': one}, 1.0)['w']) == want
    assert float(jax.grad(f)({'w': one}, 1.0)['w']) == 1


def test_a_pullback_inside_a_trace():
    f = reads_backwards()

    @jax.jit
    def step(p):
        pull = jax.vjp(lambda p: f(p, 1.0), p)[1]
        with IDLE:
            return pull(1.0)[0]['w']

    for t, want in zip(TS * 2, (0, 5, 7) * 2, strict=True):
        with t:
            assert float(step({'w': one})) == want


class Two(nn.Module):
    def first(self, x):
        return self.get_variable('params', 'w') * x

    def second(self, x):
        return self.get_variable('params', 'v') * x


@pytest.mark.parametrize('order', [(('w', 'v'), ('w',)), (('w',), ('w', 'v'))])
def test_predicates_of_one_line_in_rules_that_ask_more_than_the_call_did(order):
    second = jax.jit(lambda p: Two().apply({'params': p}, 1.0, method='second'))
    f = jax.custom_vjp(lambda p: Two().apply({'params': p}, 1.0, method='first'))
    f.defvjp(
        lambda p: (f(p), p), lambda p, ct: (jax.tree.map(lambda g: g * ct, jax.grad(second)(p)),)
    )
    weights = dict(zip(order, (5, 3), strict=True))

    def loss(p):
        def part(names):
            with sg.stop_gradient(lambda v: v.name in names):
                return weights[names] * f(p)

        return sum(map(part, order))

    grads = jax.grad(loss)({'w': one, 'v': one})
    assert float(grads['v']) == weights[('w',)] and float(grads['w']) == 0


def test_a_call_in_a_block_of_a_module_keeps_no_tracer(no_leaks):
    plain = jax.custom_vjp(lambda x: x)
    plain.defvjp(lambda x: (x, ()), lambda _, ct: (ct,))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            with sg.stop_gradient('s'):
                return plain(Scale(name='s')(x))

    jax.jit(Net().apply)({'params': {'s': {'w': one}}}, 1.0)


@pytest.mark.parametrize('primal', [jnp.sign, lambda x: jnp.sign(x)], ids=['of JAX', 'own'])
@pytest.mark.parametrize('wrap', [lambda f: f, jax.jit], ids=['eager', 'jit'])
def test_rules_of_ones_own_for_a_function_of_jax(primal, wrap):
    surrogate = jax.custom_vjp(primal)
    surrogate.defvjp(lambda x: (primal(x), None), lambda _, ct: (run(PARAMS, ct),))

    def loss(x):
        with sg.map_values(True, lambda info, w: 7 * w, allow_unmatched=True):
            return surrogate(x)

    assert wrap(jax.grad(loss))(2.0) == 14


def test_rules_in_a_partial_of_jax():
    Partial = jax.tree_util.Partial
    f = jax.custom_vjp(Partial(run))
    f.defvjp(
        Partial(lambda p, x: (run(p, x), (p, x))),
        Partial(lambda res, ct: jax.vjp(run, *res)[1](ct)),
    )

    def loss(p):
        with sg.stop_gradient():
            return f(p, one)

    assert jax.grad(loss)(PARAMS)['params']['w'] == 0
