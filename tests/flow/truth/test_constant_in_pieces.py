"""Truth for gradient_flow: what is constant in pieces, and estimators straight through it."""

import jax
import jax.numpy as jnp
import pytest

from flow_truth import XS, Programs, X, check_gradients, check_record, flat, live, partly

PROGRAMS = Programs()
program = PROGRAMS.program


# What is constant in pieces.


@program('a w', a=flat('argmax', 'a'), w=live('w'))
def argmax(p, x):
    best = jnp.argmax(p['a'] * x)  # <- a
    return p['w'][best] * x[best]  # <- w


@program('a w', a=flat('argmax', 'a'), w=live('w'))
def one_hot_of_argmax(p, x):
    h = jax.nn.one_hot(jnp.argmax(p['a']), 3)  # <- a
    return (h * p['w'] * x).sum()  # <- w


@program('a w', a=flat('argsort (sort)', 'a'), w=live('w'))
def argsort(p, x):
    order = jnp.argsort(p['a'])  # <- a
    return (x[order] * p['w']).sum()  # <- w


@program('a', a=live('a'))
def sort(p, x):
    h = jnp.sort(p['a'])  # <- a
    return (h * x).sum()


@program('k v', k=flat('sort', 'sort'), v=live('sort'))
def sort_by_a_key(p, x):
    _, v = jax.lax.sort((p['k'], p['v']), num_keys=1)  # <- sort
    return (v * x).sum()


@program('k', k=partly('sort', 'sort', 'sort'))
def sort_of_key_and_value(p, x):
    k, v = jax.lax.sort((p['k'], x), num_keys=1)  # <- sort
    return (k * v).sum()


@program('a', a=live('a'))
def top_k_values(p, x):
    values, _ = jax.lax.top_k(p['a'], 2)  # <- a
    return (values * x[:2]).sum()


@program('a', a=flat('top_k', 'a'))
def top_k_indices(p, x):
    _, chosen = jax.lax.top_k(p['a'], 2)  # <- a
    return x[chosen].sum()


@program('gate experts', gate=partly('top_k', 'gate', 'gate'), experts=live('experts'))
def mixture_of_experts(p, x):
    weights, chosen = jax.lax.top_k(p['gate'] * x, 2)  # <- gate
    return (weights * p['experts'][chosen]).sum()  # <- experts


@program(
    'a b c d', a=flat('round', 'a'), b=flat('floor', 'b'), c=flat('sign', 'c'), d=flat('ceil', 'd')
)
def rounding(p, x):
    h = jnp.round(p['a'] * 3)  # <- a
    h = h * jnp.floor(p['b'])  # <- b
    h = h + jnp.sign(p['c'])  # <- c
    return (h * x - jnp.ceil(p['d'])).sum()  # <- d


@program(
    'a b w', a=flat('convert_element_type', 'a'), b=flat('convert_element_type', 'b'), w=live('w')
)
def cast_to_integers_and_back(p, x):
    h = (p['a'] * 5).astype(jnp.int32).astype(jnp.float32)  # <- a
    h = h + p['b'].astype(bool)  # <- b
    return (h * p['w'] * x).sum()  # <- w


@program('a', a=live('a'))
def cast_to_another_float(p, x):
    h = p['a'].astype(jnp.bfloat16)  # <- a
    return (h.astype(jnp.float32) * x).sum()


@program('a b', a=flat('floor_divide (*', 'a'), b=live('b'))
def floor_division(p, x):
    h = p['a'] // 0.5  # <- a
    return (h * x + p['b'] % 0.5).sum()  # <- b


@program('edges v', edges=flat('searchsorted (*', 'bin'), v=live('v'))
def searchsorted(p, x):
    bins = jnp.searchsorted(jnp.sort(p['edges']), x)  # <- bin
    return (p['v'][bins % 3] * x).sum()  # <- v


@program('a w', a=partly('argmax', 'best', 'live'), w=live('w'))
def integer_side_path(p, x):
    best = jnp.argmax(p['a'])  # <- best
    h = p['a'] * x  # <- live
    return (h * p['w'])[best]  # <- w


@program('a', a=partly('gt', 'mask', 'live'))
def boolean_side_path(p, x):
    h = jnp.exp(p['a'] * x)  # <- live
    bad = jnp.any(h > 100)  # <- mask
    return jnp.where(bad, 0.0, h.sum())


@program({'i': jnp.float32(1.4), 'w': X}, i=flat('convert_element_type', 'i'), w=live('w'))
def dynamic_slice_at_a_learned_index(p, x):
    i = p['i'].astype(jnp.int32)  # <- i
    return (jax.lax.dynamic_slice(p['w'], (i,), (2,)) * x[:2]).sum()  # <- w


@program('i w', i=flat('round', 'i'), w=live('w'))
def gather_at_learned_indices(p, x):
    i = jnp.abs(jnp.round(p['i'])).astype(int)  # <- i
    return (jnp.take(p['w'], i, mode='clip') * x).sum()  # <- w


@program(
    {'rate': jnp.float32(0.5), 'w': X},
    jax.random.key(0),
    X,
    rate=flat('bernoulli (lt)', 'rate'),
    w=live('w'),
)
def learned_dropout_rate(p, key, x):
    keep = jax.random.bernoulli(key, jax.nn.sigmoid(p['rate']), (3,))  # <- rate
    return jnp.where(keep, p['w'] * x, 0).sum()  # <- w


@program('a', jax.random.key(1), X, a=flat('categorical (argmax)', 'a'))
def sampled_action(p, key, x):
    action = jax.random.categorical(key, p['a'])  # <- a
    return x[action]


@program('a b', a=flat('bitcast_convert_type', 'a'), b=flat('integer_pow', 'b'))
def other_constants(p, x):
    h = jax.lax.bitcast_convert_type(p['a'], jnp.int32)  # <- a
    h = jax.lax.bitcast_convert_type(h, jnp.float32)
    return (h * x + p['b'] ** 0).sum()  # <- b


@program('shape deck', jax.random.key(4), X, shape=live('shape'), deck=live('deck'))
def samples_with_gradients(p, key, x):
    h = jax.random.gamma(key, jnp.exp(p['shape']))  # <- shape
    return (h * x * jax.random.permutation(key, p['deck'])).sum()  # <- deck


@program('k v', k=partly('sort', 'sort', 'sort'), v=live('sort'))
def sorted_by_keys(p, x):
    k, v = jax.lax.sort((p['k'], p['v']), num_keys=1)  # <- sort
    return (k * v * x).sum()


@program('a b', jnp.arange(3.0), a=flat('searchsorted*', 'a'), b=live('b'))
def binned(p, edges):
    bins = jnp.searchsorted(edges, p['a'])  # <- a
    return (bins * p['b']).sum()  # <- b


# Straight-through estimators and other mixtures.


@program('a', a=partly('stop_gradient', 'ste', 'ste'))
def straight_through(p, x):
    h = p['a'] + jax.lax.stop_gradient(jnp.round(p['a']) - p['a'])  # <- ste
    return (h * x).sum()


@program('a', a=partly(None, None, 'soft'))
def straight_through_argmax(p, x):
    soft = jax.nn.softmax(p['a'])  # <- soft
    hard = jax.nn.one_hot(jnp.argmax(soft), 3)
    return ((hard + soft - jax.lax.stop_gradient(soft)) * x).sum()


@program(
    {'enc': X, 'book': XS, 'dec': X},
    enc=partly(None, None, 'enc'),
    book=partly(None),
    dec=live('dec'),
)
def vector_quantisation(p, x):
    z = p['enc'] * x  # <- enc
    code = p['book'][jnp.argmin(((z - p['book']) ** 2).sum(1))]
    recon = (z + jax.lax.stop_gradient(code - z)) * p['dec']  # <- dec
    commit = (z - jax.lax.stop_gradient(code)) ** 2 + (code - jax.lax.stop_gradient(z)) ** 2
    return ((recon - x) ** 2 + commit).sum()


# The tests.


@pytest.mark.parametrize('name', PROGRAMS)
def test_record(name):
    check_record(PROGRAMS[name])


@pytest.mark.thinned(5)
@pytest.mark.parametrize('name', PROGRAMS)
def test_gradients(name):
    check_gradients(PROGRAMS[name])
