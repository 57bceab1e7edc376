"""gradient_views and map_gradient with every kind of operation inside, and in every cache of JAX.

By hand, entry k is the target with what its predicate does not select stopped by
`jax.lax.stop_gradient`. A program is written once, and given the library's views or those by hand.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import checkify

import flax_sg as sg
from flax_sg import nn
from internals import in_views, mark, nothing_is_open, tangent_of_a_mark
from oracle import assert_same
from random_programs import traced

stop = jax.lax.stop_gradient


def ours(entries):
    """Return the library's views; an entry is a string of one-letter names."""
    return sg.gradient_views({name: list(letters) for name, letters in entries.items()})


def by_hand(entries):
    return lambda fn: (
        lambda p, *args: {
            name: fn({k: v if k in letters else stop(v) for k, v in p.items()}, *args)
            for name, letters in entries.items()
        }
    )


def total(tree):
    """Make one number of all floating-point leaves, not linear in any element."""
    leaves = [x for x in map(jnp.asarray, jax.tree.leaves(tree)) if x.dtype == jnp.float32]
    return sum(
        (k + 1) * jnp.sum(jnp.sin(x.ravel()) * (1 + jnp.arange(x.size)))
        for k, x in enumerate(leaves)
    )


def mixed(outs):
    """Make one number of the entries, so that second derivatives mix them."""
    first, *rest = (total(outs[name]) for name in sorted(outs))
    return first**2 * (1 + sum(rest)) + sum(k * x for k, x in enumerate(rest))


def ones_like(p):
    return jax.tree.map(jnp.ones_like, p)


def norm(tree):
    return sum(jnp.sum(jnp.abs(x) ** 2) for x in jax.tree.leaves(tree))


ORDERS = {
    'grad': jax.grad,
    'jvp': lambda f: lambda p: jax.jvp(f, (p,), (ones_like(p),))[1],
    'reverse over reverse': lambda f: jax.grad(lambda p: norm(jax.grad(f)(p))),
    'forward over reverse': lambda f: lambda p: jax.jvp(jax.grad(f), (p,), (ones_like(p),))[1],
}
REVERSE, FIRST = ('grad', 'reverse over reverse'), ('grad', 'jvp')
SOME = ('grad', 'jvp', 'reverse over reverse')


def compare(program, params, orders=SOME, rtol=1e-3, run=traced):
    """Compare orders of derivative of ``program(views)(params)``, with nothing to be compiled."""

    def derivatives(views):
        return lambda p: {name: ORDERS[name](program(views))(p) for name in orders}

    got, want = run(lambda p: (derivatives(ours)(p), derivatives(by_hand)(p)))(params)
    assert_same(got, want, 'derivative', rtol=rtol)
    assert norm(want['grad']) > 0


# Objects with rules of their own, which jax 0.12 has in place of primitives -----------------------

GRID = jnp.array([0.0, 0.5, 1.0, 2.0])
P = {'a': jnp.array([0.3, 0.8, 0.55]), 'b': jnp.array([0.9, 0.45, 0.21])}


def cube_root(p):
    newton = lambda f, x: jax.lax.fori_loop(
        0, 9, lambda _, x: x - f(x) / jax.jvp(f, (x,), (1.0,))[1], x
    )
    return jax.lax.custom_root(
        lambda x: x**3 * p['a'][0] + x - p['b'][1], 0.1, newton, lambda g, y: y / g(1.0)
    )


OBJECTS = {
    'searchsorted': lambda p: p['a'] * p['b'][0] * jnp.searchsorted(GRID, p['a'] * p['b']),
    'interp': lambda p: jnp.interp(p['a'], GRID, GRID**2 * p['b'][0]) * p['b'],
    'nonzero': lambda p: p['a'][jnp.nonzero(p['b'] > 0.3, size=3)[0]] * p['b'],
    'where': lambda p: p['a'][jnp.where(p['b'] > 0.3, size=3)[0]] ** 2 * p['b'],
    'unique': lambda p: jnp.unique(p['a'] * p['b'], size=3) * p['a'],
    'choice': lambda p: (
        jax.random.choice(jax.random.key(0), p['a'], (2,), p=jax.nn.softmax(p['b'])) * p['b'][:2]
    ),
    'expm': lambda p: jax.scipy.linalg.expm(jnp.outer(p['a'][:2], p['b'][:2]))[0],
    'custom_root': cube_root,
    'einsum': lambda p: jnp.einsum('i,j->ij', p['a'], p['b']),
    'frexp': lambda p: jnp.frexp(p['a'])[0] * jnp.ldexp(p['b'], 2),
    'name': jax.checkpoint(
        lambda p: checkpoint_name(jnp.sin(p['a'] * p['b']), 'u') ** 2,
        policy=jax.checkpoint_policies.save_only_these_names('u'),
    ),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize('name', OBJECTS)
def test_an_object_with_rules_in_a_target(name):
    program = lambda views: lambda p: mixed(views({'a': 'a', 'b': 'b'})(OBJECTS[name])(p))
    compare(program, P, FIRST if name == 'expm' else SOME, run=jax.jit)


searched = OBJECTS['searchsorted']


FORMS = {
    'jit': lambda views: jax.jit(views(searched)),
    'in jit': lambda views: views(jax.jit(searched)),
    'checkpoint': lambda views: jax.checkpoint(views(searched)),
    'in checkpoint': lambda views: views(jax.checkpoint(searched)),
    'scan': lambda views: (
        lambda p: jax.lax.scan(
            lambda c, s: (c, views(searched)({**p, 'a': s * p['a']})), 0, jnp.array([1, 0.9])
        )[1]
    ),
    'in scan': lambda views: views(
        lambda p: jax.lax.scan(
            lambda c, _: (jnp.sin(c * searched(p)), None), p['b'], None, length=2
        )[0]
    ),
    'vmap': lambda views: (
        lambda p: jax.vmap(lambda s: views(searched)({**p, 'a': s * p['a']}))(jnp.array([1, 0.9]))
    ),
    'in vmap': lambda views: views(
        lambda p: jax.vmap(lambda s: searched({**p, 'a': s * p['a']}))(jnp.array([1, 0.9]))
    ),
    'in cond': lambda views: views(
        lambda p: jax.lax.cond(p['b'][0] > 0, searched, lambda p: p['a'], p)
    ),
    'views': lambda views: views(lambda p: mixed(views(searched)(p))),
}


@pytest.mark.parametrize('form', FORMS)
def test_an_object_with_rules_in_each_form(form):
    program = lambda views: lambda p: mixed(FORMS[form](views({'a': 'a', 'b': 'b'}))(p))
    second = form in ('in checkpoint', 'views')
    compare(program, P, SOME if second else FIRST, run=jax.jit)


def test_an_object_with_rules_runs_eagerly():
    out = ours({'a': 'a', 'b': 'b'})(searched)(P)
    assert_same(out, {'a': searched(P), 'b': searched(P)}, 'value')


class Table(nn.Module):
    @nn.compact
    def __call__(self, x):
        a, b = (self.param(n, nn.initializers.ones, (3,)) for n in 'ab')
        return jnp.interp(x, GRID, GRID**2 * b[0]) * a


def test_an_object_with_rules_in_a_module():
    x = jnp.array([0.3, 0.8, 0.55])

    def of(views):
        if views is ours:
            return lambda p: mixed(
                Table().apply({'params': p}, x, method=views({'a': 'a', 'b': 'b'})(Table.__call__))
            )
        return lambda p: mixed(
            views({'a': 'a', 'b': 'b'})(lambda p: Table().apply({'params': p}, x))(p)
        )

    compare(of, P, REVERSE)


def test_a_rule_that_closes_over_a_traced_value():
    """The value is another function's, which JAX is tracing for jit or vmap."""

    def program(views):
        def loss(p, y):
            square = jax.custom_jvp(lambda x: x**2)
            square.defjvp(lambda xs, ts: (square(*xs), 2 * ts[0] * xs[0] * y))
            return mixed(views({'a': 'a', 'b': 'b'})(lambda p: square(p['a'] * p['b']))(p))

        return lambda p, y: [jax.grad(loss)(p, y), jax.hessian(loss)(p, y)]

    batch = lambda f: jax.vmap(f, (None, 0))
    for run, y in ((lambda f: f, jnp.float32(2)), (batch, jnp.arange(3.0))):
        got, want = (jax.jit(run(program(views)))(AB, y) for views in (ours, by_hand))
        assert_same(got, want, 'derivatives', rtol=1e-4)


def mapped_by_hand(fn):
    @jax.custom_vjp
    def same(x):
        return x

    # Not x: a derivative of this one passes here too.
    same.defvjp(lambda x: (same(x), None), lambda _, ct: (fn(ct),))
    return same


COTANGENTS = {
    'searchsorted': lambda ct: ct * (1 + jnp.searchsorted(GRID, ct)),
    'interp': lambda ct: ct * jnp.interp(ct, GRID, jnp.sin(GRID)),
    'unique': lambda ct: jnp.unique(ct, size=3),
    'expm': lambda ct: jax.scipy.linalg.expm(jnp.outer(ct, ct) / 30)[0],
    'nonzero': lambda ct: ct[jnp.nonzero(ct > 0.2, size=3)[0]],
    'quantile': lambda ct: jnp.clip(ct, -jnp.quantile(abs(ct), 0.6), jnp.quantile(abs(ct), 0.6)),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    'name, form',
    [
        *((name, 'plain') for name in COTANGENTS),
        *(('interp', form) for form in ('jit', 'checkpoint', 'scan', 'vmap', 'views')),
    ],
)
def test_map_gradient_with_an_object_with_rules(name, form):
    fn = COTANGENTS[name]

    def program(views):
        same = mapped_by_hand(fn)
        read = (
            sg.map_gradient('a', lambda info, ct: fn(ct))
            if views is ours
            else lambda p: {**p, 'a': same(p['a'])}
        )
        run = lambda p: read(p)['a'] ** 2 * p['b']
        if form in ('jit', 'checkpoint'):
            return lambda p: total(getattr(jax, form)(run)(p))
        if form == 'scan':
            return lambda p: total(
                jax.lax.scan(
                    lambda c, s: (jnp.sin(c + run({**p, 'b': s * p['b']})), None),
                    p['b'],
                    jnp.array([1, 0.9]),
                )[0]
            )
        if form == 'vmap':
            scales = jnp.array([[1, 0.9, 0.8], [0.4, 0.3, 1.2]])
            return lambda p: total(jax.vmap(lambda s: run({'a': s * p['a'], 'b': p['b']}))(scales))
        if form == 'views':
            return lambda p: mixed(views({'x': 'ab', 'y': 'b'})(run)(p))
        return lambda p: total(run(p))

    compare(program, P, REVERSE)


# Cached traces with views in them, inside other views ---------------------------------------------

AB = {'a': jnp.float32(1.1), 'b': jnp.float32(0.7)}


def target(p):
    return p['a'] ** 2 * p['b']


def scanned(fn):
    """Return a function with a scan whose body is one object, of which JAX keeps the trace."""

    def body(p, _):
        return {'a': jnp.sin(fn(p)), 'b': p['b']}, None

    return lambda p: jax.lax.scan(body, p, None, length=2)[0]['a']


CACHES = {'jit': jax.jit, 'remat': lambda f: jax.checkpoint(jax.jit(f)), 'scan': scanned}


def uses_of(views, cache):
    """Return programs with one cached function in them, at several depths of views."""
    one, two, three = (
        views({'a': 'a', 'b': 'b'}),
        views({'u': 'a', 'v': 'b'}),
        views({'m': 'b', 'n': 'ab'}),
    )
    cached = cache(lambda p: mixed(one(target)(p)))
    above = cache(lambda p: mixed(three(cached)(p)))
    return {
        '1': cached,
        '2': lambda p: mixed(two(cached)(p)),
        '3': lambda p: mixed(two(lambda p: p['a'] * mixed(three(cached)(p)))(p)),
        'g': lambda p: mixed(two(lambda p: jax.grad(cached)(p))(p)),
        'b': lambda p: cached(p) * mixed(three(cached)(p)),
        'n': above,
        'N': lambda p: mixed(two(above)(p)),
    }


@functools.cache
def used_by_hand(cache, use):
    program = uses_of(by_hand, lambda f: jax.jit(CACHES[cache](f)))[use]
    return traced(lambda p: {name: ORDERS[name](program)(p) for name in CACHED})(AB)


CACHED = ('grad', 'forward over reverse')


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    'cache, order',
    [
        *(('jit', order) for order in ('12', '21', '123', '3b1', 'g12', '2g1', 'nN1', 'N1n')),
        *((cache, order) for cache in ('remat', 'scan') for order in ('12', '21', 'g1')),
    ],
)
def test_a_cached_function_with_views_in_every_order_of_calls(cache, order):
    """1 is the function alone, 2 in views, 3 in views in views, g its gradient in views."""
    uses = uses_of(ours, CACHES[cache])
    got = traced(
        lambda p: [{name: ORDERS[name](uses[use])(p) for name in CACHED} for use in order]
    )(AB)
    assert_same(got, [used_by_hand(cache, use) for use in order], order, rtol=1e-3)


def test_a_cached_function_with_views_runs_eagerly():
    uses = uses_of(ours, jax.jit)
    for use in '12321':
        assert_same(jax.grad(uses[use])(AB), used_by_hand('jit', use)['grad'], use, rtol=1e-3)


class Inner(nn.Module):
    """Views of its own method, in a module that Flax may jit."""

    @nn.compact
    def __call__(self, x):
        for name in 'ab':
            self.param(name, nn.initializers.ones, ())
        return mixed(sg.gradient_views({'a': 'a', 'b': 'b'})(self.run)(x))

    @nn.nowrap
    def read(self):
        return {name: self.get_variable('params', name) for name in 'ab'}

    def run(self, x):
        return target(self.read()) * x


class Outer(nn.Module):
    use: str
    jitted: bool

    @nn.compact
    def __call__(self, x):
        inner = (nn.jit(Inner) if self.jitted else Inner)(name='inner')
        views = sg.gradient_views({'u': '**/a', 'v': '**/b'}, allow_unmatched=True)
        plain = lambda: inner(x)
        if self.jitted == 'captured':
            plain = jax.jit(lambda: inner(x))
        out = 0.0
        for use in self.use:
            out = out * 0.5 + (
                plain() if use == '1' else mixed(views(lambda inner: plain())(inner))
            )
        return out


@pytest.mark.parametrize(
    'jitted, use, mutable',
    [
        *((jitted, use, False) for jitted in (False, True, 'captured') for use in ('12', '21')),
        (True, '1221', False),
        (False, '12', ['params']),
        (True, '12', ['params']),
        (True, '21', ['params']),
    ],
)
def test_a_module_with_views_in_every_order_of_calls(jitted, use, mutable):
    variables = {'params': {'inner': AB}}

    def program(views):
        if views is ours:
            run = lambda p: Outer(use, jitted).apply({'params': {'inner': p}}, 1.0, mutable=mutable)
            return (lambda p: run(p)[0]) if mutable else run

        def run(p):
            cached = lambda p: mixed(views({'a': 'a', 'b': 'b'})(target)(p))
            out = 0.0
            for way in use:
                out = out * 0.5 + (
                    cached(p) if way == '1' else mixed(views({'u': 'a', 'v': 'b'})(cached)(p))
                )
            return out

        return run

    compare(program, AB, CACHED)
    shapes = jax.eval_shape(Outer(use, jitted).init, jax.random.key(0), 1.0)
    assert jax.tree.structure(shapes) == jax.tree.structure(variables)


def test_a_cached_function_is_traced_once_for_each_depth():
    traces = []

    @jax.jit
    def cached(p):
        traces.append(p)
        return mixed(ours({'a': 'a', 'b': 'b'})(target)(p))

    for _ in range(3):
        jax.grad(lambda p: cached(p))(AB)
        jax.grad(lambda p: mixed(ours({'u': 'a'})(cached)(p)))(AB)
    assert len(traces) == 1


# Marks that cannot be told apart ------------------------------------------------------------------

INSIDE_TEXT = 'gradient_views: its target differentiates, .* Read the variable first, and '
OUTSIDE_TEXT = 'differentiated where the views cannot be told apart: .* Read the variable before'


def through_its_own_mark():
    return jax.grad(lambda x: mark(x, (True, False)) ** 2)(2.0), ()


def in_a_rule(fun):
    """Call a function in the rule of what is differentiated, itself in views of the same level."""
    square = jax.custom_jvp(jnp.square)
    square.defjvp(lambda xs, ts: (square(*xs), ts[0] * fun()))
    return jax.grad(lambda p: ours({'a': 'a'})(lambda p: square(p['a']))(p)['a'])(AB)


def taken_out():
    """A jaxpr with a mark, made in a target and differentiated after it."""
    kept = []

    def fun():
        read = lambda x: mark(x, (True, False)) ** 2
        kept.append(jax.make_jaxpr(read)(2.0))
        return read(2.0), ()

    in_views(fun, ('x', 'y'))
    return jax.grad(lambda x: jax.core.eval_jaxpr(kept[0].jaxpr, kept[0].consts, x)[0])(2.0)


@pytest.mark.parametrize(
    'run, text',
    [
        (lambda: in_views(through_its_own_mark, ('x', 'y')), INSIDE_TEXT),
        (lambda: in_a_rule(lambda: in_views(through_its_own_mark, ('x', 'y'))[0][0]), INSIDE_TEXT),
        (taken_out, OUTSIDE_TEXT),
        (lambda: tangent_of_a_mark(jnp.float32(1), (True, False)), OUTSIDE_TEXT),
    ],
    ids=['inside', 'in a rule', 'taken out', 'evaluated'],
)
def test_a_mark_that_cannot_be_told_apart_is_an_error(run, text):
    with pytest.raises(sg.UsageError, match=text):
        run()
    assert nothing_is_open()


class Root(nn.Module):
    """An implicit layer whose equation reads the module."""

    def setup(self):
        self.inner = Inner()

    def __call__(self, x):
        newton = lambda f, y: jax.lax.fori_loop(
            0, 9, lambda _, y: y - f(y) / jax.jvp(f, (y,), (1.0,))[1], y
        )
        return jax.lax.custom_root(
            lambda y: self.equation(y, self.inner.read()), 0.1, newton, lambda g, y: y / g(1.0)
        )

    @staticmethod
    def equation(y, p):
        return y**3 * p['a'] + y - p['b']


def test_an_implicit_layer_whose_equation_reads_the_module():
    """Second derivatives are right, or an error: jax 0.12 hides the equation in an object."""

    def program(views):
        if views is ours:
            views = sg.gradient_views({'a': 'inner/a', 'b': 'inner/b'})
            return lambda p: mixed(
                Root().apply({'params': {'inner': p}}, 1.0, method=views(Root.__call__))
            )
        return lambda p: mixed(
            views({'a': 'a', 'b': 'b'})(lambda p: Root().apply({'params': {'inner': p}}, 1.0))(p)
        )

    compare(program, AB, FIRST, run=jax.jit)
    try:
        compare(program, AB, REVERSE, run=jax.jit)
    except sg.UsageError as error:
        assert re.search(OUTSIDE_TEXT, str(error))


# Complex residuals --------------------------------------------------------------------------------

COMPLEX = {
    'fft': lambda p: abs(jnp.fft.fft(jnp.stack([p['a'], p['b']]) * p['a'])) ** 2,
    'rfft': lambda p: jnp.fft.irfft(
        jnp.sin(jnp.fft.rfft(jnp.stack([p['a'], p['b'], p['a'] * p['b'], p['b'] ** 2]))) * p['b']
    ),
    'exp': lambda p: jnp.real(jnp.exp(1j * p['a'] * p['b']) * (p['a'] + 1j * p['b']) ** 3),
    'conj': lambda p: jnp.imag(jnp.conj(p['a'] * 1j + p['b']) ** 2 * jnp.exp(1j * p['b'])),
    'scan': lambda p: jnp.real(
        jax.lax.scan(
            lambda c, _: (jnp.sin(c * p['a'] + 1j * p['b']), None), p['a'] + 0j, None, length=2
        )[0]
    ),
    'remat': jax.checkpoint(lambda p: jnp.real(jnp.exp(1j * p['a'] * p['b']) / (p['a'] + 2j))),
    'run again': lambda p: jax.checkpoint(lambda z: jnp.real(z**2) * jnp.sin(jnp.cos(abs(z))))(
        p['a'] * jnp.exp(1j * p['b'])
    ),
    'solve': lambda p: jnp.real(
        jnp.linalg.solve(jnp.array([[2, 1j], [1, 3]]) * p['a'], jnp.stack([p['b'], p['a']]) + 0j)
    ),
}


@pytest.mark.parametrize('name', COMPLEX)
def test_complex_residuals(name):
    compare(
        lambda views: lambda p: mixed(views({'a': 'a', 'b': 'b'})(COMPLEX[name])(p)),
        AB,
        run=jax.jit,
    )


@pytest.mark.parametrize('around', ['scan', 'vmap', 'checkpoint', 'views'])
def test_complex_residuals_in_what_is_around(around):
    def program(views):
        run = lambda p: mixed(views({'a': 'a', 'b': 'b'})(COMPLEX['exp'])(p))
        step = lambda p, s: run({'a': jnp.sin(s * p['a']), 'b': p['b']})
        if around == 'scan':
            return lambda p: jax.lax.scan(
                lambda c, _: (jnp.sin(step(p, c)), None), 0.3, None, length=2
            )[0]
        if around == 'vmap':
            return lambda p: jax.vmap(step, (None, 0))(p, jnp.array([0.5, 1.5])).sum()
        if around == 'checkpoint':
            return jax.checkpoint(run)
        return lambda p: mixed(views({'x': 'ab', 'y': 'b'})(run)(p))

    compare(program, AB, run=jax.jit)


def test_complex_parameters():
    params = {'a': jnp.complex64(0.4 + 0.3j), 'b': jnp.complex64(0.2 - 0.5j)}
    fn = lambda p: jnp.real(jnp.exp(p['a'] * p['b']) * p['a'] ** 2)
    compare(lambda views: lambda p: mixed(views({'a': 'a', 'b': 'b'})(fn)(p)), params, run=jax.jit)


# Collectives of an axis around --------------------------------------------------------------------

X = jnp.array([0.5, -1.2, 2.0])
COLLECTIVES = {
    'psum': lambda p, x: jax.lax.psum(jnp.sin(p['a'] * x), 'i') * p['b'],
    'pmean': lambda p, x: jax.lax.pmean(p['a'] * x**2, 'i') ** 2 * p['b'],
    'all_gather': lambda p, x: jax.lax.all_gather(jnp.sin(p['a'] * x), 'i') * p['b'],
    'axis_index': lambda p, x: jnp.sin(p['a'] * jax.lax.axis_index('i')) * p['b'],
    'ppermute': lambda p, x: (
        jax.lax.ppermute(jnp.sin(p['a'] * x), 'i', [(0, 1), (1, 2), (2, 0)]) * p['b']
    ),
    'constant': lambda p, x: p['a'] ** 2 * jax.lax.psum(1.0, 'i') * p['b'],
    'params alone': lambda p, x: jax.lax.psum(p['a'] ** 2, 'i') * p['b'],
    'scan': lambda p, x: jax.lax.scan(
        lambda c, _: (jnp.sin(jax.lax.psum(c * p['a'], 'i') * p['b']), None), x, None, length=2
    )[0],
    'remat': jax.checkpoint(lambda p, x: jax.lax.psum(jnp.sin(p['a'] * x), 'i') * p['b']),
}
INSIDE = {
    'grad': jax.grad,
    'jvp': lambda f: lambda p, x: jax.jvp(lambda p: f(p, x), (p,), (ones_like(p),))[1],
    'hessian': jax.hessian,
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize('name', COLLECTIVES)
def test_a_collective_of_an_axis_around(name):
    """Derivatives inside the axis, and outside of it."""

    def program(views):
        run = lambda p, x: mixed(views({'a': 'a', 'b': 'b'})(COLLECTIVES[name])(p, x))
        inside = [derive(run) for derive in INSIDE.values()]
        return run, lambda p, x: [f(p, x) for f in inside]

    over = lambda f: jax.vmap(f, (None, 0), axis_name='i')
    got, want = jax.jit(lambda p: [over(program(views)[1])(p, X) for views in (ours, by_hand)])(AB)
    assert_same(got, want, name, rtol=1e-3)
    compare(lambda views: lambda p: over(program(views)[0])(p, X).sum(), AB)


# checkify, and effects ----------------------------------------------------------------------------

ERRORS = checkify.float_checks | checkify.user_checks


def checked(p):
    checkify.check(p['b'] > 0, 'b is {b}', b=p['b'])
    return jnp.log(p['a']) * p['b'] ** 2


def run_checked(views):
    return lambda p: mixed(views({'a': 'a', 'b': 'b'})(checked)(p))


AROUND = {
    'value': lambda f: f,
    'grad': jax.grad,
    'jvp': ORDERS['jvp'],
    'reverse over reverse': ORDERS['reverse over reverse'],
    'jit': jax.jit,
    'checkpoint': jax.checkpoint,
    'vmap': lambda f: lambda p: jax.vmap(f)(jax.tree.map(lambda x: jnp.stack([x, x]), p)),
    'scan': lambda f: lambda p: jax.lax.scan(lambda c, _: (c + f(p), None), 0.0, None, length=2),
    'views': lambda f: lambda p: ours({'u': 'a'})(f)(p),
}


@pytest.mark.parametrize('around', AROUND)
def test_checkify_looks_into_views(around):
    run = jax.jit(checkify.checkify(AROUND[around](run_checked(ours)), errors=ERRORS))
    by_itself = jax.jit(
        AROUND[around](
            lambda p: mixed(ours({'a': 'a', 'b': 'b'})(lambda p: jnp.log(p['a']) * p['b'] ** 2)(p))
        )
    )
    for a, b, text in (
        (2, 3, None),
        (-2, 3, 'nan generated by primitive: log'),
        (2, -3, r'b is -3\.0'),
    ):
        error, out = run({'a': jnp.float32(a), 'b': jnp.float32(b)})
        if text is None:
            assert error.get() is None
            assert_same(
                out, by_itself({'a': jnp.float32(a), 'b': jnp.float32(b)}), 'value', rtol=1e-5
            )
        else:
            with pytest.raises(checkify.JaxRuntimeError, match=text):
                error.throw()


@pytest.mark.parametrize('order', ['grad', 'jvp', 'reverse over reverse'])
def test_views_under_checkify_are_still_views(order):
    """A derivative of what checkify has transformed tells the entries apart."""

    def program(views):
        check = checkify.checkify(run_checked(views), errors=ERRORS)
        return ORDERS[order](lambda p: check(p)[1])

    got, want = jax.jit(lambda p: [program(views)(p) for views in (ours, by_hand)])(AB)
    assert_same(got, want, order, rtol=1e-4)


@pytest.mark.parametrize('outer', ['grad', 'jvp'])
def test_a_derivative_of_a_derivative_that_checkify_looked_into(outer):
    """The tangents of what checkify has transformed are told from the errors that it hands on."""

    def program(views):
        def slope(p, t):
            tangent = lambda p, t: jax.jvp(run_checked(views), (p,), (t,))[1]
            return checkify.checkify(tangent, errors=ERRORS)(p, t)[1]

        if outer == 'jvp':
            return lambda p: jax.jvp(lambda p, t: slope(p, t), (p, p), (p, AB))[1]
        return jax.grad(slope, argnums=(0, 1))

    args = (AB,) if outer == 'jvp' else (AB, {'a': jnp.float32(0.3), 'b': jnp.float32(0.7)})
    got, want = (jax.jit(program(views))(*args) for views in (ours, by_hand))
    assert_same(got, want, outer, rtol=1e-4)


def test_checkify_looks_into_map_gradient():
    def fn(info, ct):
        checkify.check(ct < 10, 'large')
        return jnp.log(ct)

    loss = lambda p: p['b'] * sg.map_gradient('a', fn)(p)['a']
    grads = checkify.checkify(jax.jit(jax.grad(loss)), errors=ERRORS)
    for b, text in ((2.0, None), (-2.0, 'nan generated by primitive: log'), (20.0, 'large')):
        error, _ = grads({'a': 1.0, 'b': b})
        assert text in error.get() if text else error.get() is None


def test_callbacks_run_once_and_in_order():
    from jax.experimental import io_callback

    seen = []

    def note(x):
        seen.append(float(x))
        return np.float32(x)

    def fn(p):
        jax.debug.print('{}', p['a'])
        jax.debug.callback(note, p['a'], ordered=True)
        io_callback(note, jax.ShapeDtypeStruct((), jnp.float32), stop(p['b']), ordered=True)
        return p['a'] * p['b']

    for run in (lambda f: f, jax.jit):
        for derive in (lambda f: f, jax.grad, ORDERS['jvp']):
            seen.clear()
            run(derive(lambda p: mixed(ours({'a': 'a', 'b': 'b'})(fn)(p))))(AB)
            jax.effects_barrier()
            assert seen == [float(AB['a']), float(AB['b'])]


# References to mutable arrays ---------------------------------------------------------------------


def made_inside(p):
    ref = jax.new_ref(jnp.float32(0))
    ref[...] = p['a'] * p['b']
    return ref[...]


def made_of_a_parameter(p):
    ref = jax.new_ref(1.0 * p['a'])
    ref[...] = jnp.sin(ref[...]) * p['b']
    return ref[...]


def made_in_a_scan(p):
    def step(c, x):
        ref = jax.new_ref(c)
        ref[...] += x * p['b']
        return ref[...] * p['a'], ref[...]

    c, ys = jax.lax.scan(step, jnp.float32(1), jnp.ones(3))
    return c + ys.sum()


def of_a_scan(p):
    def step(c, x):
        return (c + x * p['b']) * p['a'], c + x * p['b']

    c, ys = jax.lax.scan(step, jnp.float32(1), jnp.ones(3))
    return c + ys.sum()


# Not all derivatives of functions with references work in JAX, so these are without, by hand.
REFERENCES = [
    (made_inside, lambda p: p['a'] * p['b']),
    (made_of_a_parameter, lambda p: jnp.sin(p['a']) * p['b']),
    (made_in_a_scan, of_a_scan),
]


@pytest.mark.parametrize('how', ['grad', 'jitted', 'forward', 'second', 'jitted target', 'scan'])
@pytest.mark.parametrize('target, pure', REFERENCES, ids=lambda fn: fn.__name__)
def test_a_reference_that_is_made_in_a_target(target, pure, how):
    p = {'a': jnp.float32(0.7), 'b': jnp.float32(-1.3)}
    entries = {'one': 'a', 'two': 'b', 'both': 'ab'}

    def loss(outputs):
        return lambda p: (
            jax.lax.scan(lambda c, _: (c + total(outputs(p)), None), 0.0, jnp.ones(2))[0]
            if how == 'scan'
            else total(outputs(p))
        )

    transform = {
        'forward': jax.jacfwd,
        'second': lambda f: jax.grad(lambda p: total(jax.grad(f)(p))),
    }.get(how, jax.grad)
    run = jax.jit if how == 'jitted' else lambda f: f
    got = run(transform(loss(ours(entries)(jax.jit(target) if how == 'jitted target' else target))))
    assert_same(got(p), transform(loss(by_hand(entries)(pure)))(p), 'gradient', rtol=1e-5)


@pytest.mark.parametrize('run', [lambda f: f, jax.jit], ids=['eager', 'jit'])
def test_references_from_outside_a_target_are_read_and_written_once(run):
    def program(p):
        scale, count, seen = (jax.new_ref(jnp.float32(x)) for x in (5, 0, 0))

        def target(p):
            count[...] += 1
            seen[...] = jax.lax.stop_gradient(p['a'])
            return p['a'] * p['b'] * scale[...]

        out = ours({'one': 'a', 'two': 'b'})(target)(p)
        return out['one'] + 10 * out['two'], (scale[...], count[...], seen[...])

    p = {'a': jnp.float32(2), 'b': jnp.float32(3)}
    (out, refs), grads = run(jax.value_and_grad(program, has_aux=True))(p)
    assert (out, *refs, grads['a'], grads['b']) == (330, 5, 1, 2, 15, 100)
