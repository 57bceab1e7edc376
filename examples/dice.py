"""DiCE's magic box: derivatives of any order of an expectation, with ⊥ written as a block.

The derivatives of L = E[cost(x; θ)] need samples of x, whose distribution depends on θ as well. The
usual way is a surrogate loss, log p(x; θ) ⊥cost + cost. Its gradient is right in expectation. Its
value is not L, and its derivatives of higher order are wrong, since ⊥cost has lost its dependence
on θ. DiCE (Foerster et al., arXiv:1802.05098) multiplies each cost by the magic box of the random
nodes before it:

    L_DiCE = Σ_c MagicBox(τ_c) c,   MagicBox(τ) = exp(τ - ⊥τ),   τ_c = Σ_{x before c} log p(x; θ).

The box is 1, and its derivative is itself times that of τ, over and over again. ⊥τ is τ computed
once more in a block that holds the parameters, see `Graph.dice`:

    with nn.stop_gradient(True):
        held = self.log_probs(x, y)

As τ depends on nothing but parameters and discrete samples, jax.lax.stop_gradient(τ) is the same
here. It would also stop what comes in by another way, an input or a sample that is differentiable;
the block holds parameters, and with a narrower predicate only those of one part.

The graph is the paper's failing example, x ~ Bernoulli(θ) with the cost x(1 - θ) + (1 - x)(1 + θ),
and a second node behind it, y | x ~ Bernoulli(φ if x else θφ), with the cost y(θ + φ). So

    L(θ, φ) = 1 + θ - 2θ² + θφ(2 - θ)(θ + φ),

and all derivatives are known. For the first node alone L'' is -4. There are two ways to a second
derivative with surrogates. To differentiate the surrogate twice leaves out, for each cost c,
E[c s sᵀ + s ∇cᵀ + ∇c sᵀ] with s = ∇τ_c. To make a surrogate of the surrogate's gradient, and
differentiate that, leaves out E[s ∇cᵀ]; it gets -2 for the first node, as the paper shows.

Two means of each estimator are printed: the exact one, which is a sum over the four outcomes
weighted with their probabilities, and that over samples, with its standard error.

Run it: python examples/dice.py [--quick] [--output PATH]
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_sg import nn

POINT = np.array([0.4, 0.7], np.float32)  # θ and φ
OUTCOMES = np.array([(0, 0), (0, 1), (1, 0), (1, 1)], np.float32)
ROWS = {  # quantities of the table, and which derivatives they are
    'L': (),
    'L_θ': (0,),
    'L_φ': (1,),
    'L_θθ': (0, 0),
    'L_θφ': (0, 1),
    'L_φφ': (1, 1),
    'L_θθθ': (0, 0, 0),
    'L_θθφ': (0, 0, 1),
}

Array = jax.Array
Derivatives = Callable[..., list[Array]]  # of (θ, φ) and more: the value, gradient, Hessian, ...


class Graph(nn.Module):
    """Two random nodes and two costs. Every method is of one sample (x, y)."""

    def setup(self):
        self.theta = self.param('theta', nn.initializers.constant(0.5), ())
        self.phi = self.param('phi', nn.initializers.constant(0.5), ())

    def second(self, x: Array) -> Array:
        """Return the probability of y = 1."""
        return jnp.where(x == 1, self.phi, self.theta * self.phi)

    def sample(self, key: Array) -> tuple[Array, Array]:
        key_x, key_y = jax.random.split(key)
        x = jax.random.bernoulli(key_x, self.theta).astype(jnp.float32)
        return x, jax.random.bernoulli(key_y, self.second(x)).astype(jnp.float32)

    def log_probs(self, x: Array, y: Array) -> Array:
        """Return τ of each cost: log p(x), and log p(x, y)."""
        return jnp.cumsum(
            jnp.stack([log_bernoulli(x, self.theta), log_bernoulli(y, self.second(x))])
        )

    def costs(self, x: Array, y: Array) -> Array:
        first = x * (1 - self.theta) + (1 - x) * (1 + self.theta)
        return jnp.stack([first, y * (self.theta + self.phi)])

    def dice(self, x: Array, y: Array) -> Array:
        live = self.log_probs(x, y)
        with nn.stop_gradient(True):
            held = self.log_probs(x, y)
        magic_box = jnp.exp(live - held)
        return (magic_box * self.costs(x, y)).sum()

    def surrogate(self, x: Array, y: Array) -> Array:
        with nn.stop_gradient(True):
            held = self.costs(x, y)
        return (self.log_probs(x, y) * held + self.costs(x, y)).sum()


def log_bernoulli(x: Array, p: Array) -> Array:
    return jnp.where(x == 1, jnp.log(p), jnp.log1p(-p))


def call(method: str, point: Array, *args: Array) -> Any:
    """Call a method of the graph, at θ and φ."""
    theta, phi = point
    return Graph().apply({'params': {'theta': theta, 'phi': phi}}, *args, method=method)


def truth(point: Array) -> Array:
    """Return L in closed form."""
    theta, phi = point
    return 1 + theta - 2 * theta**2 + theta * phi * (2 - theta) * (theta + phi)


def next_surrogate(point: Array, x: Array, y: Array) -> Array:
    """Return the surrogate of the surrogate's gradient. Its derivative is the paper's Hessian."""
    gradient = jax.grad(call, argnums=1)('surrogate', point, x, y)
    # The gradient is no read of a module, so that no block can hold it.
    return call('log_probs', point, x, y)[-1] * jax.lax.stop_gradient(gradient) + gradient


def derivatives(fn: Callable[..., Array], order: int) -> Derivatives:
    """Return a function that returns the value of ``fn`` and all derivatives up to ``order``."""
    fns = [fn]
    for _ in range(order):
        fns.append(jax.jacfwd(fns[-1]))
    return lambda *args: [fn(*args) for fn in fns]


analytic = jax.jit(derivatives(truth, 3))
dice = functools.partial(call, 'dice')
surrogate = functools.partial(call, 'surrogate')


def surrogate_of_surrogate(*args: Array) -> list[Array]:
    """Return what the surrogate and the surrogate of its gradient give."""
    return [*derivatives(surrogate, 1)(*args), jax.jacfwd(next_surrogate)(*args)]


WAYS = {
    'DiCE': derivatives(dice, 3),
    'surrogate': derivatives(surrogate, 3),
    'surrogate of surrogate': surrogate_of_surrogate,
}


@functools.partial(jax.jit, static_argnums=0)
def exact_mean(way: Derivatives, point: Array) -> list[Array]:
    """Return the mean of an estimator over all outcomes."""
    x, y = OUTCOMES.T
    probabilities = jnp.exp(jax.vmap(functools.partial(call, 'log_probs', point))(x, y)[:, -1])
    return [
        jnp.tensordot(probabilities, each, 1)
        for each in jax.vmap(functools.partial(way, point))(x, y)
    ]


def estimates(way: Derivatives, point: Array, samples: int, key: Array) -> list[Array]:
    """Return an estimator's values for each of so many samples."""
    x, y = jax.vmap(functools.partial(call, 'sample', point))(jax.random.split(key, samples))
    return jax.vmap(functools.partial(way, point))(x, y)


@functools.partial(jax.jit, static_argnums=(0, 2))
def sampled_mean(
    way: Derivatives, point: Array, samples: int, key: Array
) -> list[tuple[Array, Array]]:
    """Return the mean over samples, and its standard error."""
    return [
        (each.mean(0), each.std(0, ddof=1) / np.sqrt(samples))
        for each in estimates(way, point, samples, key)
    ]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def errors(way: Derivatives, repeats: int, samples: int, key: Array) -> Array:
    """Return the error of L_θθ after each sample, as root mean square over the repeats."""
    counts = jnp.arange(1, samples + 1)

    def squared_error(key: Array) -> Array:
        each = estimates(way, POINT, samples, key)[2][:, 0, 0]
        return (jnp.cumsum(each) / counts - analytic(POINT)[2][0, 0]) ** 2

    return jnp.sqrt(jax.lax.map(squared_error, jax.random.split(key, repeats)).mean(0))


def print_table(samples: int) -> dict[str, dict[str, tuple[float, ...]]]:
    """Print the table, and return its rows: exact mean, mean and standard error of each way."""
    exact = {name: exact_mean(way, POINT) for name, way in WAYS.items()}
    sampled = {
        name: sampled_mean(way, POINT, samples, jax.random.key(0)) for name, way in WAYS.items()
    }
    known = analytic(POINT)
    print(
        f'θ = {POINT[0]:.1f}, φ = {POINT[1]:.1f}. Of each estimator: exact mean, mean over '
        f'{samples} samples ± standard error.\n{"":8}{"analytic":>9}'
        + ''.join(f'{name:>32}' for name in WAYS)
    )
    table = {}
    for row, index in ROWS.items():
        order = len(index)
        table[row] = {'analytic': (float(known[order][index]),)} | {
            name: (
                float(exact[name][order][index]),
                *(float(x[index]) for x in sampled[name][order]),
            )
            for name in WAYS
            if order < len(exact[name])
        }
        (value,), *cells = table[row].values()
        print(
            f'{row:8}{value:9.4f}'
            + ''.join(
                f'{f"{mean:.4f}, {found:.3f} ± {error:.3f}":>32}' for mean, found, error in cells
            )
        )
    return table


def over_theta(thetas: np.ndarray, samples: int) -> dict[str, list[list[tuple[Array, Array]]]]:
    """Return what each way estimates at each θ."""
    found = {name: [] for name in WAYS}
    for number, theta in enumerate(thetas):
        point = np.array([theta, POINT[1]], np.float32)
        for name, way in WAYS.items():
            key = jax.random.fold_in(jax.random.key(1), number)
            found[name].append(jax.device_get(sampled_mean(way, point, samples, key)))
        print(
            f'θ = {theta:.2f}: L_θθ is {analytic(point)[2][0, 0]:.3f}, estimated '
            + ', '.join(f'{found[name][-1][2][0][0, 0]:.3f} ({name})' for name in WAYS)
        )
    return found


def draw(
    thetas: np.ndarray, found: dict[str, Any], course: dict[str, np.ndarray], path: str
) -> None:
    """Save the picture: both derivatives over θ, and the error as samples come in."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    styles = dict(zip(WAYS, (('#0072b2', 'o'), ('#d55e00', 's'), ('#009e73', '^')), strict=True))
    figure, (first, second, error) = plt.subplots(1, 3, figsize=(15, 4.8), layout='constrained')
    fine = np.linspace(thetas[0], thetas[-1], 100, dtype=np.float32)
    points = np.stack([fine, np.full_like(fine, POINT[1])], 1)
    known = jax.vmap(analytic)(points)
    for axis, order, index in ((first, 1, 0), (second, 2, (0, 0))):
        axis.plot(fine, known[order][:, *np.atleast_1d(index)], color='black', label='analytic')
        for name, (colour, marker) in styles.items():
            mean, bar = np.transpose(
                [[m[index], e[index]] for m, e in (at[order] for at in found[name])]
            )
            axis.errorbar(
                thetas,
                mean,
                2 * bar,
                color=colour,
                marker=marker,
                ls='none',
                capsize=3,
                mfc='none',
                label=name,
            )
            if axis is second and name != 'DiCE':
                means = jax.vmap(functools.partial(exact_mean, WAYS[name]))(points)[2]
                axis.plot(fine, means[:, 0, 0], color=colour, lw=0.8, ls='--')
    for name, (colour, _) in styles.items():
        counts = np.arange(1, len(course[name]) + 1)
        error.loglog(counts[15:], course[name][15:], color=colour, label=name)
    first.set(title=f'∂L/∂θ at φ = {POINT[1]:.1f}, ± 2 standard errors', xlabel='θ')
    second.set(title='∂²L/∂θ², dashed: exact means', xlabel='θ')
    error.set(title='error of ∂²L/∂θ², root mean square', xlabel='samples')
    first.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, dict[str, tuple[float, ...]]]:
    parser = argparse.ArgumentParser(description="DiCE's magic box, with ⊥ as a block.")
    parser.add_argument('--quick', action='store_true', help='a short run, for the tests')
    parser.add_argument('--output', default='dice.png', help='the picture')
    args = parser.parse_args(argv)
    began = time.perf_counter()
    samples, repeats, number = (2000, 4, 3) if args.quick else (100_000, 30, 7)
    table = print_table(samples)
    print()
    thetas = np.linspace(0.2, 0.8, number)
    found = over_theta(thetas, samples)
    course = {
        name: np.asarray(errors(way, repeats, samples, jax.random.key(2)))
        for name, way in WAYS.items()
    }
    print(
        f'\nError of L_θθ after {samples} samples: '
        + ', '.join(f'{error[-1]:.4f} ({name})' for name, error in course.items())
    )
    draw(thetas, found, course, args.output)
    print(f'Picture: {args.output}. {time.perf_counter() - began:.1f} s.')
    return table


if __name__ == '__main__':
    main()
