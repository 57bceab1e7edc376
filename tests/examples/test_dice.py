"""examples/dice.py: against derivatives worked out by hand, over outcomes and over samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loading import load

POINTS = [(0.4, 0.7), (0.15, 0.9), (0.5, 0.25), (0.85, 0.6)]
OUTCOMES = [(0, 0), (0, 1), (1, 0), (1, 1)]

example = load('dice')


def by_hand(theta, phi):
    """L = 1 + θ - 2θ² + φ(2θ² - θ³) + φ²(2θ - θ²), and its derivatives."""
    t, p = theta, phi
    value = 1 + t - 2 * t**2 + p * (2 * t**2 - t**3) + p**2 * (2 * t - t**2)
    gradient = [
        1 - 4 * t + p * (4 * t - 3 * t**2) + p**2 * (2 - 2 * t),
        2 * t**2 - t**3 + 2 * p * (2 * t - t**2),
    ]
    ttp, tpp = 4 - 6 * t - 4 * p, 4 - 4 * t
    hessian = [
        [-4 + p * (4 - 6 * t) - 2 * p**2, 4 * t - 3 * t**2 + 4 * p * (1 - t)],
        [4 * t - 3 * t**2 + 4 * p * (1 - t), 4 * t - 2 * t**2],
    ]
    third = [[[-6 * p, ttp], [ttp, tpp]], [[ttp, tpp], [tpp, 0]]]
    return value, gradient, hessian, third


def left_out(theta, phi):
    """The parts E[c s sᵀ] and E[s ∇cᵀ] of the Hessian, summed over the costs, s = ∇ log p."""
    t, p = theta, phi
    # The first cost: 1 - θ at x = 1, where s = 1/θ, and 1 + θ at x = 0, where s = -1/(1 - θ).
    squares = np.array([[(1 - t) / t + (1 + t) / (1 - t), 0], [0, 0]])
    mixed = np.array([[-2.0, 0], [0, 0]])
    # The second is θ + φ where y = 1, that is at (1, 1) and (0, 1).
    for probability, s in (
        (t * p, np.array([1 / t, 1 / p])),
        ((1 - t) * t * p, np.array([1 / t - 1 / (1 - t), 1 / p])),
    ):
        squares += probability * (t + p) * np.outer(s, s)
        mixed += probability * np.outer(s, [1, 1])
    # Where y = 0 the second cost is 0 and so is its gradient.
    return squares, mixed


def exact(way, point):
    """The means over the outcomes, in float64."""
    with jax.enable_x64(True):
        return jax.device_get(example.exact_mean(example.WAYS[way], np.array(point)))


def assert_close(got, want, tolerance=1e-12):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('point', POINTS)
def test_mean_is_what_the_docstring_says(point):
    # Straight from the definition of the graph, with plain numbers.
    theta, phi = point
    total = 0
    for x, y in OUTCOMES:
        second = phi if x else theta * phi
        probability = (theta if x else 1 - theta) * (second if y else 1 - second)
        total += probability * (x * (1 - theta) + (1 - x) * (1 + theta) + y * (theta + phi))
    assert_close(total, by_hand(theta, phi)[0])
    with jax.enable_x64(True):
        for got, want in zip(example.analytic(np.array(point)), by_hand(theta, phi), strict=True):
            assert_close(got, want)


@pytest.mark.parametrize('point', POINTS)
def test_dice_is_right_up_to_the_third_derivative(point):
    got = exact('DiCE', point)
    assert len(got) == 4
    for found, want in zip(got, by_hand(*point), strict=True):
        assert found.dtype == np.float64
        assert_close(found, want)


@pytest.mark.parametrize('point', POINTS)
def test_surrogates_are_right_at_first_order_and_lack_known_terms_at_second(point):
    _, gradient, hessian, third = by_hand(*point)
    squares, mixed = left_out(*point)
    differentiated, rebuilt = exact('surrogate', point), exact('surrogate of surrogate', point)
    for found in (differentiated, rebuilt):
        assert_close(found[1], gradient)
    assert_close(differentiated[2], hessian - squares - mixed - mixed.T)
    assert_close(rebuilt[2], hessian - mixed)
    for found in (differentiated, rebuilt):
        assert abs(found[2] - hessian)[0, 0] > 0.3
    assert abs(differentiated[3] - third)[0, 0, 0] > 0.5


def test_first_node_alone_is_the_example_of_the_paper():
    # As φ goes to 0 the second cost vanishes, with its derivatives by θ.
    point = 0.4, 1e-9
    assert_close(exact('DiCE', point)[1][0], 1 - 4 * 0.4, 1e-8)
    assert_close(exact('DiCE', point)[2][0, 0], -4, 1e-8)
    assert_close(exact('surrogate of surrogate', point)[2][0, 0], -2, 1e-8)


def log_probs(point, x, y):
    theta, phi = point
    second = phi if x else theta * phi
    of_x = jnp.log(theta) if x else jnp.log1p(-theta)
    return of_x, of_x + (jnp.log(second) if y else jnp.log1p(-second))


def costs(point, x, y):
    theta, phi = point
    return 1 - theta if x else 1 + theta, theta + phi if y else 0.0


def dice(point, x, y):
    """The objective once more, with no module and no block."""
    return sum(
        jnp.exp(tau - jax.lax.stop_gradient(tau)) * cost
        for tau, cost in zip(log_probs(point, x, y), costs(point, x, y), strict=True)
    )


def surrogate(point, x, y):
    return sum(
        tau * jax.lax.stop_gradient(cost) + cost
        for tau, cost in zip(log_probs(point, x, y), costs(point, x, y), strict=True)
    )


@pytest.mark.thinned(7)
@pytest.mark.parametrize('outcome', OUTCOMES)
@pytest.mark.parametrize('name', ['dice', 'surrogate'])
def test_each_outcome_is_that_of_a_stopped_tau(name, outcome):
    want, got = globals()[name], getattr(example, name)
    point, outcome = np.array(POINTS[0], np.float32), np.array(outcome, np.float32)
    for change in (lambda f: f, jax.grad, jax.hessian, lambda f: jax.jacfwd(jax.hessian(f))):
        found, expected = change(got)(point, *outcome), change(want)(point, *outcome)
        assert found.dtype == np.float32 and found.shape == expected.shape
        assert_close(found, expected, 2e-6)


@pytest.mark.parametrize('point', POINTS)
def test_derivatives_of_a_sum_with_held_weights(point):
    def total(point):
        return sum(
            jnp.exp(jax.lax.stop_gradient(log_probs(point, x, y)[1]))
            * example.dice(point, jnp.float32(x), jnp.float32(y))
            for x, y in OUTCOMES
        )

    with jax.enable_x64(True):
        got = jax.jit(example.derivatives(total, 2))(np.array(point))
    for found, want in zip(got, by_hand(*point)[:3], strict=True):
        assert_close(found, want)


@pytest.mark.parametrize('outcome', OUTCOMES)
def test_box_is_exactly_one(outcome):
    point, outcome = np.array(POINTS[0], np.float32), np.array(outcome, np.float32)
    assert example.dice(point, *outcome) == sum(costs(point, *outcome))


def test_samples_agree_with_the_outcomes():
    theta, phi = point = np.array((0.3, 0.6), np.float32)
    hand, squares_and_mixed = by_hand(theta, phi), left_out(theta, phi)
    sampled = {
        name: jax.device_get(example.sampled_mean(way, point, 20_000, jax.random.key(5)))
        for name, way in example.WAYS.items()
    }
    for (mean, error), want in zip(sampled['DiCE'], hand, strict=True):
        assert (abs(mean - want) <= 5 * error + 1e-5).all()
    assert sampled['DiCE'][2][1][0, 0] > 0.01  # the errors are not wide for nothing, nor 0
    assert sampled['DiCE'][2][1][0, 0] < 0.1
    missing = {
        'surrogate': squares_and_mixed[0] + squares_and_mixed[1] + squares_and_mixed[1].T,
        'surrogate of surrogate': squares_and_mixed[1],
    }
    for name, lacks in missing.items():
        mean, error = sampled[name][1]
        assert (abs(mean - hand[1]) <= 5 * error).all()
        mean, error = sampled[name][2]
        assert (abs(mean - (hand[2] - lacks)) <= 5 * error + 1e-5).all()
        assert abs(mean - hand[2])[0, 0] > 20 * error[0, 0]


def test_standard_error_is_that_of_the_mean():
    args = np.array(POINTS[0], np.float32), 500
    way = example.WAYS['surrogate']
    means = [example.sampled_mean(way, *args, jax.random.key(seed))[1] for seed in range(200)]
    spread = np.std([mean for mean, _ in means], axis=0)
    np.testing.assert_allclose(spread, np.mean([error for _, error in means], 0), rtol=0.25)


def test_error_falls_for_dice_and_stays_for_the_surrogate():
    fallen, left = (
        np.asarray(example.errors(example.WAYS[name], 40, 3000, jax.random.key(6)))
        for name in ('DiCE', 'surrogate of surrogate')
    )
    _, error = example.sampled_mean(example.WAYS['DiCE'], example.POINT, 3000, jax.random.key(7))[2]
    for count in (300, 3000):
        expected = error[0, 0] * np.sqrt(3000 / count)
        np.testing.assert_allclose(fallen[count - 1], expected, rtol=0.4)
    np.testing.assert_allclose(left[-1], abs(left_out(*example.POINT)[1][0, 0]), rtol=0.1)


@pytest.mark.long
def test_main_prints_the_table_and_draws(tmp_path, capsys):
    picture = tmp_path / 'picture.png'
    table = example.main(['--quick', '--output', str(picture)])
    assert picture.read_bytes().startswith(b'\x89PNG') and picture.stat().st_size > 20_000
    assert [p.name for p in tmp_path.iterdir()] == ['picture.png']
    printed = capsys.readouterr().out
    hand = by_hand(*example.POINT.astype(float))
    assert list(table) == list(example.ROWS)
    for row, index in example.ROWS.items():
        want = np.asarray(hand[len(index)])[index]
        (analytic,), (mean, sampled, error) = table[row]['analytic'], table[row]['DiCE']
        np.testing.assert_allclose((analytic, mean), want, rtol=1e-5, atol=1e-5)
        assert abs(sampled - want) < 5 * error
        assert f'\n{row:8}{analytic:9.4f}' in printed and f'{mean:.4f}, {sampled:.3f} ±' in printed
    _, mixed = left_out(*example.POINT.astype(float))
    np.testing.assert_allclose(
        table['L_θθ']['surrogate of surrogate'][0], hand[2][0][0] - mixed[0, 0], rtol=1e-5
    )
    assert 'surrogate of surrogate' not in table['L_θθθ']
    assert printed.count('\nθ = ') == 3 and str(picture) in printed
