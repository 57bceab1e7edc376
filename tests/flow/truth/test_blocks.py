"""Truth for gradient_flow: the library's blocks, values and views."""

import jax
import jax.numpy as jnp
import pytest

import flax_sg as sg
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
    partly,
    rule,
    unused,
)

PROGRAMS = Programs()
program = PROGRAMS.program


# Blocks, and transforms of values.


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


@program(
    PAIR,
    **{'gln/w': masked('block', "stop_gradient(path('gln') & where(*"), 'code/w': live('Scale')},
)
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


@program(
    PAIR, **{'gln/w': partly("stop_gradient('gln')", 'block', 'Scale'), 'code/w': live('Scale')}
)
def block_then_live(p, x):
    class Net(Pair):
        def __call__(self, x):
            with sg.stop_gradient('gln'):  # <- block
                h = self.gln(x)
            return self.code(self.gln(h)).sum()

    return Net().apply({'params': p}, x)


@program(
    PAIR,
    **{
        'gln/w': masked('outer', "stop_gradient('gln')"),
        'code/w': masked('inner', "stop_gradient('code')"),
    },
)
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


@program(PAIR, **{'gln/w': masked('made', 'stop_gradient(everything)'), 'code/w': live('Scale')})
def decorated_class(p, x):
    class Net(Pair):
        def setup(self):
            self.gln = Frozen()  # <- made
            self.code = Scale()

    return Net().apply({'params': p}, x)


@program(PAIR, **{'gln/w': masked('use', "stop_gradient('gln')"), 'code/w': live('Scale')})
def decorated_method(p, x):
    class Net(Pair):
        @sg.stop_gradient('gln')
        def encode(self, x):
            return self.gln(x)

        def __call__(self, x):
            h = self.encode(x)  # <- use
            return self.code(h).sum()

    return Net().apply({'params': p}, x)


@program(PAIR, **{'gln/w': partly("stop_gradient('w')", 'made', 'Scale'), 'code/w': live('Scale')})
def mirrored_instance(p, x):
    class Net(Pair):
        def __call__(self, x):
            held = sg.stop_gradient('w')(self.gln)  # <- made
            h = held(x)
            return self.code(self.gln(h)).sum()

    return Net().apply({'params': p}, x)


@program(PAIR, **{'gln/w': masked('use', "stop_gradient('gln')"), 'code/w': live('live')})
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


@program(
    {'a': X, 'b': X, 'c': X, 'd': X},
    a=live('cast'),
    b=flat('round', 'round'),
    c=unused,
    d=live('d'),
)
def mapped_values(p, x):
    def rounded(info, v):
        return jnp.round(v)  # <- round

    p = sg.map_values('a', lambda info, v: v.astype(jnp.bfloat16))(p)  # <- cast
    p = sg.map_values('b', rounded)(p)
    p = sg.map_values('c', lambda info, v: jnp.ones(3))(p)
    return (p['a'] * p['b'] * p['c'] * p['d'] * x).sum()  # <- d


@program(
    {'net': PAIR, 'target': {'gln': {'w': X}}, 'held': {'code': {'w': X}}},
    **{
        'net/gln/w': unused,
        'net/code/w': unused,
        'target/gln/w': live('Scale'),
        'held/code/w': masked('block', "stop_gradient('code')"),
    },
)
def replaced_values(p, x):
    with sg.replace_values('gln', p['target']), sg.replace_values('code', p['held']):
        with sg.stop_gradient('code'):  # <- block
            return Pair().apply({'params': p['net']}, x)


def held_where_read(info, value):
    return jax.lax.stop_gradient(value)  # <- stop


@program('d w', d=masked('stop'), w=live('w'))
def own_stop_in_a_mapped_value(p, x):
    p = sg.map_values('d', held_where_read)(p)
    return (p['d'] * p['w'] * x).sum()  # <- w


# Views.


VIEWS = sg.gradient_views({'one': 'gln', 'two': 'code'})


@program(
    PAIR,
    **{
        'one:gln/w': live(),
        'two:code/w': live(),
        'one:code/w': masked('views', "gradient_views({'one': 'gln', 'two': 'code'}), entry 'one'"),
        'two:gln/w': masked('views', "gradient_views({'one': 'gln', 'two': 'code'}), entry 'two'"),
    },
)
def views(p, x):
    class Net(Pair):
        def __call__(self, x):
            out = VIEWS(lambda net, x: jnp.sin(net.code(net.gln(x))))(self, x)  # <- views
            return {'one': out['one'].sum(), 'two': (out['two'] ** 2).sum()}

    return Net().apply({'params': p}, x)


@program(
    'a b c',
    **{
        'one:a': live(),
        'one:c': flat('sign', 'c'),
        'two:b': live(),
        'two:c': unused,
        'one:b': masked('views', "gradient_views({'one': 'a', 'two': 'b'}), entry 'one'"),
        'two:a': masked('views', "gradient_views({'one': 'a', 'two': 'b'}), entry 'two'"),
    },
)
def views_of_a_function(p, x):
    out = sg.gradient_views({'one': ['a'], 'two': 'b'})(lambda q: q['a'] * q['b'] * x)
    out = out({'a': p['a'], 'b': p['b']})  # <- views
    one = out['one'] * jnp.sign(p['c'])  # <- c
    return {'one': one.sum(), 'two': jnp.exp(out['two']).sum()}


def entries_of_trees(p):
    return {'a': p['a'] * jnp.sin(p['b'])}['a']  # <- product


@program(
    'a b',
    **{
        'a:a': live('call'),
        'b:b': live('call'),
        'a:b': masked('call', "gradient_views({'a': 'a', 'b': 'b'}), entry 'a'"),
        'b:a': masked('call', "gradient_views({'a': 'a', 'b': 'b'}), entry 'b'"),
    },
)
def line_of_views_of_a_function(p, x):
    out = sg.gradient_views({'a': 'a', 'b': 'b'})(entries_of_trees)(p)  # <- call
    return {k: v.sum() for k, v in out.items()}


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


# Blocks under transforms of JAX.


@program(PAIR, **{'gln/w': masked('block', "stop_gradient('gln')"), 'code/w': live('Scale')})
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


@program(PAIR, **{'gln/w': masked('tree', "stop_gradient('gln')"), 'code/w': live()})
def block_of_a_tree_in_an_inner_gradient(p, x):
    def inner(p):
        p = sg.stop_gradient('gln')(p)  # <- tree
        return jnp.sin(p['gln']['w'] * p['code']['w'] * x).sum()

    return (jax.grad(inner)(p)['code']['w'] ** 2).sum()


@program(
    jax.tree.map(lambda v: jnp.stack([v] * 3), PAIR),
    XS,
    **{'gln/w': masked('block', "stop_gradient('gln')"), 'code/w': live('Scale')},
)
def block_in_an_ensemble(p, xs):
    class Net(Pair):
        def __call__(self, x):
            with sg.stop_gradient('gln'):  # <- block
                h = self.gln(x)
            return self.code(h).sum()

    return jax.vmap(lambda p, x: Net().apply({'params': p}, x))(p, xs).sum()


@program(PAIR, **{'gln/w': masked('helper', "stop_gradient('gln')"), 'code/w': live('Scale')})
def block_in_a_helper(p, x):
    def encode(net, x):
        with sg.stop_gradient('gln'):  # <- helper
            return net.gln(x)

    class Net(Pair):
        def __call__(self, x):
            return self.code(encode(self, x)).sum()

    return jax.jit(Net().apply)({'params': p}, x)


# The tests.


@pytest.mark.parametrize('name', PROGRAMS)
def test_record(name):
    check_record(PROGRAMS[name])


@pytest.mark.thinned(5)
@pytest.mark.parametrize('name', PROGRAMS)
def test_gradients(name):
    check_gradients(PROGRAMS[name])
