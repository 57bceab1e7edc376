"""Truth for gradient_flow: rules of one's own for derivatives, and gradients in the loss."""

import jax
import jax.numpy as jnp
import pytest

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
    rule,
    unused,
)

PROGRAMS = Programs()
program = PROGRAMS.program


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
    equation = lambda v: v**3 - p['target']
    step = lambda f, v: jax.lax.fori_loop(0, 20, lambda i, v: v - f(v) / (3 * v**2 + 1e-3), v)
    return jax.lax.custom_root(equation, 1.0, step, lambda g, y: y / g(1.0))  # <- root


@jax.custom_vjp
def of_the_first(a, b):
    return jnp.sin(a)


of_the_first.defvjp(
    lambda a, b: (jnp.sin(a), (a, b)), lambda ab, ct: (ct * jnp.cos(ab[0]), jnp.zeros_like(ab[1]))
)


@program('a b', a=live('call'), b=unused)
def custom_rule_with_an_idle_argument(p, x):
    return (of_the_first(p['a'], p['b']) * x).sum()  # <- call


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
        return (held * p['w'] * x**2).sum()

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


@program('a w', a=masked('w'), w=partly('stop_gradient', 'w'))
def own_stop_in_an_inner_derivative(p, x):
    def inner(w):
        target = jax.lax.stop_gradient(p['a'] * p['w'])  # <- w
        return ((w * x - target) ** 2).sum()

    return (jax.grad(inner)(p['w']) ** 2).sum()


@program('a b', a=partly('gt', 'a'), b=flat('gt', 'a'))
def kinks_in_an_inner_derivative(p, x):
    slope = jax.grad(lambda x: jax.nn.relu(p['a'] * x + p['b']).sum())(x)  # <- a
    return (slope**2).sum()


# The tests.


@pytest.mark.parametrize('name', PROGRAMS)
def test_record(name):
    check_record(PROGRAMS[name])


@pytest.mark.thinned(5)
@pytest.mark.parametrize('name', PROGRAMS)
def test_gradients(name):
    check_gradients(PROGRAMS[name])
