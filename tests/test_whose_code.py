"""Names in a block are those of the module in whose code it stands, whoever calls that code."""

import functools

import jax
import jax.numpy as jnp
import pytest

from flax_sg import nn

ones = nn.initializers.ones


class Caller(nn.Module):
    """Has a variable of the same name, and calls what it is given in several ways."""

    def setup(self):
        self.w = self.param('w', ones, ())

    @nn.nowrap
    def unwrapped(self, f, x):
        return f(x)

    def wrapped(self, f, x):
        return f(x)

    def generator(self, f, x):
        yield f(x)

    @property
    def calls(self):
        return lambda f, x: f(x)

    @nn.nowrap
    def nested(self, f, x):
        def call(x):
            return [f(x) for _ in range(1)][0]
        return call(x)


CALLS = {
    'unwrapped': lambda s, f, x: s.unwrapped(f, x), 'wrapped': lambda s, f, x: s.wrapped(f, x),
    'generator': lambda s, f, x: next(s.generator(f, x)), 'property': lambda s, f, x: s.calls(f, x),
    'nested': lambda s, f, x: s.nested(f, x),
    'lambda': lambda s, f, x: s.unwrapped(lambda x: f(x), x),
    'partial': lambda s, f, x: s.wrapped(functools.partial(lambda a, x: f(x), 1), x),
    'jit': lambda s, f, x: s.unwrapped(jax.jit(f), x),
    'map': lambda s, f, x: s.wrapped(jax.jit(jax.vmap(f)), x[None])[0],
    'scan': lambda s, f, x: s.wrapped(lambda x: jax.lax.scan(
        lambda c, _: (c, f(x)), x, None, length=1)[1][0], x),
    'twice': lambda s, f, x: s.wrapped(lambda x: s.unwrapped(f, x), x),
}
WRITTEN = ['in the method', 'in setup', 'in a nested function', 'in a property']


class Writer(nn.Module):
    where: str
    call: str

    def setup(self):
        self.s, self.w = Caller(), self.param('w', ones, ())

        def block(x):
            with nn.stop_gradient('w'):
                return self.w * x
        self.of_setup = lambda x: block(x)

    @property
    def of_property(self):
        def block(x):
            with nn.stop_gradient('w'):
                return self.w * x
        return block

    def __call__(self, x):
        def in_method(x):
            with nn.stop_gradient('w'):
                return self.w * x

        def outer(x):
            def inner(x):
                with nn.stop_gradient('w'):
                    return self.w * x
            return inner(x)
        f = dict(zip(WRITTEN, (in_method, self.of_setup, outer, self.of_property), strict=True))
        return CALLS[self.call](self.s, f[self.where], x) + self.s.wrapped(lambda x: self.s.w * x, x)


@pytest.mark.parametrize('call', CALLS)
@pytest.mark.thinned(2)
@pytest.mark.parametrize('where', WRITTEN)
def test_a_function_that_another_module_calls(where, call):
    params = {'w': jnp.array(1.0), 's': {'w': jnp.array(1.0)}}
    grads = jax.grad(lambda p: Writer(where, call).apply({'params': p}, jnp.array(2.0)))(params)
    assert (grads['w'], grads['s']['w']) == (0, 2)


def test_it_may_be_called_without_the_module_that_wrote_it():
    """Then there is none whose names could be meant but the one that is running."""
    class Maker(nn.Module):
        def setup(self):
            self.s, self.w = Caller(), self.param('w', ones, ())

        def make(self):
            def f(x):
                with nn.stop_gradient('w'):
                    return self.w * x
            return f

        def __call__(self, x):
            return self.make()(x) + self.s.w * x
    grads = jax.grad(lambda p: Maker().apply({'params': p}, 2.0))(
        {'w': jnp.array(1.0), 's': {'w': jnp.array(1.0)}})
    assert (grads['w'], grads['s']['w']) == (0, 2)


class Deep(nn.Module):
    kind: str

    def setup(self):
        self.w = self.param('w', ones, ())

    @nn.nowrap
    def curvature(self, xs):
        def f(x):
            with nn.stop_gradient('w'):
                return self.w * x ** 3

        def down(x, depth):
            return f(x) if depth == 0 else down(x, depth - 1)
        return {'hessian': lambda: jax.vmap(jax.hessian(f))(xs),
                'jitted': lambda: jax.jit(jax.vmap(jax.hessian(f)))(xs),
                'map': lambda: jax.lax.map(jax.hessian(f), xs),
                'recursion': lambda: down(xs, 60)}[self.kind]().sum()

    @property
    def in_property(self):
        return self.curvature(jnp.ones(1))


class Top(nn.Module):
    kind: str
    named: bool

    def setup(self):
        self.s = Deep(self.kind)
        if self.named:
            self.w = self.param('w', ones, ())

    def __call__(self):
        return self.s.curvature(jnp.ones(1)) + self.s.in_property


@pytest.mark.parametrize('named', [False, True])
@pytest.mark.parametrize('kind', ['hessian', 'jitted', 'map', 'recursion'])
def test_however_deep_in_calls_the_block_is(kind, named):
    params = {'s': {'w': jnp.array(1.0)}, **({'w': jnp.array(1.0)} if named else {})}
    grads = jax.grad(lambda p: Top(kind, named).apply({'params': p}))(params)
    assert grads['s']['w'] == 0
