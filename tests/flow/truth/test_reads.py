"""Truth for gradient_flow: reads, stops, comparisons, zeros and trees of parameters."""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_sg as sg
from flax_sg import nn
from flow_truth import (
    Programs,
    X,
    check_gradients,
    check_lines,
    check_record,
    flat,
    live,
    masked,
    partly,
    same_operation,
    unused,
    zero,
)

PROGRAMS = Programs()
program = PROGRAMS.program


# Reads, stops and things that are not used.


@program('a w', a=live('a'), w=live('w'))
def plain(p, x):
    h = p['a'] * x  # <- a
    h = jnp.tanh(h)
    return (h * p['w']).sum()  # <- w


@program('a b c d w', a=unused, b=unused, c=unused, d=unused, w=live('w'))
def read_to_no_purpose(p, x):
    jnp.sin(p['b'] * x)
    like = jnp.ones_like(p['c'])
    shape = jax.eval_shape(lambda v: v * x, p['d']).shape
    return (p['w'] * like * jnp.ones(shape)).sum()  # <- w


@program('a w', a=masked('a'), w=live('w'))
def own_stop(p, x):
    held = jax.lax.stop_gradient(p['a'])  # <- a
    return (held * p['w'] * x).sum()  # <- w


@program(
    {'enc': {'w': X}, 'head': {'w': X, 'b': X}},
    **{'enc/w': masked('enc'), 'head/w': masked('head'), 'head/b': live('b')},
)
def stop_of_part_of_a_tree(p, x):
    head = p['head'] | jax.lax.stop_gradient({'w': p['head']['w']})  # <- head
    p = jax.lax.stop_gradient({'enc': p['enc']}) | {'head': head}  # <- enc
    return (p['enc']['w'] * x * p['head']['w'] + p['head']['b']).sum()  # <- b


@program('a w', a=masked('stop'), w=masked('stop'))
def stop_after_arithmetic(p, x):
    h = p['a'] * x + 1
    return jax.lax.stop_gradient(h @ p['w'])  # <- stop


@program('a', a=partly('stop_gradient', 'stop', 'live'))
def live_then_stopped(p, x):
    h = p['a'] * x  # <- live
    return (h + jax.lax.stop_gradient(p['a'])).sum()  # <- stop


@program('a', a=partly('stop_gradient', 'stop', 'live'))
def stopped_then_live(p, x):
    h = jax.lax.stop_gradient(p['a']) * x  # <- stop
    return (h + jnp.sin(p['a'])).sum()  # <- live


@program('a b', a=partly('stop_gradient', 'stop', 'live'), b=live('b'))
def stopped_twice_and_live(p, x):
    h = jax.lax.stop_gradient(p['a'] * x)  # <- stop
    h = h * p['b']  # <- b
    h = h * jax.lax.stop_gradient(p['a'] + x)
    return (h * jnp.exp(p['a'])).sum()  # <- live


def held_by_a_helper(v):
    return jax.lax.stop_gradient(v)  # <- held_by_a_helper


@program('a w', a=masked('held_by_a_helper'), w=live('w'))
def plain_helper(p, x):
    h = held_by_a_helper(p['a'])
    return (h * p['w'] * x).sum()  # <- w


@program('a w', a=masked('a', 'stop_gradient in optax (*'), w=live('w'))
def stop_in_a_library(p, x):
    held = optax.scale_gradient(p['a'], 0.0)  # <- a
    return (held * p['w'] * x).sum()  # <- w


@program('a', a=live('a'))
def gradient_scaled_by_a_library(p, x):
    h = optax.scale_gradient(p['a'], 0.5)  # <- a
    return (h * x).sum()


@program('a', a=unused)
def constant_loss(p, x):
    return x.sum()


@program('a b', a=live('loss'), b=live('loss'))
def first_use_in_an_expression(p, x):
    return (p['a'] + p['b']) @ x  # <- loss


# Comparisons.


@program('a w', a=partly('gt', 'a', 'a'), w=live('w'))
def own_comparison(p, x):
    h = jnp.where(p['a'] > 0, p['a'], 0.1 * p['a'])  # <- a
    return (h * p['w']).sum()  # <- w


@program('a w', a=flat('gt', 'a'), w=live('w'))
def comparison(p, x):
    mask = p['a'] > x  # <- a
    return jnp.where(mask, p['w'], 0).sum()  # <- w


@program('a w', a=flat('le', 'a'), w=live('w'))
def comparison_as_a_number(p, x):
    mask = (p['a'] <= x).astype(jnp.float32)  # <- a
    return (mask * p['w']).sum()  # <- w


# Zeros that only a run shows.


@program('a b c d', norms=True, a=zero('a'), b=zero('b'), c=zero('c'), d=live('d'))
def zero_on_this_input(p, x):
    h = 0.0 * p['a']  # <- a
    h = h + p['b'] * jnp.zeros(3)  # <- b
    h = h + jax.nn.relu(p['c'] - 100)  # <- c
    return (h + p['d'] * x).sum()  # <- d


@program('a b', norms=True, a=live('both'), b=zero('both'))
def zero_for_the_part_that_is_used(p, x):
    h = jnp.concatenate([p['a'], p['b']])  # <- both
    return (h[:3] * x).sum()


@program('a', a=partly('stop_gradient', 'stop', 'live'))
def stop_of_one_element(p, x):
    h = jax.lax.stop_gradient(p['a'][0])  # <- stop
    return h * x[0] + p['a'][1]  # <- live


@program('a', a=live('a'), vanishes=True)
def zero_without_a_run(p, x):
    h = p['a'] - p['a']  # <- a
    return (h * x).sum()


@program('a b', norms=True, a=zero('a'), b=masked('b'))
def zero_beside_a_stop(p, x):
    h = p['a'] * 0.0  # <- a
    return (h * x + jax.lax.stop_gradient(p['b'])).sum()  # <- b


# Trees of parameters, several losses.


@flax.struct.dataclass
class Layer:
    w: jax.Array
    b: jax.Array


class Point(NamedTuple):
    at: jax.Array
    by: jax.Array


@program(
    {'list': [X, (X, X)], 'layer': Layer(X, X), 'point': Point(X, X)},
    **{
        'list/0': live('list'),
        'list/1/0': masked('stop'),
        'list/1/1': unused,
        'layer/w': live('layer'),
        'layer/b': flat('floor', 'b'),
        'point/at': live('point'),
        'point/by': unused,
    },
)
def trees(p, x):
    h = p['list'][0] * jax.lax.stop_gradient(p['list'][1][0])  # <- list stop
    h = h * p['layer'].w  # <- layer
    h = h + jnp.floor(p['layer'].b)  # <- b
    return (h * x * p['point'].at).sum()  # <- point


@program(
    {'dense': {'w': nn.Partitioned(X, (None,)), 'b': nn.LogicallyPartitioned(X, ('i',))}},
    **{'dense/w': live('w'), 'dense/b': masked('b')},
)
def boxes(p, x):
    h = p['dense']['w'].value * x  # <- w
    p = nn.unbox(p)
    return (h + jax.lax.stop_gradient(p['dense']['b'])).sum()  # <- b


@program(
    {'n': jnp.arange(3), 'mask': jnp.array([True, False, True]), 'w': X},
    n=flat('its dtype, int32'),
    mask=flat('its dtype, bool'),
    w=live('w'),
)
def integer_parameters(p, x):
    h = jnp.where(p['mask'], p['w'], 0)  # <- w
    return (h * x[p['n']]).sum() + p['n'].sum()


@program([X, X], **{'0': live('a'), '1': masked('b')})
def list_of_parameters(p, x):
    h = p[0] * x  # <- a
    return (h * jax.lax.stop_gradient(p[1])).sum()  # <- b


@program(
    'a b',
    **{
        'one:a': live('a'),
        'one:b': masked('b'),
        'two:a': partly('stop_gradient', 'stop', 'a'),
        'two:b': unused,
        'three:a': unused,
        'three:b': flat('round', 'three'),
    },
)
def several_losses(p, x):
    h = p['a'] * x  # <- a
    held = jax.lax.stop_gradient(p['b'])  # <- b
    two = h * jax.lax.stop_gradient(p['a'])  # <- stop
    return {'one': (h * held).sum(), 'two': two.sum(), 'three': jnp.round(p['b']).sum()}  # <- three


@program(
    {'key': jax.random.key(5), 'scale': 1.5, 'host': np.ones(3, np.float32)},
    key=flat('its dtype, key<fry>'),
    scale=live('loss'),
    host=live('loss'),
)
def other_leaves(p, x):
    return (jax.random.normal(p['key'], (3,)) * p['scale'] * p['host']).sum()  # <- loss


# The tests.


@pytest.mark.parametrize('name', PROGRAMS)
def test_record(name):
    check_record(PROGRAMS[name])


@pytest.mark.thinned(5)
@pytest.mark.parametrize('name', PROGRAMS)
def test_gradients(name):
    check_gradients(PROGRAMS[name])


def test_dict_of_losses():
    names = ['plain', 'own_stop', 'comparison']
    params = {k: X for k in 'aw'}
    flow = sg.gradient_flow({k: PROGRAMS[k].fn for k in names})(params, X)
    assert flow.to_dict().keys() == set(names)
    for record in flow:
        truth = PROGRAMS[record.loss].truth[record.name]
        assert record.verdict == truth.verdict and same_operation(record.operation, truth.operation)
        check_lines(record.source, truth.line, PROGRAMS[record.loss].fn)
