"""The program of two_pass_encoding.py on modules of flax.nnx: the same blocks, the same result.

Read that one first: it says what all this is for. The losses, the data and what is printed are
imported from there. Here is what reads differently in NNX:

- A block names modules, not paths: in `with nnx.stop_gradient(~nnx.within(self.gln)):` gln alone is
  trained. There is no name to mistype, and a module that is renamed takes its block with it.
- Views take modules too, see `SharedElement`.
- A model has its parameters, so there is no `apply`. `nnx.Optimizer` takes labels of the State that
  it updates; a State is a tree, of which predicates are paths, see `make_optimizer`.

    python two_pass_encoding_nnx.py [--steps N] [--seed N] [--output FILE] [--quick] [--shared]

It starts from the parameters that the Linen program makes of the seed, see `from_linen`, and draws
the same digits and noise. So it prints the same losses, the same table and the same accuracies.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import two_pass_encoding as linen
from two_pass_encoding import (
    Code,
    Digits,
    Inference,
    Params,
    ScanParameters,
    SecondPass,
    code_mismatch,
    follow,
    gln_objective,
    gradient_norms,
    iterated_sampler,
    load_data,
    print_table,
    probe_codes,
    save_picture,
    squared_error,
)

import flax_sg as sg
from flax_sg import nnx

# --- The element: this is what the example is about -----------------------------------------------


class EncodingElement(nnx.Module):
    """Infers a code from an observation in two passes, and learns from it."""

    def __init__(self, observation_features: int, units: int, iterations: int, *, rngs: nnx.Rngs):
        self.gln = GatedLinearNetwork(observation_features, units, rngs=rngs)
        self.code_value = Perceptron(observation_features, units, rngs=rngs)
        self.code_presence = Perceptron(observation_features, units, rngs=rngs)
        self.explanation = Perceptron(units, observation_features, rngs=rngs)
        self.units, self.iterations = units, iterations

    def quick_code(self, observation: jax.Array) -> Code:
        return Code(self.code_value(observation), self.code_presence(observation))

    def noise(self, observation: jax.Array, rng: jax.Array) -> jax.Array:
        return jax.random.normal(rng, (self.iterations, len(observation), self.units))

    def infer(self, observation: jax.Array, rng: jax.Array) -> Inference:
        # First pass: trains nothing, and hands cotangents on to the observation.
        with nnx.stop_gradient():
            quick = self.quick_code(observation)

        given, start = jax.lax.stop_gradient((observation, quick))

        # Second pass, with the only run of the sampler. Cotangents reach gln through the
        # explanation, which does not adapt.
        with nnx.stop_gradient(~nnx.within(self.gln)):
            code = iterated_sampler(self.gln(given), start, self.noise(given, rng))
            gln_loss = gln_objective(self.explanation(code.message), given, code)

        code = jax.lax.stop_gradient(code)

        # The quick guess learns to be like the refined code, and to be explained as well as it is.
        with nnx.stop_gradient(~nnx.within(self.code_value, self.code_presence)):
            guess = self.quick_code(given)
            code_loss = code_mismatch(guess, code)
            code_loss += squared_error(self.explanation(guess.message), given)

        # The explanation learns to explain both.
        with nnx.stop_gradient(~nnx.within(self.explanation)):
            guess = self.quick_code(given)
            explanation_loss = squared_error(self.explanation(code.message), given)
            explanation_loss += squared_error(self.explanation(guess.message), given)

        losses = {'gln': gln_loss, 'code': code_loss, 'explanation': explanation_loss}
        return Inference(quick.message, code, losses)


class SharedElement(EncodingElement):
    """The element with losses that all look at the same second pass, the sampler's run included."""

    def second_pass(self, given: jax.Array, noise: jax.Array) -> SecondPass:
        guess = self.quick_code(given)
        code = iterated_sampler(self.gln(given), guess, noise)
        return SecondPass(
            guess, code, self.explanation(guess.message), self.explanation(code.message)
        )

    def infer(self, observation: jax.Array, rng: jax.Array) -> Inference:
        with nnx.stop_gradient():
            message = self.quick_code(observation).message

        given = jax.lax.stop_gradient(observation)

        # One run, and what each loss sees of it: there its own modules alone are trainable.
        views = nnx.gradient_views(
            {
                'gln': self.gln,
                'code': [self.code_value, self.code_presence],
                'explanation': self.explanation,
            }
        )
        seen = views(self.second_pass)(given, self.noise(given, rng))

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


class World(nnx.Module):
    """The element between its neighbours: a retina, which makes the observation, and a reader."""

    def __init__(
        self,
        observation_features: int = 32,
        units: int = 8,
        iterations: int = 80,
        element: type[EncodingElement] = EncodingElement,
        *,
        rngs: nnx.Rngs,
    ):
        self.retina = Retina(64, observation_features, rngs=rngs)
        self.encoding = element(observation_features, units, iterations, rngs=rngs)
        self.reader = Perceptron(units, 64, rngs=rngs)

    def __call__(self, pixels: jax.Array, rng: jax.Array) -> dict[str, jax.Array]:
        inference = self.encoding.infer(self.retina(pixels), rng)
        drawing = self.reader(inference.message)
        return {'reader': squared_error(drawing, pixels), **inference.losses}

    def codes(self, pixels: jax.Array, rng: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the messages of the quick code and of the refined one, and the drawing."""
        inference = self.encoding.infer(self.retina(pixels), rng)
        return inference.message, inference.code.message, self.reader(inference.message)


# --- The networks ---------------------------------------------------------------------------------


class GatedLinear(nnx.Module):
    """A layer of linear units, each with a weight vector for every cell of its fixed halfspaces."""

    def __init__(self, inputs: int, features: int, halfspaces: int = 2, *, rngs: nnx.Rngs):
        kernel = nnx.initializers.lecun_normal()(rngs.params(), (inputs, features))
        cells = 2**halfspaces
        self.kernel = nnx.Param(jnp.broadcast_to(kernel.T[:, None], (features, cells, inputs)))
        self.halfspaces = halfspaces

    def __call__(self, inputs: jax.Array, side: jax.Array) -> jax.Array:
        features, cells, _ = self.kernel.shape
        planes = np.random.default_rng(features).standard_normal(
            (side.shape[-1], features, self.halfspaces)
        )
        bits = jnp.einsum('bs,suh->buh', side, planes.astype(np.float32)) > 0
        cell = jax.nn.one_hot(bits @ 2 ** np.arange(self.halfspaces), cells)
        return jnp.einsum('bf,ucf,buc->bu', inputs, self.kernel[...], cell)


class GatedLinearNetwork(nnx.Module):
    """Computes the sampler's parameters from the observation (arXiv 1910.01526)."""

    def __init__(self, inputs: int, units: int, hidden: int = 32, *, rngs: nnx.Rngs):
        self.hidden = GatedLinear(inputs, hidden, rngs=rngs)
        self.output = GatedLinear(hidden, 2 * units, rngs=rngs)
        self.lateral = nnx.Param(nnx.initializers.normal(0.1)(rngs.params(), (units, units)))

    def __call__(self, observation: jax.Array) -> ScanParameters:
        hidden = self.hidden(observation, observation)
        drive, evidence = jnp.split(self.output(hidden, observation), 2, axis=-1)
        return ScanParameters(drive, evidence, self.lateral[...])


class Perceptron(nnx.Module):
    """One hidden layer."""

    def __init__(self, inputs: int, features: int, hidden: int = 64, *, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(inputs, hidden, rngs=rngs)
        self.output = nnx.Linear(hidden, features, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return self.output(nnx.gelu(self.hidden(inputs)))


class Retina(nnx.Module):
    """Makes an observation from pixels: learned features, brought to one scale."""

    def __init__(self, pixels: int, features: int, *, rngs: nnx.Rngs):
        self.output = nnx.Linear(pixels, features, rngs=rngs)
        self.norm = nnx.LayerNorm(features, use_bias=False, use_scale=False, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        return self.norm(self.output(pixels))


# --- From Linen, training, and what it prints -----------------------------------------------------

ELEMENTS = {linen.EncodingElement: EncodingElement, linen.SharedElement: SharedElement}


# What Linen numbers in the order of construction, in which a Perceptron's output comes first.
NAMES = {'Dense_0': 'output', 'Dense_1': 'hidden'}
NAMES |= {'GatedLinear_0': 'hidden', 'GatedLinear_1': 'output'}


def from_linen(world: linen.World, params: Params) -> World:
    """Return the same world in NNX, with the same parameters."""

    def renamed(tree: Params) -> Params:
        return {
            NAMES.get(name, name): renamed(each) if isinstance(each, dict) else each
            for name, each in tree.items()
        }

    sizes = world.observation_features, world.units, world.iterations
    made = World(*sizes, ELEMENTS[world.element], rngs=nnx.Rngs(0))
    nnx.update(made, renamed(params))
    return made


def make_optimizer(world: World) -> nnx.Optimizer:
    """Give each part its own Adam; the labels are of the State that the optimiser updates."""
    parts = {
        'world': ['retina', 'reader'],
        'gln': 'encoding/gln',
        'code': 'encoding/code_*',
        'explanation': 'encoding/explanation',
    }
    rates = {'world': 1e-3, 'gln': 3e-3, 'code': 3e-3, 'explanation': 3e-3}
    labels = sg.labels(parts, nnx.state(world, nnx.Param))
    adams = {part: optax.adam(rate) for part, rate in rates.items()}
    return nnx.Optimizer(world, optax.partition(adams, labels), wrt=nnx.Param)


@nnx.jit
def update(
    world: World, optimizer: nnx.Optimizer, pixels: jax.Array, rng: jax.Array
) -> dict[str, jax.Array]:
    """Make one step on the sum of all losses; return each."""

    def total(world: World) -> tuple[jax.Array, dict[str, jax.Array]]:
        losses = world(pixels, rng)
        return sum(losses.values()), losses

    grads, losses = nnx.grad(total, has_aux=True)(world)
    optimizer.update(world, grads)
    return losses


def train(world: World, digits: Digits, *, steps: int, seed: int) -> dict[str, np.ndarray]:
    """Train the world with the sum of all losses; return the course of each loss."""
    step = nnx.cached_partial(update, world, make_optimizer(world))  # half the time of a partial
    return follow(step, digits, steps=steps, seed=seed)


@nnx.jit
def gradients(world: World, pixels: jax.Array, rng: jax.Array) -> dict[str, nnx.State]:
    """Return the gradient of each loss."""
    graph, params = nnx.split(world)
    return jax.jacrev(lambda params: nnx.merge(graph, params)(pixels, rng))(params)


infer_codes = nnx.jit(World.codes)


class Result(NamedTuple):
    """What a run found, as it was printed."""

    world: World
    course: dict[str, np.ndarray]
    norms: dict[str, dict[str, float]]
    accuracy: dict[str, dict[str, float]]


def main(argv: Sequence[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--steps', type=int, help='training steps (default: 3000)')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--output', default='two_pass_encoding_nnx.png', help='the picture')
    parser.add_argument('--quick', action='store_true', help='a tiny run, to see that it works')
    parser.add_argument('--shared', action='store_true', help='all losses look at the same scan')
    args = parser.parse_args(argv)
    steps = (30 if args.quick else 3000) if args.steps is None else args.steps
    if steps < 1:
        parser.error(f'--steps {steps}: expected at least 1')

    digits, held_out, mean = load_data()
    model = linen.World(iterations=8) if args.quick else linen.World()
    if args.shared:
        model = model.clone(element=linen.SharedElement)
    world = from_linen(model, linen.init(model, jax.random.key(args.seed)))
    infer = functools.partial(infer_codes, world)
    accuracy = {'untrained': probe_codes(infer, digits, held_out)}

    course = train(world, digits, steps=steps, seed=args.seed)
    accuracy['trained'] = probe_codes(infer, digits, held_out)

    norms = gradient_norms(gradients(world, digits.pixels[:128], jax.random.key(0)))
    print('\nWhich loss moves what: norms of gradients, 0 is exactly zero')
    print_table(norms, 5)
    print(f'\nAccuracy of a linear probe on the {model.units} numbers of a code, held-out digits')
    print_table(accuracy, 3)

    shown = held_out.pixels[:10]
    _, _, drawings = infer(shown, jax.random.key(1))
    save_picture(args.output, course, shown + mean, drawings + mean)
    print(f'\nLoss curves and drawings: {args.output}')
    return Result(world, course, norms, accuracy)


if __name__ == '__main__':
    main()
