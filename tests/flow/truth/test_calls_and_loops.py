"""Truth for gradient_flow: calls, vectorised functions, loops and branches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from flow_truth import (
    XS,
    Programs,
    X,
    check_gradients,
    check_record,
    flat,
    live,
    masked,
    partly,
    unused,
)

PROGRAMS = Programs()
program = PROGRAMS.program


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


@program('a b', a=flat('round', 'a'), b=live('b'))
def function_of_jax_in_remat(p, x):
    low = jax.checkpoint(jnp.round)(p['a'])  # <- a
    return (low * jax.checkpoint(jnp.sin)(p['b'])).sum()  # <- b


@program('a b c', a=live('barrier'), b=unused, c=masked('kept'))
def several_operands_that_do_not_meet(p, x):
    held = jax.lax.stop_gradient(p['c'])  # <- kept
    a, _, c = jax.lax.optimization_barrier((p['a'], p['b'], held))  # <- barrier
    return (a * c * x).sum()


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


@program({'layers': {'w': XS, 'b': XS}}, **{'layers/w': live('live'), 'layers/b': masked('stop')})
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


@program('a', a=live('loop'), reverse=False, reason='forward mode')
def straight_into_a_while_loop(p, x):
    body = lambda s: (s[0] + 1, s[1] * x)
    return jax.lax.while_loop(lambda s: s[0] < 3, body, (0, p['a']))[1].sum()  # <- loop


@program('a', a=partly('lt', 'more', 'step'), reverse=False, reason='forward mode')
def loop_whose_length_is_learned(p, x):
    more = lambda s: s.sum() < p['a'].sum() ** 2  # <- more
    step = lambda s: s + jnp.exp(p['a'])  # <- step
    return jax.lax.while_loop(more, step, x).sum()


@program('a', a=partly('round', 'beside', 'beside'))
def loop_whose_result_is_rounded(p, x):
    out = jax.lax.while_loop(lambda s: s.sum() < 9, lambda s: s + jnp.exp(s), p['a'])
    return (jnp.round(out) * x).sum() + (p['a'] * x).sum()  # <- beside


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


# The tests.


@pytest.mark.parametrize('name', PROGRAMS)
def test_record(name):
    check_record(PROGRAMS[name])


@pytest.mark.thinned(5)
@pytest.mark.parametrize('name', PROGRAMS)
def test_gradients(name):
    check_gradients(PROGRAMS[name])
