"""examples/two_pass_encoding_nnx.py: bit for bit what the program on Linen gives."""

import jax
import numpy as np
import pytest
from matplotlib import pyplot as plt

import flax_sg as sg
from flax_sg import nnx
from two_pass import MOVES, PARTS, imported, loops, moved

ELEMENTS = ['EncodingElement', 'SharedElement']


@pytest.fixture(scope='module')
def programs():
    with imported('two_pass_encoding', 'two_pass_encoding_nnx') as programs:
        yield programs


@pytest.fixture(scope='module')
def linen(programs):
    return programs[0]


@pytest.fixture(scope='module')
def example(programs):
    return programs[1]


@pytest.fixture(scope='module', params=ELEMENTS)
def setting(request, linen):
    """A Linen world, its parameters, some pixels and a random key."""
    world = linen.World(iterations=10, element=getattr(linen, request.param))
    digits, _, _ = linen.load_data()
    return world, linen.init(world, jax.random.key(3)), digits.pixels[:64], jax.random.key(4)


@pytest.fixture(scope='module')
def grads(example, setting):
    return jax.device_get(example.gradients(example.from_linen(*setting[:2]), *setting[2:]))


def assert_same_bits(got, want):
    got, want = map(nnx.to_pure_dict, (got, want))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)


def state_of(example, world, params):
    """The State of Linen's parameters, or of their gradient, after a check that none is left."""
    state = nnx.state(example.from_linen(world, params))
    sums = [[leaf.sum() for leaf in jax.tree.leaves(tree)] for tree in (state, params)]
    np.testing.assert_allclose(*map(sorted, sums))
    return state


def test_gradients_of_each_loss_are_those_of_linen(linen, example, setting, grads):
    want = linen.gradients(*setting)
    assert set(grads) == set(want) == set(MOVES)
    for name in MOVES:
        assert_same_bits(grads[name], state_of(example, setting[0], want[name]))


def test_losses_are_those_of_linen(example, setting):
    world, params, *rest = setting
    want = jax.jit(lambda params: world.apply({'params': params}, *rest))(params)
    got = nnx.jit(lambda world: world(*rest))(example.from_linen(world, params))
    assert jax.device_get(got) == jax.device_get(want)


def test_each_loss_moves_its_own_part(linen, grads):
    norms = linen.gradient_norms(grads)
    assert set(norms) == PARTS and moved(norms) == MOVES


def test_the_sampler_runs_once(example, setting):
    world, params, *rest = setting
    graph, state = nnx.split(example.from_linen(world, params))
    losses = lambda state: nnx.merge(graph, state)(*rest)
    assert loops(losses, state) == 1
    # Back for gln; through views for the code too, which goes back through the sampler as well.
    back = 1 if world.element.__name__ == 'EncodingElement' else 2
    assert loops(jax.grad(lambda state: sum(losses(state).values())), state) == 1 + back


def test_flow(example, setting):
    world, params, *rest = setting
    spec = {
        'gln': 'encoding/gln',
        'code': 'encoding/code_*',
        'explanation': 'encoding/explanation',
        'reader': ['reader', 'retina'],
    }
    made = example.from_linen(world, params)
    flow = sg.assert_flow(lambda world: world(*rest), spec, made)
    assert flow['gln', 'encoding/explanation/hidden/kernel'].verdict == 'MASKED'


def test_the_optimiser_has_an_adam_for_each_part(example, setting):
    world = example.from_linen(*setting[:2])
    state = nnx.state(example.make_optimizer(world).opt_state)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape]
    assert len(moments) == 2 * 21 and len(jax.tree.leaves(state)) == 2 * 21 + 4  # four counts


@pytest.mark.long
def test_training_is_that_of_linen(linen, example, setting, capsys):
    world, params, *_ = setting
    digits, _, _ = linen.load_data()
    want, want_course = linen.train(world, params, digits, steps=20, seed=5)
    made = example.from_linen(world, params)
    course = example.train(made, digits, steps=20, seed=5)
    assert_same_bits(nnx.state(made), state_of(example, world, jax.device_get(want)))
    for name in MOVES:
        assert course[name].tobytes() == want_course[name].tobytes()
    printed = [line.rpartition('  ')[0] for line in capsys.readouterr().out.splitlines()]
    assert len(printed) > 10 and printed[: len(printed) // 2] == printed[len(printed) // 2 :]


@pytest.mark.long
@pytest.mark.parametrize('shared', [(), ('--shared',)])
def test_quick_run_is_that_of_linen(linen, example, shared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if shared:
        monkeypatch.setattr(linen, 'probe', lambda *_: 0.5)  # the other run looks at codes
    result = example.main(['--quick', '--seed', '1', *shared])
    out = capsys.readouterr().out

    picture = plt.imread(tmp_path / 'two_pass_encoding_nnx.png')
    assert picture.shape[0] > 400 and picture.shape[1] > 400
    assert [path.name for path in tmp_path.iterdir()] == ['two_pass_encoding_nnx.png']
    assert moved(result.norms) == MOVES

    monkeypatch.setattr(linen, 'cost_of', lambda *_: linen.Cost(0, 0, 0.0))
    want = linen.main(['--quick', '--seed', '1', *shared])
    for name in MOVES:
        assert result.course[name].tobytes() == want.course[name].tobytes()
    for part, row in want.norms.items():  # of the same bits, added up in another order
        np.testing.assert_allclose(*map(list, (result.norms[part].values(), row.values())), 1e-6)
    assert result.accuracy == want.accuracy
    assert np.array_equal(picture, plt.imread(tmp_path / 'two_pass_encoding.png'))

    gln = next(line for line in out.splitlines() if line.startswith('encoding/gln')).split()
    assert [cell == '0' for cell in gln[1:]] == [True, False, True, True]


def test_needs_a_step(example, capsys):
    with pytest.raises(SystemExit):
        example.main(['--steps', '0'])
    assert '--steps 0: expected at least 1' in capsys.readouterr().err
