"""gradient_views: one forward pass, and an output for each of several losses.

The meaning, by hand: entry k is the target with what its predicate does not select stopped by
`jax.lax.stop_gradient`, run once for each entry.
"""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze
from oracle import assert_same, scalar
from random_programs import check_views, draw_views, report, same_failure, shrink, traced

import flax_sg as sg
from flax_sg import nn

X = jnp.array([[0.3, -0.7, 0.2], [1.1, 0.4, -0.5]])

# Pure functions, at every order -------------------------------------------------------------------

ENTRIES = {'a': 'a', 'b': 'b', 'both': ['a', 'b'], 'none': sg.nothing, 'again': 'a'}
AB = {'a': jnp.float32(0.7), 'b': jnp.float32(0.3)}


def product(p, x):
    return p['a'] ** 2 * p['b'] ** 2 * x


def loop(p, x):
    def body(c, i):
        c = jnp.tanh(p['a'] * c + p['b'] * x + c * c)
        return c, c * p['b']
    c, ys = jax.lax.scan(body, x, jnp.arange(3))
    return {'c': c, 'ys': ys, 'n': (ys > 0).sum(), 'late': x > 0}


def branch(p, x):
    return jax.lax.cond(x > 0, lambda a, b: a * b * b, lambda a, b: a * a * b, p['a'], p['b'])


def fori(p, x):
    return jax.lax.fori_loop(0, 3, lambda i, c: jnp.sin(p['a'] * c) + p['b'], x)


@jax.custom_jvp
def cube(x):
    return x ** 3


cube.defjvp(lambda primals, tangents: (cube(*primals), 5 * primals[0] ** 2 * tangents[0]))


FUNCTIONS = {
    'product': product, 'loop': loop, 'branch': branch, 'fori': fori,
    'remat': jax.checkpoint(lambda p, x: loop(p, x)['ys']),
    'jit': jax.jit(lambda p, x: (jnp.sin(p['a'] * p['b']) * x, x * 2)),
    'rule': lambda p, x: cube(p['a'] * p['b']) * x,
}


def by_hand(fn, entries=ENTRIES):
    """Return the entries, each a run of its own."""
    def run(params, *args):
        out = {}
        for name, predicate in entries.items():
            select = sg.path('*') & predicate if predicate != sg.nothing else sg.nothing
            held = {k: v if select.selects(sg.VariableInfo((k,), (k,))) else
                    jax.lax.stop_gradient(v) for k, v in params.items()}
            out[name] = fn(held, *args)
        return out
    return run


def squared(fn):
    """Make a loss that is not linear in the outputs, so that derivatives mix the entries."""
    def loss(*args):
        return scalar(lambda: fn(*args))() ** 2 + scalar(lambda: fn(*args))()
    return loss


GRAD = functools.partial(jax.grad, argnums=(0, 1))
FORWARD = functools.partial(jax.jacfwd, argnums=(0, 1))
REVERSE = functools.partial(jax.jacrev, argnums=(0, 1))


def total(f):
    return lambda *args: sum(jax.tree.leaves(f(*args)))


ORDERS = {
    'value': lambda f: f,
    'grad': GRAD,
    'jacfwd': FORWARD,
    'hessian': lambda f: jax.hessian(f, (0, 1)),
    'reverse over reverse': lambda f: REVERSE(REVERSE(f)),
    'reverse over forward': lambda f: REVERSE(FORWARD(f)),
    'forward over forward': lambda f: FORWARD(FORWARD(f)),
    'third': lambda f: GRAD(total(GRAD(total(GRAD(f))))),
    'vmap of grad': lambda f: lambda p, x: jax.vmap(GRAD(f), (None, 0))(p, jnp.stack([x, -x])),
    'grad of vmap': lambda f: GRAD(
        lambda p, x: jax.vmap(f, (None, 0))(p, jnp.stack([x, 2 * x])).sum()),
    'grad of scan': lambda f: GRAD(lambda p, x: jax.lax.scan(
        lambda c, _: (c / 2 + f(p, c / 9), None), x, None, length=2)[0]),
    'hessian of remat': lambda f: jax.hessian(jax.checkpoint(f), (0, 1)),
}


@pytest.mark.parametrize('order', ORDERS)
@pytest.mark.parametrize('name', FUNCTIONS)
def test_each_order_of_derivative(name, order):
    if (name, order) == ('branch', 'grad of vmap'):
        return  # test_what_jax_cannot_do
    fn = FUNCTIONS[name]
    of = lambda f: traced(ORDERS[order](squared(f)))
    got, want = (of(f)(AB, jnp.float32(0.5)) for f in (sg.gradient_views(ENTRIES)(fn), by_hand(fn)))
    assert_same(got, want, order, rtol=1e-4)


@pytest.mark.parametrize('run', [lambda f: f, jax.jit], ids=['eager', 'jit'])
def test_as_jax_runs_it(run):
    views = sg.gradient_views(ENTRIES)(loop)
    for order in (GRAD, lambda f: jax.hessian(f, (0, 1))):
        got, want = (run(order(squared(f)))(AB, 0.5) for f in (views, by_hand(loop)))
        assert_same(got, want, 'gradient', rtol=1e-4)


def test_no_view_sees_another_ones_second_derivative():
    """Pullbacks of one vjp, chosen by entry, would give 24."""
    views = sg.gradient_views({'a': 'a', 'b': 'b'})(lambda p: p['a'] ** 2 * p['b'] ** 2)
    hessian = jax.hessian(lambda p: views(p)['a'])({'a': 2.0, 'b': 3.0})
    assert jax.tree.map(float, hessian) == {'a': {'a': 18, 'b': 0}, 'b': {'a': 0, 'b': 0}}


def test_forward_mode_where_there_is_no_reverse():
    def body(p, x):
        return jax.lax.while_loop(lambda c: c < 5, lambda c: c * (1 + p['a'] * p['b']), x)

    got, want = (jax.jit(FORWARD(squared(f)))(AB, 0.5)
                 for f in (sg.gradient_views(ENTRIES)(body), by_hand(body)))
    assert_same(got, want, 'jacfwd', rtol=1e-4)


@pytest.mark.parametrize('wrap', [lambda f: f, jax.jit, jax.checkpoint, lambda f: lambda p, x: (
    jax.lax.scan(lambda c, _: (c + f(p, x), None), 0.0, None, length=2)[0])],
    ids=['plain', 'jit', 'remat', 'scan'])
def test_rules_for_reverse_mode_alone(wrap):
    clip = sg.map_gradient(True, lambda info, ct: jnp.clip(ct, -0.1, 0.1))

    def fn(p, x):
        return wrap(lambda p, x: p['b'] * clip(p)['a'] ** 2 * x)(p, x)

    got, want = (GRAD(squared(f))(AB, 0.5) for f in (sg.gradient_views(ENTRIES)(fn), by_hand(fn)))
    assert_same(got, want, 'grad', rtol=1e-4)
    assert abs(got[0]['a']) <= 0.1 * 3 * 2 and got[0]['a'] != 0


def test_what_jax_cannot_do():
    """A batched `cond` becomes a select, with a stop_gradient in it that JAX cannot transpose."""
    loss = lambda p, x: sg.gradient_views({'a': 'a'})(branch)(p, x)['a']
    with pytest.raises(NotImplementedError, match='Transpose rule .* not implemented'):
        jax.grad(lambda p: jax.vmap(loss, (None, 0))(p, jnp.array([1.0, -1.0])).sum())(AB)
    one = lambda p, x: jax.grad(loss)(p, x)['a']  # the other way round is right
    assert_same(jax.vmap(one, (None, 0))(AB, jnp.array([1.0, -1.0])),
                jnp.array([0.3 ** 2, 2 * 0.7 * 0.3], jnp.float32), 'vmap of grad', rtol=1e-5)


# What is differentiated besides -------------------------------------------------------------------


def test_overlapping_and_uncovered_parameters():
    params = {'a': 2.0, 'b': 3.0, 'c': 5.0}
    views = sg.gradient_views({'ab': ['a', 'b'], 'b': 'b'})(lambda p: p['a'] * p['b'] * p['c'])
    out, pullback = jax.vjp(views, params)
    assert out == {'ab': 30, 'b': 30}
    assert jax.tree.map(float, pullback({'ab': 1.0, 'b': 10.0})[0]) == {'a': 15, 'b': 110, 'c': 0}


def test_what_the_target_closes_over_is_differentiated_in_every_entry():
    def loss(p, x, y):
        out = sg.gradient_views({'a': 'a', 'b': 'b'})(lambda p: jax.lax.scan(
            lambda c, _: (c * p['a'] * x, c * y), p['b'], None, length=2))(p)
        return sum(c + ys.sum() for c, ys in out.values())

    for run in (lambda f: f, jax.jit):
        grads = run(jax.grad(loss, (0, 1, 2)))({'a': 2.0, 'b': 3.0}, 5.0, 7.0)
        # b(ax)² + by + baxy, where each entry has the derivative with respect to x and y.
        assert jax.tree.map(float, grads) == (
            {'a': 300 + 105, 'b': 100 + 7 + 70}, 2 * (120 + 42), 2 * (3 + 30))


def test_leaves_of_every_kind_pass_through():
    key = jax.random.key(3)

    def fn(p, x):
        return {'key': key, 'n': p['n'] + 1, 'none': None, 'flag': x > 0, 'half': p['h'] * x,
                'complex': p['z'] * x, 'same': x, 'text': p['box'].value * 2}

    params = {'n': jnp.int32(3), 'h': jnp.bfloat16(0.5), 'z': jnp.complex64(1j),
              'box': nn.Partitioned(jnp.float32(3), ('x',))}
    views = sg.gradient_views({'h': 'h', 'z': ['z', 'box']})(fn)
    out = jax.jit(views)(freeze(params), jnp.float32(2))
    for entry in out.values():
        assert_same(entry, fn(params, jnp.float32(2)), 'value')

    def loss(p, x):
        out = views({**params, **p}, x)
        return out['h']['half'].astype(float) * 3 + jnp.imag(out['h']['complex']) + (
            jnp.imag(out['z']['complex']) * 5 + out['h']['text'] + 11 * out['z']['text'])

    params.pop('n')
    params = {'n': jnp.int32(3), **params}
    grads = jax.grad(loss)({k: params[k] for k in ('h', 'z', 'box')}, jnp.float32(2))
    assert grads['h'] == 6 and grads['z'] == -10j and grads['box'].value == 22


# Modules ------------------------------------------------------------------------------------------


class Cell(nn.Module):
    @nn.compact
    def __call__(self, c, x):
        h = jnp.tanh(nn.Dense(3, name='gln')(c) + nn.Dense(3, name='code')(x))
        self.sow('intermediates', 'h', h)
        return nn.Dropout(0.3, deterministic=False)(h), h


class Core(nn.Module):
    """A scan, statistics, noise, sown values, a value derived in setup, remat and jit."""

    def setup(self):
        self.gain = self.param('gain', nn.initializers.ones, (3,))
        self.derived = jnp.exp(self.gain)
        self.cell = nn.scan(
            Cell, variable_broadcast='params', variable_axes={'intermediates': 0},
            split_rngs={'params': False, 'dropout': True}, length=2)()
        self.norm = nn.BatchNorm(use_running_average=False)
        self.again = nn.remat(nn.jit(nn.Dense))(3)

    def __call__(self, x, *, power=1, flip=False):
        h, hs = self.cell(x, jnp.stack([x, -x]))
        h = self.again(self.norm(h)) * self.derived ** power
        return {'h': -h if flip else h, 'hs': hs, 'n': (h > 0).sum()}

    def run(self, x, **kwargs):
        return self(x, **kwargs)

    @nn.nowrap
    def names(self):
        return ['gln', 'rest']


PREDICATES = {'gln': '**/gln', 'rest': ['gain', 'again'], 'few': 'cell/code/bias'}
VIEWS = sg.gradient_views(PREDICATES)
OUTER = {name: f'core/{p}' if isinstance(p, str) else [f'core/{q}' for q in p]
         for name, p in PREDICATES.items()}
BESIDE = {name: f'../{p}' if isinstance(p, str) else [f'../{q}' for q in p]
          for name, p in OUTER.items()}


class Whole(nn.Module):
    use: str = 'plain'

    def setup(self):
        self.core = {'class': VIEWS(Core), 'unbound': lambda: VIEWS(Core())}.get(self.use, Core)()
        self.head = nn.Dense(3)

    def __call__(self, x):
        x = self.head(x)
        kwargs = dict(power=2, flip=True)
        match self.use:
            case 'module':
                out = VIEWS(self.core)(x, **kwargs)
            case 'method':
                out = VIEWS(self.core.run)(x, **kwargs)
            case 'function':
                out = VIEWS(lambda core, x: core(x, **kwargs))(self.core, x)
            case 'decorated':
                out = self.decorated(x)
            case 'argument':
                out = sg.gradient_views(BESIDE)(
                    lambda head, core: core(x, **kwargs))(self.head, self.core)
            case 'method around':
                out = around_method(self, x)
            case _:
                out = self.core(x, **kwargs)
        return out if 'gln' in out else dict.fromkeys(PREDICATES, out)

    @sg.gradient_views(OUTER)
    def decorated(self, x):
        return self.core(x, power=2, flip=True)


@sg.gradient_views(OUTER)
def around_method(whole, x):
    return whole.core(x, power=2, flip=True)


USES = ['module', 'method', 'function', 'decorated', 'argument', 'method around', 'class',
        'unbound']
RNGS = {'params': jax.random.key(0), 'dropout': jax.random.key(1)}
WHOLE = Whole().init(RNGS, X)


def select(params, names):
    """Return the parameters with those of the core stopped that an entry does not select."""
    def leaf(path, p):
        path = '/'.join(k.key for k in path if hasattr(k, 'key'))
        chosen = {'gln': '/gln/' in path, 'rest': path.startswith(('core/gain', 'core/again')),
                  'few': path == 'core/cell/code/bias'}
        live = path.startswith('head') or any(chosen[n] for n in names)
        return p if live else jax.lax.stop_gradient(p)
    return jax.tree_util.tree_map_with_path(leaf, params)


def by_runs(mutable):
    """Return the whole model, run once for each entry, and for the state once more."""
    def run(variables, x):
        out, state = {}, None
        for name in [*PREDICATES, None]:
            chosen = {**variables, 'params': select(variables['params'], [name] * bool(name))}
            made, state = Whole().apply(chosen, x, rngs=RNGS, mutable=mutable)
            out[name] = made.get(name)
        out.pop(None)
        if 'params' in state:
            state['params'] = variables['params']
        return out, state
    return run


MUTABLE = {'state': ['batch_stats'], 'sown': ['batch_stats', 'intermediates'],
           'params': ['batch_stats', 'params'], 'all': ['batch_stats', 'params', 'intermediates']}


@pytest.mark.parametrize('mutable', MUTABLE)
@pytest.mark.parametrize('use', USES)
def test_each_target(use, mutable):
    mutable = MUTABLE[mutable]
    run = lambda v, x: Whole(use).apply(v, x, rngs=RNGS, mutable=mutable)
    variables = {k: v for k, v in WHOLE.items() if k != 'intermediates'}

    def grads(f):
        def loss(variables, x):
            out = f(variables, x)
            return scalar(lambda: out)(), out
        return traced(jax.value_and_grad(loss, (0, 1), has_aux=True))

    got, want = (grads(f)(variables, X) for f in (run, by_runs(mutable)))
    assert_same(got, want, use, rtol=1e-4)


@pytest.mark.parametrize('use', USES)
def test_init_is_that_of_the_plain_model(use):
    assert_same(Whole(use).init(RNGS, X), WHOLE, 'init')
