"""A GAN whose two losses share one forward pass: each trains its own part, by gradient_views.

The generator should make images that the discriminator takes for real ones, and the discriminator
should tell them apart. Both losses look at the same number, the discriminator's verdict on what the
generator made, and each may train one part. The usual step therefore makes and judges the images
twice: once for the discriminator's loss, with the generator held, and once for the generator's,
whose gradient flows through the discriminator and must not move it. Here it is done once:

    views = nn.gradient_views({'generator': 'generator', 'discriminator': 'discriminator'})
    fake = views(self.judge)(batch)     # two entries, of the same value

The gradients are the same. What is saved is a forward pass through both parts. If a backward pass
costs two forward ones, a step costs the generator 3 instead of 4: so no more than a third can be
won, and less with the discriminator and the optimisers counted. One-stage training (Shen et al.,
arXiv:2103.00430) goes on to share the discriminator's backward pass, by scaling gradients, which
needs a verdict of one number for each image. Views need not, and pull back twice.

The images are scikit-learn's digits, 8 by 8 pixels. The generator paints each in several strokes, a
loop (`nn.scan`). That matters: XLA merges equal forward passes of one program where they are
straight code, as in this discriminator, but does not merge loops, one of which stores what its
backward pass needs. Four ways are compared: one pass; two passes, compiled as one program or as two
programs, one for each loss; and one pass of the generator and two of the discriminator, written by
hand with the generator's pullback, which XLA turns into much the same as the first. All update both
parts at once. Where the discriminator is updated before the generator looks at it, as is common as
well, the second verdict is another one, and cannot be shared.

Run it: python examples/gan_one_pass.py [--quick] [--steps N] [--output PATH]

See also google/flax issue 1857 and pytorch issue 74832.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from flax_sg import nn

RATES = {'generator': 1e-3, 'discriminator': 2e-3}
BATCH, NOISE, BLUR = 64, 32, 0.1  # images; numbers for each; deviation of noise on the pixels
STROKES, HIDDEN = 8, 128
SURE = 0.95  # a classifier's probability from which it counts as sure

Array = jax.Array
Params = dict[str, Any]
Losses = dict[str, Array]


class Stroke(nn.Module):
    """Looks at the canvas, and adds something to it."""

    @nn.compact
    def __call__(
        self, carry: tuple[Array, Array], noise: Array
    ) -> tuple[tuple[Array, Array], None]:
        hidden, canvas = carry
        seen = jnp.concatenate([noise, jnp.tanh(canvas)], -1)
        hidden, _ = nn.GRUCell(HIDDEN)(hidden, seen)
        return (hidden, canvas + nn.Dense(64)(hidden)), None


class Generator(nn.Module):
    """Paints images (batch, 64), from -1 to 1, from noise (batch, NOISE)."""

    @nn.compact
    def __call__(self, noise: Array) -> Array:
        paint = nn.scan(
            Stroke,
            variable_broadcast='params',
            split_rngs={'params': False},
            in_axes=nn.broadcast,
            length=STROKES,
        )
        blank = jnp.zeros((len(noise), HIDDEN)), jnp.zeros((len(noise), 64))
        (_, canvas), _ = paint(name='stroke')(blank, noise)
        return jnp.tanh(canvas)


class Discriminator(nn.Module):
    """Gives a verdict on each image, the logit of its being real."""

    @nn.compact
    def __call__(self, images: Array) -> Array:
        for features in (256, 128):
            images = nn.leaky_relu(nn.Dense(features)(images), 0.2)
        return nn.Dense(1)(images)[:, 0]


class Batch(NamedTuple):
    """Real images, and noise: to paint from, and for the pixels of both kinds of image."""

    real: Array  # (BATCH, 64)
    noise: Array  # (BATCH, NOISE)
    blur: Array  # (2, BATCH, 64)


class Gan(nn.Module):
    def setup(self):
        self.generator, self.discriminator = Generator(), Discriminator()

    def judge(self, batch: Batch) -> Array:
        return self.discriminator(self.generator(batch.noise) + batch.blur[0])

    def __call__(self, batch: Batch) -> Losses:
        """Return the loss of each part. It trains that part, and not the other."""
        views = nn.gradient_views({'generator': 'generator', 'discriminator': 'discriminator'})
        fake = views(self.judge)(batch)
        real = self.discriminator(batch.real + batch.blur[1])
        return {
            'generator': generator_loss(fake['generator']),
            'discriminator': discriminator_loss(fake['discriminator'], real),
        }


def generator_loss(fake: Array) -> Array:
    """Return the non-saturating loss: -log of the probability that fakes are real."""
    return nn.softplus(-fake).mean()


def discriminator_loss(fake: Array, real: Array) -> Array:
    return (nn.softplus(fake) + nn.softplus(-real)).mean()


# --- The gradients of both losses, in one pass and in two -----------------------------------------


def one_pass(params: Params, batch: Batch) -> tuple[Losses, Params]:
    """Return the losses, and for each part the gradient of its own."""

    def total(params: Params) -> tuple[Array, Losses]:
        losses = Gan().apply({'params': params}, batch)
        return sum(losses.values()), losses

    grads, losses = jax.grad(total, has_aux=True)(params)
    return losses, grads


def of_discriminator(params: Params, batch: Batch) -> tuple[Losses, Params]:
    """Return the discriminator's half of the usual step."""
    return discriminator_alone(params, batch, generate(params['generator'], batch.noise))


def of_generator(params: Params, batch: Batch) -> tuple[Losses, Params]:
    """Return the generator's half of the usual step."""

    def loss(mine: Params) -> Array:
        fake = generate(mine, batch.noise) + batch.blur[0]
        return generator_loss(verdict(params['discriminator'], fake))

    value, grad = jax.value_and_grad(loss)(params['generator'])
    return {'generator': value}, {'generator': grad}


def two_passes(params: Params, batch: Batch) -> tuple[Losses, Params]:
    return both(of_discriminator(params, batch), of_generator(params, batch))


def by_hand(params: Params, batch: Batch) -> tuple[Losses, Params]:
    """Return the same, with one pass of the generator."""

    def loss(fake: Array) -> Array:
        return generator_loss(verdict(params['discriminator'], fake + batch.blur[0]))

    fake, pullback = jax.vjp(lambda mine: generate(mine, batch.noise), params['generator'])
    value, cotangent = jax.value_and_grad(loss)(fake)
    return both(
        discriminator_alone(params, batch, fake),
        ({'generator': value}, {'generator': pullback(cotangent)[0]}),
    )


def discriminator_alone(params: Params, batch: Batch, fake: Array) -> tuple[Losses, Params]:
    def loss(mine: Params) -> Array:
        return discriminator_loss(
            verdict(mine, fake + batch.blur[0]), verdict(mine, batch.real + batch.blur[1])
        )

    value, grad = jax.value_and_grad(loss)(params['discriminator'])
    return {'discriminator': value}, {'discriminator': grad}


def generate(params: Params, noise: Array) -> Array:
    return Generator().apply({'params': params}, noise)


def verdict(params: Params, images: Array) -> Array:
    return Discriminator().apply({'params': params}, images)


def both(half: tuple[Losses, Params], other: tuple[Losses, Params]) -> tuple[Losses, Params]:
    return half[0] | other[0], half[1] | other[1]


WAYS = {
    'one pass': [one_pass],
    'two passes': [two_passes],
    'two programs': [of_discriminator, of_generator],
    'by hand': [by_hand],
}


# --- Training -------------------------------------------------------------------------------------


class State(NamedTuple):
    """Of one part: its parameters, and its optimiser's state."""

    params: Params
    adam: Any


def optimiser(part: str) -> optax.GradientTransformation:
    return optax.adam(RATES[part], b1=0.5)


def start(seed: int, batch: Batch) -> dict[str, State]:
    params = jax.jit(Gan().init)(jax.random.key(seed), batch)['params']
    return {part: State(params[part], optimiser(part).init(params[part])) for part in RATES}


def step_of(gradients: Callable) -> Callable:
    """Return a step that updates the parts whose gradients it is given."""

    def step(state: dict[str, State], batch: Batch) -> tuple[dict[str, State], Losses]:
        losses, grads = gradients({part: own.params for part, own in state.items()}, batch)
        new = {}
        for part, grad in grads.items():
            changes, adam = optimiser(part).update(grad, state[part].adam)
            new[part] = State(optax.apply_updates(state[part].params, changes), adam)
        return new, losses

    return jax.jit(step)


def draw_batch(images: np.ndarray, rng: np.random.Generator) -> Batch:
    noise, blur = (
        rng.standard_normal(shape, np.float32) for shape in ((BATCH, NOISE), (2, BATCH, 64))
    )
    return Batch(images[rng.integers(len(images), size=BATCH)], noise, BLUR * blur)


paint = jax.jit(generate)


@jax.jit
def blend(average: Params, params: Params) -> Params:
    return jax.tree.map(lambda a, p: 0.995 * a + 0.005 * p, average, params)


class Quality(NamedTuple):
    """What a classifier of real digits says of images."""

    sure: float  # the share of images of whose class it is sure
    classes: np.ndarray  # how many it finds of each class


def quality(classifier: LogisticRegression, images: np.ndarray) -> Quality:
    probabilities = classifier.predict_proba(images)
    return Quality(
        (probabilities.max(1) > SURE).mean(), np.bincount(probabilities.argmax(1), minlength=10)
    )


def train(
    images: np.ndarray, classifier: LogisticRegression, steps: int, seed: int
) -> tuple[dict[str, State], dict[int, np.ndarray], dict[int, Quality]]:
    """Train in one pass a step; return the state, and images and their quality on the way."""
    rng = np.random.default_rng(seed)
    shown = rng.standard_normal((500, NOISE), np.float32)
    step, state = step_of(one_pass), start(seed, draw_batch(images, rng))
    average = state['generator'].params  # over some 200 steps: it paints what is shown
    losses, painted, course, began = {}, {}, {}, time.perf_counter()
    for number in range(steps + 1):
        if number % max(steps // 8, 1) == 0:
            painted[number] = np.asarray(paint(average, shown))
            course[number] = quality(classifier, painted[number])
            print(
                f'step {number:5d}  classifier sure of {course[number].sure:4.0%}'
                + ''.join(f'  {part} {loss:.3f}' for part, loss in losses.items())
                + f'  {time.perf_counter() - began:5.1f} s',
                flush=True,
            )
        if number < steps:
            state, losses = step(state, draw_batch(images, rng))
            average = blend(average, state['generator'].params)
    return state, painted, course


# --- What a step costs ----------------------------------------------------------------------------


class Cost(NamedTuple):
    """Figures of a way's compiled programs, and what each is over that of one pass."""

    flops: float
    loops: int
    temp_bytes: int
    seconds: float
    times: float  # median of the ratios of neighbours


def largest_difference(state: dict[str, State], batch: Batch) -> tuple[float, float]:
    """Return how far the gradients of both ways are apart, and the largest gradient."""
    params = {part: own.params for part, own in state.items()}
    (_, ours), (_, usual) = (jax.jit(way)(params, batch) for way in (one_pass, two_passes))
    apart = jax.tree.map(lambda a, b: float(abs(a - b).max()), ours, usual)
    return (
        max(jax.tree.leaves(apart)),
        max(float(abs(grad).max()) for grad in jax.tree.leaves(usual)),
    )


def costs_of(state: dict[str, State], batch: Batch, rounds: int) -> dict[str, Cost]:
    """Compile all ways and run them in turns, A B C D D C B A."""
    programs = {
        name: [step_of(way).lower(state, batch).compile() for way in ways]
        for name, ways in WAYS.items()
    }
    seconds = {name: [] for name in WAYS}
    for number in range(-1, rounds):
        for name in list(WAYS)[:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            for _ in range(5):
                jax.block_until_ready([program(state, batch) for program in programs[name]])
            seconds[name] += [(time.perf_counter() - began) / 5] * (number >= 0)
    return {
        name: Cost(
            sum(program.cost_analysis()['flops'] for program in compiled),
            sum(program.as_text().count(' while(') for program in compiled),
            max(program.memory_analysis().temp_size_in_bytes for program in compiled),
            statistics.median(seconds[name]),
            statistics.median(
                a / b for a, b in zip(seconds[name], seconds['one pass'], strict=True)
            ),
        )
        for name, compiled in programs.items()
    }


def print_costs(costs: dict[str, Cost]) -> None:
    base = costs['one pass']
    print(
        '\nA step, optimiser included; in brackets, over one pass. Flops as XLA counts them, the '
        f'body of a loop once\n{"":14}{"time":>18}{"flops":>18}{"temporary bytes":>22}'
        f'{"loops":>8}'
    )
    for name, cost in costs.items():
        cells = (
            f'{1e3 * cost.seconds:.2f} ms ({cost.times:.2f})',
            f'{cost.flops / 1e6:.1f} M ({cost.flops / base.flops:.2f})',
            f'{cost.temp_bytes / 1e6:.2f} M ({cost.temp_bytes / base.temp_bytes:.2f})',
        )
        print(f'{name:14}{cells[0]:>18}{cells[1]:>18}{cells[2]:>22}{cost.loops:8}')


def draw(painted: dict[int, np.ndarray], real: np.ndarray, ratio: float, path: str) -> None:
    """Save the picture: each row is the same noise after more steps; the last are real digits."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    rows = {f'step {number}': images for number, images in painted.items()} | {'real': real}
    figure, axes = plt.subplots(
        len(rows), figsize=(9, 0.72 * len(rows) + 0.6), layout='constrained'
    )
    for axis, (name, images) in zip(axes, rows.items(), strict=True):
        framed = np.pad(images[:14].reshape(14, 8, 8), ((0, 0), (0, 0), (0, 2)), constant_values=-1)
        axis.imshow(np.concatenate(framed, 1), cmap='gray_r', vmin=-1, vmax=1)
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name, rotation=0, ha='right', va='center')
    figure.suptitle(
        f'Both losses from one forward pass. The usual two take {ratio:.2f} times as long'
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


class Result(NamedTuple):
    """What a run found, as it was printed."""

    course: dict[int, Quality]
    differences: list[tuple[float, float]]  # at the start and at the end
    costs: dict[str, Cost]


def main(argv: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description='A GAN: two losses from one forward pass.')
    parser.add_argument('--quick', action='store_true', help='a short run, for the tests')
    parser.add_argument('--steps', type=int, help='training steps (default: 2400)')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--output', default='gan_one_pass.png', help='the picture')
    args = parser.parse_args(argv)
    steps = (16 if args.quick else 2400) if args.steps is None else args.steps
    if steps < 1:
        parser.error(f'--steps {steps}: expected at least 1')

    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 8 - 1).astype(np.float32)
    held_out = images[1300:]
    classifier = LogisticRegression(max_iter=2000).fit(images[:1300], labels[:1300])
    state, painted, course = train(images, classifier, steps, args.seed)

    rng = np.random.default_rng(args.seed)
    shuffled = np.stack([rng.permutation(column) for column in held_out.T], 1)
    print(f'\nA classifier of digits is sure (over {SURE}) of')
    for name, found in {
        'generated': course[max(course)],
        'real, held out': quality(classifier, held_out),
        'pixels shuffled among images': quality(classifier, shuffled),
    }.items():
        print(f'{name:30}{found.sure:4.0%}, and finds of each class', *found.classes)

    batch = draw_batch(images, rng)
    differences = [largest_difference(s, batch) for s in (start(args.seed, batch), state)]
    for when, (difference, largest) in zip(('start', 'end'), differences, strict=True):
        print(
            f'Gradients of one pass and two, {when} of training: at most {difference:.1e} apart, '
            f'where the largest is {largest:.1e}'
        )
    costs = costs_of(state, batch, 3 if args.quick else 40)
    print_costs(costs)
    draw(painted, held_out, costs['two passes'].times, args.output)
    print(f'\nPicture: {args.output}')
    return Result(course, differences, costs)


if __name__ == '__main__':
    main()
