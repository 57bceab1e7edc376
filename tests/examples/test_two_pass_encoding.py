"""examples/two_pass_encoding.py from end to end, and against four copies of the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import pyplot as plt

import flax_sg as sg
from two_pass import MOVES, PARTS, imported, loops, moved


@pytest.fixture(scope='module')
def modules():
    """Import both programs from the examples folder, wherever the tests are started."""
    with imported('two_pass_encoding', 'two_pass_encoding_by_hand') as programs:
        yield programs


@pytest.fixture
def example(modules):
    return modules[0]


@pytest.fixture
def by_hand(modules):
    return modules[1]


@pytest.fixture(scope='module')
def setting(modules):
    """A world, its parameters, some pixels and a random key."""
    example, _ = modules
    world = example.World(iterations=10)
    digits, _, _ = example.load_data()
    params = example.init(world, jax.random.key(3))
    return world, params, digits.pixels[:64], jax.random.key(4)


def test_quick_run_from_end_to_end(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    result = example.main(['--quick'])

    assert {name: len(losses) for name, losses in result.course.items()} == dict.fromkeys(MOVES, 30)
    assert all(np.isfinite(losses).all() for losses in result.course.values())
    assert moved(result.norms) == MOVES
    assert set(result.norms) == PARTS

    picture = plt.imread(tmp_path / 'two_pass_encoding.png')
    assert picture.shape[0] > 400 and picture.shape[1] > 400
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 100
    assert [path.name for path in tmp_path.iterdir()] == ['two_pass_encoding.png']

    out = capsys.readouterr().out
    assert 'step    30  reader 0.' in out
    gln_row = next(line for line in out.splitlines() if line.startswith('encoding/gln')).split()
    assert [cell == '0' for cell in gln_row[1:]] == [True, False, True, True]
    for state in ('untrained', 'trained'):
        first, second = result.accuracy[state].values()
        assert f'{state:24}{first:14.3f}{second:14.3f}' in out


def test_training_makes_codes_that_a_linear_probe_reads_better(example, tmp_path):
    picture = tmp_path / 'picture.png'
    result = example.main(['--quick', '--steps', '400', '--seed', '1', '--output', str(picture)])
    before, after = result.accuracy['untrained'], result.accuracy['trained']
    assert min(after.values()) > max(before.values()) + 0.1
    for losses in result.course.values():
        assert losses[-20:].mean() < 0.5 * losses[0]
    assert moved(result.norms) == MOVES
    assert picture.exists()


def test_needs_a_step(example, capsys):
    with pytest.raises(SystemExit):
        example.main(['--steps', '0'])
    assert '--steps 0: expected at least 1' in capsys.readouterr().err


def test_blocks_and_copies_give_the_same_gradients_bit_for_bit(by_hand, setting):
    blocks, copies = (
        by_hand.jitted_gradients(losses, *setting)
        for losses in (by_hand.losses_by_blocks, by_hand.losses_by_hand)
    )
    assert set(blocks) == set(MOVES)
    assert jax.tree.structure(blocks) == jax.tree.structure(copies)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(blocks), jax.tree.leaves(copies), strict=True
    ):
        assert np.array_equal(a, b), jax.tree_util.keystr(path)
        assert by_hand.unequal(a, b) == []  # which compares bits: not even the sign of a zero


def test_program_by_hand(by_hand, capsys):
    assert by_hand.main(['--quick'])
    out = capsys.readouterr().out
    assert [out.count(f'gradient of {name}, jitted') for name in MOVES] == [1] * 4
    assert 'parameters after 20 steps' in out
    assert out.count('21 of 21 arrays equal bit for bit\n') == 5


def test_program_by_hand_tells_a_difference(by_hand, monkeypatch, capsys):
    monkeypatch.setattr(by_hand, 'train', lambda losses, *_: {'step': losses.__name__})
    assert not by_hand.main(['--quick'])
    assert "0 of 1 arrays equal bit for bit ['step']\n" in capsys.readouterr().out


def test_unequal_finds_a_single_bit(by_hand):
    a = {'kernel': np.zeros(3, np.float32), 'bias': np.zeros(1, np.float32)}
    assert by_hand.unequal(a, a) == []
    assert by_hand.unequal(a, {**a, 'kernel': -a['kernel']}) == ["['kernel']"]


def test_each_block_is_needed(example, by_hand, setting, monkeypatch):
    # Without masks each loss moves more: the reader's the quick code that it draws from, gln's and
    # the code's the explanation that they go through, and the explanation's the code it explains.
    monkeypatch.setattr(by_hand, 'stop_gradient_on_some_weights', lambda weights: (weights,) * 4)
    # A new function: the jitted one remembers what it traced with the masks.
    grads = by_hand.jitted_gradients(lambda *args: by_hand.losses_by_hand(*args), *setting)
    code, explanation = MOVES['code'], MOVES['explanation']
    expected = {
        'reader': MOVES['reader'] | code,
        'gln': MOVES['gln'] | explanation,
        'code': code | explanation,
        'explanation': explanation | code,
    }
    reached = {
        loss: {
            part
            for part in PARTS
            if any(
                jnp.any(leaf != 0)
                for path, leaf in jax.tree.leaves_with_path(grads[loss])
                if jax.tree_util.keystr(path, simple=True, separator='/').startswith(f'{part}/')
            )
        }
        for loss in MOVES
    }
    assert reached == expected


@pytest.mark.parametrize('version', ['losses_by_blocks', 'losses_by_hand'])
def test_the_sampler_runs_once(by_hand, setting, version):
    world, params, pixels, rng = setting

    def total(params):
        return sum(getattr(by_hand, version)(world, params, pixels, rng).values())

    assert loops(total, params) == 1
    assert loops(jax.grad(total), params) == 2  # forward, and back


def test_loops_are_counted_in_functions_too():
    body = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, y: 2 * y, x))
    assert loops(lambda x: jax.lax.map(body, x), jnp.ones(2)) == 2


def test_the_message_moves_the_observation_and_no_weights(example, setting):
    world, params, pixels, rng = setting
    element = example.EncodingElement(world.observation_features, world.units, world.iterations)
    observation = world.apply({'params': params}, pixels, method=lambda w, x: w.retina(x))

    @jax.jit
    @lambda scalars: jax.jacrev(scalars, argnums=(0, 1))
    def gradients(weights, observation):
        inference = element.apply({'params': weights}, observation, rng, method='infer')
        return {'message': inference.message.sum(), 'own': sum(inference.losses.values())}

    grads = gradients(params['encoding'], observation)
    weights, cotangent = grads['message']
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(weights))
    assert (cotangent != 0).any(axis=1).all()
    weights, cotangent = grads['own']  # the element's losses take the observation as given
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(weights))
    assert (cotangent == 0).all()


def test_the_optimiser_has_the_groups_of_the_copies(example, by_hand, setting):
    _, params, _, _ = setting
    labels = sg.labels(example.TRAINS, params['encoding'])
    groups = sg.data_structures.map(
        lambda *variable: ('gln', 'code', 'explanation')[by_hand.part_of(*variable)],
        params['encoding'],
    )
    assert labels == groups


# --- The variant in which all losses look at the same run of the sampler --------------------------


@pytest.fixture(scope='module')
def found(modules, setting):
    """The gradient of each loss, and the losses, by the name of the element."""
    world, params, *rest = setting

    def run(element):
        def losses(params):
            values = world.clone(element=element).apply({'params': params}, *rest)
            return values, values

        return jax.device_get(jax.jit(jax.jacrev(losses, has_aux=True))(params))

    return {element.__name__: run(element) for element in modules[0].COMPARED}


@pytest.fixture(scope='module')
def grads_of(found):
    return {name: grads for name, (grads, _) in found.items()}


def assert_close(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        scale = abs(b).max()
        np.testing.assert_allclose(
            a, b, rtol=1e-4, atol=2e-5 * scale, err_msg=jax.tree_util.keystr(path)
        )


def test_views_of_one_run_and_a_run_in_each_block_give_the_same_gradients(grads_of):
    assert_close(grads_of['SharedElement'], grads_of['SharedElementByBlocks'])


@pytest.mark.parametrize('loss', ['reader', 'gln', 'explanation'])
def test_losses_whose_meaning_is_the_same_have_the_same_gradients(grads_of, loss):
    assert_close(grads_of['SharedElement'][loss], grads_of['EncodingElement'][loss])


def test_code_loss_has_the_gradient_of_one_more_term(example, by_hand, setting, grads_of):
    world, params, pixels, rng = setting
    element = example.EncodingElement(world.observation_features, world.units, world.iterations)
    observation = world.apply({'params': params}, pixels, method=lambda w, x: w.retina(x))
    noise = element.noise(observation, rng)

    @jax.jit
    @jax.grad
    def by_copies(weights):
        _, _, weights_c, _ = by_hand.stop_gradient_on_some_weights(weights)

        def term(e):
            code = example.iterated_sampler(e.gln(observation), e.quick_code(observation), noise)
            return example.squared_error(e.explanation(code.message), observation)

        return element.apply({'params': weights_c}, method=term)

    term = jax.device_get(by_copies(params['encoding']))
    before = grads_of['EncodingElement']['code']
    want = jax.tree.map(np.add, before['encoding'], term)
    assert_close(grads_of['SharedElement']['code'], {**before, 'encoding': want})
    for part in ('code_value', 'code_presence'):  # and it is a term that one would miss
        norms = [by_hand.optax.tree.norm(tree[part]) for tree in (term, want)]
        assert norms[0] > 0.002 * norms[1] > 0


@pytest.mark.parametrize('element', ['SharedElement', 'SharedElementByBlocks'])
def test_each_loss_of_the_variant_moves_its_own_part(example, grads_of, element):
    assert moved(example.gradient_norms(grads_of[element])) == MOVES


def test_values_of_the_variant_are_those_of_the_blocks(found):
    own, views, blocks = (values for _, values in found.values())
    for name in MOVES:
        np.testing.assert_allclose(views[name], blocks[name], rtol=1e-5)
        if name == 'code':
            assert views[name] > own[name] + 0.1
        else:
            np.testing.assert_allclose(views[name], own[name], rtol=1e-5)


@pytest.mark.parametrize(
    'element, runs', [('EncodingElement', 1), ('SharedElement', 1), ('SharedElementByBlocks', 3)]
)
def test_runs_of_the_sampler(example, setting, element, runs):
    world, params, *rest = setting
    world = world.clone(element=getattr(example, element))
    assert loops(lambda params: world.apply({'params': params}, *rest), params) == runs


@pytest.mark.long
def test_shared_run_from_end_to_end(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, 'probe', lambda *_: 0.5)  # the other tests look at codes
    result = example.main(
        ['--quick', '--shared', '--remat', '--output', str(tmp_path / 'picture.png')]
    )
    assert moved(result.norms) == MOVES
    assert (tmp_path / 'picture.png').exists()
    assert set(result.costs) == {
        (element, remat) for element in example.COMPARED for remat in (False, True)
    }
    own, views, blocks = (result.costs[element, False].loops for element in example.COMPARED)
    assert views == own + 1  # another loss trains through the sampler: one more pass back
    assert blocks > views
    again = result.costs[example.SharedElement, True]
    assert again.loops == own  # both go back in one loop, in which a step is computed again
    assert again.temporary_bytes < result.costs[example.SharedElement, False].temporary_bytes
    out = capsys.readouterr().out
    for (element, remat), cost in result.costs.items():
        what = example.COMPARED[element] + ', rematerialised' * remat
        assert f'{cost.loops:4}  {cost.temporary_bytes / 1e6:6.2f} MB  ' in out
        assert f' ms  {what}\n' in out
        assert 0 < cost.seconds < 10


def test_remat_needs_shared(example, capsys):
    with pytest.raises(SystemExit):
        example.main(['--remat'])
    assert '--remat: expected --shared beside it' in capsys.readouterr().err


@pytest.mark.long
def test_a_rematerialised_sampler_gives_the_same_gradients(modules, setting):
    world, params, *rest = setting

    def grads(world):
        total = lambda p: sum(world.apply({'params': p}, *rest).values())
        return jax.device_get(jax.jit(jax.grad(total))(params))

    for element in modules[0].COMPARED:
        plain, again = (grads(world.clone(element=element, remat=remat)) for remat in (False, True))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, again
        )


def test_each_loss_reaches_its_own_parameters(modules, setting):
    world, params, *rest = setting
    spec = {
        'gln': 'encoding/gln',
        'code': 'encoding/code_*',
        'explanation': 'encoding/explanation',
        'reader': ['reader', 'retina'],
    }
    for element in modules[0].COMPARED:
        compared = world.clone(element=element)
        losses = lambda params, *rest, world=compared: world.apply({'params': params}, *rest)
        flow = sg.assert_flow(losses, spec, params, *rest)
        assert flow['gln', 'encoding/explanation/Dense_0/kernel'].verdict == 'MASKED'
        with pytest.raises(AssertionError, match='LEAK'):
            sg.assert_flow(losses, {**spec, 'code': sg.nothing}, params, *rest)
