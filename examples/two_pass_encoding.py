"""Four losses, four parts of one model, one expensive pass: google/flax issue 1857 as a program.

The request: an encoding element has the parts gln, code_value, code_presence and explanation. One
step of it computes a code message that must train none of them, although its cotangents go on to
the observation; runs an expensive iterated sampler, once; and adds up three losses, each of which
must train its own part only. In Haiku that took four hand-made copies of the weights. Here it takes
four blocks, see `EncodingElement.infer`; two_pass_encoding_by_hand.py has the four copies.

The data are scikit-learn's digits. A retina turns pixels into an observation; the element infers a
code of a few units in two passes, a quick guess and a refinement; a reader draws the digit from
the code message, and its cotangents reach the retina through the element, which they leave alone.

    python two_pass_encoding.py [--steps N] [--seed N] [--output FILE] [--quick]
                                [--shared [--remat]]

Only one loss trains through the sampler there, so that its block can hold the only run. With
--shared all losses look at the same run, and the code's trains through it as well, see
`SharedElement`: with a block for each loss the sampler would run for each, and
`nn.gradient_views` runs it once. Loops, memory and time of the compiled steps are printed. With
--remat they are printed for a sampler too that is rematerialised: its steps keep what they start
from, and are computed again for the gradients. A step is then computed again once for all losses.

It prints the losses while it trains, a table of which loss moves which parameters, and the accuracy
of a linear probe on the codes of held-out digits, before and after training. Labels are used by the
probe only. The loss curves and some digits go to FILE, a picture.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import flax_sg as sg
from flax_sg import nn

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)

# Which parameters of the element each of its losses trains. The blocks of the model and the labels
# of the optimiser both come from here. A block names what it stops: hence the ~ in front of them.
TRAINS = {'gln': sg.path('gln'), 'code': sg.path('code_*'), 'explanation': sg.path('explanation')}
LOSSES = ('reader', 'gln', 'code', 'explanation')


class Code(NamedTuple):
    """A code: of each unit its value, and the logit of its being present."""

    value: jax.Array
    logit: jax.Array

    @property
    def presence(self) -> jax.Array:
        return jax.nn.sigmoid(self.logit)

    @property
    def message(self) -> jax.Array:
        """What others see of the code: values, as far as they are present."""
        return self.presence * self.value


class ScanParameters(NamedTuple):
    """What the sampler is run with: the evidence for values and presence, and the competition."""

    drive: jax.Array
    evidence: jax.Array
    lateral: jax.Array


class Inference(NamedTuple):
    """What one step of the element gives: the message for others, the code, and its losses."""

    message: jax.Array
    code: Code
    losses: dict[str, jax.Array]


# --- The element: this is what the example is about -----------------------------------------------


class EncodingElement(nn.Module):
    """Infers a code from an observation in two passes, and learns from it."""

    observation_features: int
    units: int
    iterations: int
    remat: bool = False

    def setup(self) -> None:
        self.gln = GatedLinearNetwork(self.units)
        self.code_value = Perceptron(self.units)
        self.code_presence = Perceptron(self.units)
        self.explanation = Perceptron(self.observation_features)

    def quick_code(self, observation: jax.Array) -> Code:
        return Code(self.code_value(observation), self.code_presence(observation))

    def noise(self, observation: jax.Array, rng: jax.Array) -> jax.Array:
        return jax.random.normal(rng, (self.iterations, len(observation), self.units))

    def refine(self, parameters: ScanParameters, start: Code, noise: jax.Array) -> Code:
        return iterated_sampler(parameters, start, noise, remat=self.remat)

    def infer(self, observation: jax.Array, rng: jax.Array) -> Inference:
        # First pass. Whoever uses the message sends cotangents through it to the observation; they
        # train nothing here.
        with nn.stop_gradient():
            quick = self.quick_code(observation)

        # The element's own losses take the observation as given.
        given, start = jax.lax.stop_gradient((observation, quick))

        # Second pass, with the only run of the sampler. Cotangents reach gln through the
        # explanation, which does not adapt.
        with nn.stop_gradient(~TRAINS['gln']):
            code = self.refine(self.gln(given), start, self.noise(given, rng))
            gln_loss = gln_objective(self.explanation(code.message), given, code)

        code = jax.lax.stop_gradient(code)

        # The quick guess learns to be like the refined code, and to be explained as well as it is.
        with nn.stop_gradient(~TRAINS['code']):
            guess = self.quick_code(given)
            code_loss = code_mismatch(guess, code)
            code_loss += squared_error(self.explanation(guess.message), given)

        # The explanation learns to explain both.
        with nn.stop_gradient(~TRAINS['explanation']):
            guess = self.quick_code(given)
            explanation_loss = squared_error(self.explanation(code.message), given)
            explanation_loss += squared_error(self.explanation(guess.message), given)

        losses = {'gln': gln_loss, 'code': code_loss, 'explanation': explanation_loss}
        return Inference(quick.message, code, losses)


class SecondPass(NamedTuple):
    """A guess, the code that the sampler makes of it, and what the explanation makes of each."""

    guess: Code
    code: Code
    guess_explained: jax.Array
    code_explained: jax.Array


class SharedElement(EncodingElement):
    """The element with losses that all look at the same second pass, the sampler's run included.

    The losses of gln and the explanation are what they were. The code's has one more term: what the
    sampler makes of the guess, from which it starts, should be explained well too.
    """

    def second_pass(self, given: jax.Array, noise: jax.Array) -> SecondPass:
        guess = self.quick_code(given)
        code = self.refine(self.gln(given), guess, noise)
        return SecondPass(
            guess, code, self.explanation(guess.message), self.explanation(code.message)
        )

    def second_passes(self, given: jax.Array, noise: jax.Array) -> dict[str, SecondPass]:
        """Return the second pass as each loss sees it: to each only its own part is trainable."""
        return nn.gradient_views(TRAINS)(self.second_pass)(given, noise)

    def infer(self, observation: jax.Array, rng: jax.Array) -> Inference:
        with nn.stop_gradient():
            message = self.quick_code(observation).message

        given = jax.lax.stop_gradient(observation)
        seen = self.second_passes(given, self.noise(given, rng))

        gln = seen['gln']
        gln_loss = gln_objective(gln.code_explained, given, gln.code)

        code = seen['code']
        code_loss = code_mismatch(code.guess, jax.lax.stop_gradient(code.code))
        code_loss += squared_error(code.guess_explained, given)
        code_loss += squared_error(code.code_explained, given)

        explanation = seen['explanation']
        explanation_loss = squared_error(explanation.code_explained, given)
        explanation_loss += squared_error(explanation.guess_explained, given)

        losses = {'gln': gln_loss, 'code': code_loss, 'explanation': explanation_loss}
        return Inference(message, jax.lax.stop_gradient(gln.code), losses)


class SharedElementByBlocks(SharedElement):
    """The same with a block for each loss, for comparison: each runs the sampler."""

    def second_passes(self, given: jax.Array, noise: jax.Array) -> dict[str, SecondPass]:
        seen = {}
        for name, trained in TRAINS.items():
            with nn.stop_gradient(~trained):
                seen[name] = self.second_pass(given, noise)
        return seen


COMPARED = {  # elements whose compiled steps --shared compares
    EncodingElement: 'one loss trains through the sampler, in the block of its only run',
    SharedElement: 'two losses do, all look at the same run: gradient_views',
    SharedElementByBlocks: 'the same with a block and a run for each loss',
}


class World(nn.Module):
    """The element between its neighbours: a retina, which makes the observation, and a reader."""

    observation_features: int = 32
    units: int = 8
    iterations: int = 80
    element: type[EncodingElement] = EncodingElement
    remat: bool = False

    def setup(self) -> None:
        self.retina = Retina(self.observation_features)
        self.encoding = self.element(
            self.observation_features, self.units, self.iterations, self.remat
        )
        self.reader = Perceptron(64)

    def __call__(self, pixels: jax.Array, rng: jax.Array) -> dict[str, jax.Array]:
        inference = self.encoding.infer(self.retina(pixels), rng)
        drawing = self.reader(inference.message)
        return {'reader': squared_error(drawing, pixels), **inference.losses}

    def codes(self, pixels: jax.Array, rng: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the messages of the quick code and of the refined one, and the drawing."""
        inference = self.encoding.infer(self.retina(pixels), rng)
        return inference.message, inference.code.message, self.reader(inference.message)


# --- The networks ---------------------------------------------------------------------------------


def _alike_in_every_cell(rng: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    features, _, inputs = shape
    kernel = nn.initializers.lecun_normal()(rng, (inputs, features))
    return jnp.broadcast_to(kernel.T[:, None], shape)


class GatedLinear(nn.Module):
    """A layer of linear units, each with a weight vector for every cell of its fixed halfspaces."""

    features: int
    halfspaces: int = 2

    @nn.compact
    def __call__(self, inputs: jax.Array, side: jax.Array) -> jax.Array:
        cells = 2**self.halfspaces
        planes = (
            np.random.default_rng(self.features)
            .standard_normal((side.shape[-1], self.features, self.halfspaces))
            .astype(np.float32)
        )
        kernel = self.param(
            'kernel', _alike_in_every_cell, (self.features, cells, inputs.shape[-1])
        )
        bits = jnp.einsum('bs,suh->buh', side, planes) > 0
        cell = jax.nn.one_hot(bits @ 2 ** np.arange(self.halfspaces), cells)
        return jnp.einsum('bf,ucf,buc->bu', inputs, kernel, cell)


class GatedLinearNetwork(nn.Module):
    """Computes the sampler's parameters from the observation (arXiv 1910.01526)."""

    units: int
    hidden: int = 32

    @nn.compact
    def __call__(self, observation: jax.Array) -> ScanParameters:
        hidden = GatedLinear(self.hidden)(observation, observation)
        drive, evidence = jnp.split(GatedLinear(2 * self.units)(hidden, observation), 2, axis=-1)
        lateral = self.param('lateral', nn.initializers.normal(0.1), (self.units, self.units))
        return ScanParameters(drive, evidence, lateral)


class Perceptron(nn.Module):
    """One hidden layer."""

    features: int
    hidden: int = 64

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return nn.Dense(self.features)(nn.gelu(nn.Dense(self.hidden)(inputs)))


class Retina(nn.Module):
    """Makes an observation from pixels: learned features, brought to one scale."""

    features: int

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        features = nn.Dense(self.features)(pixels)
        return nn.LayerNorm(use_bias=False, use_scale=False)(features)


# --- The computation without weights --------------------------------------------------------------


def iterated_sampler(
    parameters: ScanParameters, start: Code, noise: jax.Array, *, remat: bool = False
) -> Code:
    """Refine a code step by step; `noise` has a row for each step. This is the expensive part."""
    rate, temperature = 0.1, 0.001

    def step(code: Code, noise: jax.Array) -> tuple[Code, None]:
        inhibition = jnp.tanh(code.message) @ parameters.lateral
        value = code.value + rate * (parameters.drive - inhibition - code.value)
        value += jnp.sqrt(2 * rate * temperature) * noise
        support = parameters.evidence + jnp.square(jnp.tanh(code.value))
        return Code(value, code.logit + rate * (support - code.logit)), None

    if remat:
        step = jax.checkpoint(step, prevent_cse=False)
    return jax.lax.scan(step, start, noise)[0]


def squared_error(guess: jax.Array, truth: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(guess - truth))


def code_mismatch(guess: Code, truth: Code) -> jax.Array:
    """How far a guess is from a refined code: squared error of values, divergence of presences."""
    needed, least = (
        optax.sigmoid_binary_cross_entropy(code.logit, truth.presence) for code in (guess, truth)
    )
    return squared_error(guess.value, truth.value) + jnp.mean(needed - least)


def gln_objective(explained: jax.Array, observation: jax.Array, code: Code) -> jax.Array:
    """The code should explain the observation; units that are present cost a little."""
    return squared_error(explained, observation) + 0.01 * jnp.mean(code.presence)


# --- Data, training, and what it prints -----------------------------------------------------------


class Digits(NamedTuple):
    """Pixels around their mean, shape (digits, 64), and labels, which only the probe sees."""

    pixels: np.ndarray
    labels: np.ndarray


Params = dict[str, Any]


def load_data() -> tuple[Digits, Digits, np.ndarray]:
    """Return digits to train on, held-out digits, and the mean digit of the former."""
    data, target = load_digits(return_X_y=True)
    pixels = (data / 16).astype(np.float32)
    train, held_out, train_labels, held_out_labels = train_test_split(
        pixels, target, test_size=0.25, stratify=target, random_state=0
    )
    mean = train.mean(0)
    return Digits(train - mean, train_labels), Digits(held_out - mean, held_out_labels), mean


@functools.partial(jax.jit, static_argnums=0)
def init(world: World, rng: jax.Array) -> Params:
    return world.init(rng, jnp.zeros((1, 64)), rng)['params']


def make_optimizer(params: Params) -> optax.GradientTransformation:
    """Give each part its own Adam, by the predicates that the model's blocks use."""
    labels = {
        'retina': 'world',
        'reader': 'world',
        'encoding': sg.labels(TRAINS, params['encoding']),
    }
    rates = {'world': 1e-3, 'gln': 3e-3, 'code': 3e-3, 'explanation': 3e-3}
    return optax.partition({part: optax.adam(rate) for part, rate in rates.items()}, labels)


def train(
    world: World, params: Params, digits: Digits, *, steps: int, seed: int
) -> tuple[Params, dict[str, np.ndarray]]:
    """Train with the sum of all losses; return parameters and the course of each loss."""
    optimizer = make_optimizer(params)
    state = optimizer.init(params)

    def total(params: Params, pixels: jax.Array, rng: jax.Array):
        losses = world.apply({'params': params}, pixels, rng)
        return sum(losses.values()), losses

    @jax.jit
    def update(params, state, pixels, rng):
        grads, losses = jax.grad(total, has_aux=True)(params, pixels, rng)
        changes, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, changes), state, losses

    def step(pixels: np.ndarray, rng: jax.Array) -> dict[str, jax.Array]:
        nonlocal params, state
        params, state, losses = update(params, state, pixels, rng)
        return losses

    course = follow(step, digits, steps=steps, seed=seed)
    return params, course


def follow(
    step: Callable[[np.ndarray, jax.Array], dict[str, jax.Array]],
    digits: Digits,
    *,
    steps: int,
    seed: int,
    batch: int = 128,
) -> dict[str, np.ndarray]:
    """Make steps on random digits, print what becomes of the losses, and return their course."""
    choose, key = np.random.default_rng(seed), jax.random.key(seed)
    course, start, live = [], time.perf_counter(), sys.stdout.isatty()
    for number in range(1, steps + 1):
        pixels = digits.pixels[choose.integers(len(digits.pixels), size=batch)]
        losses = step(pixels, jax.random.fold_in(key, number))
        course.append(losses)
        lasting = number in (1, steps) or number % max(steps // 8, 1) == 0
        if lasting or live and number % 20 == 0:
            shown = '  '.join(f'{name} {losses[name]:.4f}' for name in LOSSES)
            line = f'step {number:5d}  {shown}  {time.perf_counter() - start:5.1f} s'
            print('\r' * live + line, end='\n' if lasting else '', flush=True)
    course = jax.device_get(course)
    return {name: np.array([losses[name] for losses in course]) for name in LOSSES}


@functools.partial(jax.jit, static_argnums=0)
def gradients(world: World, params: Params, pixels: jax.Array, rng: jax.Array) -> dict[str, Params]:
    return jax.jacrev(lambda params: world.apply({'params': params}, pixels, rng))(params)


class Cost(NamedTuple):
    """What the compiled gradient of the sum of all losses costs."""

    loops: int
    temporary_bytes: int
    seconds: float


def cost_of(world: World, params: Params, pixels: jax.Array, rng: jax.Array) -> Cost:
    """Count loops, forward and backward, and memory; time a step, the least of some."""

    def total(params: Params) -> jax.Array:
        return sum(world.apply({'params': params}, pixels, rng).values())

    step = jax.jit(jax.grad(total)).lower(params).compile()
    times = []
    for _ in range(20):
        start = time.perf_counter()
        jax.block_until_ready(step(params))
        times.append(time.perf_counter() - start)
    return Cost(
        step.as_text().count(' while('), step.memory_analysis().temp_size_in_bytes, min(times)
    )


def gradient_norms(grads: dict[str, Params]) -> dict[str, dict[str, float]]:
    """Return, for each part of the model, the norm of each loss's gradient."""

    def row(part_of: Callable[[Params], Params]) -> dict[str, float]:
        return {loss: float(optax.tree.norm(part_of(grads[loss]))) for loss in LOSSES}

    element = {
        f'encoding/{name}': row(lambda grad, name=name: grad['encoding'][name])
        for name in ('gln', 'code_value', 'code_presence', 'explanation')
    }
    return {
        'retina': row(lambda grad: grad['retina']),
        **element,
        'reader': row(lambda grad: grad['reader']),
    }


def print_table(rows: dict[str, dict[str, float]], digits: int) -> None:
    columns = next(iter(rows.values()))
    print(' ' * 24 + ''.join(f'{column:>14}' for column in columns))
    for name, row in rows.items():
        cells = ('0' if row[c] == 0 else f'{row[c]:.{digits}f}' for c in columns)
        print(f'{name:24}' + ''.join(f'{cell:>14}' for cell in cells))


def probe(codes: np.ndarray, train: Digits, held_out: Digits) -> float:
    """Fit a linear classifier to the codes of `train`, which come first; return its accuracy."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    model.fit(codes[: len(train.labels)], train.labels)
    return model.score(codes[len(train.labels) :], held_out.labels)


@functools.partial(jax.jit, static_argnums=0)
def infer_codes(
    world: World, params: Params, pixels: jax.Array, rng: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    return world.apply({'params': params}, pixels, rng, method=World.codes)


def probe_codes(
    infer: Callable[[np.ndarray, jax.Array], tuple[jax.Array, jax.Array, jax.Array]],
    train: Digits,
    held_out: Digits,
) -> dict[str, float]:
    """Return the probe's accuracy on the codes of each pass, which `infer` makes of pixels."""
    pixels = np.concatenate((train.pixels, held_out.pixels))
    first, second, _ = jax.device_get(infer(pixels, jax.random.key(1)))
    return {
        'first pass': probe(first, train, held_out),
        'second pass': probe(second, train, held_out),
    }


def save_picture(
    path: str, course: dict[str, np.ndarray], digits: np.ndarray, drawings: np.ndarray
) -> None:
    """Save the loss curves, and below them digits with what the reader makes of their codes."""
    figure = plt.figure(figsize=(8, 6), layout='constrained')
    top, bottom = figure.subfigures(2, 1, height_ratios=(2, 1))
    axes = top.subplots()
    for name, losses in course.items():
        window = min(50, len(losses))
        smooth = np.convolve(losses, np.ones(window) / window, 'valid')
        axes.semilogy(np.arange(window, len(losses) + 1), smooth, label=name)
    axes.set(xlabel='step', ylabel='loss (mean of 50 steps)', title='Each loss trains its own part')
    axes.legend(ncols=len(course), loc='upper right')
    grid = bottom.subplots(2, len(digits))
    for row, images in zip(grid, (digits, drawings), strict=True):
        for cell, image in zip(row, images, strict=True):
            cell.imshow(image.reshape(8, 8), cmap='gray_r', vmin=0, vmax=1)
            cell.set(xticks=[], yticks=[])
    grid[0][0].set_ylabel('held out')
    grid[1][0].set_ylabel('from code')
    figure.savefig(path, dpi=120)
    plt.close(figure)


class Result(NamedTuple):
    """What a run found, as it was printed."""

    course: dict[str, np.ndarray]
    norms: dict[str, dict[str, float]]
    accuracy: dict[str, dict[str, float]]
    costs: dict[tuple[type[EncodingElement], bool], Cost]  # and whether it is rematerialised


def main(argv: Sequence[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--steps', type=int, help='training steps (default: 3000)')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--output', default='two_pass_encoding.png', help='the picture')
    parser.add_argument('--quick', action='store_true', help='a tiny run, to see that it works')
    parser.add_argument('--shared', action='store_true', help='all losses look at the same scan')
    parser.add_argument('--remat', action='store_true', help='and it is rematerialised')
    args = parser.parse_args(argv)
    steps = (30 if args.quick else 3000) if args.steps is None else args.steps
    if steps < 1:
        parser.error(f'--steps {steps}: expected at least 1')
    if args.remat and not args.shared:
        parser.error('--remat: expected --shared beside it')

    digits, held_out, mean = load_data()
    world = World(iterations=8) if args.quick else World()
    if args.shared:
        world = world.clone(element=SharedElement, remat=args.remat)
    params = init(world, jax.random.key(args.seed))
    infer = functools.partial(infer_codes, world, params)
    accuracy = {'untrained': probe_codes(infer, digits, held_out)}

    params, course = train(world, params, digits, steps=steps, seed=args.seed)
    infer = functools.partial(infer_codes, world, params)
    accuracy['trained'] = probe_codes(infer, digits, held_out)

    example = digits.pixels[:128], jax.random.key(0)
    norms = gradient_norms(gradients(world, params, *example))
    print('\nWhich loss moves what: norms of gradients, 0 is exactly zero')
    print_table(norms, 5)

    costs = {}
    if args.shared:
        print('\nThe compiled step: loops, one of which draws the noise; temporary memory; time')
        for remat in (False, True)[: 1 + args.remat]:
            for element, what in COMPARED.items():
                cost = cost_of(world.clone(element=element, remat=remat), params, *example)
                costs[element, remat] = cost
                print(
                    f'{cost.loops:4}  {cost.temporary_bytes / 1e6:6.2f} MB  '
                    f'{cost.seconds * 1e3:7.2f} ms  {what}{", rematerialised" * remat}'
                )

    print(f'\nAccuracy of a linear probe on the {world.units} numbers of a code, held-out digits')
    print_table(accuracy, 3)
    pca = PCA(world.units).fit(digits.pixels)
    components = pca.transform(np.concatenate((digits.pixels, held_out.pixels)))
    print(
        f'For comparison: {world.units} principal components '
        f'{probe(components, digits, held_out):.3f}'
    )

    shown = held_out.pixels[:10]
    _, _, drawings = infer(shown, jax.random.key(1))
    save_picture(args.output, course, shown + mean, drawings + mean)
    print(f'\nLoss curves and drawings: {args.output}')
    return Result(course, norms, accuracy, costs)


if __name__ == '__main__':
    main()
