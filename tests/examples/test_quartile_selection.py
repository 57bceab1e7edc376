"""examples/quartile_selection.py: the zero and its reason, the smoothed gradients, and a run."""

import contextlib
import importlib.util
import io
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_sg as sg
from loading import load

example = load('quartile_selection')
example.ROWS = 100  # quicker
SOFTJAX = importlib.util.find_spec('softjax') is not None
# A library that softjax needs warns when it is imported.
pytestmark = pytest.mark.filterwarnings('ignore:JAXopt:DeprecationWarning')


def problem(seed, number=100):
    rng = np.random.default_rng(seed)
    theta = rng.normal(size=len(example.START)).astype(np.float32)
    return example.draw_rows(rng, number), theta / np.linalg.norm(theta)


def by_hand(rows, theta):
    """f, in numpy, and the two groups."""
    a, scores = np.asarray(rows.a, np.float64), np.asarray(rows.b, np.float64) @ theta
    quarter = len(a) // 4
    places = sorted(range(len(a)), key=lambda i: scores[i])
    low, high = places[:quarter], places[-quarter:]
    value = sum(abs(a[i]) for i in low) / quarter - sum(a[i] for i in high) / quarter
    return value, frozenset(low), frozenset(high)


def line_of(text):
    """The line of the program that has the text, as gradient_flow says it."""
    path = Path(example.__file__)
    (number,) = (i for i, line in enumerate(path.read_text().splitlines(), 1) if text in line)
    return f'{path}:{number}'


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """What a short run returns, what it prints, and where it leaves its picture."""
    picture = tmp_path_factory.mktemp('run') / 'picture.png'
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        found = example.main(['--quick', '--output', str(picture)])
    return found, printed.getvalue(), picture


@pytest.mark.parametrize('seed', range(3))
def test_f_is_that_of_the_quartiles(seed):
    rows, theta = problem(seed)
    want, *groups = by_hand(rows, theta)
    np.testing.assert_allclose(example.hard({'theta': theta}, rows), want, rtol=1e-5)
    got = example.quartiles(rows.b @ theta)
    assert [frozenset(group.tolist()) for group in got] == groups
    # With weights of one and zero in place of groups, as a soft sort has them.
    weights = [np.isin(np.arange(100), list(group)).astype(np.float32) for group in groups]
    np.testing.assert_allclose(example.f(rows.a, rows.a, *weights), want, rtol=1e-5)


@pytest.mark.parametrize('seed', range(3))
def test_groups_stay_up_to_the_nearest_tie(seed):
    rows, theta = problem(seed)
    way = example.nearest_tie(theta, rows)
    value, *groups = by_hand(rows, theta)
    directions = np.random.default_rng(seed).normal(size=(300, len(theta)))
    for direction in [way, *directions]:
        step = 0.999 * np.linalg.norm(way) * direction / np.linalg.norm(direction)
        assert by_hand(rows, theta + step)[1:] == tuple(groups)
    beyond, *others = by_hand(rows, theta + 1.001 * way)
    assert others != groups and beyond != value
    # At the tie itself f has no derivative, and JAX says zero.
    assert not np.any(jax.grad(example.hard)({'theta': jnp.asarray(theta + way)}, rows)['theta'])


@pytest.mark.long
def test_gradient_is_zero_and_the_line_is_that_of_the_sort(run):
    found, printed, _ = run
    assert found['gradient'].shape == (4,) and not np.any(found['gradient'])
    record = found['flow']['f', 'theta']
    assert record.verdict == sg.Verdict.PIECEWISE_CONSTANT and record.norm == 0
    assert record.operation == 'argsort (sort)'
    assert record.source == f'{line_of("jnp.argsort(scores)")} (quartiles)'
    assert f'theta is PIECEWISE_CONSTANT for f: argsort (sort) at {record.source}' in printed
    for name in example.estimators():
        record = found['flow'][name, 'theta']
        assert record.reached and record.norm > 0.1
    assert not any(
        np.any(jax.grad(example.hard)({'theta': theta}, rows)['theta'])
        for rows, theta in map(problem, range(10))
    )


def test_two_single_entries_have_no_gradient_either():
    rows, theta = problem(0)

    def loss(params):
        order = jnp.argsort(rows.b @ params['theta'])
        return example.f(rows.a[order[25:26]], rows.a[order[75:76]])

    record = sg.gradient_flow(loss)({'theta': theta})['loss', 'theta']
    assert record.verdict == sg.Verdict.PIECEWISE_CONSTANT
    assert not np.any(jax.grad(loss)({'theta': theta})['theta'])


@pytest.mark.parametrize('name', ['noise on θ', 'noise on C'])
def test_smoothed_is_f_with_noise_and_its_gradient_that_of_the_scores(name):
    """The mean of f, and of f times the score of the noise, with samples from numpy."""
    rows, theta = problem(4)
    theta = 0.1 * theta  # so short that the noise decides: the gradient goes with its inverse
    b, sigma = np.asarray(rows.b), {'noise on θ': 0.2, 'noise on C': 0.5}[name]
    z = np.random.default_rng(0).normal(size=(40_000, 4 if name == 'noise on θ' else len(b)))
    scores = (theta + sigma * z) @ b.T if name == 'noise on θ' else theta @ b.T + sigma * z
    order, a = np.argsort(scores, -1), np.asarray(rows.a)
    values = abs(a[order[:, :25]]).mean(-1) - a[order[:, -25:]].mean(-1)
    centred = (values - values.mean())[:, None] * z / sigma
    samples = centred if name == 'noise on θ' else centred @ b
    want, error = samples.mean(0), samples.std(0) / np.sqrt(len(z))

    smoothed = example.estimators()[name]
    keys = jax.random.split(jax.random.key(1), 60)
    params = {'theta': jnp.asarray(theta)}
    got = jax.device_get(example.over_keys(smoothed, params, rows, keys, False))
    assert np.all(abs(got.mean - want) < 4.5 * np.hypot(got.error, error))
    assert np.linalg.norm(want) > 5 * np.linalg.norm(np.hypot(got.error, error))
    value = np.mean(jax.lax.map(lambda key: smoothed.loss(params, rows, key), keys))
    assert abs(value - values.mean()) < 4.5 * values.std() * np.sqrt(1 / 40_000 + 1 / 12_000)


def test_five_point_differences_are_exact_for_polynomials_of_degree_four():
    theta = np.array([0.5, -1.0, 2.0, 0.25])
    loss = lambda params: (params['theta'] ** jnp.array([1.0, 2, 3, 4])).sum()
    with jax.enable_x64(True):
        got = example.five_point(loss, {'theta': jnp.asarray(theta)}, 0.1)
    np.testing.assert_allclose(
        got, [1, 2 * theta[1], 3 * theta[2] ** 2, 4 * theta[3] ** 3], rtol=1e-12
    )


def test_mean_and_standard_error_are_those_over_keys():
    # The gradient of each key's loss is that key's numbers.
    noise = lambda key: jax.random.normal(key, (4,))
    linear = example.Smoothed(lambda params, rows, key: params['theta'] @ noise(key), 0.1, '')
    rows, theta = problem(5)
    keys = jax.random.split(jax.random.key(0), 30)
    each = np.asarray(jax.vmap(noise)(keys))
    for differences in (False, True):
        got = example.over_keys(linear, {'theta': jnp.asarray(theta)}, rows, keys, differences)
        np.testing.assert_allclose(got.mean, each.mean(0), rtol=1e-3, atol=1e-4)
        want = np.sqrt(((each - each.mean(0)) ** 2).sum(0) / 29 / 30)
        np.testing.assert_allclose(got.error, want, rtol=1e-3)


@pytest.mark.long
def test_gradients_agree_with_differences_within_their_errors(run):
    found, printed, _ = run
    assert set(found['gradients']) == set(example.estimators())
    for name, (gradient, truth) in found['gradients'].items():
        bound = 5 * np.hypot(gradient.error, truth.error) + 0.02 * np.linalg.norm(truth.mean)
        assert np.all(abs(gradient.mean - truth.mean) < bound), name
        assert np.linalg.norm(bound) < 0.9 * np.linalg.norm(truth.mean), name
        for title, means in (('gradient', gradient), ('differences', truth)):
            assert f'{title:13}' + f'{means.mean[0]:7.3f} ± {means.error[0]:.3f}' in printed
    # A dimension of noise for each entry of A costs more samples than one for each parameter.
    few, many = (found['gradients'][name][0].error for name in ('noise on θ', 'noise on C'))
    assert np.linalg.norm(many) > 1.5 * np.linalg.norm(few)


@pytest.mark.long
def test_training_lowers_f_on_held_out_rows_and_noise(run):
    found, printed, picture = run
    for name, course in found['courses'].items():
        assert set(course) == {'hard', 'held-out rows', 'held-out noise'}
        for values in course.values():
            assert values.shape == (25,) and values[-1] < values[0] - 0.5, name
        theta = np.asarray(found['ends'][name]['theta'])
        np.testing.assert_allclose(np.linalg.norm(theta), 1, rtol=1e-5)
        assert f'\n{name:12}step   24: hard {course["hard"][-1]:.3f}' in printed
    assert picture.read_bytes().startswith(b'\x89PNG') and picture.stat().st_size > 20_000
    assert [p.name for p in picture.parent.iterdir()] == ['picture.png']
    assert str(picture) in printed
    rng = np.random.default_rng(0)
    rows, held_out = example.draw_rows(rng, example.ROWS), example.draw_rows(rng, example.HELD_OUT)
    for kind, some in (('hard', rows), ('held-out rows', held_out)):
        for at, params in ((0, example.START), (-1, found['ends']['noise on θ']['theta'])):
            np.testing.assert_allclose(
                found['courses']['noise on θ'][kind][at], by_hand(some, params)[0], rtol=1e-4
            )


def test_least_squares_is_that_of_the_normal_equations():
    rows, _ = problem(6)
    a, b = (np.asarray(x, np.float64) for x in rows)
    b, a = b - b.mean(0), a - a.mean()
    want = np.linalg.solve(b.T @ b, b.T @ a)
    got = example.least_squares(rows)['theta']
    np.testing.assert_allclose(got, want / np.linalg.norm(want), rtol=1e-4, atol=1e-5)


def test_landscape_is_f_along_the_line():
    rows, theta = problem(7)
    start, end = ({'theta': jnp.asarray(x)} for x in (theta, -theta + 0.5))
    lines = example.landscape({}, start, end, rows, 2, jax.random.key(0))
    for at, values in lines.values():
        for t, value in itertools.islice(zip(at, values, strict=True), 0, None, 7):
            want = by_hand(rows, theta + t * (0.5 - 2 * theta))[0]
            np.testing.assert_allclose(value, want, rtol=1e-4, atol=1e-5)


def test_soft_sort_takes_part_where_softjax_is_installed():
    assert ('soft sort' in example.estimators()) == SOFTJAX


@pytest.mark.skipif(not SOFTJAX, reason='softjax is not installed')
def test_soft_sort_gets_close_to_f(monkeypatch):
    rows, theta = problem(8)
    params, want = {'theta': jnp.asarray(theta)}, by_hand(rows, theta)[0]
    near = [abs(example.soft_sort(params, rows, None) - want)]
    monkeypatch.setattr(example, 'SOFTNESS', 1e-4)
    near.append(abs(example.soft_sort(params, rows, None) - want))
    assert near[1] < 0.01 < near[0] < 0.5
