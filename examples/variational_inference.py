"""Variational inference with a partial stop_gradient: what the operator ⊥_φ means and does.

The question is how to write "treat this as a constant when differentiating with respect to φ1, and
otherwise as normal", ⊥_φ1 for short (https://stats.stackexchange.com/questions/519522; ⊥ itself is
from arXiv:1802.05098). Its example has two observations, y1 of θ1 and y2 of (θ1, θ2), and

    K(φ1, φ2) = E[ log π(θ1, θ2) + log f(y1|θ1) + ⊥_φ1 log f(y2|θ1, θ2)
                   - log q1(θ1; φ1) - ⊥_φ1 log q2(θ2|θ1; φ2) ],

with θ1 = g(ε1, φ1), θ2 = g(θ1, ε2, φ2) and standard normal ε. ∇_φ1 drops the marked terms, ∇_φ2
drops nothing. Formally there are two copies: K̂(φ1, φ2, φ̄1, φ̄2) takes φ̄1 in place of φ1 in the
marked terms, and ∇K is ∇K̂ with respect to (φ1, φ2) alone, at φ̄ = φ. In flax_sg, ⊥_φ1 is a block:

    with nn.stop_gradient('q1'): ...

The marked terms depend on φ1 through θ1, which is also the input of q2 and so a part of θ2. So θ1
and θ2 are computed again in the block, from the same ε: a value read before a block keeps its
gradient. (As φ1 comes in through θ1 alone here, jax.lax.stop_gradient(θ1) would do the same. The
block needs no such argument: it holds φ1 wherever the terms may read it.)

What is it for? Someone who trusts y1 more than the model of y2 wants y2 to teach q2 and not q1
("cutting feedback", see arXiv:2204.00296). Here everything is linear and Gaussian, so the answers
are known:

    θ1 ~ N(0, 1),   θ2|θ1 ~ N(a θ1, s²),   y1|θ1 ~ N(θ1, r1²),   y2|θ1, θ2 ~ N(θ1 + θ2, r2²).

Under ⊥_φ1, ∇_φ2 is that of the full bound, so q2 becomes p(θ2|θ1, y2). What is left for φ1 then is
the target p(θ1|y1) p(y2|θ1)^κ, and the marks decide the power κ:

- none (the ELBO): the terms with θ2 add up to log p(y2|θ1). κ = 1, the posterior p(θ1|y1, y2).
- K as it is written: log π(θ1, θ2) = log π(θ1) + log π(θ2|θ1) is not marked. With q2 as above, the
  mean of log π(θ2|θ1) is a constant - (E[θ2|θ1, y2] - a θ1)² / 2s², and as that difference is
  (y2 - (1 + a) θ1) s² / (s² + r2²), this is κ log p(y2|θ1) with κ = s² / (s² + r2²): a part of y2
  still gets through, by way of the prior. This is not p(θ1|y1).
- log π(θ2|θ1) marked too: κ = 0, the cut posterior p(θ1|y1).
- the marks of K with ⊥ in place of ⊥_φ1, `nn.stop_gradient(True)`: y2 and the entropy of q2 no
  longer teach φ2 either. q2 collapses onto the prior's mean a θ1, which leaves p(θ1|y1) to q1.

Run it: python examples/variational_inference.py [--quick] [--output PATH]
"""

import argparse
import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_sg import nn

Y1, Y2 = -1.0, 4.0  # the two observations, in conflict
A, S = 0.5, 1.0  # θ2|θ1 ~ N(A θ1, S²)
R1, R2 = 1.0, 1.0  # noise of y1 and y2
KAPPA = S**2 / (S**2 + R2**2)

Array = jax.Array
Params = dict[str, Any]


def log_normal(x: Array | float, mean: Array | float, scale: Array | float) -> Array:
    """Return the log density of N(mean, scale²) at x."""
    return -0.5 * ((x - mean) / scale) ** 2 - jnp.log(scale) - 0.5 * np.log(2 * np.pi)


class Q1(nn.Module):
    """The mean and standard deviation of q1(θ1; φ1), a Gaussian."""

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        mean = self.param('mean', nn.initializers.zeros, ())
        return mean, jnp.exp(self.param('log_scale', nn.initializers.zeros, ()))


class Q2(nn.Module):
    """Those of q2(θ2|θ1; φ2), a Gaussian whose mean and log scale are functions of θ1."""

    @nn.compact
    def __call__(self, theta1: Array) -> tuple[Array, Array]:
        mean, log_scale = jnp.moveaxis(nn.Dense(2, name='net')(theta1[:, None]), 1, 0)
        return mean, jnp.exp(log_scale)


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which terms are marked, what is held in them, and where that leads.

    Attributes:
      title: the name in the table and the picture.
      marked: names of the terms that are marked.
      held: the predicate of the block; 'q1' is ⊥_φ1, True is ⊥.
      kappa: the power of p(y2|θ1) in the target of φ1.
      q2: the slope, intercept and standard deviation of q2's target.
    """

    title: str
    marked: tuple[str, ...]
    held: str | bool
    kappa: float
    q2: tuple[float, float, float]

    def q1(self) -> tuple[float, float]:
        """Return the mean and standard deviation of the target of φ1."""
        terms = [
            (0.0, 1.0),
            (Y1, 1 / R1**2),
            (Y2 / (1 + A), self.kappa * (1 + A) ** 2 / (S**2 + R2**2)),
        ]
        precision = sum(p for _, p in terms)
        return sum(m * p for m, p in terms) / precision, precision**-0.5


# p(θ2|θ1, y2): the prior N(A θ1, S²) meets y2 - θ1, seen with noise R2.
EXACT = ((1 - KAPPA) * A - KAPPA, KAPPA * Y2, (S**-2 + R2**-2) ** -0.5)
CHOICES = {
    'elbo': Choice('no ⊥: the ELBO', (), 'q1', 1.0, EXACT),
    'k': Choice('K, ⊥_φ1 as written', ('y2', 'q2'), 'q1', KAPPA, EXACT),
    'cut': Choice('⊥_φ1 on π(θ2|θ1) too', ('prior2', 'y2', 'q2'), 'q1', 0.0, EXACT),
    'all': Choice('⊥ in place of ⊥_φ1', ('y2', 'q2'), True, 0.0, (A, 0.0, 0.0)),
}


class Bound(nn.Module):
    """The value inside E[...], for each draw of the noise."""

    choice: Choice

    def setup(self):
        self.q1 = Q1()
        self.q2 = Q2()

    def terms(self, noise1: Array, noise2: Array) -> dict[str, Array]:
        mean1, scale1 = self.q1()
        theta1 = mean1 + scale1 * noise1
        mean2, scale2 = self.q2(theta1)
        theta2 = mean2 + scale2 * noise2
        return {
            'prior1': log_normal(theta1, 0.0, 1.0),
            'prior2': log_normal(theta2, A * theta1, S),
            'y1': log_normal(Y1, theta1, R1),
            'y2': log_normal(Y2, theta1 + theta2, R2),
            'q1': -log_normal(theta1, mean1, scale1),
            'q2': -log_normal(theta2, mean2, scale2),
        }

    def __call__(self, noise1: Array, noise2: Array) -> Array:
        live = self.terms(noise1, noise2)
        with nn.stop_gradient(self.choice.held):
            held = self.terms(noise1, noise2)  # computed again: the values in `live` stay live
        return sum(held[n] if n in self.choice.marked else live[n] for n in live)


def two_copies(choice: Choice, phi: Params, phi_bar: Params, noise1: Array, noise2: Array) -> Array:
    """Return K̂ of each draw, with no module and no block.

    Marked terms take what is held from ``phi_bar``. The gradient of K is the gradient with respect
    to ``phi`` alone, at ``phi_bar`` = ``phi``.
    """

    def terms(phi1: Params, phi2: Params) -> dict[str, Array]:
        mean1, scale1 = phi1['mean'], jnp.exp(phi1['log_scale'])
        theta1 = mean1 + scale1 * noise1
        both = jnp.dot(theta1[:, None], phi2['net']['kernel']) + phi2['net']['bias'][None, :]
        mean2, log_scale2 = jnp.moveaxis(both, 1, 0)
        scale2 = jnp.exp(log_scale2)
        theta2 = mean2 + scale2 * noise2
        return {
            'prior1': log_normal(theta1, 0.0, 1.0),
            'prior2': log_normal(theta2, A * theta1, S),
            'y1': log_normal(Y1, theta1, R1),
            'y2': log_normal(Y2, theta1 + theta2, R2),
            'q1': -log_normal(theta1, mean1, scale1),
            'q2': -log_normal(theta2, mean2, scale2),
        }

    unmarked = terms(phi['q1'], phi['q2'])
    marked = terms(phi_bar['q1'], phi['q2'] if choice.held == 'q1' else phi_bar['q2'])
    return sum(marked[n] if n in choice.marked else unmarked[n] for n in unmarked)


@functools.cache
def start() -> Params:
    """Return the parameters that every choice starts from."""
    noise = jnp.zeros((1,))
    return jax.jit(Bound(CHOICES['elbo']).init)(jax.random.key(0), noise, noise)['params']


def estimate(choice: Choice, phi: Params, noise1: Array, noise2: Array) -> Array:
    """Return the mean over the draws of what is inside E[...]."""
    return jnp.mean(Bound(choice).apply({'params': phi}, noise1, noise2))


def gradients(choice: Choice, phi: Params, noise1: Array, noise2: Array) -> tuple[Array, Params]:
    """Return the estimate and its gradient, through the block."""
    return jax.value_and_grad(estimate, argnums=1)(choice, phi, noise1, noise2)


def gradients_by_hand(
    choice: Choice, phi: Params, noise1: Array, noise2: Array
) -> tuple[Array, Params]:
    """Return the same from K̂."""

    def k_hat(phi: Params, phi_bar: Params) -> Array:
        return jnp.mean(two_copies(choice, phi, phi_bar, noise1, noise2))

    return jax.value_and_grad(k_hat, argnums=0)(phi, phi)


def expected_gradient(choice: Choice, phi: Params) -> Params:
    """Return the gradient of the bound itself, by quadrature over the noise, in float64."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(12)
    noise1, noise2 = (n.ravel() for n in np.meshgrid(nodes, nodes))
    weights = np.outer(weights, weights).ravel() / (2 * np.pi)

    def bound(phi: Params) -> Array:
        return jnp.dot(weights, Bound(choice).apply({'params': phi}, noise1, noise2))

    with jax.enable_x64(True):
        return jax.device_get(jax.jit(jax.grad(bound))(phi))


def target(choice: Choice) -> Params:
    """Return the parameters at which q1 and q2 are their targets, in float64."""
    (mean, sd), (slope, intercept, sd2) = choice.q1(), choice.q2
    return {
        'q1': {'mean': np.float64(mean), 'log_scale': np.log(sd)},
        'q2': {
            'net': {'kernel': np.array([[slope, 0.0]]), 'bias': np.array([intercept, np.log(sd2)])}
        },
    }


def optimise(choice: Choice, steps: int, draws: int, rate: float) -> Params:
    """Follow the gradient, and return the parameters after each step.

    All choices see the same noise. What is found is where the gradient vanishes: under marks it is
    not the gradient of any one function.
    """
    optimiser = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(carry, key):
        phi, opt_state = carry
        noise = jax.random.normal(key, (2, draws))
        grads = jax.grad(lambda phi: -estimate(choice, phi, *noise))(phi)
        updates, opt_state = optimiser.update(grads, opt_state)
        phi = optax.apply_updates(phi, updates)
        return (phi, opt_state), phi

    @jax.jit
    def run(phi):
        keys = jax.random.split(jax.random.key(1), steps)
        return jax.lax.scan(step, (phi, optimiser.init(phi)), keys)[1]

    return jax.device_get(run(start()))


def summary(phi: Params) -> tuple[float, ...]:
    """Return q1's mean and standard deviation, and q2's slope, intercept and sd at q1's mean."""
    mean, (slope, tilt) = phi['q1']['mean'], phi['q2']['net']['kernel'][0]
    intercept, log_sd2 = phi['q2']['net']['bias']
    return tuple(
        map(
            float,
            (mean, np.exp(phi['q1']['log_scale']), slope, intercept, np.exp(log_sd2 + tilt * mean)),
        )
    )


def largest(tree: Params) -> float:
    return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def print_gradients() -> None:
    """Print the gradients of each choice at one point, beside those of K̂."""
    noise = jax.random.normal(jax.random.key(2), (2, 1000))
    print('At the start, with 1000 draws:')
    print(
        f'{"":22}{"value":>9}{"∇ mean1":>10}{"∇ log sd1":>11}{"|∇φ2|":>9}   '
        'largest difference to ∇K̂'
    )
    for choice in CHOICES.values():
        value, grads = jax.jit(gradients, static_argnums=0)(choice, start(), *noise)
        _, by_hand = jax.jit(gradients_by_hand, static_argnums=0)(choice, start(), *noise)
        worst = largest(jax.tree.map(lambda a, b: a - b, grads, by_hand))
        print(
            f'{choice.title:22}{value:9.4f}{grads["q1"]["mean"]:10.4f}'
            f'{grads["q1"]["log_scale"]:11.4f}{optax.tree.norm(grads["q2"]):9.4f}   {worst:.1e}'
        )
    print()


def print_results(histories: dict[str, Params]) -> None:
    """Print what each choice learned, beside its target."""
    print(
        f'\n{"learned (exact)":22}'
        + ''.join(
            f'{name:>16}' for name in ('q1 mean', 'q1 sd', 'q2 slope', 'q2 intercept', 'q2 sd')
        )
        + '   largest gradient there'
    )
    for name, choice in CHOICES.items():
        learned = summary(last(histories[name]))
        pairs = zip(learned, (*choice.q1(), *choice.q2), strict=True)
        # The collapsed q2 has no density: there is no gradient at that target.
        gradient = (
            f'{largest(expected_gradient(choice, target(choice))):.1e}'
            if choice.q2[2]
            else 'none: q2 collapses'
        )
        print(
            f'{choice.title:22}'
            + ''.join(f'{a:7.3f} ({e:6.3f})' for a, e in pairs)
            + f'   {gradient}'
        )


def last(history: Params) -> Params:
    return jax.tree.map(lambda x: x[-1], history)


def draw(histories: dict[str, Params], path: str) -> None:
    """Save the picture: densities of q1, their way there, and q2."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    # Where choices agree, the later and thinner lines lie on the earlier ones.
    styles = {
        'elbo': {'color': '#0072b2', 'lw': 5},
        'k': {'color': '#d55e00', 'lw': 3.5},
        'cut': {'color': '#009e73', 'lw': 2},
        'all': {'color': '#999999', 'lw': 2, 'ls': ':'},
    }
    exact = {'color': 'black', 'lw': 1, 'ls': (0, (5, 4))}
    figure, (densities, means, conditional) = plt.subplots(
        1, 3, figsize=(15, 4.6), layout='constrained'
    )
    x, theta1 = np.linspace(-3, 3, 400), np.linspace(-2, 2, 50)
    for name, choice in CHOICES.items():
        history, style = histories[name], styles[name]
        mean, sd, *_ = summary(last(history))
        densities.plot(x, density(x, mean, sd), **style, label=choice.title)
        path_of_mean = history['q1']['mean']
        means.plot(np.arange(1, len(path_of_mean) + 1), path_of_mean, **style | {'lw': 2})
        centre, scale = conditional_of(last(history), theta1)
        for line in (centre - scale, centre, centre + scale):
            conditional.plot(theta1, line, **style)
    for choice in CHOICES.values():
        (mean, sd), (slope, intercept, sd2) = choice.q1(), choice.q2
        densities.plot(x, density(x, mean, sd), **exact)
        means.axhline(mean, **exact)
        for shift in (-sd2, 0, sd2):
            conditional.plot(theta1, intercept + slope * theta1 + shift, **exact)
    densities.plot([], [], **exact, label='exact target')
    densities.legend(fontsize=8, loc='upper left')
    densities.set(title='q1(θ1), learned', xlabel='θ1', ylabel='density', ylim=(0, 0.95))
    means.set(title='mean of q1 on the way', xlabel='step', xscale='log')
    for name, text in (('elbo', 'p(θ1|y1, y2)'), ('k', 'p(θ1|y1) p(y2|θ1)^κ'), ('cut', 'p(θ1|y1)')):
        means.text(
            len(path_of_mean),
            CHOICES[name].q1()[0] + 0.07,
            text,
            ha='right',
            color=styles[name]['color'],
        )
    conditional.set(
        title='q2(θ2|θ1), learned: mean ± sd', xlabel='θ1', ylabel='θ2', ylim=(-1.5, 4.2)
    )
    conditional.text(-1.95, 3.6, 'p(θ2|θ1, y2), in three choices of four')
    conditional.text(-0.6, -0.85, '⊥ in place of ⊥_φ1:\nthe sd goes to 0', color='#777777')
    figure.savefig(path, dpi=110)
    plt.close(figure)


def density(x: np.ndarray, mean: float, sd: float) -> np.ndarray:
    return np.exp(-0.5 * ((x - mean) / sd) ** 2) / (sd * np.sqrt(2 * np.pi))


def conditional_of(phi: Params, theta1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return q2's mean and standard deviation for each θ1."""
    mean, scale = Q2().apply({'params': phi['q2']}, jnp.asarray(theta1, jnp.float32))
    return np.asarray(mean), np.asarray(scale)


def main(argv: list[str] | None = None) -> dict[str, Params]:
    parser = argparse.ArgumentParser(description='What ⊥_φ1 does in variational inference.')
    parser.add_argument('--quick', action='store_true', help='a short run, for the tests')
    parser.add_argument('--output', default='variational_inference.png', help='the picture')
    args = parser.parse_args(argv)
    began = time.perf_counter()
    print_gradients()
    steps, draws, rate = (400, 64, 0.06) if args.quick else (2000, 512, 0.03)
    histories = {}
    for name, choice in CHOICES.items():
        histories[name] = optimise(choice, steps, draws, rate)
        print(
            f'{choice.title}: {steps} steps of {draws} draws, '
            f'{time.perf_counter() - began:.1f} s so far'
        )
    print_results(histories)
    draw(histories, args.output)
    print(f'\nκ = {KAPPA:.3g}. Picture: {args.output}. {time.perf_counter() - began:.1f} s.')
    return histories


if __name__ == '__main__':
    main()
