"""Why a gradient is zero, in losses of modules of flax.nnx."""

import jax.numpy as jnp
import pytest

import flax_sg as sg
from flax_sg import nnx


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.encoder = nnx.Linear(2, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs)])

    def __call__(self, x):
        with nnx.stop_gradient(self.encoder):
            h = self.drop(self.norm(self.encoder(x)))
        return self.layers[0](h).sum()


def loss(model, x):
    return model(x)


X = jnp.arange(8.0).reshape(4, 2)


@pytest.mark.parametrize('norms', [False, True])
@pytest.mark.parametrize('what', ['module', 'state', 'state of a type'])
def test_a_module_and_a_state(what, norms):
    model = Net()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    state = nnx.state(model)
    run, of = {
        'module': (loss, model),
        'state': (lambda state, x: loss(nnx.merge(graph, state), x), state),
        'state of a type': (
            lambda params, x: loss(nnx.merge(graph, params, rest, copy=True), x),
            params,
        ),
    }[what]
    flow = sg.gradient_flow(run, norms=norms)(of, X)
    names = {record.name for record in flow.records}
    assert names == {
        *('encoder/kernel', 'encoder/bias', 'norm/scale', 'norm/bias'),
        *('layers/0/kernel', 'layers/0/bias'),
    }
    record = flow['loss', 'encoder/kernel']
    assert str(record.verdict) == 'MASKED' and 'test_flow.py:' in record.source
    assert 'stop_gradient(within(Linear))' in str(record.obstacles)
    assert str(flow['loss', 'layers/0/kernel'].verdict) == 'REACHED'


def test_assert_flow():
    sg.assert_flow({'loss': loss}, {'loss': ['layers', 'norm']}, Net(), X)
    with pytest.raises(AssertionError, match='encoder/kernel'):
        sg.assert_flow({'loss': loss}, {'loss': True}, Net(), X)
    with pytest.raises(sg.UnmatchedPathError, match="matches 'head'"):
        sg.assert_flow({'loss': loss}, {'loss': 'head'}, Net(), X)
