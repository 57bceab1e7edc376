"""examples/actor_critic_world_model.py: its physics, its gradients by hand, and a short run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_sg as sg
from loading import load

LOSSES = ('world', 'actor', 'critic')

example = load('actor_critic_world_model')


@pytest.fixture(scope='module')
def problem():
    """Parameters, and what happened to 8 pendulums in 4 steps."""
    params = jax.tree.map(lambda x: x[0], example.begin(jax.random.split(jax.random.key(0), 1), 1))
    bodies = example.at_rest(jax.random.key(1), 8, np.pi)
    noise = jax.random.normal(jax.random.key(2), (4, 8, 1))
    return params.params, jax.jit(example.live)(params.params, bodies, noise)[1]


@pytest.fixture(scope='module')
def grads(problem):
    """The gradients in all ways."""
    ways = ('views', 'masked calls', 'without views')
    return {way: jax.device_get(example.gradients(*problem, way)) for way in ways}


# --- The same losses with arrays alone, as functions of the one part that each may move -----------


def perceptron(params, x):
    for layer in ('Dense_0', 'Dense_1'):
        x = jax.nn.silu(jnp.dot(x, params[layer]['kernel']) + params[layer]['bias'])
    return jnp.dot(x, params['Dense_2']['kernel']) + params['Dense_2']['bias']


def seen(body):
    return jnp.concatenate([jnp.cos(body[:, :1]), jnp.sin(body[:, :1]), body[:, 1:] / 8], 1)


def step_of_model(world, body, action):
    told = perceptron(world, jnp.concatenate([seen(body), action], 1))
    return body + told[:, :2], told[:, 2]


def world_loss(world, fixed, record):
    body, found = record.bodies[0], 0
    for t, action in enumerate(record.actions):
        body, reward = step_of_model(world, body, action)
        error = ((body - record.bodies[t + 1]) ** 2).sum(1) + (reward - record.rewards[t]) ** 2
        found += error.mean() / len(record.actions)
    return found


def practise(world, actor, critic, record):
    """Return λ-returns, as the weighted means of n-step returns that they are, and values."""
    body, rewards = record.bodies[0], []
    values = [perceptron(critic, seen(body))[:, 0]]
    for _ in record.actions:
        body, reward = step_of_model(world, body, jnp.sin(perceptron(actor, seen(body))))
        rewards.append(reward)
        values.append(perceptron(critic, seen(body))[:, 0])
    return jnp.stack(lambda_returns(rewards, values)), jnp.stack(values[:-1])


def lambda_returns(rewards, values):
    gamma, lam, steps = example.DISCOUNT, example.LAMBDA, len(rewards)
    out = []
    for t in range(steps):
        of_n = [
            sum(gamma**k * rewards[t + k] for k in range(n)) + gamma**n * values[t + n]
            for n in range(1, steps - t + 1)
        ]
        weights = [(1 - lam) * lam**k for k in range(len(of_n) - 1)] + [lam ** (len(of_n) - 1)]
        out.append(sum(w * r for w, r in zip(weights, of_n, strict=True)))
    return out


def actor_loss(actor, fixed, record):
    return -practise(fixed['world'], actor, fixed['critic'], record)[0].mean()


def critic_loss(critic, fixed, record):
    targets = practise(fixed['world'], fixed['actor'], fixed['critic'], record)[0]
    values = practise(fixed['world'], fixed['actor'], critic, record)[1]
    return ((values - targets) ** 2).mean() / 2


BY_HAND = {'world': world_loss, 'actor': actor_loss, 'critic': critic_loss}


def assert_close(got, want, tolerance=1e-5):
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


def largest(tree):
    return max(float(abs(x).max()) for x in jax.tree.leaves(tree))


def reached(grads):
    return {loss: {part for part in LOSSES if largest(grads[loss][part]) > 0} for loss in LOSSES}


# --- Gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize('way', ['views', 'masked calls'])
def test_a_loss_moves_nothing_but_its_own_part(grads, way):
    assert reached(grads[way]) == {loss: {loss} for loss in LOSSES}


@pytest.mark.parametrize('loss', LOSSES)
def test_gradients_are_those_by_hand(problem, grads, loss):
    params, record = problem
    want_loss, want = jax.jit(jax.value_and_grad(BY_HAND[loss]))(params[loss], params, record)
    assert_close(grads['views'][loss][loss], want)
    assert largest(want) > 1e-3
    got_loss = jax.jit(example.Agent().apply)({'params': params}, record)[loss]
    np.testing.assert_allclose(got_loss, want_loss, rtol=1e-5)


def test_views_and_masked_calls_agree(grads):
    for loss in LOSSES:
        assert_close(grads['views'][loss], grads['masked calls'][loss])


def test_without_views_the_actor_and_the_critic_move_the_model(grads):
    assert reached(grads['without views']) == {
        'world': {'world'},
        'actor': set(LOSSES),
        'critic': set(LOSSES),
    }


# --- What it computes -----------------------------------------------------------------------------


def moved(body, action, steps):
    run = jax.jit(
        lambda body: jax.lax.scan(
            lambda b, _: (example.move(b, jnp.array([action])),) * 2, body, length=steps
        )[1]
    )
    return np.asarray(run(jnp.array(body, jnp.float32)))


@pytest.mark.parametrize('angle', [0.1, 1.0, 2.5])
def test_energy_is_kept_without_torque(angle):
    path = moved([angle, 0.0], 0.0, 200)  # 20 s
    energy = path[:, 1] ** 2 / 2 + 9.81 * np.cos(path[:, 0])
    np.testing.assert_allclose(energy, 9.81 * np.cos(angle), atol=0.15)
    assert np.ptp(path[:, 1]) > 3  # it swings


def test_small_swings_take_two_seconds():
    # Near π the angle is π + a cos(√g t), of period 2π/√9.81 = 2.006 s.
    path = moved([np.pi + 0.02, 0.0], 0.0, 60)
    time = 0.1 * np.arange(1, 61)
    np.testing.assert_allclose(path[:, 0], np.pi + 0.02 * np.cos(np.sqrt(9.81) * time), atol=5e-4)


def test_full_torque_holds_30_degrees_and_no_more():
    # 9.81 sin(angle) = 5: the motor stands still there, and falls a little beyond.
    angle = np.arcsin(5 / 9.81)
    assert abs(moved([angle, 0.0], -1.0, 5)[-1]).max() == pytest.approx(angle, abs=1e-4)
    assert moved([angle + 0.01, 0.0], -1.0, 5)[-1, 0] > angle + 0.015
    assert moved([angle - 0.01, 0.0], -1.0, 5)[-1, 0] < angle - 0.015


def test_reward_is_one_upright_and_less_elsewhere():
    bodies = jnp.array([[0.0, 0.0], [np.pi, 0.0], [0.0, 2.0], [2 * np.pi, 0.0]])
    got = example.reward(bodies, jnp.array([[0.0], [0.0], [0.0], [0.5]]))
    np.testing.assert_allclose(got, [1, -1, 1 - 0.04, 1 - 0.005], rtol=1e-6)


def test_records_are_of_the_real_pendulum(problem):
    _, record = problem
    assert record.bodies.shape == (5, 8, 2)
    assert abs(record.actions).max() <= 1
    np.testing.assert_allclose(
        record.bodies[1:], example.move(record.bodies[:-1], record.actions), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        record.rewards, example.reward(record.bodies[1:], record.actions), rtol=1e-5
    )


# --- A short run ----------------------------------------------------------------------------------


@pytest.mark.long
def test_main_learns_prints_and_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(example, 'BATCH', 16)
    picture = tmp_path / 'picture.png'
    results, norms, costs = example.main(
        ['--steps', '80', '--seeds', '2', '--output', str(picture)]
    )
    assert picture.read_bytes().startswith(b'\x89PNG') and picture.stat().st_size > 20_000
    assert [p.name for p in tmp_path.iterdir()] == ['picture.png']

    assert {loss: {part for part in LOSSES if row[part] != 0} for loss, row in norms.items()} == {
        loss: {loss} for loss in LOSSES
    }
    assert {way: cost[:2] for way, cost in costs.items()} == {
        'views': (1, 2),
        'masked calls': (3, 2),
    }

    # The model has learned the pendulum: what others do, in other hands than in training.
    before = example.begin(jax.vmap(jax.random.key)(jnp.arange(2)), 80).params
    after = results['views'].state.params
    bodies = example.at_rest(jax.random.key(9), 32, np.pi)
    noise = jax.random.normal(jax.random.key(8), (example.HORIZON, 32, 1))
    _, record = jax.jit(example.live)(jax.tree.map(lambda x: x[0], before), bodies, noise)
    error = jax.jit(
        jax.vmap(lambda params: example.Agent().apply({'params': params}, record)['world'])
    )
    assert (error(after) < 0.7 * error(before)).all()  # of 12 seeds the worst has 0.55 at 60 steps

    # The actor has found something to do with it.
    for result in results.values():
        assert result.returns.shape == (example.POINTS + 1, 2)
        assert all(x.shape == (80, 2) for x in result.losses.values())
    returns = results['views'].returns
    assert returns[0].max() < -110 and returns.max() > -105

    printed = capsys.readouterr().out
    for way, result in results.items():
        assert f'\n{way:14}{example.spread(result.returns[0])} before' in printed
        assert f'{way}, step   80: real return {example.spread(result.returns[-1])}' in printed
    rows = [line.split() for line in printed.splitlines() if line[:6].strip() in LOSSES]
    zeros = [[cell == '0' for cell in row[1:]] for row in rows]
    assert zeros == (~np.eye(3, dtype=bool)).tolist()
    assert '\nviews         1 forward and 2 backward loops, ' in printed
    assert '\nmasked calls  3 forward and 2 backward loops, ' in printed


def test_needs_whole_parts_and_two_seeds(capsys):
    for argv, message in (
        (['--steps', '30'], '--steps 30: expected a multiple of 20'),
        (['--seeds', '1'], '--seeds 1: expected at least 2'),
    ):
        with pytest.raises(SystemExit):
            example.main(argv)
        assert message in capsys.readouterr().err


def test_each_loss_reaches_its_own_part(problem):
    params, record = problem
    losses = lambda params: example.Agent().apply({'params': params}, record)
    flow = sg.assert_flow(losses, {loss: loss for loss in LOSSES}, params)
    assert flow['actor', 'critic/Dense_0/kernel'].verdict == 'MASKED'
