"""The front end comes when flax.nnx does, and not before."""

import subprocess
import sys
import textwrap

import pytest

BLOCK = """
model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
with sg.stop_gradient(model):
    grads = nnx.grad(lambda m: m(jax.numpy.ones((1, 1))).sum())(model)
assert not grads['kernel'][...].any()
"""
ORDERS = {
    'flax_sg first': 'import flax_sg as sg\nfrom flax import nnx',
    'flax.nnx first': 'from flax import nnx\nimport flax_sg as sg',
    'by its own name': 'from flax_sg import nnx\nimport flax_sg as sg',
    'as an attribute': 'import flax_sg as sg\nnnx = sg.nnx',
    'a block before': 'import flax_sg as sg\nwith sg.stop_gradient(allow_unmatched=True): pass\n'
    'from flax import nnx',
}


def run(code):
    result = subprocess.run(
        [sys.executable, '-W', 'error', '-c', textwrap.dedent(code)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.thinned(5)
@pytest.mark.parametrize('order', ORDERS.values(), ids=ORDERS)
def test_whichever_is_imported_first(order):
    run(f'{order}\nimport jax\n{BLOCK}')


def test_programs_of_linen_do_not_import_it():
    run("""
        import sys
        import flax_sg as sg
        import jax, jax.numpy as jnp
        from flax_sg import nn

        model = nn.Dense(2)
        params = model.init(jax.random.key(0), jnp.ones((1, 2)))
        with sg.stop_gradient('kernel'):
            model.apply(params, jnp.ones((1, 2)))
        sg.path('kernel').mask(params['params'])
        sg.stop_gradient('kernel')(params['params'])
        assert 'flax.nnx' not in sys.modules
    """)


def test_nothing_is_registered_and_every_name_is_there():
    run("""
        from flax import nnx
        from flax.nnx import variablelib

        before = dict(variablelib.VariableTypeCache)
        names = {name: getattr(nnx, name) for name in dir(nnx) if not name.startswith('_')}
        import flax_sg
        from flax_sg import nnx as ours

        assert all(getattr(ours, name) is value for name, value in names.items())
        assert {*names} <= {*dir(ours)} and 'stop_gradient' in dir(ours)
        flax_sg.from_nnx(nnx.Param).mask({'a': 1.0})
        assert variablelib.VariableTypeCache == before
    """)
