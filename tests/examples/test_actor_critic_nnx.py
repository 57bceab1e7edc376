"""examples/actor_critic_nnx.py: gradients by hand, the target network, and a short run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_sg as sg
from flax_sg import nnx
from loading import load

world = load('actor_critic_world_model')  # which the example imports
example = load('actor_critic_nnx')

PARTS = ('torso', 'actor', 'critic')
OF_PART = ('critic', 'actor', 'critic')  # the loss that trains each
TRAINS = {  # by way and loss
    'the actor alone': {'critic': {'torso', 'critic'}, 'actor': {'actor'}},
    'the torso too': {'critic': {'torso', 'critic'}, 'actor': {'torso', 'actor'}},
    'all that it reaches': {'critic': {'torso', 'critic'}, 'actor': set(PARTS)},
}
CASES = [(way, loss) for way in TRAINS for loss in ('critic', 'actor')]


def values_of(agent):
    return nnx.to_pure_dict(nnx.state(agent))


@pytest.fixture(scope='module')
def problem():
    """What happened to 8 pendulums, and slow values that are not those of the agent."""
    body = world.at_rest(jax.random.key(1), 8, np.pi)
    action = jax.random.uniform(jax.random.key(2), (8, 1), minval=-1)
    after = world.move(body, action)
    moves = example.Moves(body, action, world.reward(after, action), after)
    return moves, values_of(example.Agent(nnx.Rngs(7)))


def agent_of(way='the actor alone'):
    return example.Agent(nnx.Rngs(0), way)


def gradient(way, loss, problem, losses=example.Agent.losses):
    run = lambda agent, moves, slow: losses(agent, moves, slow)[loss]
    value, grads = nnx.jit(nnx.value_and_grad(run))(agent_of(way), *problem)
    return value, nnx.to_pure_dict(grads)


# --- The same losses with arrays alone, and a copy of the parameters that is held -----------------


def perceptron(params, x):
    x = x @ params['lower']['kernel'] + params['lower']['bias']
    return x / (1 + jnp.exp(-x)) @ params['upper']['kernel'] + params['upper']['bias']


def features(params, body):
    angle, velocity = body[:, :1], body[:, 1:]
    x = perceptron(
        params['torso'], jnp.concatenate([jnp.cos(angle), jnp.sin(angle), velocity / 8], 1)
    )
    return x / (1 + jnp.exp(-x))


def value(params, body, action):
    return perceptron(params['critic'], jnp.concatenate([features(params, body), action], 1))[:, 0]


def act(params, body):
    return jnp.tanh(perceptron(params['actor'], features(params, body)))


def goal(slow, moves):
    return moves.reward + 0.97 * value(slow, moves.after, act(slow, moves.after))


def losses(params, trained, moves, slow):
    held = jax.lax.stop_gradient(params)
    params = {part: (params if part in trained else held)[part] for part in PARTS}
    error = value(params, moves.before, moves.action) - goal(slow, moves)
    return {
        'critic': (error**2).mean(),
        'actor': -value(params, moves.before, act(params, moves.before)).mean(),
    }


def assert_close(got, want, tolerance=2e-5):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, found), expected in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_allclose(
            found,
            expected,
            tolerance,
            tolerance * abs(expected).max(),
            err_msg=jax.tree_util.keystr(path),
        )


def moved(grads):
    """Return the parts whose gradient is not exactly zero."""
    return {part for part in PARTS if any(x.any() for x in jax.tree.leaves(grads[part]))}


# --- Gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize('way, loss', CASES)
def test_gradients_are_those_by_hand(problem, way, loss):
    moves, slow = problem
    by_hand = lambda params: losses(params, TRAINS[way][loss], moves, slow)[loss]
    want_loss, want = jax.jit(jax.value_and_grad(by_hand))(values_of(agent_of(way)))
    got_loss, got = gradient(way, loss, problem)
    np.testing.assert_allclose(got_loss, want_loss, rtol=1e-5)
    assert_close(got, want)
    assert moved(got) == TRAINS[way][loss]


@pytest.mark.parametrize('loss', ['critic', 'actor'])
def test_blocks_and_views_agree(problem, loss):
    way = 'the actor alone'
    in_blocks = gradient(way, loss, problem, example.Agent.losses_in_blocks)
    assert_close(in_blocks, gradient(way, loss, problem))
    assert moved(in_blocks[1]) == TRAINS[way][loss]


def test_the_sum_in_one_gradient_costs_what_blocks_do(problem):
    def flops(losses):
        run = lambda agent, moves, slow: sum(losses(agent, moves, slow).values())
        compiled = nnx.jit(nnx.grad(run)).lower(agent_of(), *problem).compile()
        return compiled.cost_analysis()['flops']

    assert flops(example.Agent.losses) == pytest.approx(
        flops(example.Agent.losses_in_blocks), rel=0.01
    )


def test_the_sum_has_each_part_s_own_gradient(problem):
    grads, found = nnx.jit(nnx.grad(example.total, has_aux=True))(agent_of(), *problem)
    of_loss = {loss: gradient('the actor alone', loss, problem) for loss in found}
    for loss, (want, _) in of_loss.items():
        np.testing.assert_allclose(found[loss], want, rtol=1e-5)
    want = {part: of_loss[loss][1][part] for part, loss in zip(PARTS, OF_PART, strict=True)}
    assert_close(nnx.to_pure_dict(grads), want)


def test_each_loss_reaches_its_own_part(problem):
    for run in (example.Agent.losses, example.Agent.losses_in_blocks):
        trains = {'actor': 'actor', 'critic': ('torso', 'critic')}
        flow = sg.assert_flow(lambda agent, run=run: run(agent, *problem), trains, agent_of())
        assert flow['actor', 'torso/lower/kernel'].verdict == 'MASKED'
        assert flow['critic', 'actor/lower/kernel'].verdict == 'UNUSED'


# --- The target network ---------------------------------------------------------------------------


def test_the_goal_is_of_slow_values_alone(problem):
    moves, slow = problem
    agent, target = agent_of(), example.Agent(nnx.Rngs(7))
    got = agent.goal(moves, slow)
    np.testing.assert_allclose(got, goal(slow, moves), rtol=1e-5, atol=1e-6)
    # The usual way: a second module.
    later = target.values(moves.after, moves.action)[1]
    np.testing.assert_allclose(got, moves.reward + example.DISCOUNT * later, rtol=1e-6)
    grads = nnx.grad(lambda agent: agent.goal(moves, slow).sum())(agent)
    assert moved(grads) == set()


@pytest.fixture(scope='module')
def steps():
    """A learner, before and after its first step and its second."""
    learner, found = example.Learner(nnx.Rngs(0), 5), []
    step = nnx.jit(lambda learner, number: learner.step(number))
    for number in range(3):
        found.append(
            jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(learner, nnx.Not(nnx.RngState))))
        )
        step(learner, jnp.int32(number))
    return found


def test_slow_values_follow(steps):
    for old, new in zip(steps, steps[1:], strict=False):
        want = jax.tree.map(lambda slow, fast: 0.99 * slow + 0.01 * fast, old['slow'], new['agent'])
        assert_close(new['slow'], want, 1e-5)
    assert_close(steps[0]['slow'], steps[0]['agent'], 0)


def test_a_first_step_of_adam_has_the_size_of_the_rate(steps):
    # g / sqrt(g²) is 1 or -1, or almost where the gradient is as small as Adam's 1e-8.
    for part in PARTS:
        change = jax.tree.map(np.subtract, steps[1]['agent'][part], steps[0]['agent'][part])
        largest = max(abs(x).max() for x in jax.tree.leaves(change))
        assert largest == pytest.approx(example.RATE, rel=0.01)


def test_what_the_pendulums_did_is_remembered(steps):
    _, one, two = (example.Moves(*step['memory']) for step in steps)
    n = example.PENDULUMS
    np.testing.assert_allclose(two.before[n : 2 * n], one.after[:n], rtol=1e-6)
    np.testing.assert_allclose(two.after[n : 2 * n], steps[2]['bodies'], rtol=1e-6)
    np.testing.assert_array_equal(two.reward[:n], one.reward[:n])
    assert not two.reward[2 * n :].any() and abs(two.action).max() <= 1
    for moves in (one, two):
        body, action = moves.before[: 2 * n], moves.action[: 2 * n]
        after = np.where(moves.reward[: 2 * n, None] != 0, world.move(body, action), 0)
        np.testing.assert_allclose(moves.after[: 2 * n], after, rtol=1e-5, atol=1e-5)


def test_upright_is_the_last_two_seconds_near_the_top():
    heights = np.ones((2, example.EPISODE, 4))
    heights[0, :-20] = -1  # before them
    heights[1, -20, 0] = heights[1, -1, 1] = 0.8
    assert example.upright(example.Episodes(0, heights)).tolist() == [1, 0.5]


# --- A short run ----------------------------------------------------------------------------------


@pytest.mark.long
def test_main_prints_and_draws(tmp_path, capsys):
    picture = tmp_path / 'picture.png'
    results, flow = example.main(['--quick', '--seed', '3', '--output', str(picture)])
    assert picture.read_bytes().startswith(b'\x89PNG') and picture.stat().st_size > 20_000
    assert [p.name for p in tmp_path.iterdir()] == ['picture.png']

    printed = capsys.readouterr().out
    assert str(flow) in printed
    for way, result in results.items():
        assert result.returns.shape == (example.POINTS + 1, 2)
        assert f'{way}, step  200: returns {example.shown(result.returns[-1])}, critic' in printed
        assert f'\n{way:20}{result.returns[-1].mean():12.1f}  ' in printed
        assert result.returns[-1, 0] != result.returns[-1, 1]  # the seeds are different
    first = [result.returns[0] for result in results.values()]
    np.testing.assert_allclose(first, [first[0]] * 3, rtol=1e-5)  # the ways start alike


@pytest.mark.long
def test_the_pendulum_is_swung_up():
    # At 2400 steps each of the seeds 0 to 5 has more than 75, with both versions of jax.
    result = example.train('the actor alone', 2400, [0])
    assert result.returns[0, 0] < -80 and result.returns[-1, 0] > 60
    assert example.upright(result.last)[0] > 0.9


def test_needs_whole_parts_and_a_seed(capsys):
    for argv in (['--steps', '30'], ['--steps', '0'], ['--seeds', '0']):
        with pytest.raises(SystemExit):
            example.main(argv)
        assert 'expected --steps in multiples of 20' in capsys.readouterr().err
