"""Truth for gradient_flow: JAX's own functions, devices, callbacks and references."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from flax_sg import nn
from flow_truth import (
    XS,
    Programs,
    X,
    check_gradients,
    check_record,
    flat,
    live,
    masked,
    unknown,
    unused,
)

PROGRAMS = Programs()
program = PROGRAMS.program


# JAX's own stops and comparisons are not the user's.


@program('a b', a=live('a'), b=live('b'))
def softmax_and_logsumexp(p, x):
    h = jax.nn.softmax(p['a'])  # <- a
    return (h * x).sum() + jax.nn.logsumexp(p['b'])  # <- b


@program('a b', a=live('a'), b=live('b'))
def softmax_in_jit_in_remat(p, x):
    @jax.checkpoint
    def run(a, b):
        h = jax.nn.log_softmax(a) * x  # <- a
        return h + jnp.logaddexp(b, 0)  # <- b

    return jax.jit(run)(p['a'], p['b']).sum()


@program(
    'a b c d e f', a=live('a'), b=live('b'), c=live('c'), d=live('d'), e=live('e'), f=live('f')
)
def bent_functions(p, x):
    h = jax.nn.relu(p['a'] * x)  # <- a
    h = h + jax.nn.leaky_relu(p['b'])  # <- b
    h = h + jnp.clip(p['c'], -0.5, 0.5)  # <- c
    h = h + jnp.maximum(p['d'], x)  # <- d
    h = h + jnp.abs(p['e'])  # <- e
    return (h * jax.nn.elu(p['f'])).max()  # <- f


@program('lo hi', lo=live('clip'), hi=live('clip'))
def learned_limits(p, x):
    return (jnp.clip(3 * x, -jnp.abs(p['lo']), jnp.abs(p['hi'])) * x).sum()  # <- clip


@program({'a': X, 'b': X, 'q': jnp.float32(0.3)}, a=live('a'), b=live('b'), q=live('q'))
def quantile_and_median(p, x):
    h = jnp.median(p['a'] * x)  # <- a
    return h + jnp.quantile(p['b'], 0.3) + jnp.quantile(x, jax.nn.sigmoid(p['q']))  # <- b q


@program('a b c', a=live('a'), b=live('b'), c=live('c'))
def sums_and_transforms(p, x):
    h = jnp.cumsum(p['a'] * x)  # <- a
    h = h * jnp.fft.fft(p['b']).real  # <- b
    return jnp.linalg.norm(h) + jnp.var(p['c']) + jnp.nanmean(p['c'])  # <- c


@program('fp xp', fp=live('f'), xp=live('f'))
def interpolation(p, x):
    return jnp.interp(x, jnp.cumsum(jnp.exp(p['xp'])) - 2, p['fp']).sum()  # <- f


@program({'m': XS, 'b': X}, m=live('m'), b=live('b'))
def solve(p, x):
    m = p['m'] + 5 * jnp.eye(3)  # <- m
    return (jnp.linalg.solve(m, p['b']) * x).sum()  # <- b


@program({'a': XS, 'b': XS, 'c': XS}, a=live('a'), b=live('b'), c=live('c'))
def factorisations(p, x):
    h = jnp.linalg.cholesky(p['a'] @ p['a'].T + jnp.eye(3)) @ x  # <- a
    values, vectors = jnp.linalg.eigh(p['b'] + p['b'].T)  # <- b
    h = h + values + vectors @ x
    return h.sum() + jnp.linalg.slogdet(p['c'])[1]  # <- c


@program('a b w', a=live('a'), b=live('b'), w=masked('w'))
def scatter(p, x):
    h = p['a'].at[1:].set(p['b'][1:])  # <- a b
    h = h.at[0].add(x[2])
    return (h.at[0].multiply(jax.lax.stop_gradient(p['w'][0])) * x).sum()  # <- w


@program('a i', a=live('a'), i=flat('argmin', 'i'))
def scatter_at_a_learned_index(p, x):
    i = jnp.argmin(p['i'])  # <- i
    return (x.at[i].add(p['a'][0]) ** 2).sum()  # <- a


@program('a', jax.random.key(2), X, a=live('a'))
def dropout(p, key, x):
    keep = jax.random.bernoulli(key, 0.8, (3,))
    return jnp.where(keep, p['a'] * x / 0.8, 0).sum()  # <- a


@program('mean scale', jax.random.key(3), mean=live('mean'), scale=live('scale'))
def reparameterised_sample(p, key):
    noise = jax.random.normal(key, (3,)) * jnp.exp(p['scale'])  # <- scale
    return (jnp.sin(p['mean'] + noise)).sum()  # <- mean


@program({'c': X + 1j * X[::-1], 'r': X, 'z': X + 1j}, c=live('c'), r=live('r'), z=masked('z'))
def complex_parameters(p, x):
    h = p['c'] * x * jnp.exp(1j * p['r'])  # <- c r
    h = h + jax.lax.stop_gradient(p['z'])  # <- z
    return (h * h.conj()).real.sum()


@program('a b', a=live('a'), b=live('b'))
def optax_losses(p, x):
    loss = optax.softmax_cross_entropy_with_integer_labels(p['a'] * x, 1)  # <- a
    return loss + optax.huber_loss(p['b'], x).sum()  # <- b


@program({'w': XS}, w=live('w'))
def convolution_and_pooling(p, x):
    h = jnp.convolve(p['w'].ravel(), x)  # <- w
    return nn.max_pool(h[None, :, None], (2,)).sum()


# Devices, callbacks, references.


MESH = jax.sharding.Mesh(np.array(jax.devices()[:1]), ('d',))


@program('a b w', a=live('a'), b=masked('b'), w=live('w'))
def shard_map(p, x):
    def run(a, b, x):
        h = jax.lax.psum(a * x, 'd')  # <- a
        return h + jax.lax.pmean(jax.lax.stop_gradient(b) * x, 'd')  # <- b

    run = jax.shard_map(run, mesh=MESH, in_specs=P('d'), out_specs=P())
    return (run(p['a'], p['b'], x) * p['w']).sum()  # <- w


@program('a b', a=live('a'), b=flat('floor', 'b'))
def shard_map_with_an_axis_index(p, x):
    def run(a, b, x):
        i = jax.lax.axis_index('d')
        h = a * x[i]  # <- a
        return h + jnp.floor(b) * i + jnp.floor(b)  # <- b

    run = jax.jit(jax.shard_map(run, mesh=MESH, in_specs=P('d'), out_specs=P('d')))
    return run(p['a'], p['b'], x).sum()


@program('a w', a=unknown('pure_callback', 'a'), w=live(), reverse=False)
def callback(p, x):
    h = jax.pure_callback(np.sin, x, p['a'])  # <- a
    return (h * p['w']).sum()


@program('a w', a=masked('stop'), w=live('w'))
def callback_of_a_stopped_value(p, x):
    held = jax.lax.stop_gradient(p['a'])  # <- stop
    h = jax.pure_callback(np.sin, x, held, vmap_method='sequential')
    return (h * p['w']).sum()  # <- w


@program('a w', a=unused, w=live('w'))
def printed(p, x):
    jax.debug.print('a {a}, w {w}', a=p['a'], w=p['w'])
    return (p['w'] * x).sum()  # <- w


@program('a w', a=live('a'), w=masked('w'))
def reference(p, x):
    ref = jax.new_ref(jnp.zeros(3))
    ref[...] = p['a'] * x  # <- a
    ref[0] += jax.lax.stop_gradient(p['w'])[0]  # <- w
    return ref[...].sum()


@program('a w', XS, a=live('a'), w=masked('w'))
def reference_in_a_scan(p, xs):
    ref = jax.new_ref(jnp.ones(3))

    def body(c, x):
        ref[...] = ref[...] * p['a'] + x  # <- a
        return c + jax.lax.stop_gradient(p['w']).sum(), None  # <- w

    c, _ = jax.lax.scan(body, 0.0, xs)
    return c + ref[...].sum()


@program('a b', a=live('ref'), b=live('b'))
def line_of_a_reference(p, x):
    ref = jax.new_ref(p['a'])  # <- ref
    ref[...] = ref[...] + p['b'] * x  # <- b
    return ref[...].sum()


# The tests.


@pytest.mark.parametrize('name', PROGRAMS)
def test_record(name):
    check_record(PROGRAMS[name])


@pytest.mark.thinned(5)
@pytest.mark.parametrize('name', PROGRAMS)
def test_gradients(name):
    check_gradients(PROGRAMS[name])
