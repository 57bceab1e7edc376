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
from hypothesis import given, settings

import flax_sg as sg
import measure
import views as programs
from flax_sg import nn
from internals import in_views, mark, nothing_is_open, watch_transposes
from oracle import assert_same, scalar
from random_programs import (
    check_views,
    deterministic,
    draw_views,
    report,
    same_failure,
    seeds,
    shrink,
    traced,
)

X = jnp.array([[0.3, -0.7, 0.2], [1.1, 0.4, -0.5]])

# Pure functions, at every order -------------------------------------------------------------------

ENTRIES = {'a': 'a', 'b': 'b', 'both': ['a', 'b'], 'none': sg.nothing, 'again': 'a'}
LIVE = {'a': 'a', 'b': 'b', 'both': 'ab', 'none': '', 'again': 'a'}  # what each selects
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
    return x**3


cube.defjvp(lambda primals, tangents: (cube(*primals), 5 * primals[0] ** 2 * tangents[0]))


FUNCTIONS = {
    'product': product,
    'loop': loop,
    'branch': branch,
    'fori': fori,
    'remat': jax.checkpoint(lambda p, x: loop(p, x)['ys']),
    'jit': jax.jit(lambda p, x: (jnp.sin(p['a'] * p['b']) * x, x * 2)),
    'rule': lambda p, x: cube(p['a'] * p['b']) * x,
}


def by_hand(fn, entries=LIVE):
    """Return the entries, each a run of its own."""

    def run(params, *args):
        held = lambda live: {
            k: v if k in live else jax.lax.stop_gradient(v) for k, v in params.items()
        }
        return {name: fn(held(live), *args) for name, live in entries.items()}

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
        lambda p, x: jax.vmap(f, (None, 0))(p, jnp.stack([x, 2 * x])).sum()
    ),
    'grad of scan': lambda f: GRAD(
        lambda p, x: jax.lax.scan(lambda c, _: (c / 2 + f(p, c / 9), None), x, None, length=2)[0]
    ),
    'hessian of remat': lambda f: jax.hessian(jax.checkpoint(f), (0, 1)),
}


@pytest.mark.thinned(7)
@pytest.mark.parametrize('order', ORDERS)
@pytest.mark.parametrize('name', FUNCTIONS)
def test_each_order_of_derivative(name, order):
    fn = FUNCTIONS[name]
    of = lambda f: traced(ORDERS[order](squared(f)))
    got, want = (of(f)(AB, jnp.float32(0.5)) for f in (sg.gradient_views(ENTRIES)(fn), by_hand(fn)))
    assert_same(got, want, order, rtol=1e-4)


@pytest.mark.thinned(2)
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

    got, want = (
        jax.jit(FORWARD(squared(f)))(AB, 0.5)
        for f in (sg.gradient_views(ENTRIES)(body), by_hand(body))
    )
    assert_same(got, want, 'jacfwd', rtol=1e-4)


@jax.custom_vjp
def clipped(v):
    return v


clipped.defvjp(lambda v: (v, v), lambda v, ct: (jnp.clip(ct, -0.1, 0.1) + 0 * v,))


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    'wrap',
    [
        lambda f: f,
        jax.jit,
        jax.checkpoint,
        lambda f: (
            lambda p, x: jax.lax.scan(lambda c, _: (c + f(p, x), None), 0.0, None, length=2)[0]
        ),
    ],
    ids=['plain', 'jit', 'remat', 'scan'],
)
@pytest.mark.parametrize(
    'clip',
    [
        lambda p: jax.tree.map(clipped, p),
        sg.map_gradient(True, lambda info, ct: jnp.clip(ct, -0.1, 0.1)),
    ],
    ids=['custom_vjp', 'mapped'],
)
def test_rules_for_reverse_mode_alone(wrap, clip):

    def fn(p, x):
        return wrap(lambda p, x: p['b'] * clip(p)['a'] ** 2 * x)(p, x)

    got, want = (GRAD(squared(f))(AB, 0.5) for f in (sg.gradient_views(ENTRIES)(fn), by_hand(fn)))
    assert_same(got, want, 'grad', rtol=1e-4)
    assert abs(got[0]['a']) <= 0.1 * 3 * 2 and got[0]['a'] != 0


def test_collectives_and_effects_in_the_target():
    def fn(p, x):
        jax.debug.callback(seen.append, x)
        mean = jax.lax.pmean(p['a'] * x, 'i')
        place = 1.0 + jax.lax.axis_index('i')
        return p['b'] * mean**2 * place + p['a'] * jnp.sin(place)

    def grad(fn):
        def loss(p, xs):
            out = jax.vmap(fn, (None, 0), axis_name='i')(p, xs)
            return sum((k + 1) * (v**2).sum() for k, v in enumerate(out.values()))

        return jax.jit(jax.grad(loss, (0, 1)))

    by_place = jax.vmap(
        sg.gradient_views({'a': 'a'})(lambda p: p['a'] * jax.lax.axis_index('i')),
        None,
        axis_name='i',
        axis_size=3,
    )(AB)
    assert_same(by_place['a'], AB['a'] * jnp.arange(3.0), 'value')

    seen, xs = [], jnp.array([0.5, 1.0, 2.0])
    got = grad(sg.gradient_views({'a': 'a', 'b': 'b'})(fn))(AB, xs)
    jax.effects_barrier()
    assert sorted(map(float, seen)) == [0.5, 1, 2]  # once, whatever the number of views
    assert_same(got, grad(by_hand(fn, {'a': 'a', 'b': 'b'}))(AB, xs), 'grad', rtol=1e-5)


def test_on_eight_devices():
    mesh = jax.make_mesh((8,), ('i',), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec('i')
    views = sg.gradient_views({'a': 'a', 'b': 'b'})

    def loss(mapped):
        def run(p, x):
            out = mapped(
                lambda p, x: {k: jax.lax.psum(v, 'i') for k, v in views(target)(p, x).items()}
            )(p, x)
            return (out['a'] ** 2 + 3 * out['b'] ** 3).sum()

        return run

    def target(p, x):
        return jnp.tanh(p['a'] * x) * p['b']

    shard = lambda f: jax.shard_map(
        f,
        mesh=mesh,
        in_specs=(jax.sharding.PartitionSpec(), spec),
        out_specs=jax.sharding.PartitionSpec(),
    )
    x = jnp.linspace(-1, 1, 8)
    got = jax.jit(jax.grad(loss(shard), (0, 1)))(
        AB, jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    )
    batch = lambda f: (
        lambda p, x: jax.tree.map(lambda v: v[:1], jax.vmap(f, (None, 0), axis_name='i')(p, x))
    )
    want = jax.jit(jax.grad(loss(batch), (0, 1)))(AB, x)
    assert_same(got, want, 'sharded', rtol=1e-5)
    assert got[1].sharding.spec == spec


# What is differentiated besides -------------------------------------------------------------------


def test_overlapping_and_uncovered_parameters():
    params = {'a': 2.0, 'b': 3.0, 'c': 5.0}
    views = sg.gradient_views({'ab': ['a', 'b'], 'b': 'b'})(lambda p: p['a'] * p['b'] * p['c'])
    out, pullback = jax.vjp(views, params)
    assert out == {'ab': 30, 'b': 30}
    assert jax.tree.map(float, pullback({'ab': 1.0, 'b': 10.0})[0]) == {'a': 15, 'b': 110, 'c': 0}


def test_what_the_target_closes_over_is_differentiated_in_every_entry():
    def loss(p, x, y):
        out = sg.gradient_views({'a': 'a', 'b': 'b'})(
            lambda p: jax.lax.scan(lambda c, _: (c * p['a'] * x, c * y), p['b'], None, length=2)
        )(p)
        return sum(c + ys.sum() for c, ys in out.values())

    for run in (lambda f: f, jax.jit):
        grads = run(jax.grad(loss, (0, 1, 2)))({'a': 2.0, 'b': 3.0}, 5.0, 7.0)
        # b(ax)² + by + baxy, where each entry has the derivative with respect to x and y.
        assert jax.tree.map(float, grads) == (
            {'a': 300 + 105, 'b': 100 + 7 + 70},
            2 * (120 + 42),
            2 * (3 + 30),
        )


def test_leaves_of_every_kind_pass_through():
    key = jax.random.key(3)

    def fn(p, x):
        return {
            'key': key,
            'n': p['n'] + 1,
            'none': None,
            'flag': x > 0,
            'half': p['h'] * x,
            'complex': p['z'] * x,
            'same': x,
            'text': p['box'].value * 2,
        }

    params = {
        'n': jnp.int32(3),
        'h': jnp.bfloat16(0.5),
        'z': jnp.complex64(1j),
        'box': nn.Partitioned(jnp.float32(3), ('x',)),
    }
    views = sg.gradient_views({'h': 'h', 'z': ['z', 'box']})(fn)
    out = jax.jit(views)(freeze(params), jnp.float32(2))
    for entry in out.values():
        assert_same(entry, fn(params, jnp.float32(2)), 'value')

    def loss(p, x):
        out = views({**params, **p}, x)
        return (
            out['h']['half'].astype(float) * 3
            + jnp.imag(out['h']['complex'])
            + (jnp.imag(out['z']['complex']) * 5 + out['h']['text'] + 11 * out['z']['text'])
        )

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
            Cell,
            variable_broadcast='params',
            variable_axes={'intermediates': 0},
            split_rngs={'params': False, 'dropout': True},
            length=2,
        )()
        self.norm = nn.BatchNorm(use_running_average=False)
        self.again = nn.remat(nn.jit(nn.Dense))(3)

    def __call__(self, x, *, power=1, flip=False):
        h, hs = self.cell(x, jnp.stack([x, -x]))
        h = self.again(self.norm(h)) * self.derived**power
        return {'h': -h if flip else h, 'hs': hs, 'n': (h > 0).sum()}

    def run(self, x, **kwargs):
        return self(x, **kwargs)

    @nn.nowrap
    def names(self):
        return ['gln', 'rest']


PREDICATES = {'gln': '**/gln', 'rest': ['gain', 'again'], 'few': 'cell/code/bias'}
VIEWS = sg.gradient_views(PREDICATES)
OUTER = {
    name: f'core/{p}' if isinstance(p, str) else [f'core/{q}' for q in p]
    for name, p in PREDICATES.items()
}
BESIDE = {
    name: f'../{p}' if isinstance(p, str) else [f'../{q}' for q in p] for name, p in OUTER.items()
}


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
                out = sg.gradient_views(BESIDE)(lambda head, core: core(x, **kwargs))(
                    self.head, self.core
                )
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


USES = [
    'module',
    'method',
    'function',
    'decorated',
    'argument',
    'method around',
    'class',
    'unbound',
]
RNGS = {'params': jax.random.key(0), 'dropout': jax.random.key(1)}
WHOLE = Whole().init(RNGS, X)


def select(params, names):
    """Return the parameters with those of the core stopped that an entry does not select."""

    def leaf(path, p):
        path = '/'.join(k.key for k in path if hasattr(k, 'key'))
        chosen = {
            'gln': '/gln/' in path,
            'rest': path.startswith(('core/gain', 'core/again')),
            'few': path == 'core/cell/code/bias',
        }
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


MUTABLE = {'sown': ['batch_stats', 'intermediates'], 'params': ['batch_stats', 'params']}


@pytest.mark.thinned(2)
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


@pytest.mark.parametrize('use', USES)
def test_tabulate_and_eval_shape(use):
    variables = {k: v for k, v in WHOLE.items() if k != 'intermediates'}
    of = lambda model: (
        jax.eval_shape(model.init, RNGS, X),
        jax.eval_shape(functools.partial(model.apply, rngs=RNGS, mutable=True), variables, X),
    )
    assert of(Whole(use)) == of(Whole())
    if use != 'method':  # a call of a method other than __call__ has a row of its own
        assert Whole(use).tabulate(RNGS, X) == Whole().tabulate(RNGS, X)


def test_both_orders_of_decorators():
    class Net(nn.Module):
        @VIEWS_AB
        @nn.compact
        def __call__(self, x):
            return self.param('a', nn.initializers.ones, ()) * x

        @nn.compact
        @VIEWS_AB
        def other(self, x):
            return self.param('a', nn.initializers.ones, ()) * x * nn.Dense(1)(x[None])[0]

    for method, names in (('__call__', {'a'}), ('other', {'a', 'Dense_0'})):
        variables = Net().init(jax.random.key(0), jnp.float32(2), method=method)
        assert set(variables['params']) == names
        out = Net().apply(variables, jnp.float32(2), method=method)
        assert out['a'] == out['b']


VIEWS_AB = sg.gradient_views({'a': 'a', 'b': ['b', '**/b']}, allow_unmatched=True)


class Two(nn.Module):
    """a² b² x, with a read after a block too."""

    @nn.compact
    def __call__(self, x):
        a = self.param('a', nn.initializers.ones, ())
        with sg.stop_gradient('b'):
            held = self.param('b', nn.initializers.ones, ())
        return a * a * self.get_variable('params', 'b') * held * x


def grads_of(fn, params=None):
    params = params or {'a': jnp.float32(2), 'b': jnp.float32(3)}
    return jax.tree.map(float, jax.grad(lambda p: fn({'params': p}))(params))


def test_blocks_inside_and_around():
    apply = functools.partial(Two().apply, method=VIEWS_AB(Two.__call__))
    assert grads_of(lambda v: apply(v, 1.0)['a']) == {'a': 36, 'b': 0}
    assert grads_of(lambda v: apply(v, 1.0)['b']) == {'a': 0, 'b': 12}  # one of two reads
    with sg.stop_gradient('a'):
        assert grads_of(lambda v: apply(v, 1.0)['a']) == {'a': 0, 'b': 0}
        assert grads_of(lambda v: apply(v, 1.0)['b']) == {'a': 0, 'b': 12}
    with sg.scale_gradient('a', -2.0):
        assert grads_of(lambda v: apply(v, 1.0)['a']) == {'a': -72, 'b': 0}
    with sg.map_values('b', lambda info, v: v + 1):
        assert grads_of(lambda v: apply(v, 1.0)['a']) == {'a': 64, 'b': 0}
    with sg.constant('a'):
        assert apply({'params': {'a': 2.0, 'b': 3.0}}, 1.0) == {'a': 36, 'b': 36}


@pytest.mark.thinned(2)
@pytest.mark.parametrize('mutable', [False, ['params']])
@pytest.mark.parametrize('where', ['scan', 'split', 'remat', 'jit', 'vmap'])
def test_views_in_the_body_of_a_lifted_transform(where, mutable):
    class Body(nn.Module):
        @nn.compact
        def __call__(self, c, _=None):
            out = VIEWS_AB(Two(name='two'))(c)
            c = jnp.tanh(out['a'] + 2 * out['b'] ** 2 + c)
            return (c, None) if 'scan' in where or where == 'split' else c

    lifts = {
        'scan': functools.partial(
            nn.scan, variable_broadcast='params', split_rngs={'params': False}, length=3
        ),
        'split': functools.partial(
            nn.scan, variable_axes={'params': 0}, split_rngs={'params': True}, length=3
        ),
        'remat': nn.remat,
        'jit': nn.jit,
        'vmap': functools.partial(
            nn.vmap, variable_axes={'params': None}, split_rngs={'params': False}
        ),
    }
    x = jnp.array([0.1, 0.2]) if where == 'vmap' else jnp.float32(0.3)
    model = lifts[where](Body)()
    variables = jax.tree.map(lambda p: p * 0.7, model.init(jax.random.key(0), x))

    def ours(variables, x):
        out = model.apply(variables, x, mutable=mutable)
        return jnp.sum(jax.tree.leaves(out[0] if mutable else out)[0])

    def hand(variables, x):
        two, stop = variables['params']['two'], jax.lax.stop_gradient
        for i in range(3 if where in ('scan', 'split') else 1):
            a, b = (two[n][i] if where == 'split' else two[n] for n in 'ab')
            x = jnp.tanh(a**2 * stop(b**2) * x + 2 * (stop(a**2 * b) * b * x) ** 2 + x)
        return jnp.sum(x)

    for order in (GRAD, lambda f: jax.hessian(f, (0, 1))):
        got, want = (jax.jit(order(f))(variables, x) for f in (ours, hand))
        assert_same(got, want, where, rtol=1e-4)


class Weight(nn.Module):
    @nn.compact
    def __call__(self):
        return self.param('w', nn.initializers.ones, ())


class Pair(nn.Module):
    """a² b² x; at a = 2, b = 3, x = 1 it is 36, and its derivatives 2ab² = 36 and 2a²b = 24."""

    def setup(self):
        self.a, self.b = Weight(), Weight()

    def __call__(self, x):
        return self.a() ** 2 * self.b() ** 2 * x


VIEWS_PAIR, HELD = sg.gradient_views({'a': 'a', 'b': 'b'}), sg.stop_gradient('a')


def derivatives(fn, run=lambda f: f):
    """Return the derivatives with respect to a and b of each number that comes out."""
    of = lambda a, b: fn({'a': {'w': a}, 'b': {'w': b}})
    return jax.tree.map(float, run(jax.jacrev(of, (0, 1)))(2.0, 3.0))


@pytest.mark.parametrize(
    'cls, target',
    [
        (Pair, lambda pair: VIEWS_PAIR(HELD(pair))),
        (Pair, lambda pair: VIEWS_PAIR(HELD(pair).__call__)),
        (lambda: VIEWS_PAIR(HELD(Pair))(), lambda pair: pair),
        (lambda: HELD(VIEWS_PAIR(Pair))(), lambda pair: pair),
        (lambda: VIEWS_PAIR(HELD(Pair())), lambda pair: pair),
    ],
    ids=['mirror', 'method', 'class', 'class of views', 'unbound'],
)
def test_views_of_what_is_held_and_the_other_way_round(cls, target):
    class Net(nn.Module):
        def setup(self):
            self.pair = cls()

        def __call__(self, x):
            return target(self.pair)(x)

    assert derivatives(lambda pair: Net().apply({'params': {'pair': pair}}, 1.0)) == {
        'a': (0, 0),
        'b': (0, 24),
    }


def run_pair(pair, x):
    return pair(x)


def doubled(pair, x):
    """The rule doubles the parameters' cotangents."""

    def backward(pullback, ct):
        params, x_bar = pullback(ct)
        return jax.tree.map(lambda g: 2 * g, params), x_bar

    forward = functools.partial(nn.vjp, run_pair)
    return nn.custom_vjp(run_pair, forward, backward)(pair, x)


def pulled_back(pair, x):
    """2ab² x, whose derivatives are 2b² = 18 and 4ab = 24."""
    y, pullback = nn.vjp(run_pair, pair, x)
    return pullback(jnp.ones_like(y))[0]['params']['a']['w']


def pushed_forward(pair, x):
    tangents = {'params': {'a': {'w': 1.0}, 'b': {'w': 0.0}}}
    return nn.jvp(run_pair, pair, (x,), (0.0,), variable_tangents=tangents)[1]


@pytest.mark.parametrize('mutable', [False, ['params']])
@pytest.mark.parametrize(
    'target, want',
    [
        (run_pair, (36, 24)),
        (doubled, (72, 48)),
        (pulled_back, (18, 24)),
        (pushed_forward, (18, 24)),
    ],
)
def test_derivatives_of_flax_in_the_target(target, want, mutable):
    def run(params):
        out = Pair().apply({'params': params}, 1.0, mutable=mutable, method=VIEWS_PAIR(target))
        return out[0] if mutable else out

    assert run({'a': {'w': 2.0}, 'b': {'w': 3.0}}) == {'a': 36, 'b': 36}
    assert derivatives(run) == {'a': (want[0], 0), 'b': (0, want[1])}


def test_views_inside_views():
    inner = sg.gradient_views({'a': 'a', 'b': 'b'})(lambda p: p['a'] ** 2 * p['b'])

    def outer(p):
        out = inner(p)
        return {'mixed': out['a'] * out['b'] ** 2, 'plain': p['a'] * p['b']}

    views = sg.gradient_views({'x': 'a', 'y': True, 'z': 'b'})(outer)

    def by_hand(p, live):
        stop = jax.lax.stop_gradient
        p = {k: v if k in live else stop(v) for k, v in p.items()}
        one, two = p['a'] ** 2 * stop(p['b']), stop(p['a']) ** 2 * p['b']
        return {'mixed': one * two**2, 'plain': p['a'] * p['b']}

    want = lambda p: {'x': by_hand(p, 'a'), 'y': by_hand(p, 'ab'), 'z': by_hand(p, 'b')}
    for order in (jax.grad, jax.hessian, lambda f: jax.grad(total(jax.grad(total(jax.grad(f)))))):
        got, meant = (order(squared(f))(AB) for f in (views, want))
        assert_same(got, meant, 'nested', rtol=1e-4)


def test_modules_inside_modules_with_views():
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return sum(VIEWS_AB(Two(name='two'))(x).values())

    model = Inner()
    views = sg.gradient_views({'both': True, 'a': '**/a'})
    apply = functools.partial(model.apply, method=views(Inner.__call__))
    params = {'two': {'a': jnp.float32(2), 'b': jnp.float32(3)}}
    for name, want in {'both': {'a': 36, 'b': 12}, 'a': {'a': 36, 'b': 0}}.items():
        got = jax.grad(lambda p, name=name: apply({'params': p}, 1.0)[name])(params)['two']
        assert jax.tree.map(float, got) == want


def test_a_module_captured_by_the_target_is_covered():
    class Net(nn.Module):
        def setup(self):
            self.two, self.other = Two(), nn.Dense(1)

        def __call__(self, x):
            if self.is_initializing():
                return self.two(x) + self.other(x[None])
            live = self.two.get_variable('params', 'a')  # read before
            views = sg.gradient_views({'a': '../two/a', 'none': sg.nothing})
            out = views(
                lambda other: (
                    live
                    * self.two.get_variable('params', 'a')
                    * self.two.get_variable('params', 'b')
                )
            )(self.other)
            return out['a'] + 10 * out['none']

    params = {
        'two': {'a': 2.0, 'b': 3.0},
        'other': {'kernel': jnp.ones((1, 1)), 'bias': jnp.ones(1)},
    }
    got = jax.grad(lambda p: Net().apply({'params': p}, jnp.float32(1)))(params)['two']
    assert jax.tree.map(float, got) == {'a': 6 + 66, 'b': 0}


@pytest.mark.parametrize('wrap', [jax.checkpoint, jax.jit, lambda f: f])
def test_a_captured_module_read_in_a_function_that_is_run_again(wrap):
    """What is recomputed in the linear map of one entry is a constant of that entry too."""

    class Net(nn.Module):
        def setup(self):
            self.two, self.other = Two(), nn.Dense(1)

        def __call__(self, x):
            if self.is_initializing():
                return {'a': self.two(x) + self.other(x[None]).sum()}
            read = lambda name: self.two.get_variable('params', name)
            views = sg.gradient_views({'a': '../two/a', 'b': '../two/b'})
            return views(lambda other: wrap(lambda x: jnp.sin(read('a') * x) * read('b') ** 2)(x))(
                self.other
            )

    def hand(p, x):
        held = lambda name: {k: v if k == name else jax.lax.stop_gradient(v) for k, v in p.items()}
        return {name: jnp.sin(held(name)['a'] * x) * held(name)['b'] ** 2 for name in 'ab'}

    dense = {'kernel': jnp.ones((1, 1)), 'bias': jnp.ones(1)}
    ours = lambda p, x: Net().apply({'params': {'two': p, 'other': dense}}, x)
    for name in ('grad', 'hessian', 'reverse over reverse', 'third'):
        got, want = (jax.jit(ORDERS[name](squared(f)))(AB, 0.5) for f in (ours, hand))
        assert_same(got, want, name, rtol=1e-4)


def test_collections():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            scale = self.variable('consts', 'scale', jnp.ones, ())
            return self.param('w', nn.initializers.ones, ()) * scale.value * x

    variables = {'params': {'w': 2.0}, 'consts': {'scale': 3.0}}
    for collections, want in (('params', 2), (['params', 'consts'], 0)):
        views = sg.gradient_views({'w': 'w'}, collections=collections)
        grads = jax.grad(lambda v, f=views: Net().apply(v, 1.0, method=f(Net.__call__))['w'])(
            variables
        )
        assert (grads['params']['w'], grads['consts']['scale']) == (3, want)


@pytest.mark.long
@settings(deterministic, max_examples=10)
@given(seeds)
def test_random_programs(seed):
    program, how = draw_views(seed)
    try:
        check_views(program, **how)
    except Exception as error:
        smaller = shrink(program, same_failure(error, check_views, **how))
        error.add_note(f'seed {seed}, {how}, shrunk:\n{report(smaller)}')
        raise


# State, caches, exceptions, threads ---------------------------------------------------------------


def test_what_is_written_is_constant_in_the_parameters_and_live_in_inputs():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            w, v = (self.param(n, nn.initializers.ones, ()) for n in 'wv')
            self.sow('losses', 'out', w * v * x)
            self.put_variable('state', 'last', w * x**2)
            return w * v * x

    def run(params, x, what):
        views = sg.gradient_views({'w': 'w'})
        out, new = Net().apply(
            {'params': params, 'state': {'last': 0.0}},
            x,
            mutable=['losses', 'state', 'params'],
            method=views(Net.__call__),
        )
        new['losses'] = new['losses']['out'][0]
        return {
            'out': out['w'],
            'last': new['state']['last'],
            'sown': new['losses'],
            'kept': new['params']['v'],
        }[what]

    params = {'w': 2.0, 'v': 3.0}
    grads = {
        what: jax.grad(run, (0, 1))(params, 5.0, what) for what in ('out', 'last', 'sown', 'kept')
    }
    assert grads == {
        'out': ({'w': 15, 'v': 0}, 6),
        'last': ({'w': 0, 'v': 0}, 20),
        'sown': ({'w': 0, 'v': 0}, 6),
        'kept': ({'w': 0, 'v': 1}, 0),
    }


def test_no_stale_traces_and_no_retracing():
    traces = []

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Compiled(name='t')(x)

    class Traced(nn.Module):
        @nn.compact
        def __call__(self, x):
            traces.append(x)
            return (
                self.param('a', nn.initializers.ones, ()) ** 2
                * self.param('b', nn.initializers.ones, ())
                * x
            )

    Compiled = nn.jit(Traced)
    bound = Net().bind({'params': {'t': {'a': jnp.float32(2), 'b': jnp.float32(3)}}})

    def grads(mask):
        def loss(p):
            model = Net().bind({'params': p})
            return mask(lambda m, x: m(x))(model, 1.0)

        return grads_of(lambda v: loss(v['params']), bound.variables['params'])['t']

    plain = lambda fn: fn
    of = {
        'a': lambda: lambda fn: lambda *x: sg.gradient_views({'a': 't/a', 'b': 't/b'})(fn)(*x)['a'],
        'b': lambda: lambda fn: lambda *x: sg.gradient_views({'b': 't/b'})(fn)(*x)['b'],
        'plain': lambda: plain,
    }
    want = {'a': {'a': 12, 'b': 0}, 'b': {'a': 0, 'b': 4}, 'plain': {'a': 12, 'b': 4}}
    counts = []
    for order in (['plain', 'a', 'b'], ['b', 'a', 'plain'], ['a', 'plain', 'b']):
        for name in order:
            assert grads(of[name]()) == want[name], (name, order)
        counts.append(len(traces))
    assert counts[0] == counts[1] == counts[2] <= 3


# Their unions read alike, a | b | a, so that nothing but the entries tells one from another.
WAYS = {
    '1': {'x': 'a', 'y': ['b', 'a']},
    '2': {'x': 'a', 'y': 'b', 'z': 'a'},
    '3': {'x': ['a', 'b'], 'y': 'a'},
}
ONE, TWO, BOTH, NEITHER = (36, 0), (0, 24), (36, 24), (0, 0)  # the derivatives of `Pair`
WANT = {
    '1': {'x': ONE, 'y': BOTH},
    '2': {'x': ONE, 'y': TWO, 'z': ONE},
    '3': {'x': BOTH, 'y': ONE},
    'p': BOTH,
    'h': TWO,
    'n': {'x': {'x': ONE, 'y': ONE}, 'y': {'x': NEITHER, 'y': TWO}, 'z': {'x': ONE, 'y': ONE}},
}


@pytest.mark.thinned(4)
@pytest.mark.parametrize('run', [lambda f: f, jax.jit], ids=['eager', 'jit'])
@pytest.mark.parametrize('order', ['12', '21', '132', '31p2', 'p12', 'h12p', '1h2', 'n21', '1n2'])
def test_one_jitted_function_called_in_different_views(order, run):
    """p is the plain call, h in a block that holds a, and n is view 1 in view 2."""
    views = {way: sg.gradient_views(entries) for way, entries in WAYS.items()}

    def calls(params):
        pair = Pair().bind({'params': params})
        read = jax.jit(lambda x: pair(x))
        plain = lambda _, x: read(x)
        targets = {'p': plain, 'h': HELD(plain), 'n': views['2'](views['1'](plain))}
        targets |= {way: v(plain) for way, v in views.items()}
        return [targets[way](pair, 1.0) for way in order]

    assert derivatives(calls, run) == [WANT[way] for way in order]


def test_an_exception_leaves_nothing_behind():
    def fails(p):
        raise KeyError('mine')

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.param('a', nn.initializers.ones, ())
            raise KeyError('mine')

    for _ in range(2):
        with pytest.raises(KeyError, match='mine'):
            VIEWS_AB(fails)({'a': 1.0})
        with pytest.raises(KeyError, match='mine'):
            Net().apply({'params': {'a': 1.0}}, 1.0, method=VIEWS_AB(Net.__call__))
        assert nothing_is_open()
    assert grads_of(lambda v: Two().apply(v, 1.0)) == {'a': 36, 'b': 12}


def test_threads(no_leaks):
    start, found = threading.Barrier(4), {}

    def work(i):
        views = sg.gradient_views({'a': 'a', 'b': 'b'})(lambda p: p['a'] * p['b'] ** 2)
        start.wait()
        for _ in range(5):
            found.setdefault(i, []).append(
                jax.grad(lambda p: views(p)['ab'[i % 2]])({'a': 2.0, 'b': 3.0})['ab'[i % 2]]
            )

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[i] == [[9, 12][i % 2]] * 5 for i in range(4))


def test_no_tracer_is_left_behind(no_leaks):
    apply = functools.partial(Two().apply, method=VIEWS_AB(Two.__call__))
    loss = lambda p, x: sum(apply({'params': p}, x).values())
    jax.make_jaxpr(jax.grad(jax.grad(loss, 1), 1))({'a': 2.0, 'b': 3.0}, 1.0)


def test_an_optimiser_step_moves_each_part_by_its_own_loss():
    params, views = {'a': 2.0, 'b': 3.0}, sg.gradient_views({'a': 'a', 'b': 'b'})

    def loss(p):
        out = views(lambda p: p['a'] * p['b'])(p)
        return out['a'] ** 2 - out['b']

    updates, _ = optax.sgd(0.1).update(jax.grad(loss)(params), optax.sgd(0.1).init(params))
    moved = jax.tree.map(float, optax.apply_updates(params, updates))
    assert moved == pytest.approx({'a': 2 - 0.1 * 36, 'b': 3 + 0.1 * 2})


# Errors -------------------------------------------------------------------------------------------

UNBOUND = Two()


@pytest.mark.parametrize(
    'make, error, text',
    [
        (
            lambda: sg.gradient_views({}),
            sg.UsageError,
            r"expected a dict of predicates, such as \{'gln': .*; got an empty one",
        ),
        (lambda: sg.gradient_views('gln'), sg.UsageError, 'expected a dict .*; got str'),
        (
            lambda: sg.gradient_views({'a': 3}),
            sg.PredicateError,
            'gradient_views.* expected a string',
        ),
        (lambda: sg.gradient_views({'a': 'a'}, collections=3), sg.PredicateError, 'collections=3'),
        (
            lambda: VIEWS(3),
            sg.UsageError,
            'object of type int; expected a flax.linen.Module( or flax.nnx.Module)? class or',
        ),
        (
            lambda: VIEWS(UNBOUND.apply),
            sg.UsageError,
            r"'apply' is a method of a module that is not bound. Pass method= to "
            r'apply: model.apply\('
            r'variables, x, method=views\(Two.__call__\)\)',
        ),
        *[
            (
                lambda target=target: target(UNBOUND.bind({'params': AB})),
                sg.UsageError,
                r"what 'apply' reads is of another root than the module that it is a "
                r'method of\. Pass '
                r'method= to apply: model\.apply\(variables, x, method=views\(Two\.__call__\)\)',
            )
            for target in (
                lambda two: VIEWS(two.apply)({'params': AB}, 1.0),
                lambda two: VIEWS(type(two).apply)(two, {'params': AB}, 1.0),
            )
        ],
        (
            lambda: VIEWS(lambda x: x)(3),
            sg.UsageError,
            'nested dict of parameters; got an object of ',
        ),
        (lambda: VIEWS(lambda: 0)(), sg.UsageError, 'got no argument'),
        (lambda: VIEWS(lambda m: 0)(UNBOUND), sg.UsageError, 'got a module that is not bound'),
        (
            lambda: sg.gradient_views({'a': 'a', 'c': 'cc'})(len)(AB),
            sg.UnmatchedPathError,
            r"gradient_views\(\{'a': 'a', 'c': 'cc'\}\): no variable of the tree matches 'cc'",
        ),
        (
            lambda: UNBOUND.apply(
                {'params': AB}, 1.0, method=sg.gradient_views({'a': 'a', 'c': 'cc'})(Two.__call__)
            ),
            sg.UnmatchedPathError,
            "no variable of '/' matches 'cc'",
        ),
    ],
)
def test_errors(make, error, text):
    with pytest.raises(error, match=text):
        make()
    assert nothing_is_open()


def test_a_derivative_inside_the_target():
    """It may be with respect to inputs, or to what was read; not through the reads themselves."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param('a', nn.initializers.ones, ())
            force = jax.grad(lambda x: w**2 * x**3)(x)
            return force + jax.grad(lambda w: w**3)(w)

    apply = functools.partial(Net().apply, method=VIEWS_AB(Net.__call__))
    assert grads_of(lambda v: apply(v, 1.0)['a'], {'a': 2.0}) == {'a': 3 * 2 * 2 + 6 * 2}
    assert grads_of(lambda v: apply(v, 1.0)['b'], {'a': 2.0}) == {'a': 0}

    def target(p, x):
        return jax.grad(lambda q: VIEWS_AB(lambda p: p['a'] ** 3 * x)({'a': q})['a'])(p['a'])

    views = sg.gradient_views({'a': 'a'})(target)  # views differentiated inside views
    assert jax.grad(lambda p: views(p, 1.0)['a'])({'a': 2.0})['a'] == 12

    class Bad(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.param('a', nn.initializers.ones, ())
            return jax.grad(lambda p: Two().apply({'params': p}, x))({'a': 2.0, 'b': 3.0})['a']

    method = VIEWS_AB(Bad.__call__)
    assert Bad().apply({'params': {'a': 1.0}}, 1.0, method=method)['a'] == 36  # another root


def with_rule(kind, read):
    """x², with a rule of JAX, raw, that multiplies with what it reads."""
    if kind == 'jvp':
        square = jax.custom_jvp(jnp.square)
        square.defjvp(lambda xs, ts: (xs[0] ** 2, ts[0] * read()))
        return square
    square = jax.custom_vjp(jnp.square)
    if kind == 'forward':
        square.defvjp(lambda x: (x**2, read()), lambda read, ct: (ct * read,))
    else:
        square.defvjp(lambda x: (x**2, None), lambda _, ct: (ct * read(),))
    return square


@pytest.mark.parametrize(
    'derivative',
    [jax.grad, lambda f: jax.jit(jax.grad(f)), jax.hessian],
    ids=['grad', 'jit', 'hessian'],
)
@pytest.mark.parametrize('kind', ['jvp', 'forward', 'backward'])
def test_a_rule_that_reads_a_captured_module_is_an_error(kind, derivative):
    def loss(params):
        pair = Pair().bind({'params': params})
        out = VIEWS_PAIR(lambda _, x: with_rule(kind, pair.b)(pair.a() * x))(pair, 1.0)
        return out['a'] + out['b']

    error, text = (
        (jax.errors.UnexpectedTracerError, TypeError),
        ('^Encountered an unexpected tracer|^No constant handler for type: .*Tracer'),
    )
    if kind != 'backward':  # which JAX runs last
        error, text = (
            sg.UsageError,
            (
                '^gradient_views: a rule of jax.custom_jvp or jax.custom_vjp reads '
                "params '/b/w' while "
                'the target of views is differentiated, after the target has run. Read '
                'the variable in '
                'the target, and give its value to the function as an argument.'
            ),
        )
    with pytest.raises(error, match=text):
        derivative(loss)({'a': {'w': 2.0}, 'b': {'w': 3.0}})
    assert nothing_is_open()


def test_a_rule_may_apply_a_model_of_its_own():
    def loss(params):
        pair = Pair().bind({'params': params})
        read = lambda: Pair().apply(
            {'params': {'a': {'w': 5.0}, 'b': {'w': 7.0}}}, method=lambda pair: pair.b()
        )
        return VIEWS_PAIR(lambda _, x: with_rule('jvp', read)(pair.a() * x))(pair, 1.0)['a']

    assert jax.grad(loss)({'a': {'w': 2.0}, 'b': {'w': 3.0}})['a']['w'] == 7  # as the rule says


def test_equal_views_compare_and_print():
    assert (
        sg.gradient_views({'a': 'a', 'b': ['x', True]})
        == sg.gradient_views({'a': 'a', 'b': ['x', True]})
        != sg.gradient_views({'a': 'a', 'b': 'x'})
    )
    assert repr(sg.gradient_views({'a': ~sg.path('g')})) == "gradient_views({'a': ~path('g')})"


# Cost ---------------------------------------------------------------------------------------------


def count_scans(jaxpr):
    """Count the scans in a jaxpr, those of its inner ones included."""
    found = 0
    for eqn in jaxpr.eqns:
        found += eqn.primitive.name == 'scan'
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, 'eqns') or hasattr(v, 'jaxpr')
        ):
            inner = getattr(value, 'jaxpr', value)
            found += count_scans(inner) if hasattr(inner, 'eqns') else 0
    return found


@pytest.mark.thinned(3)
@pytest.mark.parametrize('entries', [1, 2, 3, 4, 5, 6, 7, 8])
def test_one_forward_loop_and_a_pullback_for_each_entry(entries):
    """The compiled step has the figures of one vjp and its pullbacks, and the same bits."""
    shape = programs.Shape(entries, length=8, batch=8, width=16)
    ours, hand = (programs.step_of(way, shape, quick=True) for way in ('views', 'by hand'))
    assert measure.cost_of(ours) == measure.cost_of(hand)
    assert measure.cost_of(ours).loops == 1 + entries
    args = programs.data_of(shape)
    assert_same(ours(*args), hand(*args), 'step')
    if entries == 3:
        masked = measure.cost_of(programs.step_of('masked calls', shape, quick=True))
        assert masked.loops > 1 + entries and masked.flops > measure.cost_of(ours).flops
        assert masked.temp_bytes > measure.cost_of(ours).temp_bytes


def test_the_target_is_in_the_jaxpr_once():
    shape = programs.Shape(5, length=4, batch=2, width=3)
    args, views = (
        programs.data_of(shape),
        sg.gradient_views({programs.part(k): programs.part(k) for k in range(5)}),
    )
    net = programs.Net(shape)
    forward = lambda p, *xs: net.apply({'params': p}, *xs, method=views(programs.Net.__call__))
    assert count_scans(jax.make_jaxpr(forward)(*args).jaxpr) == 1
    assert count_scans(jax.make_jaxpr(programs.views(shape))(*args).jaxpr) == 1 + 5


def test_a_scan_around_the_views_stores_residuals_once():
    params = {name: jnp.eye(16) / 2 for name in 'abcd'}
    x = jnp.ones((8, 16))

    def target(p, x):
        for _ in range(5):
            for w in p.values():
                x = jnp.tanh(x @ w)
        return x

    def temporary(names):
        views = sg.gradient_views({name: name for name in names})(target)

        def loss(p, x):
            step = lambda c, _: (sum(views(p, c).values()) / len(names), None)
            return jax.lax.scan(step, x, None, length=32)[0].sum()

        compiled = jax.jit(jax.grad(loss)).lower(params, x).compile()
        return measure.cost_of(compiled).temp_bytes

    assert temporary('abcd') < 1.6 * temporary('a')  # 4 times as much if each stored its own


# Transposed once for all entries ------------------------------------------------------------------


class Layers(nn.Module):
    wrap: object = staticmethod(lambda cls: cls)

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = jnp.tanh(self.wrap(nn.Dense)(3, name=f'layer_{i}')(x))
        return x


@pytest.mark.parametrize('wrap', [lambda cls: cls, nn.jit])
def test_entries_share_one_transpose(monkeypatch, wrap):
    model, traced = Layers(wrap), watch_transposes(monkeypatch)
    params = model.init(jax.random.key(0), X)['params']
    entries = {f'layer_{i}': f'layer_{i}' for i in range(3)}
    views = sg.gradient_views(entries)

    def losses(run):
        return lambda params: sum((k + 1) * (out**2).sum() for k, out in enumerate(run(params)))

    def by_views(params):
        return model.apply({'params': params}, X, method=views(Layers.__call__)).values()

    def by_hand(params):
        for name in entries:
            held = {
                key: value if key == name else jax.lax.stop_gradient(value)
                for key, value in params.items()
            }
            yield Layers().apply({'params': held}, X)

    assert_same(jax.grad(losses(by_views))(params), jax.grad(losses(by_hand))(params), 'gradients')
    assert [made is not None for made in traced] == [True]


def ruled(bwd):
    f = jax.custom_vjp(lambda x: x)
    f.defvjp(lambda x: (x, None), lambda _, ct: (bwd(ct),))
    return f


def linear_call(bwd):
    return lambda x: jax.custom_derivatives.linear_call(
        lambda _, x: x, lambda _, ct: bwd(ct), (), x
    )


STORED_COTANGENT = jnp.array([5.0, -1.0, 2.0])
COTANGENT_RULES = {
    'clip': lambda ct: jnp.clip(ct, -0.5, 0.5),
    'more': lambda ct: ct + 1,
    'sign': jnp.sign,
    'some': lambda ct: jnp.where(ct > 0.5, ct, 0),
    'constant': jax.lax.stop_gradient,
    'stored': lambda ct: STORED_COTANGENT,
    'square': lambda ct: ct**2,
}
RULE_FORMS = {
    'custom_vjp': ruled,
    'map_gradient': lambda bwd: lambda x: sg.map_gradient(True, lambda _, ct: bwd(ct))({'': x})[''],
    'in a scan': lambda bwd: (
        lambda x: jax.lax.scan(lambda c, _: (ruled(bwd)(c), None), x, None, 1)[0]
    ),
    'linear_call': linear_call,
}
RULED = {
    'rule, then a sum': lambda rule, p: rule(p['a']) + p['b'],
    'rule of a product': lambda rule, p: rule(p['a'] * p['b']) + p['a'],
    'rules of two': lambda rule, p: rule(jnp.sin(p['a'])) * rule(p['b']),
}
RULE_ORDERS = {
    'grad': jax.grad,
    'jvp of grad': lambda f: lambda p: jax.jvp(jax.grad(f), (p,), (p,))[1],
    'grad of grad': lambda f: jax.grad(
        lambda p: sum((x**2).sum() for x in jax.tree.leaves(jax.grad(f)(p)))
    ),
}


@pytest.mark.thinned(5)
@pytest.mark.parametrize('target', RULED)
@pytest.mark.parametrize(
    'form, order',
    [
        (form, order)
        for form in RULE_FORMS
        for order in RULE_ORDERS
        if (form, order) != ('map_gradient', 'jvp of grad')
    ],
)  # which has no forward mode
@pytest.mark.parametrize('rule', COTANGENT_RULES)
@pytest.mark.parametrize('tied', [False, True])
def test_rules_of_cotangents_that_are_not_linear(tied, rule, form, target, order):
    run = functools.partial(RULED[target], RULE_FORMS[form](COTANGENT_RULES[rule]))
    views = sg.gradient_views({'a': 'a', 'b': 'b'})

    def loss(outs):
        return jnp.sin(outs['a']).sum() + jnp.cos(2 * outs['b']).sum()

    def by_hand(p):
        stop = jax.lax.stop_gradient
        return loss(
            {'a': run({'a': p['a'], 'b': stop(p['b'])}), 'b': run({'a': stop(p['a']), 'b': p['b']})}
        )

    params = {'a': jnp.array([0.1, 0.2, 1.3])}
    if not tied:
        params['b'] = jnp.array([0.4, -0.3, 0.2])
    both = lambda p: {'a': p['a'], 'b': p.get('b', p['a'])}
    got, want = (
        RULE_ORDERS[order](lambda p, fn=fn: fn(both(p)))(params)
        for fn in (lambda p: loss(views(run)(p)), by_hand)
    )
    assert_same(got, want, 'gradients', rtol=1e-5)


@pytest.mark.parametrize('form', ['custom_vjp', 'map_gradient', 'linear_call'])
def test_a_rule_in_a_call_is_not_asked_about_a_cotangent_that_there_is_not(form):
    rule = RULE_FORMS[form](COTANGENT_RULES['more'])

    @jax.jit
    def both(x, y):
        return rule(x), jnp.sin(y)

    def f(x, y):
        def run():
            a, b = both(x, y)
            return (mark(a, (True, False)) * mark(b, (True, True))), None

        return in_views(run, ('a', 'b'))[0]

    got = [jax.grad(lambda x, y, lane=lane: f(x, y)[lane], (0, 1))(0.3, 0.7) for lane in (0, 1)]
    slope = 0.3 * jnp.cos(0.7)
    assert_same(got, [(jnp.sin(0.7) + 1, slope), (0 * slope, slope)], 'gradients', rtol=1e-6)


def test_a_rule_of_a_value_closed_over_that_gives_another_cotangent():
    inject = ruled(lambda ct: STORED_COTANGENT)

    def loss(p, run):
        return run(lambda q: (jnp.sin(q['a']) * jnp.sin(q['b'])).sum() + inject(p['b']).sum(), p)

    views = sg.gradient_views({'a': 'a', 'b': 'b'})
    params = {'a': jnp.ones(3), 'b': 2 * jnp.ones(3)}
    got = jax.grad(loss)(params, lambda f, p: views(f)(p)['a'])
    want = jax.grad(loss)(params, lambda f, p: f({'a': p['a'], 'b': jax.lax.stop_gradient(p['b'])}))
    assert_same(got, want, 'gradients', rtol=1e-6)


def test_entries_share_no_transpose_where_marks_stand_in_a_call(monkeypatch):
    traced = watch_transposes(monkeypatch)

    def f(x):
        @jax.jit
        def inside(x):
            return jnp.sin(mark(x, (True, False))) * x

        return in_views(lambda: (2 * inside(x), None), ('a', 'b'))[0]

    grads = [jax.grad(lambda x, lane=lane: f(x)[lane])(0.3) for lane in (0, 1)]
    assert_same(
        grads, [2 * (jnp.cos(0.3) * 0.3 + jnp.sin(0.3)), 2 * jnp.sin(0.3)], 'gradients', rtol=1e-6
    )
    assert traced and not any(traced)


def mapped(fn):
    return lambda x: sg.map_gradient(True, fn)({'x': x})['x']


@pytest.mark.parametrize(
    'before',
    [
        jnp.sin,
        jax.jit(jnp.sin),
        lambda x: jax.lax.scan(lambda c, _: (c, jnp.sin(x) + c), x, None, 2)[1].sum(),
        mapped(lambda info, g: g + (g == 0)),
        mapped(lambda info, g: jax.jit(lambda g: g + (g == 0))(g)),
    ],
    ids=['op', 'call', 'loop', 'map', 'map that calls'],
)
def test_what_comes_before_a_mark_gets_no_cotangent_where_it_does_not_count(before):
    def f(x, y):
        def run():
            marked = mark(before(x), (True, False))
            return (marked * y + marked, before(y)), None

        return in_views(run, ('a', 'b'))[0]

    grads = [
        jax.grad(lambda x, y, lane=lane: sum(f(x, y)[lane]), (0, 1))(0.3, 0.7) for lane in (0, 1)
    ]
    want, slope = jax.grad(before)(0.3) * 1.7, before(0.3) + jax.grad(before)(0.7)
    assert_same(grads, [(want, slope), (jnp.zeros(()), slope)], 'gradients', rtol=1e-6)


@pytest.mark.parametrize('inside', [False, True])
@pytest.mark.parametrize('wrap', [lambda fn: fn, jax.checkpoint, jax.jit])
def test_a_rule_around_views_is_not_asked_for_what_no_entry_trains(wrap, inside):
    rule = ruled(COTANGENT_RULES['more'])

    class Net(nn.Module):
        use: str = 'views'

        def setup(self):
            self.a, self.b = (self.param(name, nn.initializers.ones, ()) for name in 'ab')

        def run(self, x):
            with self.block(inside):
                return wrap(lambda a, b: jnp.sin(a) * jnp.cos(b) * x)(self.a, self.b)

        def block(self, here):
            return sg.map_values(here, lambda info, value: rule(value), allow_unmatched=True)

        def __call__(self, x):
            with self.block(not inside):
                if self.use == 'views':
                    return sg.gradient_views({'a': 'a', 'b': 'b'})(self.run)(x)
                outs = {}
                for name in 'ab':
                    with sg.stop_gradient(~sg.path(name)):
                        outs[name] = self.run(x)
                return outs

    params = {'params': {'a': jnp.float32(0.3), 'b': jnp.float32(0.7)}}
    for names in ('a', 'b', 'ab'):
        got, want = (
            jax.grad(lambda p, use=use, names=names: sum(Net(use).apply(p, 2.0)[n] for n in names))(
                params
            )
            for use in ('views', 'by hand')
        )
        assert_same(got, want, f'gradients of {names}', rtol=1e-6)


CONSTANTS = {
    'bool': lambda: jnp.array(True),
    'Python bool': lambda: True,
    'int': lambda: jnp.array(7),
    'Python int': lambda: 3,
    'float': lambda: jnp.array(0.0),
    'Python float': lambda: 0.0,
    'bfloat16': lambda: jnp.bfloat16(2),
    'complex': lambda: 1j,
    'numpy': lambda: np.arange(3),
    'nothing': lambda: jnp.zeros((0, 2)),
}


@pytest.mark.parametrize('constant', CONSTANTS.values(), ids=CONSTANTS)
def test_constants_in_what_a_target_returns_are_arrays_as_under_jit(constant):
    """JAX keeps some as numbers in a jaxpr; each derivative has to get past them."""

    def target(p):
        return p['a'] ** 2, constant()

    def loss(p):
        out = sg.gradient_views({'a': 'a'})(target)(p)['a']
        return out[0] * 3

    params = {'a': jnp.float32(2)}
    got, want = sg.gradient_views({'a': 'a'})(target)(params)['a'][1], jax.jit(target)(params)[1]
    assert isinstance(got, jax.Array) and jax.typeof(got) == jax.typeof(want)
    np.testing.assert_array_equal(got, want)
    for run in (jax.grad(loss), jax.jit(jax.grad(loss)), jax.grad(jax.checkpoint(loss))):
        assert run(params)['a'] == 12
    assert jax.jvp(loss, (params,), (params,))[1] == 24
    assert jax.hessian(loss)(params)['a']['a'] == 6


@pytest.mark.parametrize('constant', CONSTANTS.values(), ids=CONSTANTS)
@pytest.mark.parametrize('mutable', [['state'], ['state', 'intermediates']])
def test_constants_that_a_target_writes_are_arrays(mutable, constant):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            seen = self.variable('state', 'seen', constant)
            seen.value = constant()
            self.sow('intermediates', 'said', constant())
            return self.param('a', nn.initializers.ones, ()) * x

    model, views = Net(), sg.gradient_views({'a': 'a'})

    def loss(params, state):
        variables = {'params': params, 'state': state}
        out, written = model.apply(variables, 2.0, method=views(Net.__call__), mutable=mutable)
        return out['a'] ** 2, written

    variables = model.init(jax.random.key(0), 2.0)
    params, state = variables['params'], variables['state']
    for run in (lambda f: f, jax.jit):
        grads, written = run(jax.grad(loss, has_aux=True))(params, state)
        assert grads['a'] == 8
        leaves = jax.tree.leaves(written)
        assert len(leaves) == len(mutable)
        assert all(isinstance(leaf, jax.Array) for leaf in leaves)
