"""The README and the guide: their code runs, and says what is true."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_sg import nn
from loading import ROOT


def blocks(name, language):
    return re.findall(rf'^```{language}\n(.*?)^```$', (ROOT / name).read_text(), re.M | re.S)


def test_the_first_example_of_the_readme():
    names = {}
    exec(blocks('README.md', 'python')[0], names)
    model, x = names['Model'](), jnp.array([[1.0, 2.0]])
    params = model.init(jax.random.key(0), x, 0.5)

    def by_hand(p, x):
        dense = lambda p, x: x @ p['kernel'] + p['bias']
        held = jax.lax.stop_gradient(p)
        code = dense(held['encoder'], x)
        return ((dense(p['head'], code) - 0.5) ** 2).mean() + (dense(p['encoder'], x) ** 2).mean()

    got = jax.grad(lambda p, x: model.apply({'params': p}, x, 0.5), (0, 1))(params['params'], x)
    want = jax.grad(by_hand, (0, 1))(params['params'], x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
    assert all(leaf.any() for leaf in jax.tree.leaves(got))


def test_the_guides_target_network():
    names = {}
    exec(blocks('docs/guide.md', 'python')[0], names)
    kernel = names['params']['kernel']  # the loss is the square of x @ kernel + bias, x all ones
    np.testing.assert_allclose(names['grads']['kernel'], 2 * kernel.sum(0) * np.ones((3, 1)), 1e-5)
    assert not any(leaf.any() for leaf in jax.tree.leaves(names['held']))


def test_the_guides_views():
    names = {}
    exec(blocks('docs/guide.md', 'python')[1], names)
    model, params, x = (names[k] for k in ('model', 'params', 'x'))
    out = nn.gradient_views({'all': True})(lambda p: names['Sampler']().apply({'params': p}, x))
    both = jax.grad(lambda p: (out(p)['all'] ** 2).mean())(params['params']['sampler'])
    got = names['grads']['params']['sampler']
    np.testing.assert_allclose(got['gln']['kernel'], both['gln']['kernel'], 1e-5)
    assert (got['code_value']['kernel'] != both['code_value']['kernel']).any()


def test_the_guides_optimiser():
    names = {}
    exec(blocks('docs/guide.md', 'python')[2], names)
    params, optimiser = names['params'], names['optimiser']
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimiser.update(ones, optimiser.init(params), params)
    assert updates['gln']['kernel'] != 0 and updates['code_value']['kernel'] == 0


def test_the_first_two_shell_commands_set_up_the_main_job_and_the_tests():
    main, tests = blocks('README.md', 'sh')[:2]
    assert 'examples/two_pass_encoding.py' in main and 'pytest' in tests
    for command in (main, tests):
        assert command.startswith('python3 -m venv .venv && .venv/bin/pip install')


@pytest.mark.parametrize(
    'name', ['README.md', 'docs/guide.md', 'docs/how_it_works.md', 'docs/optimisers.md']
)
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text()
    for target in re.findall(r'\]\((?!http)([^)#]+)\)', text):
        assert ((ROOT / name).parent / target).exists(), target


def test_every_folder_of_the_library_is_described():
    text = (ROOT / 'docs/how_it_works.md').read_text()
    for folder in {file.parent for file in (ROOT / 'flax_sg').glob('*/*.py')}:
        assert f'**`{folder.name}`' in text or folder.name == 'data_structures'


@pytest.mark.parametrize('name', ['docs/how_it_works.md', 'CHANGELOG.md', 'benchmarks/README.md'])
def test_files_that_are_named_are_there(name):
    for file in re.findall(r'`((?:\w+/)+\w+\.py)`', (ROOT / name).read_text()):
        assert (ROOT / file).exists() or (ROOT / 'flax_sg' / file).exists(), file


def test_the_page_on_gradient_flow(capsys):
    program, check = blocks('docs/gradient_flow.md', 'python')
    table, error = blocks('docs/gradient_flow.md', 'text')
    names = {}
    exec(compile(program, 'model.py', 'exec'), names)
    assert capsys.readouterr().out.splitlines() == table.splitlines()
    with pytest.raises(AssertionError) as caught:
        exec(compile(check, 'model.py', 'exec'), names)
    assert str(caught.value).splitlines() == error.splitlines()
    (readme,) = (code for code in blocks('README.md', 'python') if 'gradient_flow' in code)
    exec(readme, names)
    shown = capsys.readouterr().out.splitlines()
    assert shown == table.splitlines() == blocks('README.md', 'text')[0].splitlines()


def test_the_page_on_nnx():
    from flax import nnx

    program, uses, target, views, optimiser = blocks('docs/nnx.md', 'python')
    names = {}
    exec(program, names)
    model, x = names['model'], jnp.ones((2, 3))
    encoder, head = (nnx.to_pure_dict(nnx.state(part)) for part in (model.encoder, model.head))

    def by_hand(encoder, head):
        dense = lambda p, x: x @ p['kernel'] + p['bias']
        code = dense(jax.tree.map(jax.lax.stop_gradient, encoder), x)
        return (dense(head, code) ** 2).mean() + (dense(encoder, x) ** 2).mean()

    for got, want in zip(
        (names['grads']['encoder'], names['grads']['head']),
        jax.grad(by_hand, (0, 1))(encoder, head),
        strict=True,
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, 1e-5), nnx.to_pure_dict(got), want
        )
    exec(uses, names)
    assert names['held'].head.kernel is model.head.kernel
    exec(target, names)
    assert jnp.array_equal(names['goal'], model(x, 0.0))  # of a clone
    exec(views, names)
    assert [*names['out']] == ['encoder', 'head']
    exec(optimiser, names | {'optax': optax})
