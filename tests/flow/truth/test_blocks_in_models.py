"""Truth for gradient_flow: blocks in lifted loops, and in Flax's layers."""

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
    unused,
)

PROGRAMS = Programs()
program = PROGRAMS.program


# Lifted transforms.


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


@program(
    CELL, XS, **{'cell/w': masked('block', "stop_gradient('cell/w')"), 'cell/v': live('CellV')}
)
def block_around_nn_scan(p, xs):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, xs):
            with sg.stop_gradient('cell/w'):  # <- block
                return nn.scan(Cell, **SCANNED)(name='cell')(jnp.ones(3), xs)[0].sum()

    return Net().apply({'params': p}, xs)


@program(CELL, XS, **{'cell/w': masked('HalfHeld', "stop_gradient('w')"), 'cell/v': live('CellV')})
def block_in_nn_scan(p, xs):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, xs):
            return nn.scan(HalfHeld, **SCANNED)(name='cell')(jnp.ones(3), xs)[0].sum()

    return Net().apply({'params': p}, xs)


@program(
    {'cell': {'w': XS, 'v': XS}},
    XS,
    **{'cell/w': masked('HalfHeld', "stop_gradient('w')"), 'cell/v': live('CellV')},
)
def block_in_nn_scan_of_layers(p, xs):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, xs):
            loop = nn.scan(
                nn.remat(HalfHeld), variable_axes={'params': 0}, split_rngs={'params': True}
            )
            return loop(name='cell')(jnp.ones(3), xs)[0].sum()

    return Net().apply({'params': p}, xs)


@program(
    {'first': CELL['cell'], 'second': CELL['cell']},
    **{
        'first/w': masked('HalfHeld', "stop_gradient('w')"),
        'first/v': live('CellV'),
        'second/w': live('CellW'),
        'second/v': masked('block', "stop_gradient('**/v')"),
    },
)
def blocks_in_and_around_nn_jit_and_remat(p, x):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            c, _ = nn.jit(HalfHeld)(name='first')(jnp.ones(3), x)
            with sg.stop_gradient('**/v'):  # <- block
                return nn.jit(nn.remat(Cell))(name='second')(c, x)[0].sum()

    return Net().apply({'params': p}, x)


@program(CELL, XS, **{'cell/w': partly("stop_gradient('cell/w')", 'block'), 'cell/v': live()})
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


@program(CELL, **{'cell/w': live('CellW'), 'cell/v': masked('block', "stop_gradient('cell/v')")})
def nn_vjp(p, x):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            with sg.stop_gradient('cell/v'):  # <- block
                out, pull = nn.vjp(lambda m, c: m(c, x)[0], Cell(name='cell'), jnp.ones(3))
                return (pull(x)[1] * out).sum()

    return Net().apply({'params': p}, x)


# Layers of Flax.


@program(
    {'params': {'scale': X, 'bias': X}, 'batch_stats': {'mean': X, 'var': X**2 + 1}},
    **{
        'params/scale': live('apply'),
        'params/bias': live('apply'),
        'batch_stats/mean': masked('block', "stop_gradient('mean', collections='batch_stats')"),
        'batch_stats/var': live('var'),
    },
)
def block_of_another_collection(p, x):
    var = jnp.exp(p['batch_stats']['var'])  # <- var
    p = p | {'batch_stats': p['batch_stats'] | {'var': var}}
    with sg.stop_gradient('mean', collections='batch_stats'):  # <- block
        return nn.BatchNorm(True).apply(p, x[None]).sum()  # <- apply


@program(
    lambda: nn.BatchNorm(False).init(jax.random.key(0), XS),
    XS,
    **{
        'params/scale': live('apply'),
        'params/bias': live('apply'),
        'batch_stats/mean': unused,
        'batch_stats/var': unused,
    },
)
def running_statistics_in_training(p, xs):
    y, _ = nn.BatchNorm(False).apply(p, xs, mutable=['batch_stats'])  # <- apply
    return (y**3).sum()


ATTENTION = nn.MultiHeadDotProductAttention(num_heads=1, use_bias=False)


@program(
    lambda: ATTENTION.init(jax.random.key(0), XS),
    XS,
    **{
        'params/query/kernel': live('apply'),
        'params/key/kernel': live('apply'),
        'params/value/kernel': masked('block', "stop_gradient('value')"),
        'params/out/kernel': live('apply'),
    },
)
def attention(p, xs):
    with sg.stop_gradient('value'):  # <- block
        y = ATTENTION.apply(p, xs, mask=nn.make_causal_mask(jnp.ones(3)))  # <- apply
        return (y**2).sum()


def init_spectral_norm():
    return nn.SpectralNorm(nn.Dense(2)).init(jax.random.key(0), X, update_stats=False)


FLAX_STOP = 'stop_gradient in flax (normalization.py, SpectralNorm._spectral_normalize)'


@program(
    init_spectral_norm,
    **{
        'params/layer_instance/kernel': partly(FLAX_STOP, 'apply', 'apply'),
        'params/layer_instance/bias': live('apply'),
        'batch_stats/layer_instance/kernel/u': masked('apply', FLAX_STOP),
        'batch_stats/layer_instance/kernel/sigma': unused,
    },
)
def spectral_norm(p, x):
    return nn.SpectralNorm(nn.Dense(2)).apply(p, x, update_stats=False).sum()  # <- apply


RNN = nn.RNN(nn.SimpleCell(2))
ROUNDED = nn.RNN(nn.SimpleCell(2, activation_fn=jnp.round))


@program(
    lambda: RNN.init(jax.random.key(0), XS[None]),
    XS[None],
    **{f'params/cell/{k}': live('apply') for k in ('i/kernel', 'h/kernel', 'i/bias')},
)
def recurrent(p, xs):
    return RNN.apply(p, xs).sum()  # <- apply


@program(
    lambda: ROUNDED.init(jax.random.key(0), XS[None]),
    XS[None],
    **{f'params/cell/{k}': flat('round', 'apply') for k in ('i/kernel', 'h/kernel', 'i/bias')},
)
def rounded_recurrent(p, xs):
    return ROUNDED.apply(p, xs).sum()  # <- apply


# The tests.


@pytest.mark.parametrize('name', PROGRAMS)
def test_record(name):
    check_record(PROGRAMS[name])


@pytest.mark.thinned(5)
@pytest.mark.parametrize('name', PROGRAMS)
def test_gradients(name):
    check_gradients(PROGRAMS[name])
