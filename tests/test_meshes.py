"""Factors, closures and views that vary over a mesh, in `jax.shard_map` with its checks of types.

By hand is the same program as a `jax.vmap` over the axis, without the library: a device holds one
example. The cotangents of parameters, which all devices share, are summed.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import flax_sg as sg
from flax_sg import nn
from oracle import assert_same

stop = jax.lax.stop_gradient


@functools.cache
def mesh(*sizes, kind=AxisType.Auto):
    names = 'ij'[: len(sizes)]
    count = functools.reduce(lambda a, b: a * b, sizes)
    return jax.make_mesh(
        sizes, tuple(names), axis_types=(kind,) * len(sizes), devices=jax.devices()[:count]
    )


PARAMS = {'v': jnp.float32(1.3), 'w': jnp.array([0.3, 0.7, -0.2])}
F, X, WEIGHTS = jnp.array([0.5, 3.0]), jnp.array([0.5, -1.2]), jnp.array([1.0, 3.0])


def index():
    return 1.0 + jax.lax.axis_index('i')


def scaled(w, factor):
    return stop(w) + factor * (w - stop(w))


def mapped(fn):
    """Return a read of w by hand. It varies over the mesh, so that fn gets what one device has."""

    @jax.custom_vjp
    def same(w, f):
        return w

    same.defvjp(lambda w, f: (same(w, f), f), lambda f, ct: (fn(ct, f), 0 * f))
    return lambda w, f: same(w + 0 * f, f)


# The library's transform, and a read of w by hand, both of what varies over the mesh.
WAYS = {
    'scale': (lambda f: sg.scale_gradient('w', f), scaled),
    'negative': (lambda f: sg.scale_gradient('w', -2 * f), lambda w, f: scaled(w, -2 * f)),
    'number': (lambda f: sg.scale_gradient('w', -2), lambda w, f: scaled(w, -2)),
    'index': (lambda f: sg.scale_gradient('w', index()), lambda w, f: scaled(w, index())),
    'summed': (
        lambda f: sg.scale_gradient('w', jax.lax.psum(f, 'i')),
        lambda w, f: scaled(w, jax.lax.psum(f, 'i')),
    ),
    'twice': (
        lambda f: lambda q: sg.scale_gradient('w', 3.0)(sg.scale_gradient('w', f)(q)),
        lambda w, f: scaled(w, 3 * f),
    ),
    'map': (lambda f: sg.map_gradient('w', lambda info, ct: ct * f), mapped(lambda ct, f: ct * f)),
    'bent': (
        lambda f: sg.map_gradient('w', lambda info, ct: jnp.sin(ct * f) * ct),
        mapped(lambda ct, f: jnp.sin(ct * f) * ct),
    ),
    'map index': (
        lambda f: sg.map_gradient('w', lambda info, ct: ct * index()),
        mapped(lambda ct, f: ct * index()),
    ),
    'instead': (
        lambda f: sg.map_gradient('w', lambda info, ct: jnp.full_like(ct, 2) * f),
        mapped(lambda ct, f: 2 * f * jnp.ones_like(ct)),
    ),
}
REVERSE = ('map', 'bent', 'map index', 'instead')  # there is no forward mode


def plain(read, p, x):
    return jnp.tanh(read(p)['w'] * x).sum() * p['v']


def views(read, p, x):
    out = read.views({'w': 'w', 'v': 'v'})(lambda p: plain(read, p, x) * jnp.sin(p['w'][0]))(p)
    return out['w'] ** 2 + 3 * out['v']


FORMS = {
    'plain': plain,
    'jit': lambda read, p, x: jax.jit(functools.partial(plain, read))(p, x),
    'checkpoint': lambda read, p, x: jax.checkpoint(functools.partial(plain, read))(p, x),
    'scan': lambda read, p, x: jax.lax.scan(
        lambda c, _: (jnp.sin(c + plain(read, p, x)), None), x, None, length=2
    )[0],
    'vmap': lambda read, p, x: jax.vmap(lambda s: plain(read, p, x * s))(
        jnp.array([1.0, 2.0])
    ).sum(),
    'live': lambda read, p, x: plain(read, p, x) * (p['w'] * x).sum(),
    'psum': lambda read, p, x: jax.lax.psum(plain(read, p, x), 'i') * x,
    'views': views,
}


class Read:
    """A read of the parameters, and the views that go with it."""

    def __init__(self, read, views):
        self.read, self.views = read, views

    def __call__(self, p):
        return self.read(p)


def views_by_hand(entries):
    return lambda fn: (
        lambda p: {
            name: fn({k: v if k in letters else stop(v) for k, v in p.items()})
            for name, letters in entries.items()
        }
    )


def norm(tree):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(tree))


def derivatives(run, forward, second):
    """Return gradients of each order with respect to everything, and a derivative forwards."""

    def loss(*args):
        out = run(*args)
        return (out * WEIGHTS.reshape(-1, *[1] * (out.ndim - 1))).sum()

    def of(*args):
        every = tuple(range(len(args)))
        found = [jax.grad(loss, every)(*args)]
        if second:
            grads = lambda *args: norm(jax.grad(loss, (0, len(args) - 1))(*args))
            found.append(jax.grad(grads, every)(*args))
        return [*found, jax.jvp(loss, args, args)[1]] if forward else found

    return of


def sharded(body, **kwargs):
    kwargs = {'mesh': mesh(2), 'in_specs': (P(), P('i'), P('i')), 'out_specs': P('i')} | kwargs
    return jax.shard_map(lambda p, f, x: body(p, f[0], x[0])[None], **kwargs)


def by_vmap(body):
    return jax.vmap(body, (None, 0, 0), axis_name='i')


def compare(ours, hand, *args, forward=True, second=True, rtol=1e-4):
    got, want = jax.jit(
        lambda *args: [derivatives(run, forward, second)(*args) for run in (ours, hand)]
    )(*args)
    assert norm(want) > 0
    assert_same(got, want, 'derivatives', rtol=rtol)


def programs(way, form):
    library, hand = WAYS[way]
    ours = lambda p, f, x: FORMS[form](Read(library(f), sg.gradient_views), p, x)
    by_hand = lambda p, f, x: FORMS[form](
        Read(lambda q: {**q, 'w': hand(q['w'], f)}, views_by_hand), p, x
    )
    return ours, by_hand


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    'way, form',
    [
        *((way, 'plain') for way in WAYS),
        *(('scale', form) for form in FORMS if form != 'plain'),
        *(('bent', form) for form in ('scan', 'vmap', 'views')),
    ],
)
def test_what_varies_over_a_mesh(way, form):
    ours, hand = programs(way, form)
    compare(
        sharded(ours),
        by_vmap(hand),
        PARAMS,
        F,
        X,
        forward=way not in REVERSE,
        second=form in ('plain', 'views', 'live'),
    )


@pytest.mark.parametrize('way', ['scale', 'map'])
def test_eagerly(way):
    ours, hand = programs(way, 'plain')
    got, want = (
        jax.grad(lambda p, run=run: (run(p, F, X) * WEIGHTS).sum())(PARAMS)
        for run in (sharded(ours), by_vmap(hand))
    )
    assert_same(got, want, 'grad', rtol=1e-5)


def test_small_numbers():
    """Devices hold factors 1 and 10, which their own cotangents 1 and 10 are multiplied by."""
    f = jnp.array([1.0, 10.0])
    for make in (
        lambda f: sg.scale_gradient('w', f),
        lambda f: sg.map_gradient('w', lambda info, ct: ct * f),
    ):
        run = sharded(lambda p, f, x, make=make: make(f)(p)['w'] * x)
        assert jax.grad(lambda w, run=run: run({'w': w}, f, f).sum())(1.0) == 1 + 100


def test_a_function_that_does_not_vary_gets_the_sum_over_devices():
    """The cotangents 0.5 and 3 of the devices are 3.5 together, which is clipped to 1."""
    clip = sg.map_gradient('w', lambda info, ct: jnp.clip(ct, -1, 1))
    run = sharded(lambda p, f, x: clip(p)['w'] * f)
    assert jax.grad(lambda w: run({'w': w}, F, X).sum())(1.0) == 1
    # So does one whose closure varies, but not what it returns: the smaller of 3.5 and 3.5 - 2.5.
    least = lambda f: sg.map_gradient(
        'w', lambda info, ct: jnp.minimum(ct, jax.lax.psum(f, 'i') - 2.5)
    )
    run = sharded(lambda p, f, x: least(f)(p)['w'] * f)
    assert jax.grad(lambda w: run({'w': w}, F, X).sum())(1.0) == 1


def test_a_cotangent_that_stops_to_vary():
    """The variable varies, and its function returns a constant, or the sum of all devices."""
    for fn, want in (
        (lambda ct: jnp.full_like(ct, 2), [2, 2]),
        (lambda ct: jnp.float32(2), [2, 2]),
        (lambda ct: jax.lax.psum(ct, 'i'), [1.7, 1.7]),
    ):
        change = sg.map_gradient('w', lambda info, ct, fn=fn: fn(ct))
        run = sharded(lambda p, f, x, change=change: change({'w': f})['w'] * (x + 1.2))
        grads = jax.grad(lambda f, run=run: run({}, f, X).sum())(F)
        assert_same(grads, jnp.array(want, jnp.float32), 'grad', rtol=1e-6)


@pytest.mark.parametrize('kind', ['scale', 'map'])
@pytest.mark.parametrize('of', ['i', 'j', 'ij'])
def test_two_axes(of, kind):
    """A factor that varies over one axis of two, or over both; what is read varies over none."""
    f, x = jnp.array([[0.5, 2.0], [3.0, -1.0]]), jnp.array([[0.3, -1.2], [0.7, 1.1]])
    f = {'i': f[:, :1], 'j': f[:1], 'ij': f}[of]

    def body(read, p, f, x):
        return jnp.tanh(read(p['w'], f) * x).sum() * p['v']

    def ours(w, f):
        if kind == 'scale':
            return sg.scale_gradient('w', f)({'w': w})['w']
        return sg.map_gradient('w', lambda info, ct: ct * f)({'w': w})['w']

    specs = {'i': P('i'), 'j': P(None, 'j'), 'ij': P('i', 'j')}[of]
    run = jax.shard_map(
        lambda p, f, x: body(ours, p, f[0, 0], x[0, 0])[None, None],
        mesh=mesh(2, 2),
        in_specs=(P(), specs, P('i', 'j')),
        out_specs=P('i', 'j'),
    )
    hand = jax.vmap(
        jax.vmap(functools.partial(body, mapped(lambda ct, f: ct * f)), (None, 0, 0)), (None, 0, 0)
    )
    compare(
        run, lambda p, f, x: hand(p, jnp.broadcast_to(f, (2, 2)), x), PARAMS, f, x, forward=False
    )


@pytest.mark.parametrize('kind', ['scale', 'map'])
@pytest.mark.parametrize('how', ['partial', 'unchecked', 'explicit'])
def test_other_meshes(how, kind):
    """Manual over one axis of two; without checks; axes of explicit kind.

    A map in another one has no gradient in JAX 0.10 and 0.12, whatever is in it.
    """

    def body(p, f, x):
        change = (
            sg.scale_gradient('w', f)
            if kind == 'scale'
            else sg.map_gradient('w', lambda info, ct: ct * f)
        )
        return plain(change, p, x)

    if how == 'partial':
        ours = sharded(body, mesh=mesh(2, 2), axis_names={'i'})
    elif how == 'unchecked':
        ours = sharded(body, check_vma=False)
    else:
        ours = sharded(body, mesh=mesh(2, kind=AxisType.Explicit))

    def hand(p, f, x):
        read = lambda q: {**q, 'w': mapped(lambda ct, f: ct * f)(q['w'], f)}
        return plain(read, p, x)

    args = (PARAMS, F, X)
    if how == 'explicit':
        place = lambda x: jax.device_put(
            x,
            jax.NamedSharding(mesh(2, kind=AxisType.Explicit), P('i') if x is F or x is X else P()),
        )
        args = jax.tree.map(place, args)
        got = jax.jit(jax.grad(lambda p, f, x: ours(p, f, x).sum()))(*args)
        want = jax.grad(lambda p: by_vmap(hand)(p, F, X).sum())(PARAMS)
        return assert_same(got, want, 'grad', rtol=1e-4)
    compare(ours, by_vmap(hand), *args, forward=False)


# Views --------------------------------------------------------------------------------------------


def squared(p, x):
    return jnp.tanh(p['w'] * x).sum() ** 2 * p['v']


TARGETS = {
    'closes over': lambda p, f, x: squared(p, x * f),
    'psum': lambda p, f, x: jax.lax.psum(squared(p, x), 'i') * f,
    'pmean of parameters': lambda p, f, x: jax.lax.pmean(squared(p, 1.0), 'i') * f * x,
    'index': lambda p, f, x: squared(p, x * index()) * f,
    'gather': lambda p, f, x: (jax.lax.all_gather(squared(p, x), 'i') * f).sum(),
    'ppermute': lambda p, f, x: jax.lax.ppermute(squared(p, x), 'i', [(0, 1), (1, 0)]) * f,
    'scan': lambda p, f, x: jax.lax.scan(
        lambda c, _: (jnp.sin(c * f + squared(p, x)), None), x, None, length=2
    )[0],
    'remat': jax.checkpoint(lambda p, f, x: squared(p, x) * f),
    'alone': lambda p, f, x: squared(p, 0.7),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    'name, around',
    [*((name, 'plain') for name in TARGETS), ('closes over', 'scan'), ('psum', 'checkpoint')],
)
def test_views_in_a_shard_map(name, around):
    """Parameters that all devices share, and inputs that vary."""

    def body(views):
        def once(p, f, x):
            out = views({'w': 'w', 'v': 'v'})(lambda p: TARGETS[name](p, f, x))(p)
            return out['w'] ** 2 * jnp.sin(x) + 3 * out['v'] * x

        if around == 'scan':
            return lambda p, f, x: jax.lax.scan(
                lambda c, _: (jnp.sin(c + once(p, f, x)), None), x, None, length=2
            )[0]
        return jax.checkpoint(once) if around == 'checkpoint' else once

    compare(
        sharded(body(sg.gradient_views)),
        by_vmap(body(views_by_hand)),
        PARAMS,
        F,
        X,
        second=name in ('closes over', 'psum', 'gather') and around != 'scan',
    )


def test_derivatives_inside_a_shard_map():
    """Forwards and backwards of what is in the map: the axis is around the derivative."""

    def body(views):
        def run(p, f, x):
            def loss(q):
                out = views({'w': 'w', 'v': 'v'})(lambda q: TARGETS['psum'](q, 1.0, x))(q)
                return out['w'] ** 2 + 3 * out['v']

            tangent = jax.jvp(loss, (p,), (p,))[1]
            return tangent * x

        return run

    compare(sharded(body(sg.gradient_views)), by_vmap(body(views_by_hand)), PARAMS, F, X)


class Net(nn.Module):
    """A factor that varies, on a module in the map; and views of its method."""

    @nn.compact
    def __call__(self, f, x):
        dense = nn.Dense(3, name='dense')
        with nn.scale_gradient('dense/kernel', f):
            h = dense(x[None])
        out = sg.gradient_views({'k': 'kernel', 'b': 'bias'})(dense)(jnp.tanh(h))
        return (out['k'] ** 2).sum() + 3 * jnp.sin(out['b']).sum()


def test_modules_in_a_shard_map():
    x = jnp.array([[0.5, -1.2, 0.3], [0.9, 0.1, -0.4]])
    params = {'bias': jnp.array([0.1, -0.2, 0.3]), 'kernel': jnp.eye(3) * 0.5 + 0.1}

    def hand(p, f, x):
        h = jnp.tanh(x[None] @ scaled(p['kernel'], f) + p['bias'])
        kernel, bias = (
            h @ a + b for a, b in ((p['kernel'], stop(p['bias'])), (stop(p['kernel']), p['bias']))
        )
        return (kernel**2).sum() + 3 * jnp.sin(bias).sum()

    run = lambda p, f, x: Net().apply({'params': {'dense': p}}, f, x)
    compare(sharded(run), by_vmap(hand), params, F, x)


def test_pmap():
    """Which names its axis too."""

    def body(views):
        def run(p, x):
            out = views({'w': 'w', 'v': 'v'})(lambda p: TARGETS['psum'](p, 1.0, x))(p)
            return jax.lax.psum(out['w'] ** 2 + 3 * out['v'], 'i')

        return lambda p, x: jax.grad(run)(p, x)

    got = jax.pmap(body(sg.gradient_views), 'i', in_axes=(None, 0), devices=jax.devices()[:2])(
        PARAMS, X
    )
    want = jax.vmap(body(views_by_hand), (None, 0), axis_name='i')(PARAMS, X)
    assert_same(jax.tree.map(jnp.asarray, got), want, 'grad', rtol=1e-4)
