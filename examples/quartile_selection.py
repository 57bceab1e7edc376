"""A gradient that is zero, and rightly so: a loss of the entries that a sort selects.

A is a vector of N entries, B a matrix of shape (N, M), and parameters θ give each entry a score,
C(θ) = B θ. A_low and A_high are the entries of A whose scores are in the lower and in the upper
quartile of C. A loss f(A_low, A_high) is to be minimised with respect to θ:

    order = jnp.argsort(b @ theta)
    loss = f(a[order[:n // 4]], a[order[-(n // 4):]])

"The entries at a quartile" could also be two single entries, at the places N/4 and 3N/4 of the
order. Here they are the N/4 lowest and the N/4 highest: a loss of two entries says nothing about
the other ones, let alone about new rows. What follows holds for both.

jax.grad gives zero, without a warning, and zero is right. θ has an effect only through which
entries are selected, and under an infinitesimal change of θ no score moves past another: the
selected sets stay, and so does f. The program computes how far θ can move before an entry enters or
leaves a set. Within that f is constant, and the derivative of a constant is zero. At a tie between
an entry in a set and one outside, f jumps: there the derivative is undefined, and jax.grad still
says zero. `gradient_flow` finds all this in the program and calls it PIECEWISE_CONSTANT, with the
operation and the line.

So no other way to write the sort gives a gradient, as f has none. What can be differentiated is
another function that is close to f, a smoothed one:

    noise on θ   E f(θ + σz) with normal z: optax.perturbations around f as a function of θ
    noise on C   E f(C(θ) + σz): the same around f as a function of the scores
    soft sort    each entry belongs to a quartile by a weight: softjax.argsort. It runs where
                 softjax is installed, which needs Python 3.12: the extra `soft-sort`

The first two use nothing but values of f. Their gradients are means over samples of
(f(θ + σz) - f(θ)) z/σ, unbiased for the smoothed function. `gradient_flow` calls them
REACHED_PARTLY, as optax holds the samples at which it evaluates f: the gradient comes by their
probability alone. They differ in how many samples they need: noise on θ has M dimensions, noise
on C has N. The third has no noise. It is the exact gradient of another smoothed function.

The task: rows of B describe investments, A is what they return. The lower quartile should be quiet
and the upper one should gain: f = mean |A_low| - mean A_high. The first feature raises the mean of
A, the second lowers it a little and raises its spread, and two have no effect. Least squares of A
on B, for comparison, does not see the spread. f does not depend on the length of θ, which is set
to 1 after each step. Else it would grow, and the noise, which counts relative to it, would be lost.

The program prints the zero with its reason; then each estimator's gradient beside central
differences of its own smoothed function, both with their Monte Carlo standard error; then it trains
with each. At every step f is evaluated with hard quartiles, on the rows that θ is trained on and on
held-out rows, and the smoothed function with held-out noise z.

Run it: python examples/quartile_selection.py [--quick] [--steps N] [--seed N] [--output PATH]
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import perturbations

import flax_sg as sg

ROWS, HELD_OUT = 300, 2000
START = np.array([-0.3, -0.3, 0.8, 0.4], np.float32)
SIGMA_THETA, SIGMA_C, SOFTNESS = 0.2, 0.5, 0.1
SAMPLES = 200  # of the noise, for one gradient

Array = jax.Array
Params = dict[str, Array]


class Rows(NamedTuple):
    """A, of shape (N,), and B, of shape (N, M)."""

    a: Array
    b: Array


Loss = Callable[[Params, Rows, Array], Array]  # the last argument is the key of the noise


class Smoothed(NamedTuple):
    """A loss to be trained with, and the step of its central differences."""

    loss: Loss
    step: float
    colour: str


def draw_rows(rng: np.random.Generator, number: int) -> Rows:
    b = rng.normal(size=(number, len(START)))
    spread = 2.5 / (1 + np.exp(-2 * b[:, 1]))
    a = 0.5 + b[:, 0] - 0.3 * b[:, 1] + spread * rng.normal(size=number)
    return Rows(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))


def f(a_low: Array, a_high: Array, low: Array | None = None, high: Array | None = None) -> Array:
    """Return f of two groups, to which entries may belong by the weights ``low`` and ``high``."""
    return jnp.average(jnp.abs(a_low), weights=low) - jnp.average(a_high, weights=high)


def quartiles(scores: Array) -> tuple[Array, Array]:
    """Return the places of the lowest quarter of the scores, and of the highest."""
    order = jnp.argsort(scores)
    return order[: len(scores) // 4], order[-(len(scores) // 4) :]


def of_scores(a: Array, scores: Array) -> Array:
    low, high = quartiles(scores)
    return f(a[low], a[high])


def hard(params: Params, rows: Rows, key: Array | None = None) -> Array:
    """Return f, whose gradient is zero. There is no noise for which a key would be needed."""
    return of_scores(rows.a, rows.b @ params['theta'])


def noise_on_theta(params: Params, rows: Rows, key: Array) -> Array:
    smooth = perturbations.make_perturbed_fun(
        lambda params: hard(params, rows), SAMPLES, SIGMA_THETA, perturbations.Normal()
    )
    return smooth(key, params)


def noise_on_scores(params: Params, rows: Rows, key: Array) -> Array:
    smooth = perturbations.make_perturbed_fun(
        lambda scores: of_scores(rows.a, scores), SAMPLES, SIGMA_C, perturbations.Normal()
    )
    return smooth(key, rows.b @ params['theta'])


def soft_sort(params: Params, rows: Rows, key: Array) -> Array:
    """Return f of two soft groups: of all entries, by how far they belong to each."""
    import softjax

    places = softjax.argsort(rows.b @ params['theta'], softness=SOFTNESS, method='softsort')
    quarter = len(rows.a) // 4
    return f(rows.a, rows.a, places[:quarter].sum(0), places[-quarter:].sum(0))


def estimators() -> dict[str, Smoothed]:
    """Return what there is to train with, softjax only where it is installed."""
    found = {
        'noise on θ': Smoothed(noise_on_theta, SIGMA_THETA / 4, '#0072b2'),
        'noise on C': Smoothed(noise_on_scores, SIGMA_THETA / 4, '#d55e00'),
    }
    try:
        import softjax  # noqa: F401  (whether it is there)
    except ImportError:
        return found
    # A soft sort has kinks where scores tie. A long step goes over many of them.
    return found | {'soft sort': Smoothed(soft_sort, 0.0005, '#009e73')}


def nearest_tie(theta: Array, rows: Rows) -> np.ndarray:
    """Return the shortest way that θ can go until an entry enters or leaves a group.

    Entries i and j tie on the plane (B_i - B_j) θ = 0. This is the way to the nearest of them, for
    all i in a group and j outside it.
    """
    b, scores = np.asarray(rows.b, np.float64), np.asarray(rows.b @ theta, np.float64)
    ways = []
    for group in map(np.asarray, quartiles(rows.b @ theta)):
        outside = np.setdiff1d(np.arange(len(b)), group)
        across = b[outside][:, None] - b[group]
        gaps = scores[outside][:, None] - scores[group]
        way = -(gaps / (across**2).sum(-1))[..., None] * across
        ways.append(way.reshape(-1, b.shape[1]))
    ways = np.concatenate(ways)
    return ways[np.argmin((ways**2).sum(-1))]


def explain_zero(
    smoothed: dict[str, Smoothed], params: Params, rows: Rows, key: Array
) -> tuple[np.ndarray, sg.Flow]:
    """Print the zero and why it is there; return the gradient, and the flow of all losses."""
    gradient = np.asarray(jax.grad(hard)(params, rows)['theta'])
    way = nearest_tie(params['theta'], rows)
    print(
        f'f is {hard(params, rows):.4f}, and its gradient {gradient}.\nIf θ moves by less than '
        f'{np.linalg.norm(way):.6f}, in any direction, the groups stay. Towards the nearest tie:'
    )
    for share in (0.5, 0.99, 1.01):
        moved = {'theta': params['theta'] + jnp.asarray(share * way, jnp.float32)}
        print(f'  θ moves by {share * np.linalg.norm(way):.6f}, f is {hard(moved, rows):.4f}')

    losses = {'f': hard, **{name: each.loss for name, each in smoothed.items()}}
    expected = {name: sg.nothing if name == 'f' else 'theta' for name in losses}
    flow = sg.assert_flow(losses, expected, params, rows, key, norms=True)
    record = flow['f', 'theta']
    print(
        f'\n{flow}\n\n{record.name} is {record.verdict} for {record.loss}: {record.operation} '
        f'at {record.source}'
    )
    return gradient, flow


def five_point(loss: Callable[[Params], Array], params: Params, step: float) -> Array:
    """Return central differences of fourth order."""

    def along(direction: Array) -> Array:
        values = jax.vmap(lambda t: loss({'theta': params['theta'] + t * direction}))(
            step * jnp.array([-2.0, -1.0, 1.0, 2.0])
        )
        return values @ jnp.array([1.0, -8.0, 8.0, -1.0]) / (12 * step)

    return jax.lax.map(along, jnp.eye(len(params['theta'])))


class Mean(NamedTuple):
    """A gradient: the mean over keys, and its standard error."""

    mean: np.ndarray
    error: np.ndarray


@functools.partial(jax.jit, static_argnums=(0, 4))
def over_keys(
    smoothed: Smoothed, params: Params, rows: Rows, keys: Array, differences: bool
) -> Mean:
    """Return the mean gradient of a smoothed loss, by JAX or by differences.

    A key gives the same noise whatever the parameters are, so that a difference is one of values
    with common random numbers.
    """

    def each(key: Array) -> Array:
        loss = lambda params: smoothed.loss(params, rows, key)
        if differences:
            return five_point(loss, params, smoothed.step)
        return jax.grad(loss)(params)['theta']

    found = jax.lax.map(each, keys)
    return Mean(found.mean(0), found.std(0, ddof=1) / np.sqrt(len(keys)))


def compare(
    smoothed: dict[str, Smoothed], params: Params, rows: Rows, number: int, key: Array
) -> dict[str, tuple[Mean, Mean]]:
    """Print and return the gradients, and central differences with noise of their own."""
    print(
        f'\nGradients at the start ± standard error, over {4 * number} times {SAMPLES} samples, '
        f'and differences over {number} times {SAMPLES} other ones:'
    )
    found = {}
    for name, each in smoothed.items():
        keys = jax.random.split(key, 5 * number)
        gradient = jax.device_get(over_keys(each, params, rows, keys[number:], False))
        truth = jax.device_get(over_keys(each, params, rows, keys[:number], True))
        found[name] = gradient, truth
        for title, (mean, error) in (
            (f'{name:12}gradient', gradient),
            (f'{"":12}differences', truth),
        ):
            print(
                f'{title:25}'
                + '  '.join(f'{m:7.3f} ± {e:.3f}' for m, e in zip(mean, error, strict=True)),
                flush=True,
            )
        apart, length = np.linalg.norm(gradient.mean - truth.mean), np.linalg.norm(truth.mean)
        expected = np.linalg.norm(np.hypot(gradient.error, truth.error)) / length
        one = np.linalg.norm(gradient.error) * np.sqrt(4 * number) / length
        print(
            f'{"":12}apart by {apart / length:.2%}, '
            + (
                f'while the standard errors are {expected:.2%}; a gradient of {SAMPLES} samples '
                f'is off by {one:.0%}'
                if one > 1e-3
                else 'and there is no noise'
            )
        )
    return found


def train(
    name: str, loss: Loss, params: Params, rows: Rows, held_out: Rows, steps: int, key: Array
) -> tuple[Params, dict[str, np.ndarray]]:
    """Train; return the parameters, and the values of f at the start and after each step."""
    optimiser = optax.adam(0.03)
    training, spare = jax.random.split(key)

    @jax.jit
    def values(params: Params) -> dict[str, Array]:
        return {
            'hard': hard(params, rows),
            'held-out rows': hard(params, held_out),
            'held-out noise': loss(params, rows, spare),
        }

    def step(carry, key):
        params, opt_state = carry
        updates, opt_state = optimiser.update(jax.grad(loss)(params, rows, key), opt_state)
        moved = optax.apply_updates(params, updates)
        params = jax.tree.map(lambda x: x / jnp.linalg.norm(x), moved)
        return (params, opt_state), values(params)

    run = jax.jit(functools.partial(jax.lax.scan, step))
    carry = params, optimiser.init(params)
    course = [jax.tree.map(jnp.atleast_1d, values(params))]
    keys, part = jax.random.split(training, steps), max(1, -(-steps // 4))
    for first in range(0, steps, part):
        carry, some = run(carry, keys[first : first + part])
        course.append(some)
        print(
            f'{name:12}step {min(first + part, steps):4d}: '
            + ', '.join(f'{key} {value[-1]:.3f}' for key, value in some.items()),
            flush=True,
        )
    return carry[0], jax.tree.map(lambda *parts: np.concatenate(parts), *course)


def least_squares(rows: Rows) -> Params:
    """Return the direction in which A rises, as least squares finds it."""
    theta = np.linalg.lstsq(np.column_stack([rows.b, np.ones(len(rows.a))]), rows.a)[0][:-1]
    return {'theta': jnp.asarray(theta / np.linalg.norm(theta), jnp.float32)}


def landscape(
    smoothed: dict[str, Smoothed], start: Params, end: Params, rows: Rows, number: int, key: Array
) -> dict[str, tuple[np.ndarray, Array]]:
    """Return f, f closely, and the smoothed losses, along the line from start to end."""

    @functools.partial(jax.jit, static_argnums=0)
    def along(loss: Loss, at: Array) -> Array:
        def of(t: Array) -> Array:
            params = jax.tree.map(lambda a, b: a + t * (b - a), start, end)
            return jax.vmap(lambda key: loss(params, rows, key))(jax.random.split(key, 2)).mean()

        return jax.lax.map(of, at)

    fine, coarse, close = (
        np.linspace(*ends, dtype=np.float32)
        for ends in ((-0.3, 1.5, 30 * number), (-0.3, 1.5, number), (0, 0.04, 30 * number))
    )
    return {
        'f': (fine, along(hard, fine)),
        'close': (close, along(hard, close)),
        **{name: (coarse, along(each.loss, coarse)) for name, each in smoothed.items()},
    }


def draw(
    path: str,
    smoothed: dict[str, Smoothed],
    lines: dict[str, Any],
    gradients: dict[str, tuple[Mean, Mean]],
    courses: dict[str, dict[str, np.ndarray]],
    rival: float,
) -> None:
    """Save the picture: f along a line, the gradients, and the training."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    figure, ((line, bars), (trained, unseen)) = plt.subplots(
        2, 2, figsize=(13, 9), layout='constrained'
    )
    line.plot(*lines['f'], color='black', lw=0.8, label='f, hard quartiles')
    inset = line.inset_axes((0.56, 0.54, 0.42, 0.38))
    inset.plot(*lines['close'], color='black', lw=1)
    inset.set_title('f close to the start', fontsize=9)
    inset.tick_params(labelsize=8)
    line.indicate_inset_zoom(inset, edgecolor='black')
    for number, (name, each) in enumerate(smoothed.items()):
        line.plot(*lines[name], color=each.colour, label=name)
        places = np.arange(len(START)) + 0.25 * (number - (len(smoothed) - 1) / 2)
        gradient, truth = gradients[name]
        bars.bar(places, truth.mean, 0.2, color=each.colour, alpha=0.35)
        bars.errorbar(
            places,
            gradient.mean,
            2 * np.hypot(gradient.error, truth.error),
            fmt='o',
            ms=4,
            color=each.colour,
            capsize=3,
            label=name,
        )
        course = courses[name]
        trained.plot(course['hard'], color=each.colour, lw=0.9, label=f'{name}: f')
        trained.plot(
            course['held-out noise'], color=each.colour, ls='--', lw=2, label=f'{name}: smoothed'
        )
        unseen.plot(course['held-out rows'], color=each.colour, label=name)
    line.set(
        title='training rows: f along a line of θ, flat between jumps',
        xlabel='0: start, 1: after training',
    )
    line.legend(loc='lower left')
    bars.axhline(0, color='black', lw=1, label='gradient of f: zero')
    bars.set(
        title='gradients at the start: dots ± 2 standard errors, differences as bars',
        xticks=range(len(START)),
        xticklabels=[f'θ{i}' for i in range(1, len(START) + 1)],
    )
    bars.legend(loc='lower right')
    trained.set(title='training rows: f, and the smoothed f on held-out noise', xlabel='step')
    trained.legend(fontsize=9)
    unseen.axhline(rival, color='black', ls=':', label='least squares')
    unseen.set(title='held-out rows: f, hard quartiles', xlabel='step')
    unseen.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--quick', action='store_true', help='a short run, for the tests')
    parser.add_argument('--steps', type=int, help='of the training with each estimator')
    parser.add_argument('--seed', type=int, default=0, help='of rows and noise')
    parser.add_argument('--output', default='quartile_selection.png', help='the picture')
    args = parser.parse_args(argv)
    began = time.perf_counter()
    number, points = (5, 8) if args.quick else (20, 40)
    steps = args.steps if args.steps is not None else 24 if args.quick else 100
    rng = np.random.default_rng(args.seed)
    rows, held_out = draw_rows(rng, ROWS), draw_rows(rng, HELD_OUT)
    keys = jax.random.split(jax.random.key(args.seed), 4)
    start, smoothed = {'theta': jnp.asarray(START / np.linalg.norm(START))}, estimators()

    gradient, flow = explain_zero(smoothed, start, rows, keys[0])
    gradients = compare(smoothed, start, rows, number, keys[1])
    print('\nTraining, with values of f:')
    ends, courses = {}, {}
    for name, each in smoothed.items():
        ends[name], courses[name] = train(name, each.loss, start, rows, held_out, steps, keys[2])
    rival = least_squares(rows)
    print(f'\n{"":15}{"f, training":>12}{"f, held out":>12}   θ')
    for name, params in {'start': start, 'least squares': rival, **ends}.items():
        print(
            f'{name:15}{hard(params, rows):12.3f}{hard(params, held_out):12.3f}   '
            + ' '.join(f'{x:5.2f}' for x in params['theta'])
        )
    lines = landscape(smoothed, start, ends['noise on θ'], rows, points, keys[3])
    draw(args.output, smoothed, lines, gradients, courses, float(hard(rival, held_out)))
    print(f'Picture: {args.output}. {time.perf_counter() - began:.1f} s.')
    return {
        'gradient': gradient,
        'flow': flow,
        'gradients': gradients,
        'courses': courses,
        'ends': ends,
    }


if __name__ == '__main__':
    main()
