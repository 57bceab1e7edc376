"""Setup, and cached properties, that first run in a function which JAX traces.

What they make there is of that trace: the same program with the values made in each place is right.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

import flax_sg as sg
from flax_sg import nn

ones, one = nn.initializers.ones, jnp.ones(())


class Derived(nn.Module):
    def setup(self):
        self.w = self.param('w', ones, ())
        self.s = [2 * self.w]
        self.f = functools.partial(jnp.multiply, self.w)

    def __call__(self, x):
        return self.w * x + self.s[0] * x + self.f(x)  # 4 w x


class Cached(nn.Module):
    @nn.compact
    def __call__(self, x):
        return (
            self.double * x + self.get_variable('params', 'w') * 2 * x
            if (not self.is_initializing())
            else self.param('w', ones, ()) * x
        )

    @functools.cached_property
    def double(self):
        return 2 * self.get_variable('params', 'w')


TRACES = {
    'scan': lambda f: lambda x: jax.lax.scan(lambda c, _: (c + f(x), None), 0.0, None, length=1)[0],
    'jit': jax.jit,
    'checkpoint': jax.checkpoint,
    'cond': lambda f: lambda x: jax.lax.cond(x > 0, f, lambda x: 0.0, x),
    'vmap': lambda f: lambda x: jax.vmap(f)(x[None])[0],
    'while': lambda f: (
        lambda x: jax.lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, f(x)), (0, 0.0))[1]
    ),
    'grad': lambda f: lambda x: jax.grad(f)(x) * x,
}
BLOCKS = {
    'none': sg.stop_gradient(sg.nothing),
    'stop': sg.stop_gradient('sub'),
    'scale': sg.scale_gradient('sub', 10.0),
    'map': sg.map_values('sub', lambda i, w: w * 3),
}
SLOPE = {'none': 4, 'stop': 0, 'scale': 40, 'map': 12}


@pytest.mark.thinned(3)
@pytest.mark.parametrize('jit', [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize('block', BLOCKS)
@pytest.mark.parametrize(
    'trace',
    [
        pytest.param(name, marks=[pytest.mark.long] * (name in ('vmap', 'grad')))
        for name in TRACES
        if name != 'while'
    ],
)
@pytest.mark.parametrize('sub', [Derived, Cached])
def test_first_in_a_trace_and_then_outside(sub, trace, block, jit):
    class Net(nn.Module):
        def setup(self):
            self.sub = sub()

        def __call__(self, x):
            if self.is_initializing():
                return self.sub(x)
            with BLOCKS[block]:
                first = TRACES[trace](lambda x: self.sub(x))(x)
                second = self.sub(x)
                third = TRACES[trace](lambda x: self.sub(x))(x)
            return first + 100 * second + 10000 * third + 1000000 * self.sub(x)

    apply = jax.jit(Net().apply) if jit else Net().apply
    params = {'params': {'sub': {'w': one}}}
    grads = jax.grad(apply)(params, one)
    assert float(grads['params']['sub']['w']) == pytest.approx(SLOPE[block] * 10101 + 4 * 1000000)
    assert float(apply(params, one)) == pytest.approx(
        4 * 10101 * (3 if block == 'map' else 1) + 4000000
    )


@pytest.mark.parametrize('sub', [Derived, Cached])
def test_in_the_body_of_a_while_loop(sub):
    class Net(nn.Module):
        def setup(self):
            self.sub = sub()

        def __call__(self, x):
            with nn.map_values('sub', lambda info, w: w * 3):
                return TRACES['while'](lambda x: self.sub(x))(x) + self.sub(x)

    params = {'params': {'sub': {'w': one}}}
    assert float(jax.jit(Net().apply)(params, one)) == 24
