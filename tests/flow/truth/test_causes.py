"""Two obstacles in all orders: the cause is the one which alone would let the gradient through.

Each entry is proved by a probe: the obstacle is differentiated straight through, and the gradient
is there or not.
"""

import itertools

import jax
import jax.numpy as jnp
import pytest

import flax_sg as sg

stop = jax.lax.stop_gradient
X = jnp.array([0.3, -0.7, 1.1])


@jax.custom_vjp
def no_cotangent(x):
    return 2 * x


no_cotangent.defvjp(lambda x: (2 * x, None), lambda _, ct: (jnp.zeros_like(ct),))

# By name: the function, its verdict, its operation. The order of verdicts decides among equals.
OBSTACLES = {
    'stop': (stop, 'MASKED', 'stop_gradient'),
    'rule': (no_cotangent, 'CUSTOM_ZERO', 'no_cotangent (custom_vjp)'),
    'round': (lambda x: jnp.round(3 * x), 'PIECEWISE_CONSTANT', 'round'),
    'sign': (jnp.sign, 'PIECEWISE_CONSTANT', 'sign'),
    'cast': (
        lambda x: (5 * x).astype(int).astype(jnp.float32),
        'PIECEWISE_CONSTANT',
        'astype (convert_element_type)',
    ),
}
ORDER = ['MASKED', 'CUSTOM_ZERO', 'PIECEWISE_CONSTANT']
SHAPES = {
    'in a row': lambda f, g, x: g(1.3 * f(x)),
    'the first beside a path': lambda f, g, x: g(x - 0.5 * f(x)),
    'beside each other': lambda f, g, x: f(x) * 0.7 + g(jnp.sin(x)),
    'both beside a path': lambda f, g, x: f(x) * x + g(jnp.sin(x)),
    'in a row beside a path': lambda f, g, x: g(1.3 * f(x)) + jnp.tanh(x),
    'the first twice': lambda f, g, x: g(x * f(x)) + 0.1 * g(jnp.cos(x)),
    'in a loop': lambda f, g, x: jax.lax.fori_loop(0, 6, lambda i, c: g(jnp.tanh(c - f(c))), x),
    'in a branch': lambda f, g, x: jax.lax.cond(x[0] > 0, lambda x: g(x + f(x)), jnp.ones_like, x),
}


def straight(f):
    return lambda x: x + stop(f(x) - x)


def is_there(shape, f, g):
    grads = [
        jax.grad(lambda x: (SHAPES[shape](f, g, x) * X).sum())(k * X) for k in (1.0, -0.6, 2.0)
    ]
    return any(bool(grad.any()) for grad in grads)


@pytest.mark.thinned(4)
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('names', [*itertools.permutations(OBSTACLES, 2)], ids='-'.join)
def test_the_cause(names, shape):
    (f, *of_f), (g, *of_g) = (OBSTACLES[name] for name in names)
    record = sg.gradient_flow(lambda p: (SHAPES[shape](f, g, p['a']) * X).sum())({'a': X})[
        'loss', 'a'
    ]
    live = is_there(shape, f, g)
    assert record.reached is live
    if live:
        assert record.verdict == 'REACHED_PARTLY'
        return
    alone = [
        which
        for which, fg in ((of_f, (straight(f), g)), (of_g, (f, straight(g))))
        if is_there(shape, *fg)
    ]
    expected = sorted(alone or [of_f, of_g], key=lambda which: ORDER.index(which[0]))
    found = {o.operation: o.alone for o in record.obstacles}
    assert (str(record.verdict), record.operation) in map(tuple, expected)
    assert record.verdict == expected[0][0]
    for verdict, operation in (of_f, of_g):
        if [verdict, operation] in alone:
            assert found[operation], (operation, record)
        else:
            assert not found.get(operation), (operation, record)
    assert ('in a row with' in record.reason) is not bool(alone), record.reason


@pytest.mark.parametrize(
    'fn',
    [
        lambda x: jnp.where(x > 0, jnp.round(3 * x), -jnp.round(2 * x)),
        lambda x: jax.lax.cond(x[0] > 0, lambda x: jnp.round(3 * x), lambda x: jnp.round(x), x),
        lambda x: jax.lax.while_loop(lambda c: c.sum() < x[0], jnp.exp, jnp.round(3 * x)),
    ],
    ids=['where', 'cond', 'while'],
)
def test_what_only_chooses_is_named_last(fn):
    record = sg.gradient_flow(lambda p: (fn(p['a']) * X).sum())({'a': X})['loss', 'a']
    assert record.operation == 'round'
    assert [
        o.alone for o in record.obstacles if 'greater' in o.operation or 'less' in o.operation
    ] == [True]


def test_three_in_a_row():
    loss = lambda p: jnp.sign(jnp.floor(2 * stop(p['a']))).sum()
    record = sg.gradient_flow(loss)({'a': X})['loss', 'a']
    assert (record.verdict, record.operation) == ('MASKED', 'stop_gradient')
    assert [o.operation for o in record.obstacles] == ['stop_gradient', 'floor', 'sign']
    assert record.reason.startswith('in a row with floor at ') and 'sign at ' in record.reason


def test_a_residual_branch_is_not_blamed_for_what_ends_behind_it():
    def loss(p, x):
        for name in ('a', 'b', 'c'):
            x = x + jnp.round(x * p[name])
        return (jnp.argmax(x * p['last']) * x).sum()

    flow = sg.gradient_flow(loss)({name: X for name in ('a', 'b', 'c', 'last')}, X)
    assert {flow['loss', name].operation for name in 'abc'} == {'round'}
    assert flow['loss', 'last'].operation == 'argmax'


# Rules of others.


def test_what_ends_in_a_function_with_a_rule():
    from jax.experimental.ode import odeint

    times = jnp.array([0.0, 0.5])

    def held(p):
        return odeint(lambda y, t, q: -sg.stop_gradient('a')(q)['a'] * y, p['b'], times, p)[
            -1
        ].sum()

    def rounded(p):
        return odeint(lambda y, t, a: -jnp.round(a) * y, p['b'], times, p['a'])[-1].sum()

    params = {'a': X, 'b': X}
    for loss, verdict, operation in (
        (held, 'MASKED', "stop_gradient('a')"),
        (rounded, 'PIECEWISE_CONSTANT', 'round'),
    ):
        flow = sg.gradient_flow(loss, norms=True)(params)
        assert (flow['loss', 'a'].verdict, flow['loss', 'a'].operation) == (verdict, operation)
        assert flow['loss', 'a'].norm == 0 and flow['loss', 'b'].verdict == 'REACHED'


def test_what_is_inside_an_installed_package_is_how_it_computes(tmp_path, monkeypatch):
    package = tmp_path / 'site-packages' / 'somebodys.py'
    package.parent.mkdir()
    package.write_text(
        'import jax.numpy as jnp\n'
        'def scaled(x):\n'
        '    return x / jnp.maximum(jnp.round(abs(x).max()), 1.0)\n'
        'def step(x):\n'
        '    return jnp.round(x)\n'
    )
    monkeypatch.syspath_prepend(package.parent)
    import somebodys

    flow = sg.gradient_flow(
        lambda p: {'scaled': somebodys.scaled(p['a']).sum(), 'step': somebodys.step(p['a']).sum()}
    )({'a': X})
    assert flow['scaled', 'a'].verdict == 'REACHED'
    assert (flow['step', 'a'].verdict, flow['step', 'a'].operation) == (
        'PIECEWISE_CONSTANT',
        'round',
    )
    assert 'test_causes.py' in flow['step', 'a'].source


# Numbers.


def test_the_first_operation_at_which_a_gradient_becomes_zero_or_infinite():
    def loss(p, x):
        h = jax.nn.relu(x * p['dead'] - 9.0)  # relu
        b = x @ p['b'] @ p['zero']  # product
        root = jnp.sqrt(jnp.abs(x * p['root']).sum() * 0.0)  # root
        clipped = jnp.clip(p['clipped'] * 9, -1, 1)
        return {'dead': h.sum(), 'lora': b.sum(), 'root': root, 'clip': clipped.sum()}

    params = {'dead': X, 'b': jnp.eye(3), 'zero': jnp.zeros((3, 3)), 'root': X, 'clipped': X}
    flow = sg.gradient_flow(loss, norms=True)(params, X)
    for name, param, verdict, word in (
        ('dead', 'dead', 'NUMERIC_ZERO', 'relu'),
        ('lora', 'b', 'NUMERIC_ZERO', 'dot_general'),
        ('lora', 'zero', 'REACHED', ''),
        ('root', 'root', 'NOT_FINITE', 'sqrt'),
        ('clip', 'root', 'UNUSED', ''),
        ('clip', 'clipped', 'NUMERIC_ZERO', 'clip'),
    ):
        record = flow[name, param]
        assert record.verdict == verdict and word in (record.operation or ''), record
    with pytest.raises(AssertionError, match='root is NOT_FINITE, sqrt at '):
        sg.assert_flow(loss, {'root': 'root'}, params, X, norms=True)


def test_numbers_in_a_loop_and_in_a_branch():
    def loss(p):
        def step(c, x):
            return jnp.sin(c) * p['a'], jax.nn.relu(c * p['b'] - 100.0).sum()

        c, ys = jax.lax.scan(step, X, None, length=7)
        taken = jax.lax.cond(p['a'].sum() > 0, lambda b: 0.0 * b, lambda b: b, p['b'].sum())
        return {'carry': c.sum(), 'stacked': ys.sum(), 'branch': taken}

    flow = sg.gradient_flow(loss, norms=True)({'a': X, 'b': X})
    grads = jax.jacrev(loss)({'a': X, 'b': X})
    assert flow['carry', 'a'].norm == pytest.approx(
        float(jnp.linalg.norm(grads['carry']['a'])), 1e-5
    )
    assert 'relu' in flow['stacked', 'b'].operation
    assert flow['branch', 'b'].verdict == 'NUMERIC_ZERO' and flow['branch', 'b'].operation == 'mul'


def test_numbers_in_double_precision():
    with jax.enable_x64(True):
        params = {'small': jnp.full(3, 1.0), 'large': jnp.full(3, 1.0)}
        loss = lambda p: (1e-60 * p['small']).sum() + (1e200 * p['large']).sum()
        flow = sg.gradient_flow(loss, norms=True)(params)
        for name, size in (('small', 1e-60), ('large', 1e200)):
            assert flow['loss', name].verdict == 'REACHED'
            assert flow['loss', name].norm == pytest.approx(size * 3**0.5)


def test_norms_need_arrays():
    abstract = jax.ShapeDtypeStruct((3,), jnp.float32)
    loss = lambda p, x: (p['a'] * x).sum()
    for args, what in (
        (({'a': abstract}, X), "the parameter 'a'"),
        (({'a': X}, abstract), 'an arg'),
    ):
        with pytest.raises(
            sg.UsageError, match=f'norms=True runs the losses, and {what}.* is a Shape'
        ):
            sg.gradient_flow(loss, norms=True)(*args)
        with pytest.raises(sg.UsageError, match='ShapeDtypeStruct'):
            sg.assert_flow(loss, {'loss': 'a'}, *args, norms=True)


def test_an_assertion_with_norms_does_not_pass_without_them():
    def loss(p):
        return jax.lax.while_loop(lambda s: s.sum() < 9, lambda s: s + jnp.exp(s), p['a']).sum()

    sg.assert_flow(loss, {'loss': 'a'}, {'a': X})
    with pytest.raises(AssertionError, match='a has no norm, .*forward mode alone'):
        sg.assert_flow(loss, {'loss': 'a'}, {'a': X}, norms=True)


def test_a_row_in_a_function_with_a_rule():
    @jax.custom_vjp
    def f(x):
        return jnp.round(jnp.sign(x) * 3.3)

    f.defvjp(lambda x: (f(x), x), lambda x, ct: (jnp.zeros_like(x),))
    record = sg.gradient_flow(lambda p: f(p['a']).sum())({'a': X})['loss', 'a']
    assert record.operation == 'sign' and 'in a row with round at ' in record.reason
    assert not any(o.alone for o in record.obstacles)


@pytest.mark.parametrize(
    'step',
    [
        lambda x: jnp.heaviside(x, 0.5),
        lambda x: jnp.where(jnp.isnan(x), x, jnp.sign(x)),
        lambda x: jnp.where(~jnp.isnan(x), jnp.sign(x), x),
        lambda x: jnp.where(x == x, jnp.sign(x), x),
        lambda x: jnp.where(jnp.isnan(x)[None], x, jnp.sign(x))[0],
    ],
)
def test_what_comes_out_for_a_nan_alone_is_no_path(step):
    record = sg.gradient_flow(lambda p: step(p['a']).sum())({'a': X})['loss', 'a']
    assert record.verdict == 'PIECEWISE_CONSTANT'


def test_many_losses_and_parameters_of_which_each_needs_few():
    params = {f'w{i}': X for i in range(60)}
    losses = {f'l{i}': lambda p, i=i: (p[f'w{i}'] ** 2).sum() for i in range(60)}
    flow = sg.gradient_flow(losses, norms=True)(params)
    assert {(r.loss[1:], r.name[1:]) for r in flow if r.reached} == {
        (str(i),) * 2 for i in range(60)
    }
    assert all(record.norm == 0 for record in flow if not record.reached)
