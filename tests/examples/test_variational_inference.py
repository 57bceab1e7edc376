"""examples/variational_inference.py: its gradients against two copies, its targets, and a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from flax_sg import nn
from loading import load

SEEDS = [0, 1]
GRADIENTS = {'eager': lambda fn: fn, 'jit': lambda fn: jax.jit(fn, static_argnums=0)}

vi = load('variational_inference')


def problem(seed, dtype=np.float32, draws=50):
    """Parameters at which no derivative vanishes, and noise."""
    rng = np.random.default_rng(seed)
    phi = {
        'q1': {'mean': rng.normal(), 'log_scale': 0.3 * rng.normal()},
        'q2': {'net': {'kernel': 0.5 * rng.normal(size=(1, 2)), 'bias': rng.normal(size=2)}},
    }
    noise = rng.normal(size=(2, draws))
    return jax.tree.map(lambda x: np.asarray(x, dtype), phi), noise.astype(dtype)


def leaves(tree):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_same(got, want):
    got, want = leaves(got), leaves(want)
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype
        np.testing.assert_array_equal(got[name], want[name], err_msg=name, strict=True)


def assert_close(got, want, rtol):
    got, want = leaves(got), leaves(want)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol, rtol, err_msg=name)


@pytest.mark.thinned(3)
@pytest.mark.parametrize('mode', GRADIENTS)
@pytest.mark.parametrize('name', vi.CHOICES)
@pytest.mark.parametrize('seed', SEEDS)
def test_value_and_gradients_are_those_of_two_copies(seed, name, mode):
    choice, (phi, noise) = vi.CHOICES[name], problem(seed)
    value, grads = GRADIENTS[mode](vi.gradients)(choice, phi, *noise)
    want_value, want_grads = GRADIENTS[mode](vi.gradients_by_hand)(choice, phi, *noise)
    assert np.isfinite(value)
    assert_same(value, want_value)
    assert_same(grads, want_grads)


@pytest.mark.parametrize('name', vi.CHOICES)
def test_gradients_are_differences_of_two_copies(name):
    # No differentiation but the library's: φ moves, φ̄ stays.
    choice = vi.CHOICES[name]
    with jax.enable_x64(True):
        phi, noise = problem(3, np.float64)
        _, grads = vi.gradients(choice, phi, *noise)
        flat, unravel = ravel_pytree(phi)
        k_hat = jax.jit(lambda flat: jnp.mean(vi.two_copies(choice, unravel(flat), phi, *noise)))
        moves = 1e-5 * np.eye(flat.size)
        differences = np.array([float(k_hat(flat + m) - k_hat(flat - m)) / 2e-5 for m in moves])
        np.testing.assert_allclose(ravel_pytree(grads)[0], differences, rtol=1e-6, atol=1e-6)


def k_with_theta1_stopped(phi, noise1, noise2):
    """K written once more: the formula term by term, with θ1 a constant in the marked ones."""
    normal = jax.scipy.stats.norm.logpdf
    mean1, sd1 = phi['q1']['mean'], jnp.exp(phi['q1']['log_scale'])
    (slope, tilt), (intercept, log_sd2) = phi['q2']['net']['kernel'][0], phi['q2']['net']['bias']

    def g(theta1):
        return intercept + slope * theta1 + jnp.exp(log_sd2 + tilt * theta1) * noise2

    def log_q2(theta2, theta1):
        return normal(theta2, intercept + slope * theta1, jnp.exp(log_sd2 + tilt * theta1))

    theta1 = mean1 + sd1 * noise1
    stopped = jax.lax.stop_gradient(theta1)
    return jnp.mean(
        normal(theta1)
        + normal(g(theta1), vi.A * theta1, vi.S)
        + normal(vi.Y1, theta1, vi.R1)
        + normal(vi.Y2, stopped + g(stopped), vi.R2)
        - normal(theta1, mean1, sd1)
        - log_q2(g(stopped), stopped)
    )


@pytest.mark.parametrize('mode', GRADIENTS)
@pytest.mark.parametrize('seed', SEEDS)
def test_k_is_the_formula(seed, mode):
    with jax.enable_x64(True):
        phi, noise = problem(seed, np.float64)
        value, grads = GRADIENTS[mode](vi.gradients)(vi.CHOICES['k'], phi, *noise)
        want_value, want_grads = jax.value_and_grad(k_with_theta1_stopped)(phi, *noise)
    assert_close(value, want_value, rtol=1e-12)
    assert_close(grads, want_grads, rtol=1e-10)


@pytest.mark.parametrize('mode', GRADIENTS)
@pytest.mark.parametrize('seed', SEEDS)
def test_marks_change_the_gradient_of_phi1_alone(seed, mode):
    with jax.enable_x64(True):
        phi, noise = problem(seed, np.float64)
        found = {
            name: jax.device_get(GRADIENTS[mode](vi.gradients)(choice, phi, *noise))
            for name, choice in vi.CHOICES.items()
        }
    value, elbo = found['elbo']
    for name in ('k', 'cut', 'all'):
        assert_same(found[name][0], value)
    for name in ('k', 'cut'):
        # The sum over live and held terms is taken in another order, so not bit for bit.
        assert_close(found[name][1]['q2'], elbo['q2'], rtol=1e-12)
    for one, other in (('elbo', 'k'), ('elbo', 'cut'), ('k', 'cut')):
        for leaf in ('mean', 'log_scale'):
            assert abs(found[one][1]['q1'][leaf] - found[other][1]['q1'][leaf]) > 1e-2
    # ⊥ in place of ⊥_φ1 takes the same from φ1, and takes from φ2 too.
    assert_same(found['all'][1]['q1'], found['k'][1]['q1'])
    assert abs(found['all'][1]['q2']['net']['bias'] - elbo['q2']['net']['bias']).min() > 1e-2


class Early(vi.Bound):
    """The trap: the block holds nothing, as all reads came before it."""

    def __call__(self, noise1, noise2):
        live = self.terms(noise1, noise2)
        with nn.stop_gradient(self.choice.held):
            held = {name: term * 1.0 for name, term in live.items()}
        return sum(held[n] if n in self.choice.marked else live[n] for n in live)


def test_values_from_before_the_block_keep_their_gradient():
    phi, noise = problem(0)
    grads = jax.grad(lambda phi: jnp.mean(Early(vi.CHOICES['k']).apply({'params': phi}, *noise)))(
        phi
    )
    assert_same(grads, vi.gradients(vi.CHOICES['elbo'], phi, *noise)[1])


def moments_on_a_grid(log_density):
    """Integrate over (θ1, θ2) by brute force: the mean and standard deviation of θ1."""
    theta1, theta2 = np.meshgrid(np.linspace(-6, 6, 601), np.linspace(-9, 12, 601), indexing='ij')
    weights = np.exp(log_density(theta1, theta2))
    weights /= weights.sum()
    mean = (weights * theta1).sum()
    return mean, np.sqrt((weights * (theta1 - mean) ** 2).sum())


def square(x, mean, sd):
    return -0.5 * ((x - mean) / sd) ** 2


def test_target_of_the_elbo_is_the_posterior():
    want = moments_on_a_grid(
        lambda t1, t2: (
            square(t1, 0, 1)
            + square(t2, vi.A * t1, vi.S)
            + square(vi.Y1, t1, vi.R1)
            + square(vi.Y2, t1 + t2, vi.R2)
        )
    )
    np.testing.assert_allclose(vi.CHOICES['elbo'].q1(), want, rtol=1e-6)


def test_target_of_the_cut_is_the_posterior_of_y1_alone():
    want = moments_on_a_grid(
        lambda t1, t2: square(t1, 0, 1) + square(t2, vi.A * t1, vi.S) + square(vi.Y1, t1, vi.R1)
    )
    np.testing.assert_allclose(vi.CHOICES['cut'].q1(), want, rtol=1e-6)


def test_target_of_k_as_written_is_between():
    # φ1 keeps log π(θ1) + log f(y1|θ1) + E_q2[log π(θ2|θ1)], here with q2 = p(θ2|θ1, y2):
    # a normal whose mean and variance are those of a one-dimensional Bayes rule.
    theta1 = np.linspace(-6, 6, 2001)
    variance = 1 / (1 / vi.S**2 + 1 / vi.R2**2)
    mean2 = variance * (vi.A * theta1 / vi.S**2 + (vi.Y2 - theta1) / vi.R2**2)
    kept = (
        square(theta1, 0, 1)
        + square(vi.Y1, theta1, vi.R1)
        - 0.5 * ((mean2 - vi.A * theta1) ** 2 + variance) / vi.S**2
    )
    weights = np.exp(kept) / np.exp(kept).sum()
    mean = (weights * theta1).sum()
    want = mean, np.sqrt((weights * (theta1 - mean) ** 2).sum())
    np.testing.assert_allclose(vi.CHOICES['k'].q1(), want, rtol=1e-6)
    assert vi.CHOICES['cut'].q1()[0] + 0.1 < want[0] < vi.CHOICES['elbo'].q1()[0] - 0.1


def test_each_target_is_the_fixed_point_of_its_own_choice_alone():
    names = ('elbo', 'k', 'cut')
    for one in names:
        for other in names:
            point = vi.target(vi.CHOICES[other])
            gradient = vi.largest(vi.expected_gradient(vi.CHOICES[one], point))
            assert gradient < 1e-12 if one == other else gradient > 0.1, (one, other)
    assert jnp.ones(()).dtype == np.float32  # float64 stayed inside


@pytest.mark.long
def test_main_learns_the_targets_and_draws(tmp_path, capsys):
    picture = tmp_path / 'picture.png'
    histories = vi.main(['--quick', '--output', str(picture)])
    assert picture.read_bytes().startswith(b'\x89PNG') and picture.stat().st_size > 20_000
    assert [p.name for p in tmp_path.iterdir()] == ['picture.png']
    for name, choice in vi.CHOICES.items():
        learned = vi.summary(vi.last(histories[name]))
        if name != 'all':
            np.testing.assert_allclose(learned, (*choice.q1(), *choice.q2), atol=0.1)
    assert vi.summary(vi.last(histories['all']))[-1] < 0.3 * vi.EXACT[2]
    printed = capsys.readouterr().out
    for choice in vi.CHOICES.values():
        assert printed.count(f'\n{choice.title} ') == 2 and f'\n{choice.title}: 400' in printed
    assert str(picture) in printed
