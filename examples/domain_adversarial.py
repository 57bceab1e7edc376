"""Domain-adversarial training: one loss trains the encoder backwards, by a block with a factor.

Ganin et al. (arXiv:1505.07818) have labelled examples of a source domain, unlabelled ones of a
target domain, and want a classifier for the target. Three parts learn at once: an encoder, a label
head on its features of the source, and a domain head that tells from the features which domain an
example is of. The encoder learns to help the label head and to hinder the domain head, so that the
features look alike in both domains. For this the paper puts a gradient reversal layer between
encoder and domain head: the identity, whose backward pass multiplies by -λ. Here it is a block:

    with nn.scale_gradient('encoder', -lam):
        domain_logits = self.domain(self.encoder(both))

λ is a traced number that grows in training from 0 to 1, as in the paper. The block multiplies the
cotangents of the encoder's parameters, which are read in it, and leaves those of activations alone.
A reversal layer multiplies the cotangent of the features. A backward pass is linear in that, so the
gradients of all parameters are equal. They differ where a gradient goes on to the encoder's input,
or to a part before the encoder: the layer reverses it, the block does so for what it names.

The source is scikit-learn's digits, 8 by 8 pixels. The target is other digits, slanted: each row is
moved by a half pixel against the next. Three runs differ in nothing but λ and the labelled set:

- source only: λ stays 0. The domain head learns, and the encoder does not notice.
- adversarial: λ grows. The labels of the target are not used.
- oracle: λ stays 0, and the labelled set is the target's own. This is an upper bound.

Accuracies are on digits that no run trains with. Each seed has its own split, start and batches.
All runs share the settings, which were chosen on splits of other seeds. The method is no cure for
every shift: features can agree in distribution while they pair different digits, and where ink and
paper are exchanged it gains next to nothing.

Run it: python examples/domain_adversarial.py [--quick] [--output PATH]
"""

import argparse
import dataclasses
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from flax_sg import nn

SLANT = 0.5  # pixels from row to row
RATE, BATCH = 0.05, 64
POINTS = 30  # of the curves

Array = jax.Array
Params = dict[str, Any]


class Net(nn.Module):
    """The encoder and its two heads."""

    def setup(self):
        self.encoder = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(64), nn.relu])
        self.label = nn.Dense(10)
        self.domain = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(1)])

    def __call__(self, source: Array, target: Array, lam: Array | float) -> tuple[Array, Array]:
        """Return the logits of the source's labels, and of being the target, source first."""
        label_logits = self.label(self.encoder(source))
        with nn.scale_gradient('encoder', -lam):
            domain_logits = self.domain(self.encoder(jnp.concatenate([source, target])))
        return label_logits, domain_logits[:, 0]

    def features(self, pixels: Array) -> Array:
        return self.encoder(pixels)

    def classify(self, pixels: Array) -> Array:
        return self.label(self.encoder(pixels)).argmax(-1)

    def is_target(self, pixels: Array) -> Array:
        return self.domain(self.encoder(pixels))[:, 0] > 0


class Digits(NamedTuple):
    pixels: Array
    labels: Array


class Data(NamedTuple):
    """Disjoint sets of digits, the last two for tests."""

    source: Digits
    target: Digits
    source_test: Digits
    target_test: Digits


@dataclasses.dataclass(frozen=True)
class Run:
    """A row of the table: its name, what λ grows to, and whether target labels are used."""

    title: str
    peak: float
    labelled_target: bool = False


RUNS = {
    'plain': Run('source only', 0.0),
    'adversarial': Run('adversarial', 1.0),
    'oracle': Run('oracle', 0.0, labelled_target=True),
}


class Result(NamedTuple):
    """What a run leaves: arrays with the seeds in front, ``course`` with the points before them."""

    params: Params
    course: np.ndarray  # accuracy on the target's test set on the way
    source: np.ndarray  # accuracies at the end
    target: np.ndarray
    domain: np.ndarray


def slanted(images: np.ndarray) -> np.ndarray:
    """Move each row by SLANT pixels against the next, with linear interpolation."""
    rows, columns = np.arange(8)[:, None], np.arange(8)
    comes_from = columns + SLANT * (rows - 3.5)
    weights = np.maximum(0, 1 - np.abs(comes_from[:, :, None] - columns))
    return np.einsum('rcf,nrf->nrc', weights, images)


def load(seeds: list[int]) -> Data:
    """Return a split of the digits for each seed, stacked."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8) / 16
    domains = {'source': images, 'target': slanted(images)}

    def digits(domain: str, which: np.ndarray) -> Digits:
        pixels = domains[domain][which].reshape(len(which), 64)
        return Digits(pixels.astype(np.float32), labels[which])

    def split(seed: int) -> Data:
        order = np.random.default_rng(seed).permutation(len(labels))
        parts = np.split(order, [650, 1300, 1500])
        return Data(*map(digits, ('source', 'target', 'source', 'target'), parts))

    return jax.tree.map(lambda *arrays: np.stack(arrays), *map(split, seeds))


def loss(params: Params, source: Digits, target: Array, lam: Array | float) -> Array:
    """Return the sum of both losses. Its gradient is what every part descends."""
    label_logits, domain_logits = Net().apply({'params': params}, source.pixels, target, lam)
    of_target = jnp.concatenate([jnp.zeros(len(source.pixels)), jnp.ones(len(target))])
    return (
        optax.softmax_cross_entropy_with_integer_labels(label_logits, source.labels).mean()
        + optax.sigmoid_binary_cross_entropy(domain_logits, of_target).mean()
    )


gradients = jax.grad(loss)


def ramp(progress: Array | float) -> Array:
    """Return the paper's λ, for progress from 0 to 1."""
    return 2 / (1 + jnp.exp(-10 * progress)) - 1


def optimiser(steps: Array | int) -> optax.GradientTransformation:
    """Return the paper's: momentum, and a rate that decays."""
    return optax.sgd(lambda step: RATE / (1 + 10 * step / steps) ** 0.75, momentum=0.9)


@jax.jit
@jax.vmap
def start(key: Array) -> tuple:
    """Return the parameters and the optimiser's state."""
    params = Net().init(key, jnp.zeros((1, 64)), jnp.zeros((1, 64)), 0.0)['params']
    return params, optimiser(1).init(params)


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, 0, 0, None, None, None))  # over the seeds
def advance(state: tuple, key: Array, data: Data, peak: float, numbers: Array, steps: int) -> tuple:
    """Take the steps with these numbers, of ``steps`` in all."""

    def step(state: tuple, number: Array) -> tuple[tuple, None]:
        params, opt_state = state
        keys = jax.random.split(jax.random.fold_in(key, number))
        size = len(data.source.labels)
        mine, other = (jax.random.randint(k, (BATCH,), 0, size) for k in keys)
        source = Digits(data.source.pixels[mine], data.source.labels[mine])
        lam = peak * ramp(number / steps)
        grads = gradients(params, source, data.target.pixels[other], lam)
        updates, opt_state = optimiser(steps).update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.lax.scan(step, state, numbers)[0]


@jax.jit
@jax.vmap
def accuracy(params: Params, digits: Digits) -> Array:
    guess = Net().apply({'params': params}, digits.pixels, method='classify')
    return (guess == digits.labels).mean()


@jax.jit
@jax.vmap
def domain_accuracy(params: Params, source: Digits, target: Digits) -> Array:
    """Return the mean of the domain head's accuracies on the two domains."""
    found = [
        Net().apply({'params': params}, digits.pixels, method='is_target').mean()
        for digits in (source, target)
    ]
    return (1 - found[0] + found[1]) / 2


def train(run: Run, data: Data, seeds: list[int], steps: int) -> Result:
    """Train a net for each seed, all at once."""
    if run.labelled_target:
        data = data._replace(source=data.target)
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    state, course = start(keys), []
    for numbers in jnp.arange(steps).reshape(POINTS, -1):
        state = advance(state, keys, data, run.peak, numbers, steps)
        course.append(jax.device_get(accuracy(state[0], data.target_test)))
        if len(course) % 6 == 0:
            print(
                f'{run.title}, step {numbers[-1] + 1}: accuracy {course[-1].mean():.3f} on the '
                'target',
                flush=True,
            )
    return jax.device_get(
        Result(
            state[0],
            np.stack(course),
            accuracy(state[0], data.source_test),
            course[-1],
            domain_accuracy(state[0], data.source_test, data.target_test),
        )
    )


def print_results(results: dict[str, Result]) -> None:
    """Print the means over the seeds and the standard deviations, and the gain of each seed."""
    print(f'\n{"accuracy, mean ± sd":22}{"target":>16}{"source":>16}{"domain head":>16}')
    for name, result in results.items():
        cells = [
            f'{x.mean():.3f} ± {x.std(ddof=1):.3f}'
            for x in (result.target, result.source, result.domain)
        ]
        if RUNS[name].labelled_target:
            cells[2] = '-'  # its domain head never saw the source
        print(f'{RUNS[name].title:22}' + ''.join(f'{cell:>16}' for cell in cells))
    gains = results['adversarial'].target - results['plain'].target
    print(
        '\nGain on the target by the adversarial term, seed by seed: '
        + ', '.join(f'{gain:+.3f}' for gain in gains)
    )


def draw(results: dict[str, Result], data: Data, steps: int, path: str) -> None:
    """Save the picture: the course of the runs, and the features of both domains."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.8), layout='constrained')
    colours = {'plain': '#d55e00', 'adversarial': '#0072b2', 'oracle': '#888888'}
    numbers = np.arange(1, POINTS + 1) * (steps // POINTS)
    for name, result in results.items():
        mean, sd = result.course.mean(1), result.course.std(1, ddof=1)
        axes[0].plot(numbers, mean, color=colours[name], label=RUNS[name].title)
        axes[0].fill_between(numbers, mean - sd, mean + sd, color=colours[name], alpha=0.2, lw=0)
    axes[0].set(
        title='accuracy on the target, mean ± sd over the seeds', xlabel='step', ylim=(0, 1)
    )
    axes[0].legend(loc='lower right')
    sets = {'source': data.source_test, 'target': data.target_test}
    for axis, name in zip(axes[1:], ('plain', 'adversarial'), strict=True):
        draw_features(axis, first(results[name].params), {k: first(v) for k, v in sets.items()})
        axis.set(
            title=f'features, {RUNS[name].title}: two principal components', xticks=[], yticks=[]
        )
    axes[1].legend(loc='best', title='numerals: mean of a digit', markerscale=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def first(tree: Any) -> Any:
    """Return what belongs to the first seed."""
    return jax.tree.map(lambda x: x[0], tree)


def draw_features(axis: Any, params: Params, sets: dict[str, Digits]) -> None:
    """Scatter the features of both domains, with a numeral at the mean of each digit."""
    features = {
        domain: np.asarray(Net().apply({'params': params}, digits.pixels, method='features'))
        for domain, digits in sets.items()
    }
    pca = PCA(2, svd_solver='full').fit(np.concatenate(list(features.values())))
    means = {}
    for domain, colour in (('source', '#009e73'), ('target', '#a2478b')):
        points = pca.transform(features[domain])
        axis.scatter(*points.T, s=9, color=colour, alpha=0.35, lw=0, label=domain)
        means[domain] = [points[sets[domain].labels == digit].mean(0) for digit in range(10)]
        for digit, mean in enumerate(means[domain]):
            axis.text(
                *mean,
                str(digit),
                color=colour,
                fontsize=14,
                fontweight='bold',
                ha='center',
                va='center',
            )
    for ends in zip(*means.values(), strict=True):
        axis.plot(*np.transpose(ends), color='black', lw=0.8, alpha=0.6)


def main(argv: list[str] | None = None) -> dict[str, Result]:
    parser = argparse.ArgumentParser(description='Domain-adversarial training by a block.')
    parser.add_argument('--quick', action='store_true', help='a short run, for the tests')
    parser.add_argument('--output', default='domain_adversarial.png', help='the picture')
    args = parser.parse_args(argv)
    began = time.perf_counter()
    seeds, steps = ([0, 1, 2], 900) if args.quick else ([0, 1, 2, 3, 4], 1500)
    data = load(seeds)
    results = {name: train(run, data, seeds, steps) for name, run in RUNS.items()}
    print_results(results)
    draw(results, data, steps, args.output)
    print(
        f'{len(seeds)} seeds, {steps} steps. Picture: {args.output}. '
        f'{time.perf_counter() - began:.1f} s.'
    )
    return results


if __name__ == '__main__':
    main()
