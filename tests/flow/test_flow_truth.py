"""Truth for gradient_flow: small programs with verdicts, operations and lines worked out by hand.

A comment ``# <- name`` marks the line that a record must give. `test_gradients` proves the table
itself without the library: what is not reached has a gradient of exactly zero wherever it is tried,
what is reached has another one somewhere.
"""

import dataclasses
import inspect
import os
import re
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

import flax_sg as sg
from flax_sg import nn

FILE = os.path.basename(__file__)
X = jnp.array([0.3, -0.7, 1.1])
XS = jnp.array([[0.3, -0.7, 1.1], [0.9, 0.2, -0.4], [-1.3, 0.5, 0.6]])
PROGRAMS = {}


class Truth(NamedTuple):
    """A verdict, its operation, the marks of its line and of the first live use.

    A mark may be several: of a line in a jitted helper and of the calls that lead to it.
    """

    verdict: str
    operation: str | None = None
    line: str | tuple[str, ...] | None = None
    used_at: str | None = None


def live(line=None):
    return Truth('REACHED', None, line)


def partly(operation, line=None, used_at=None):
    return Truth('REACHED_PARTLY', operation, line, used_at)


def masked(line=None, operation='stop_gradient'):
    return Truth('MASKED', operation, line)


def flat(operation, line=None):
    return Truth('PIECEWISE_CONSTANT', operation, line)


def rule(operation, line=None):
    return Truth('CUSTOM_ZERO', operation, line)


def unknown(operation, line=None):
    return Truth('UNKNOWN', operation, line)


def zero(line=None):
    return Truth('NUMERIC_ZERO', None, line)


unused = Truth('UNUSED')


@dataclasses.dataclass
class Program:
    fn: object
    params: object
    args: tuple
    truth: dict
    norms: bool = False
    reverse: bool = True
    vanishes: bool = False
    reason: str = ''


def program(params, *args, norms=False, reverse=True, vanishes=False, reason='', **truth):
    """Enter a function into the table.

    Args:
      params: a tree, a function that makes one, or names of vectors of 3.
      norms: whether gradient_flow runs the loss too.
      reverse: False where `jax.grad` raises.
      vanishes: the path is there, and its gradient zero all the same.
      reason: what the record's reason holds.
      **truth: by the parameter's name, after the loss's and a colon if there are several.
    """
    if isinstance(params, str):
        params = {k: jnp.cos(jnp.arange(3.0) + i) for i, k in enumerate(params.split())}

    def enter(fn):
        assert fn.__name__ not in PROGRAMS
        PROGRAMS[fn.__name__] = Program(
            fn, params, args or (X,), truth, norms, reverse, vanishes, reason)
        return fn
    return enter


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


@program({'enc': {'w': X}, 'head': {'w': X, 'b': X}}, **{
    'enc/w': masked('enc'), 'head/w': masked('head'), 'head/b': live('b')})
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


# jit, remat, vmap.


@program('a b w', a=masked(('in', 'a')), b=masked(('in', 'b')), w=live('w'))
def jitted_helper_called_twice(p, x):
    @jax.jit
    def held(v):
        return jax.lax.stop_gradient(v) * x  # <- in
    h = held(p['a'])  # <- a
    h = h + held(p['b'])  # <- b
    return (h * p['w']).sum()  # <- w


@program('a b', a=live(('in', 'a')), b=partly('stop_gradient', ('in', 'b'), ('in', 'b')))
def jitted_helper_is_live_for_one(p, x):
    @jax.jit
    def bent(v, w):
        return jnp.sin(v) + w * jax.lax.stop_gradient(w)  # <- in
    h = bent(p['a'], x)  # <- a
    return (h + bent(x, p['b'])).sum()  # <- b


@program('a b', a=flat('floor', ('in', 'middle', 'a')), b=live(('live', 'middle', 'b')))
def jitted_in_jitted(p, x):
    @jax.jit
    def inner(v, w):
        v = jnp.floor(v)  # <- in
        return v * w  # <- live

    @jax.jit
    def outer(v, w):
        return inner(v, w) + inner(v + 1, w)  # <- middle
    h = outer(p['a'], x)  # <- a
    return (h + outer(x, p['b'])).sum()  # <- b


@program('a b c', a=live(), b=unused, c=live())
def jitted_that_hands_through(p, x):
    pair = jax.jit(lambda a, b, c: (a, jnp.sin(b), c * a, b))
    a, _, c, _ = pair(p['a'], p['b'], p['c'])
    return (a * x + c).sum()


@program('a w', a=masked('a'), w=live('w'))
def all_jitted(p, x):
    @jax.jit
    def run(p):
        h = jax.lax.stop_gradient(p['a']) + x  # <- a
        return (h * p['w']).sum()  # <- w
    return run(p)


@program('a w', a=masked('a'), w=live('w'))
def remat(p, x):
    @jax.checkpoint
    def run(a, w):
        h = jax.lax.stop_gradient(a) * x  # <- a
        return jnp.sin(h * w)  # <- w
    return run(p['a'], p['w']).sum()


@program('a w', a=flat('round', 'a'), w=live('w'))
def remat_with_a_policy(p, x):
    def run(a, w):
        h = checkpoint_name(jnp.round(a) * x, 'h')  # <- a
        return jnp.sin(h * w)  # <- w
    policy = jax.checkpoint_policies.save_only_these_names('h')
    return jax.checkpoint(run, policy=policy)(p['a'], p['w']).sum()


@program('a', a=live('a'))
def named_for_a_policy(p, x):
    h = checkpoint_name(p['a'], 'a')  # <- a
    return (h * x).sum()


@program('a w', XS, a=masked('a'), w=live('w'))
def vmap(p, xs):
    def one(x):
        h = jax.lax.stop_gradient(p['a']) * x  # <- a
        return jnp.tanh(h) @ p['w']  # <- w
    return jax.vmap(one)(xs).sum()


@program('a b w', XS, a=flat('argmax', 'a'), b=live('b'), w=masked('w'))
def vmap_of_a_parameter(p, xs):
    def one(a, b, x):
        h = x[jnp.argmax(a * x)] * b  # <- a b
        return h * jax.lax.stop_gradient(p['w'])  # <- w
    return jax.vmap(one, (None, 0, 0))(p['a'], p['b'], xs).sum()


@program('a w', XS, a=masked('a'), w=live('w'))
def vmap_of_vmap_in_scan(p, xs):
    def body(c, x):
        def one(u, v):
            h = jax.lax.stop_gradient(p['a'][0]) * u  # <- a
            return h * v * p['w'].sum()  # <- w
        return c + jax.vmap(lambda u: jax.vmap(lambda v: one(u, v))(x))(x).sum(), None
    return jax.lax.scan(body, 0.0, xs)[0]


# Loops.


@program('a w', XS, a=live('a'), w=masked('w'))
def scan_over_constants(p, xs):
    def body(c, x):
        c = c + p['a'] * x  # <- a
        return c, c * jax.lax.stop_gradient(p['w'])  # <- w
    _, ys = jax.lax.scan(body, jnp.zeros(3), xs)
    return ys.sum()


@program('a w', XS, a=masked('stop'), w=partly('stop_gradient', 'stop', 'w'))
def scan_whose_carry_is_stopped(p, xs):
    def body(c, x):
        held = jax.lax.stop_gradient(c)  # <- stop
        return held + p['w'] * x, None  # <- w
    return jax.lax.scan(body, p['a'], xs)[0].sum()


@program('a', XS, a=partly('stop_gradient', 'stop'))
def scan_whose_steps_are_stopped_in_the_outputs(p, xs):
    def body(c, x):
        y = jax.lax.stop_gradient(c) * x  # <- stop
        return c * x, y
    c, ys = jax.lax.scan(body, p['a'], xs)
    return c.sum() + ys.sum()


@program('a b', XS, a=masked('stop'), b=live('b'))
def scan_of_two_carries(p, xs):
    def body(carry, x):
        a, b = carry
        h = jax.lax.stop_gradient(a) * x  # <- stop
        return (a, b * h), None  # <- b
    return jax.lax.scan(body, (p['a'], p['b']), xs)[0][1].sum()


@program('a b', XS, a=partly('stop_gradient', 'carry', 'carry'), b=live('carry'))
def scan_that_leaks_through_the_carry(p, xs):
    def body(carry, x):
        out, middle, last = carry
        out = out + jax.lax.stop_gradient(last) * x + middle  # <- carry
        return (out, last, last), None
    carry = jnp.zeros(3), p['b'], p['a']
    return jax.lax.scan(body, carry, xs)[0][0].sum()


@program({'layers': {'w': XS, 'b': XS}}, **{
    'layers/w': live('live'), 'layers/b': masked('stop')})
def scan_over_layers(p, x):
    def body(h, layer):
        h = jnp.tanh(h * layer['w'])  # <- live
        return h + jax.lax.stop_gradient(layer['b']), None  # <- stop
    return jax.lax.scan(body, x, p['layers'])[0].sum()


@program({'layers': XS}, layers=flat('sign', 'a'))
def scan_over_rounded_layers_backwards(p, x):
    def body(h, layer):
        return h * jnp.sign(layer), h  # <- a
    return jax.lax.scan(body, x, p['layers'], reverse=True)[1].sum()


@program('a w', XS, a=masked(('in', 'a')), w=live(('live', 'w')))
def jitted_helper_in_a_scan(p, xs):
    @jax.jit
    def helper(a, w, x):
        h = jax.lax.stop_gradient(a) * x  # <- in
        return h * w  # <- live

    def body(c, x):
        return c + helper(p['a'], p['w'], x), None  # <- a w
    return jax.lax.scan(body, jnp.zeros(3), xs)[0].sum()


@program('a w', XS, a=masked('a'), w=live('w'))
def remat_in_scan_in_scan(p, xs):
    @jax.checkpoint
    def cell(c, x):
        c = c * p['w'] + x  # <- w
        return c + jax.lax.stop_gradient(p['a']), None  # <- a

    def rows(c, _):
        return jax.lax.scan(cell, c, xs)[0], None
    return jax.lax.scan(rows, jnp.ones(3), None, length=2)[0].sum()


@program('a w', XS, a=unused, w=live('w'))
def scan_whose_other_carry_is_dropped(p, xs):
    def body(carry, x):
        c, d = carry
        return (c * p['w'], d * x + p['a']), None  # <- w
    return jax.lax.scan(body, (jnp.ones(3), p['a']), xs)[0][0].sum()


@program({'a': jnp.float32(2.5), 'w': X}, a=flat('lt', 'a'), w=live('w'))
def while_predicate(p, x):
    def more(s):
        return s < p['a']  # <- a
    steps = jax.lax.while_loop(more, lambda s: s + 1.0, 0.0)
    return (steps * p['w'] * x).sum()  # <- w


@program('a', a=live(), reverse=False, reason='forward mode')
def while_carry(p, x):
    def body(s):
        return s[0] + 1, s[1] * x
    return jax.lax.while_loop(lambda s: s[0] < 3, body, (0, p['a']))[1].sum()


@program('a w', a=masked('a'), w=live('w'))
def while_whose_body_is_stopped(p, x):
    def body(s):
        return s[0] + 1, s[1] + jax.lax.stop_gradient(p['a'])  # <- a
    h = jax.lax.while_loop(lambda s: s[0] < 3, body, (0, x))[1]
    return (h * p['w']).sum()  # <- w


@program('a w', a=live('a'), w=masked('w'))
def fori_loop(p, x):
    def body(i, c):
        c = c * p['a'] + i  # <- a
        return c + jax.lax.stop_gradient(p['w'])  # <- w
    return jax.lax.fori_loop(0, 3, body, x).sum()


@program('a w', X, jnp.int32(3), a=live('a'), w=masked('w'), reverse=False, reason='forward mode')
def fori_loop_of_any_length(p, x, n):
    def body(i, c):
        c = c * p['a'] + i  # <- a
        return c + jax.lax.stop_gradient(p['w'])  # <- w
    return jax.jit(lambda n: jax.lax.fori_loop(0, n, body, x))(n).sum()


@program({'n': jnp.float32(2.5), 'w': X}, n=flat('convert_element_type', 'n'), w=live('w'))
def fori_loop_of_a_learned_length(p, x):
    n = p['n'].astype(jnp.int32)  # <- n
    h = jax.lax.fori_loop(0, n, lambda i, c: c * 0.5, x)
    return (h * p['w']).sum()  # <- w


@program('a', XS, a=live('a'))
def associative_scan(p, xs):
    h = xs * p['a']  # <- a
    return jax.lax.associative_scan(jnp.multiply, h).sum()


@program('a w', XS, a=live('a'), w=masked('w'))
def mapped_by_lax(p, xs):
    def one(x):
        return p['a'] * x + jax.lax.stop_gradient(p['w'])  # <- a w
    return jax.lax.map(one, xs).sum()


@program('a b', a=unused, b=masked('stop'))
def scan_that_shifts(p, x):
    def body(carry, _):
        u, v = carry
        return (v, jax.lax.stop_gradient(u)), None  # <- stop
    return jax.lax.scan(body, (p['a'], p['b']), None, length=3)[0][0].sum()


@program('a w', a=masked('stop'), w=live('w'))
def stopped_before_a_while_loop(p, x):
    a = jax.lax.stop_gradient(p['a'])  # <- stop
    s = jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] * x), (0, a))
    return (s[1] * p['w']).sum()  # <- w


@program('a', a=live('a'))
def while_loop_with_a_rule(p, x):
    @jax.custom_vjp
    def fixed_point(a):
        far = lambda z: jnp.abs(z - jnp.cos(a * z)).max() > 1e-3
        return jax.lax.while_loop(far, lambda z: jnp.cos(a * z), jnp.ones(3))
    fixed_point.defvjp(lambda a: (fixed_point(a), a), lambda a, g: (g * a,))
    return (fixed_point(jax.nn.sigmoid(p['a'])) * x).sum()  # <- a


# Branches.


@program('a w', a=flat('gt', 'a'), w=live('w'))
def cond_predicate(p, x):
    def up(w):
        return w * x  # <- w
    return jax.lax.cond(p['a'].sum() > 0, up, lambda w: x, p['w']).sum()  # <- a


@program('a b w', a=partly('stop_gradient', 'stop', 'live'), b=masked('b'), w=unused)
def cond_that_stops_in_one_branch(p, x):
    def held(a, b, w):
        h = jax.lax.stop_gradient(a)  # <- stop
        return h + jax.lax.stop_gradient(b)  # <- b

    def other(a, b, w):
        return a * x  # <- live
    return jax.lax.cond(x[0] > 0.5, held, other, p['a'], p['b'], p['w']).sum()


@program('a w i', a=partly('stop_gradient', 'stop', 'live'), w=live('w'), i=flat('argmax', 'i'))
def switch(p, x):
    def first(a, w):
        return jax.lax.stop_gradient(a) * x  # <- stop

    def second(a, w):
        return jnp.sin(a)  # <- live

    def third(a, w):
        return w * x  # <- w
    i = jnp.argmax(p['i'])  # <- i
    return jax.lax.switch(i, [first, second, third], p['a'], p['w']).sum()


@program('a', a=masked())
def stopped_in_every_branch(p, x):
    branches = [lambda a: jax.lax.stop_gradient(a) * x, lambda a: -jax.lax.stop_gradient(a)]
    return jax.lax.cond(x.sum() > 0, *branches, p['a']).sum()


@program('a w', XS, a=partly('stop_gradient', 'stop', 'live'), w=live('w'))
def cond_in_scan(p, xs):
    def body(c, x):
        held = lambda c: c + jax.lax.stop_gradient(p['a'])  # <- stop
        free = lambda c: c * p['a']  # <- live
        c = jax.lax.cond(x.sum() > 0, held, free, c)
        return c * p['w'], None  # <- w
    return jax.lax.scan(body, jnp.ones(3), xs)[0].sum()


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


@program('a b c d', a=flat('round', 'a'), b=flat('floor', 'b'), c=flat('sign', 'c'),
         d=flat('ceil', 'd'))
def rounding(p, x):
    h = jnp.round(p['a'] * 3)  # <- a
    h = h * jnp.floor(p['b'])  # <- b
    h = h + jnp.sign(p['c'])  # <- c
    return (h * x - jnp.ceil(p['d'])).sum()  # <- d


@program('a b w', a=flat('convert_element_type', 'a'), b=flat('convert_element_type', 'b'),
         w=live('w'))
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


@program({'rate': jnp.float32(0.5), 'w': X}, jax.random.key(0), X,
         rate=flat('bernoulli (lt)', 'rate'), w=live('w'))
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


@program('a b c d e f', a=live('a'), b=live('b'), c=live('c'), d=live('d'), e=live('e'),
         f=live('f'))
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


@program({'enc': X, 'book': XS, 'dec': X}, enc=partly(None, None, 'enc'),
         book=partly(None), dec=live('dec'))
def vector_quantisation(p, x):
    z = p['enc'] * x  # <- enc
    code = p['book'][jnp.argmin(((z - p['book']) ** 2).sum(1))]
    recon = (z + jax.lax.stop_gradient(code - z)) * p['dec']  # <- dec
    commit = (z - jax.lax.stop_gradient(code)) ** 2 + (code - jax.lax.stop_gradient(z)) ** 2
    return ((recon - x) ** 2 + commit).sum()


# Rules of one's own.


@program('a w', a=rule('f (custom_vjp)', 'a'), w=live('w'))
def custom_vjp_of_zeros(p, x):
    @jax.custom_vjp
    def f(v):
        return v * x
    f.defvjp(lambda v: (f(v), None), lambda _, g: (jnp.zeros_like(g),))
    h = f(p['a'])  # <- a
    return (h * p['w']).sum()  # <- w


@program('a b', a=live('f'), b=rule('f (custom_vjp)', 'f'))
def custom_vjp_that_drops_one(p, x):
    @jax.custom_vjp
    def f(a, b):
        return a * b
    f.defvjp(lambda a, b: (a * b, b), lambda b, g: (g * b, None))
    return (f(p['a'], p['b']) * x).sum()  # <- f


@program('a', a=live('f'))
def custom_vjp_straight_through(p, x):
    @jax.custom_vjp
    def f(v):
        return jnp.round(v)
    f.defvjp(lambda v: (f(v), None), lambda _, g: (g,))
    return (f(p['a']) * x).sum()  # <- f


@program('a', a=live('f'))
def custom_vjp_whose_body_stops(p, x):
    @jax.custom_vjp
    def f(v):
        return jax.lax.stop_gradient(v) * x

    # The backward pass is not differentiated: a stop in it does nothing.
    f.defvjp(lambda v: (f(v), None), lambda _, g: (jax.lax.stop_gradient(g),))
    return f(p['a']).sum()  # <- f


@program('a b', a=live('f'), b=rule('f (custom_vjp)', 'f'))
def custom_vjp_with_jit_in_its_rule(p, x):
    @jax.custom_vjp
    def f(a, b):
        return a + b
    half = jax.jit(lambda g: (0.5 * g, jnp.zeros_like(g)))
    f.defvjp(lambda a, b: (a + b, None), lambda _, g: half(g))
    return jax.jit(lambda a, b: f(a, b) * x)(p['a'], p['b']).sum()  # <- f


@program('a b', a=rule('f (custom_vjp)', 'f'), b=live('f'))
def custom_vjp_with_static_arguments(p, x):
    def f(kind, a, b):
        return a * b if kind == 'product' else a + b
    f = jax.custom_vjp(f, nondiff_argnums=(0,))
    f.defvjp(lambda kind, a, b: (f(kind, a, b), a), lambda kind, a, g: (None, g * a))
    return (f('product', p['a'], p['b']) * x).sum()  # <- f


@program('a w', a=rule('f (custom_jvp)', 'a'), w=live('w'))
def custom_jvp_of_zeros(p, x):
    @jax.custom_jvp
    def f(v):
        return v * x
    f.defjvp(lambda primals, tangents: (f(*primals), jnp.zeros_like(tangents[0])))
    h = f(p['a'])  # <- a
    return (h * p['w']).sum()  # <- w


@program('a b', a=live('f'), b=rule('f (custom_jvp)', 'f'))
def custom_jvp_that_drops_one(p, x):
    @jax.custom_jvp
    def f(a, b):
        return a * b
    f.defjvps(lambda t, out, a, b: t * b, None)
    return (f(p['a'], p['b']) * x).sum()  # <- f


@program('a w', a=live('f'), w=live('f'))
def custom_jvp_straight_through(p, x):
    @jax.custom_jvp
    def f(v):
        return jnp.sign(v)
    f.defjvp(lambda primals, tangents: (f(*primals), tangents[0]))
    return (f(p['a'] * p['w']) * x).sum()  # <- f


@program('a', XS, a=rule('f (custom_vjp)', 'a'))
def custom_vjp_in_scan_in_vmap(p, xs):
    @jax.custom_vjp
    def f(v):
        return v * 2
    f.defvjp(lambda v: (v * 2, None), lambda _, g: (jnp.zeros_like(g),))

    def one(x):
        def body(c, _):
            return c + f(p['a']) * x, None  # <- a
        return jax.lax.scan(body, x, None, length=2)[0]
    return jax.vmap(one)(xs).sum()


@program({'t': {'a': X, 'b': X}}, **{'t/a': live('f'), 't/b': rule('f (custom_vjp)', 'f')})
def custom_vjp_of_a_tree(p, x):
    @jax.custom_vjp
    def f(t):
        return t['a'] * t['b']
    f.defvjp(lambda t: (f(t), None), lambda _, g: ({'a': g, 'b': None},))
    return (f(p['t']) * x).sum()  # <- f


@program('a b', a=partly('f (custom_jvp)', 'f', 'f'), b=rule('f (custom_jvp)', 'f'))
def custom_jvp_of_two_results(p, x):
    @jax.custom_jvp
    def f(a, b):
        return a * b, a + b
    f.defjvp(lambda primals, tangents: (f(*primals), (tangents[0], jnp.zeros(3))))
    u, v = f(p['a'], p['b'])  # <- f
    return (u * x + v).sum()


@program('a b', a=live('g'), b=rule('f (custom_jvp)', 'f'))
def custom_jvp_in_a_custom_jvp(p, x):
    @jax.custom_jvp
    def f(v):
        return v * 2
    f.defjvp(lambda primals, tangents: (f(*primals), jnp.zeros(3)))

    @jax.custom_jvp
    def g(v):
        return f(v)
    g.defjvp(lambda primals, tangents: (g(*primals), tangents[0]))
    h = g(p['a'])  # <- g
    return (h * f(p['b'])).sum()  # <- f


@program('a', a=live('a'))
def custom_gradient(p, x):
    @jax.custom_gradient
    def f(v):
        return jnp.floor(v), lambda g: g * 2
    return (f(p['a']) * x).sum()  # <- a


@program({'target': jnp.float32(2.0)}, target=live('root'))
def root_of_an_equation(p, x):
    equation = lambda v: v ** 3 - p['target']
    step = lambda f, v: jax.lax.fori_loop(0, 20, lambda i, v: v - f(v) / (3 * v ** 2 + 1e-3), v)
    return jax.lax.custom_root(equation, 1.0, step, lambda g, y: y / g(1.0))  # <- root


# Gradients in the loss.


@program('w', w=live('in'))
def adapted_parameters(p, x):
    def inner(w):
        return jnp.sin(w * x).sum()  # <- in
    fast = p['w'] - 0.1 * jax.grad(inner)(p['w'])
    return inner(fast)


@program('w', w=partly('stop_gradient', 'stop', 'live'))
def adapted_parameters_to_first_order(p, x):
    def inner(w):
        return jnp.sin(w * x).sum()
    step = jax.lax.stop_gradient(jax.grad(inner)(p['w']))  # <- stop
    fast = p['w'] - 0.1 * step  # <- live
    return inner(fast)


@program('w b', w=live('in'), b=live('in'))
def gradient_penalty(p, x):
    def critic(x):
        return jnp.tanh(p['w'] * x + p['b']).sum()  # <- in
    return (jax.grad(critic)(x) ** 2).sum()


@program('w b', w=live('in'), b=unused)
def gradient_penalty_of_a_line(p, x):
    def critic(x):
        return (p['w'] * x + p['b']).sum()  # <- in
    return (jax.grad(critic)(x) ** 2).sum()


@program('w b v', w=live('in'), b=flat('leaky_relu (ge)', 'in'), v=live('v'))
def gradient_penalty_of_a_relu(p, x):
    def critic(x):
        h = jax.nn.leaky_relu(p['w'] * x + p['b'])  # <- in
        return (h * p['v']).sum()  # <- v
    return (jax.grad(critic)(x) ** 2).sum()


@program('w t', w=live(), t=masked('stop'))
def derivative_of_a_stopped_value(p, x):
    def inner(x):
        held = jax.lax.stop_gradient(p['t'])  # <- stop
        return (held * p['w'] * x ** 2).sum()
    return jax.grad(inner)(x).sum()


@program('w', w=live())
def hessian_vector_product(p, x):
    energy = lambda x: jnp.cos(p['w'] * x).sum()
    return jax.jvp(jax.grad(energy), (x,), (x,))[1].sum()


@program('a w', a=masked('stop'), w=live('in'))
def vjp_in_the_loss(p, x):
    def f(w):
        return jnp.sin(jax.lax.stop_gradient(p['a']) * w)  # <- stop in
    out, pull = jax.vjp(f, p['w'])
    return out.sum() + pull(x)[0].sum()


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


@program({'list': [X, (X, X)], 'layer': Layer(X, X), 'point': Point(X, X)}, **{
    'list/0': live('list'), 'list/1/0': masked('stop'), 'list/1/1': unused,
    'layer/w': live('layer'), 'layer/b': flat('floor', 'b'), 'point/at': live('point'),
    'point/by': unused})
def trees(p, x):
    h = p['list'][0] * jax.lax.stop_gradient(p['list'][1][0])  # <- list stop
    h = h * p['layer'].w  # <- layer
    h = h + jnp.floor(p['layer'].b)  # <- b
    return (h * x * p['point'].at).sum()  # <- point


@program({'dense': {'w': nn.Partitioned(X, (None,)), 'b': nn.LogicallyPartitioned(X, ('i',))}}, **{
    'dense/w': live('w'), 'dense/b': masked('b')})
def boxes(p, x):
    h = p['dense']['w'].value * x  # <- w
    p = nn.unbox(p)
    return (h + jax.lax.stop_gradient(p['dense']['b'])).sum()  # <- b


@program({'n': jnp.arange(3), 'mask': jnp.array([True, False, True]), 'w': X},
         n=flat('its dtype, int32'), mask=flat('its dtype, bool'), w=live('w'))
def integer_parameters(p, x):
    h = jnp.where(p['mask'], p['w'], 0)  # <- w
    return (h * x[p['n']]).sum() + p['n'].sum()


@program([X, X], **{'0': live('a'), '1': masked('b')})
def list_of_parameters(p, x):
    h = p[0] * x  # <- a
    return (h * jax.lax.stop_gradient(p[1])).sum()  # <- b


@program('a b', **{
    'one:a': live('a'), 'one:b': masked('b'), 'two:a': partly('stop_gradient', 'stop', 'a'),
    'two:b': unused, 'three:a': unused, 'three:b': flat('round', 'three')})
def several_losses(p, x):
    h = p['a'] * x  # <- a
    held = jax.lax.stop_gradient(p['b'])  # <- b
    two = h * jax.lax.stop_gradient(p['a'])  # <- stop
    return {'one': (h * held).sum(), 'two': two.sum(), 'three': jnp.round(p['b']).sum()}  # <- three


@program({'key': jax.random.key(5), 'scale': 1.5, 'host': np.ones(3, np.float32)},
         key=flat('its dtype, key<fry>'), scale=live('loss'), host=live('loss'))
def other_leaves(p, x):
    return (jax.random.normal(p['key'], (3,)) * p['scale'] * p['host']).sum()  # <- loss


# The library's blocks.


class Scale(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param('w', nn.initializers.ones, (3,))
        return w * x  # <- Scale


class Pair(nn.Module):
    def setup(self):
        self.gln, self.code = Scale(), Scale()

    def __call__(self, x):
        return jnp.tanh(self.code(self.gln(x))).sum()


PAIR = {'gln': {'w': X}, 'code': {'w': X}}


@program(PAIR, **{'gln/w': masked('block', "stop_gradient('gln')"), 'code/w': live('Scale')})
def block_around_apply(p, x):
    with sg.stop_gradient('gln'):  # <- block
        return Pair().apply({'params': p}, x)


@program(PAIR, **{
    'gln/w': masked('block', "stop_gradient(path('gln') & where(*"), 'code/w': live('Scale')})
def block_of_a_combined_filter(p, x):
    held = sg.path('gln') & (lambda v: v.shape == (3,))
    with sg.stop_gradient(held):  # <- block
        return Pair().apply({'params': p}, x)


@program(PAIR, **{'gln/w': live('Scale'), 'code/w': masked('block', "stop_gradient(~path('gln'))")})
def block_in_a_method(p, x):
    class Net(Pair):
        def __call__(self, x):
            with sg.stop_gradient(~sg.path('gln')):  # <- block
                return super().__call__(x)
    return Net().apply({'params': p}, x)


@program(PAIR, **{
    'gln/w': partly("stop_gradient('gln')", 'block', 'Scale'), 'code/w': live('Scale')})
def block_then_live(p, x):
    class Net(Pair):
        def __call__(self, x):
            with sg.stop_gradient('gln'):  # <- block
                h = self.gln(x)
            return self.code(self.gln(h)).sum()
    return Net().apply({'params': p}, x)


@program(PAIR, **{
    'gln/w': masked('outer', "stop_gradient('gln')"),
    'code/w': masked('inner', "stop_gradient('code')")})
def block_in_a_block(p, x):
    class Net(Pair):
        def __call__(self, x):
            with sg.stop_gradient('code'):  # <- inner
                return super().__call__(x)
    with sg.stop_gradient('gln'):  # <- outer
        return Net().apply({'params': p}, x)


@program({'w': X, 'v': X}, w=partly("stop_gradient('w')", 'block', 'live'), v=live('live'))
def block_over_a_derived_value(p, x):
    class Net(nn.Module):
        def setup(self):
            self.w = self.param('w', nn.initializers.ones, (3,))
            self.s = jnp.exp(self.w)
            self.v = self.param('v', nn.initializers.ones, (3,))

        def __call__(self, x):
            with sg.stop_gradient('w'):  # <- block
                h = self.s * x
            return (h * self.w * self.v).sum()  # <- live
    return Net().apply({'params': p}, x)


Frozen = sg.stop_gradient()(Scale)


@program(PAIR, **{
    'gln/w': masked('made', 'stop_gradient(everything)'), 'code/w': live('Scale')})
def decorated_class(p, x):
    class Net(Pair):
        def setup(self):
            self.gln = Frozen()  # <- made
            self.code = Scale()
    return Net().apply({'params': p}, x)


@program(PAIR, **{
    'gln/w': masked('use', "stop_gradient('gln')"), 'code/w': live('Scale')})
def decorated_method(p, x):
    class Net(Pair):
        @sg.stop_gradient('gln')
        def encode(self, x):
            return self.gln(x)

        def __call__(self, x):
            h = self.encode(x)  # <- use
            return self.code(h).sum()
    return Net().apply({'params': p}, x)


@program(PAIR, **{
    'gln/w': partly("stop_gradient('w')", 'made', 'Scale'), 'code/w': live('Scale')})
def mirrored_instance(p, x):
    class Net(Pair):
        def __call__(self, x):
            held = sg.stop_gradient('w')(self.gln)  # <- made
            h = held(x)
            return self.code(self.gln(h)).sum()
    return Net().apply({'params': p}, x)


@program(PAIR, **{
    'gln/w': masked('use', "stop_gradient('gln')"), 'code/w': live('live')})
def transformed_tree(p, x):
    p = sg.stop_gradient('gln')(p)  # <- use
    h = p['gln']['w'] * x
    return (h * p['code']['w']).sum()  # <- live


@program(PAIR, **{'gln/w': masked('block', "constant('gln')"), 'code/w': live('Scale')})
def constant(p, x):
    with sg.constant('gln'):  # <- block
        return Pair().apply({'params': p}, x)


@program(PAIR, **{'gln/w': live(), 'code/w': masked('zero', "scale_gradient('code', 0.0)")})
def scaled_gradients(p, x):
    with sg.scale_gradient('gln', -0.5):
        with sg.scale_gradient('code', 0):  # <- zero
            return Pair().apply({'params': p}, x)


@program(PAIR, **{'gln/w': live(), 'code/w': rule("map_gradient('code', *", 'zero')})
def mapped_gradients(p, x):
    with sg.map_gradient('gln', lambda info, ct: jnp.clip(ct, -1, 1)):
        with sg.map_gradient('code', lambda info, ct: jnp.zeros_like(ct)):  # <- zero
            return Pair().apply({'params': p}, x)


@program({'a': X, 'b': X, 'c': X, 'd': X}, a=live('cast'), b=flat('round', 'round'),
         c=unused, d=live('d'))
def mapped_values(p, x):
    def rounded(info, v):
        return jnp.round(v)  # <- round
    p = sg.map_values('a', lambda info, v: v.astype(jnp.bfloat16))(p)  # <- cast
    p = sg.map_values('b', rounded)(p)
    p = sg.map_values('c', lambda info, v: jnp.ones(3))(p)
    return (p['a'] * p['b'] * p['c'] * p['d'] * x).sum()  # <- d


@program({'net': PAIR, 'target': {'gln': {'w': X}}, 'held': {'code': {'w': X}}}, **{
    'net/gln/w': unused, 'net/code/w': unused, 'target/gln/w': live('Scale'),
    'held/code/w': masked('block', "stop_gradient('code')")})
def replaced_values(p, x):
    with sg.replace_values('gln', p['target']), sg.replace_values('code', p['held']):
        with sg.stop_gradient('code'):  # <- block
            return Pair().apply({'params': p['net']}, x)


VIEWS = sg.gradient_views({'one': 'gln', 'two': 'code'})


@program(PAIR, **{
    'one:gln/w': live(), 'two:code/w': live(),
    'one:code/w': masked('views', "gradient_views({'one': 'gln', 'two': 'code'}), entry 'one'"),
    'two:gln/w': masked('views', "gradient_views({'one': 'gln', 'two': 'code'}), entry 'two'")})
def views(p, x):
    class Net(Pair):
        def __call__(self, x):
            out = VIEWS(lambda net, x: jnp.sin(net.code(net.gln(x))))(self, x)  # <- views
            return {'one': out['one'].sum(), 'two': (out['two'] ** 2).sum()}
    return Net().apply({'params': p}, x)


@program('a b c', **{
    'one:a': live(), 'one:c': flat('sign', 'c'), 'two:b': live(), 'two:c': unused,
    'one:b': masked('views', "gradient_views({'one': 'a', 'two': 'b'}), entry 'one'"),
    'two:a': masked('views', "gradient_views({'one': 'a', 'two': 'b'}), entry 'two'")})
def views_of_a_function(p, x):
    out = sg.gradient_views({'one': ['a'], 'two': 'b'})(lambda q: q['a'] * q['b'] * x)
    out = out({'a': p['a'], 'b': p['b']})  # <- views
    one = out['one'] * jnp.sign(p['c'])  # <- c
    return {'one': one.sum(), 'two': jnp.exp(out['two']).sum()}


class Cell(nn.Module):
    @nn.compact
    def __call__(self, c, x):
        w = self.param('w', nn.initializers.ones, (3,))
        v = self.param('v', nn.initializers.ones, (3,))
        c = jnp.tanh(w * c)  # <- CellW
        return c + v * x, c  # <- CellV


class HalfHeld(Cell):
    @nn.compact
    def __call__(self, c, x):
        with sg.stop_gradient('w'):  # <- HalfHeld
            return super().__call__(c, x)


CELL = {'cell': {'w': X, 'v': X}}
SCANNED = dict(variable_broadcast='params', split_rngs={'params': False})


@program(CELL, XS, **{
    'cell/w': masked('block', "stop_gradient('cell/w')"), 'cell/v': live('CellV')})
def block_around_nn_scan(p, xs):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, xs):
            with sg.stop_gradient('cell/w'):  # <- block
                return nn.scan(Cell, **SCANNED)(name='cell')(jnp.ones(3), xs)[0].sum()
    return Net().apply({'params': p}, xs)


@program(CELL, XS, **{
    'cell/w': masked('HalfHeld', "stop_gradient('w')"), 'cell/v': live('CellV')})
def block_in_nn_scan(p, xs):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, xs):
            return nn.scan(HalfHeld, **SCANNED)(name='cell')(jnp.ones(3), xs)[0].sum()
    return Net().apply({'params': p}, xs)


@program({'cell': {'w': XS, 'v': XS}}, XS, **{
    'cell/w': masked('HalfHeld', "stop_gradient('w')"), 'cell/v': live('CellV')})
def block_in_nn_scan_of_layers(p, xs):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, xs):
            loop = nn.scan(
                nn.remat(HalfHeld), variable_axes={'params': 0}, split_rngs={'params': True})
            return loop(name='cell')(jnp.ones(3), xs)[0].sum()
    return Net().apply({'params': p}, xs)


@program({'first': CELL['cell'], 'second': CELL['cell']}, **{
    'first/w': masked('HalfHeld', "stop_gradient('w')"), 'first/v': live('CellV'),
    'second/w': live('CellW'), 'second/v': masked('block', "stop_gradient('**/v')")})
def blocks_in_and_around_nn_jit_and_remat(p, x):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            c, _ = nn.jit(HalfHeld)(name='first')(jnp.ones(3), x)
            with sg.stop_gradient('**/v'):  # <- block
                return nn.jit(nn.remat(Cell))(name='second')(c, x)[0].sum()
    return Net().apply({'params': p}, x)


@program(CELL, XS, **{
    'cell/w': partly("stop_gradient('cell/w')", 'block'), 'cell/v': live()})
def block_in_a_raw_scan(p, xs):
    class Net(nn.Module):
        def setup(self):
            self.cell = Cell()

        def __call__(self, xs):
            def body(c, x):
                with sg.stop_gradient('cell/w'):  # <- block
                    return self.cell(c, x)[0], None
            c, _ = self.cell(jnp.ones(3), xs[0])
            return jax.lax.scan(body, c, xs)[0].sum()
    return Net().apply({'params': p}, xs)


@program(CELL, **{
    'cell/w': live('CellW'), 'cell/v': masked('block', "stop_gradient('cell/v')")})
def nn_vjp(p, x):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            with sg.stop_gradient('cell/v'):  # <- block
                out, pull = nn.vjp(lambda m, c: m(c, x)[0], Cell(name='cell'), jnp.ones(3))
                return (pull(x)[1] * out).sum()
    return Net().apply({'params': p}, x)


@program(PAIR, **{
    'gln/w': masked('block', "stop_gradient('gln')"), 'code/w': live('Scale')})
def block_in_an_inner_gradient(p, x):
    class Net(Pair):
        def __call__(self, x):
            with sg.stop_gradient('gln'):  # <- block
                return super().__call__(x)

    def step(p, _):
        grads = jax.grad(lambda p: Net().apply({'params': p}, x))(p)
        return jax.tree.map(lambda v, g: v - 0.1 * g, p, grads), None
    p, _ = jax.lax.scan(step, p, None, length=2)
    return (p['code']['w'] * x).sum()


@program(PAIR, **{
    'gln/w': masked('tree', "stop_gradient('gln')"), 'code/w': live()})
def block_of_a_tree_in_an_inner_gradient(p, x):
    def inner(p):
        p = sg.stop_gradient('gln')(p)  # <- tree
        return jnp.sin(p['gln']['w'] * p['code']['w'] * x).sum()
    return (jax.grad(inner)(p)['code']['w'] ** 2).sum()


@program(jax.tree.map(lambda v: jnp.stack([v] * 3), PAIR), XS, **{
    'gln/w': masked('block', "stop_gradient('gln')"), 'code/w': live('Scale')})
def block_in_an_ensemble(p, xs):
    class Net(Pair):
        def __call__(self, x):
            with sg.stop_gradient('gln'):  # <- block
                h = self.gln(x)
            return self.code(h).sum()
    return jax.vmap(lambda p, x: Net().apply({'params': p}, x))(p, xs).sum()


@program(PAIR, **{
    'gln/w': masked('helper', "stop_gradient('gln')"), 'code/w': live('Scale')})
def block_in_a_helper(p, x):
    def encode(net, x):
        with sg.stop_gradient('gln'):  # <- helper
            return net.gln(x)

    class Net(Pair):
        def __call__(self, x):
            return self.code(encode(self, x)).sum()
    return jax.jit(Net().apply)({'params': p}, x)


@program({'params': {'scale': X, 'bias': X}, 'batch_stats': {'mean': X, 'var': X ** 2 + 1}}, **{
    'params/scale': live('apply'), 'params/bias': live('apply'),
    'batch_stats/mean': masked('block', "stop_gradient('mean', collections='batch_stats')"),
    'batch_stats/var': live('var')})
def block_of_another_collection(p, x):
    var = jnp.exp(p['batch_stats']['var'])  # <- var
    p = p | {'batch_stats': p['batch_stats'] | {'var': var}}
    with sg.stop_gradient('mean', collections='batch_stats'):  # <- block
        return nn.BatchNorm(True).apply(p, x[None]).sum()  # <- apply


@program(lambda: nn.BatchNorm(False).init(jax.random.key(0), XS), XS, **{
    'params/scale': live('apply'), 'params/bias': live('apply'),
    'batch_stats/mean': unused, 'batch_stats/var': unused})
def running_statistics_in_training(p, xs):
    y, _ = nn.BatchNorm(False).apply(p, xs, mutable=['batch_stats'])  # <- apply
    return (y ** 3).sum()


ATTENTION = nn.MultiHeadDotProductAttention(num_heads=1, use_bias=False)


@program(lambda: ATTENTION.init(jax.random.key(0), XS), XS, **{
    'params/query/kernel': live('apply'), 'params/key/kernel': live('apply'),
    'params/value/kernel': masked('block', "stop_gradient('value')"),
    'params/out/kernel': live('apply')})
def attention(p, xs):
    with sg.stop_gradient('value'):  # <- block
        y = ATTENTION.apply(p, xs, mask=nn.make_causal_mask(jnp.ones(3)))  # <- apply
        return (y ** 2).sum()


def init_spectral_norm():
    return nn.SpectralNorm(nn.Dense(2)).init(jax.random.key(0), X, update_stats=False)


FLAX_STOP = 'stop_gradient in flax (normalization.py, SpectralNorm._spectral_normalize)'


@program(init_spectral_norm, **{
    'params/layer_instance/kernel': partly(FLAX_STOP, 'apply', 'apply'),
    'params/layer_instance/bias': live('apply'),
    'batch_stats/layer_instance/kernel/u': masked('apply', FLAX_STOP),
    'batch_stats/layer_instance/kernel/sigma': unused})
def spectral_norm(p, x):
    return nn.SpectralNorm(nn.Dense(2)).apply(p, x, update_stats=False).sum()  # <- apply


# What was wrong at first: literals handed to jitted functions, stops under vmap and in derivatives,
# bodies whose frames hold no line of the user's.


@program('a b', a=live('a'), b=live('b'))
def literals_into_jit(p, x):
    h = jnp.clip(p['a'], np.float32(-0.5))  # <- a
    largest = jax.jit(lambda v, u: jax.lax.max(u, v))
    return (h * x).sum() + largest(p['b'].sum() ** 2, -1.0)  # <- b


@program('w', XS, w=masked('w'))
def own_stop_in_vmap(p, xs):
    return jax.vmap(lambda x: jax.lax.stop_gradient(p['w'] * x))(xs).sum()  # <- w


@program('w', XS, w=live('w'))
def softmax_in_vmap(p, xs):
    return jax.vmap(lambda x: jax.nn.softmax(x * p['w'])[0])(xs).sum()  # <- w


@program('a w', a=masked('w'), w=partly('stop_gradient', 'w'))
def own_stop_in_an_inner_derivative(p, x):
    def inner(w):
        target = jax.lax.stop_gradient(p['a'] * p['w'])  # <- w
        return ((w * x - target) ** 2).sum()
    return (jax.grad(inner)(p['w']) ** 2).sum()


@program('a b', a=partly('gt', 'a'), b=flat('gt', 'a'))
def kinks_in_an_inner_derivative(p, x):
    slope = jax.grad(lambda x: jax.nn.relu(p['a'] * x + p['b']).sum())(x)  # <- a
    return (slope ** 2).sum()


RNN = nn.RNN(nn.SimpleCell(2))
ROUNDED = nn.RNN(nn.SimpleCell(2, activation_fn=jnp.round))


@program(lambda: RNN.init(jax.random.key(0), XS[None]), XS[None], **{
    f'params/cell/{k}': live('apply') for k in ('i/kernel', 'h/kernel', 'i/bias')})
def recurrent(p, xs):
    return RNN.apply(p, xs).sum()  # <- apply


@program(lambda: ROUNDED.init(jax.random.key(0), XS[None]), XS[None], **{
    f'params/cell/{k}': flat('round', 'apply') for k in ('i/kernel', 'h/kernel', 'i/bias')})
def rounded_recurrent(p, xs):
    return ROUNDED.apply(p, xs).sum()  # <- apply


@program('a b', a=flat('round', 'a'), b=live('b'))
def function_of_jax_in_remat(p, x):
    low = jax.checkpoint(jnp.round)(p['a'])  # <- a
    return (low * jax.checkpoint(jnp.sin)(p['b'])).sum()  # <- b


@program('a', a=live('loop'), reverse=False, reason='forward mode')
def straight_into_a_while_loop(p, x):
    body = lambda s: (s[0] + 1, s[1] * x)
    return jax.lax.while_loop(lambda s: s[0] < 3, body, (0, p['a']))[1].sum()  # <- loop


@program('a', a=partly('lt', 'loop', 'loop'), reverse=False, reason='forward mode')
def loop_whose_length_is_learned(p, x):
    return jax.lax.while_loop(
        lambda s: s.sum() < p['a'].sum() ** 2, lambda s: s + jnp.exp(p['a']), x).sum()  # <- loop


@program('a b', a=live('ref'), b=live('b'))
def line_of_a_reference(p, x):
    ref = jax.new_ref(p['a'])  # <- ref
    ref[...] = ref[...] + p['b'] * x  # <- b
    return ref[...].sum()


def entries_of_trees(p):
    return {'a': p['a'] * jnp.sin(p['b'])}['a']  # <- product


@program('a b', **{
    'a:a': live('call'), 'b:b': live('call'),
    'a:b': masked('call', "gradient_views({'a': 'a', 'b': 'b'}), entry 'a'"),
    'b:a': masked('call', "gradient_views({'a': 'a', 'b': 'b'}), entry 'b'")})
def line_of_views_of_a_function(p, x):
    out = sg.gradient_views({'a': 'a', 'b': 'b'})(entries_of_trees)(p)  # <- call
    return {k: v.sum() for k, v in out.items()}


@program('k v', k=partly('sort', 'sort', 'sort'), v=live('sort'))
def sorted_by_keys(p, x):
    k, v = jax.lax.sort((p['k'], p['v']), num_keys=1)  # <- sort
    return (k * v * x).sum()


def held_where_read(info, value):
    return jax.lax.stop_gradient(value)  # <- stop


@program('d w', d=masked('stop'), w=live('w'))
def own_stop_in_a_mapped_value(p, x):
    p = sg.map_values('d', held_where_read)(p)
    return (p['d'] * p['w'] * x).sum()  # <- w


@program('a b', jnp.arange(3.0), a=flat('searchsorted*', 'a'), b=live('b'))
def binned(p, edges):
    bins = jnp.searchsorted(edges, p['a'])  # <- a
    return (bins * p['b']).sum()  # <- b


@program('a b', a=live(), b=masked('inner', "gradient_views({'a': 'a', 'b': 'b'}), entry 'a'"))
def inner_gradient_of_views(p, x):
    views = sg.gradient_views({'a': 'a', 'b': 'b'})(lambda p: p['a'] ** 3 * p['b'] ** 2 * x)
    grads = jax.grad(lambda p: views(p)['a'].sum())(p)  # <- inner
    return (grads['a'] + grads['b']).sum()


@program('a b', a=live(), b=masked('push', "gradient_views({'a': 'a', 'b': 'b'})"))
def inner_tangents_of_views(p, x):
    views = sg.gradient_views({'a': 'a', 'b': 'b'})(lambda p: p['a'] ** 3 * p['b'] ** 2 * x)
    at = jax.tree.map(jnp.ones_like, p)
    return jax.jvp(lambda p: views(p)['a'], (at,), (p,))[1].sum()  # <- push


@jax.custom_vjp
def of_the_first(a, b):
    return jnp.sin(a)


of_the_first.defvjp(lambda a, b: (jnp.sin(a), (a, b)),
                    lambda ab, ct: (ct * jnp.cos(ab[0]), jnp.zeros_like(ab[1])))


@program('a b', a=live('call'), b=unused)
def custom_rule_with_an_idle_argument(p, x):
    return (of_the_first(p['a'], p['b']) * x).sum()  # <- call


@program('a', a=partly('lt', 'turns', 'beside'))
def loop_whose_result_is_rounded(p, x):
    out = jax.lax.while_loop(lambda s: s.sum() < 9, lambda s: s + jnp.exp(s), p['a'])  # <- turns
    return (jnp.round(out) * x).sum() + (p['a'] * x).sum()  # <- beside


@program('a b c', a=live('barrier'), b=unused, c=masked('kept'))
def several_operands_that_do_not_meet(p, x):
    held = jax.lax.stop_gradient(p['c'])  # <- kept
    a, _, c = jax.lax.optimization_barrier((p['a'], p['b'], held))  # <- barrier
    return (a * c * x).sum()


# The tests.


def params_of(program):
    return program.params() if callable(program.params) else program.params


def names(params):
    """Flatten a tree to ``{name: array}``, with the boxes of Flax opened."""
    is_box = lambda v: isinstance(v, nn.meta.AxisMetadata)
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_box)
    return {jax.tree_util.keystr(path, simple=True, separator='/'): nn.unbox(v)
            for path, v in leaves}


def marks(fn):
    """Find the marked lines of a function, or of the whole file, as ``{mark: line}``."""
    def scan(lines, first):
        return {mark: first + i for i, line in enumerate(lines)
                for mark in re.sub(r'.*?(# <- |$)', '', line, count=1).split()}
    module = inspect.getmodule(fn)
    return scan(inspect.getsource(module).splitlines(), 1) | scan(*inspect.getsourcelines(fn))


def lines_of(source):
    """Return the lines of ``'file:line (function), called at file:line (function)'``."""
    places = [re.fullmatch(r'(.*):(\d+) \(.+\)', s) for s in source.split(', called at ')]
    assert all(places) and {os.path.basename(m[1]) for m in places} == {FILE}, source
    return [int(m[2]) for m in places]


def same_operation(operation, expected):
    """Compare operations; a star at the end stands for anything."""
    if expected and expected.endswith('*'):
        return operation.startswith(expected[:-1])
    return operation == expected


def check_lines(source, mark, fn):
    if mark:
        assert source, f'no line, and not that of {mark}'
        several = isinstance(mark, tuple)
        lines = lines_of(source) if several else lines_of(source)[:1]
        assert lines == [marks(fn)[m] for m in (mark if several else (mark,))], source


@pytest.mark.parametrize('name', PROGRAMS)
def test_record(name):
    case = PROGRAMS[name]
    params = params_of(case)
    flow = sg.gradient_flow(case.fn, norms=case.norms)(params, *case.args)
    assert {r.name for r in flow} == set(names(params))
    for record in flow:
        several = f'{record.loss}:{record.name}'
        truth = case.truth[several if several in case.truth else record.name]
        assert record.verdict == truth.verdict, (several, record)
        if truth.operation or truth.verdict in ('REACHED', 'UNUSED'):
            assert same_operation(record.operation, truth.operation), (several, record)
        check_lines(record.source, truth.line, case.fn)
        check_lines(record.used_at, truth.used_at, case.fn)
        assert case.reason in record.reason or not record.reached, (several, record)
        assert case.reason or not record.reason or not record.reached, (several, record)
    assert len(flow) == len(case.truth)


def test_dict_of_losses():
    names = ['plain', 'own_stop', 'comparison']
    params = {k: X for k in 'aw'}
    flow = sg.gradient_flow({k: PROGRAMS[k].fn for k in names})(params, X)
    assert flow.to_dict().keys() == set(names)
    for record in flow:
        truth = PROGRAMS[record.loss].truth[record.name]
        assert (record.verdict, record.operation) == truth[:2]
        check_lines(record.source, truth.line, PROGRAMS[record.loss].fn)


def points(params, count=4):
    """Make trees like ``params`` with random floats."""
    rng = np.random.default_rng(0)

    def draw(v):
        v = jnp.asarray(v)
        if jnp.issubdtype(v.dtype, jnp.complexfloating):
            return jnp.asarray(rng.normal(size=v.shape) + 1j * rng.normal(size=v.shape), v.dtype)
        if jnp.issubdtype(v.dtype, jnp.floating):
            return jnp.asarray(rng.normal(size=v.shape), v.dtype)
        return v
    return [params, *(jax.tree.map(draw, params) for _ in range(count - 1))]


@pytest.mark.thinned(5)
@pytest.mark.parametrize('name', PROGRAMS)
def test_gradients(name):
    case = PROGRAMS[name]
    params = params_of(case)
    losses = jax.eval_shape(case.fn, params, *case.args)
    for loss in losses if isinstance(losses, dict) else [None]:
        truth = {k.split(':')[-1]: t for k, t in case.truth.items()
                 if k.startswith(f'{loss}:') or ':' not in k}
        pick = (lambda out: out) if loss is None else lambda out, loss=loss: out[loss]
        seen = dict.fromkeys(names(params), False)
        for point in points(params):
            for key, g in gradients(case, pick, point, truth).items():
                seen[key] |= bool((np.asarray(g) != 0).any())
        for key, t in truth.items():
            reached = t.verdict in ('REACHED', 'REACHED_PARTLY')
            if t.verdict != 'UNKNOWN':
                assert seen[key] == (reached and not case.vanishes), (loss, key, t.verdict)


def gradients(case, pick, params, truth):
    """Return the gradients of what is known; in forward mode where reverse mode is an error."""
    grad = jax.jit(jax.grad(lambda p, *args: pick(case.fn(p, *args)), allow_int=True))
    if case.reverse:
        grads = names(grad(params, *case.args))
        return {k: g for k, g in grads.items() if g.dtype != jax.dtypes.float0}
    refusal = '^(Reverse-mode differentiation does not work|Pure callbacks do not support JVP)'
    with pytest.raises(ValueError, match=refusal):
        grad(params, *case.args)
    known = {k: v for k, v in params.items() if truth[k].verdict != 'UNKNOWN'}
    push = jax.jit(jax.jacfwd(lambda known, *args: pick(case.fn(params | known, *args))))
    return push(known, *case.args)
