"""The check, before the first block, that Flax's reads pass where the library stands."""

import subprocess
import sys

import flax
import jax
import pytest
from flax.core.scope import Scope

import flax_sg as sg
from flax_sg import nn
from internals import (
    not_checked_yet,
    nothing_is_open,
    pass_by,
    replace_self_check,
    self_check,
    self_check_of,
)

HELD = sg.stop_gradient('**/held')


def test_it_passes():
    self_check_of(HELD)


@pytest.mark.parametrize(
    'owner, name, variable', [(Scope, 'get_variable', "['held']"), (Scope, 'variables', "['held']")]
)
def test_reads_that_pass_by_are_an_error(monkeypatch, owner, name, variable):
    pass_by(monkeypatch, owner, name)
    with pytest.raises(sg.UnsupportedVersionError) as error:
        self_check_of(HELD)
    assert str(error.value) == (
        'A tiny model was run in a block to see whether masks work here, and its variable '
        f'{variable} is held, and has a gradient. flax {flax.__version__} with jax '
        f'{jax.__version__} reads variables in a way that this flax_sg does not know, so that '
        'nothing it says about gradients would be true. Install a newer flax_sg, or an older '
        'flax.'
    )


def test_what_is_live_must_have_a_gradient():
    with pytest.raises(sg.UnsupportedVersionError, match='is not held, and has no gradient'):
        self_check_of(sg.stop_gradient())


def test_an_error_of_the_check_is_told():
    def block():
        raise KeyError('new')

    with pytest.raises(sg.UnsupportedVersionError, match="and it raised KeyError: 'new'"):
        self_check(block)


def _uses():
    def block():
        with sg.stop_gradient(True, allow_unmatched=True):
            pass

    return {
        'block': block,
        'class': lambda: sg.stop_gradient('*')(nn.Dense),
        'instance': lambda: sg.stop_gradient('*')(nn.Dense(1)),
        'method': lambda: sg.stop_gradient('*')(nn.Dense.__call__),
        'views': lambda: sg.gradient_views({'a': '*'})(nn.Dense),
    }


@pytest.mark.parametrize('use', _uses())
def test_each_use_checks_once_and_after_a_failure_again(monkeypatch, use):
    calls = []

    def check(block):
        calls.append(block)
        if len(calls) == 1:
            raise sg.UnsupportedVersionError('planted')

    replace_self_check(monkeypatch, check)
    with not_checked_yet():
        with pytest.raises(sg.UnsupportedVersionError, match='planted'):
            _uses()[use]()
        assert nothing_is_open()
        _uses()[use]()
        _uses()[use]()
        assert len(calls) == 2


def test_a_first_block_inside_a_running_module_and_a_trace():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            with nn.stop_gradient('Dense_0/kernel'):
                return nn.Dense(1)(x).sum()

    seen = []

    def intercept(next_fn, args, kwargs, context):
        seen.append(type(context.module))
        return next_fn(*args, **kwargs)

    x = jax.numpy.ones((1, 2))
    params = Net().init(jax.random.key(0), x)
    with not_checked_yet(), flax.linen.intercept_methods(intercept):
        grads = jax.jit(jax.grad(Net().apply))(params, x)['params']['Dense_0']
    assert set(seen) == {Net, nn.Dense}
    assert (grads['kernel'] == 0).all() and (grads['bias'] == 1).all()


def test_no_device_is_touched():
    code = (
        'import flax_sg as sg\n'
        'with sg.stop_gradient(True, allow_unmatched=True): pass\n'
        'from jax._src import xla_bridge\n'
        'assert not xla_bridge._backends'
    )
    subprocess.run([sys.executable, '-c', code], check=True)
