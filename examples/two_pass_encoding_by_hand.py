"""The step of two_pass_encoding.py with four hand-made copies of the weights, and no blocks.

This is how google/flax issue 1857 did it: partition the weights, stop the gradient of some parts,
merge, and hand the right copy to each use. The networks and losses are those of
two_pass_encoding.py, run as pure functions of the weights; no gradient mask of flax_sg is used.

    python two_pass_encoding_by_hand.py [--quick]

It prints whether both programs give the same gradients, bit for bit: of each loss, eager and
jitted, and whether they still have the same parameters after some steps of training.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from two_pass_encoding import (
    LOSSES,
    Code,
    EncodingElement,
    Inference,
    Params,
    Perceptron,
    Retina,
    World,
    code_mismatch,
    gln_objective,
    init,
    iterated_sampler,
    load_data,
    squared_error,
)

from flax_sg.data_structures import merge, partition_n


def part_of(module_name: str, name: str, value: Any) -> int:
    """Return the part that a parameter belongs to: 0 for gln, 1 for code, 2 for explanation."""
    top = (module_name or name).split('/')[0]
    return {'gln': 0, 'code_value': 1, 'code_presence': 1, 'explanation': 2}[top]


def stop_gradient_on_some_weights(weights: Params) -> tuple[Params, Params, Params, Params]:
    """Return four copies of the weights: all parts stopped, and all but one."""
    live = partition_n(part_of, weights, 3)
    stopped = jax.lax.stop_gradient(live)
    weights_sg = merge(*stopped)
    weights_g = merge(live[0], stopped[1], stopped[2])
    weights_c = merge(stopped[0], live[1], stopped[2])
    weights_e = merge(stopped[0], stopped[1], live[2])
    return weights_sg, weights_g, weights_c, weights_e


def infer(
    element: EncodingElement, observation: jax.Array, rng: jax.Array, weights: Params
) -> Inference:
    """Do what `EncodingElement.infer` does, as a pure function of the weights."""
    weights_sg, weights_g, weights_c, weights_e = stop_gradient_on_some_weights(weights)

    def quick_code(weights: Params, observation: jax.Array) -> Code:
        return element.apply({'params': weights}, observation, method='quick_code')

    def gln(weights: Params, observation: jax.Array) -> Any:
        return element.apply({'params': weights}, observation, method=lambda e, x: e.gln(x))

    def explanation(weights: Params, message: jax.Array) -> jax.Array:
        return element.apply({'params': weights}, message, method=lambda e, x: e.explanation(x))

    quick = quick_code(weights_sg, observation)
    given, start = jax.lax.stop_gradient((observation, quick))

    code = iterated_sampler(gln(weights_g, given), start, element.noise(given, rng))
    gln_loss = gln_objective(explanation(weights_g, code.message), given, code)

    code = jax.lax.stop_gradient(code)
    guess = quick_code(weights_c, given)
    code_loss = code_mismatch(guess, code)
    code_loss += squared_error(explanation(weights_c, guess.message), given)

    guess = quick_code(weights_e, given)
    explanation_loss = squared_error(explanation(weights_e, code.message), given)
    explanation_loss += squared_error(explanation(weights_e, guess.message), given)

    losses = {'gln': gln_loss, 'code': code_loss, 'explanation': explanation_loss}
    return Inference(quick.message, code, losses)


def losses_by_hand(
    world: World, params: Params, pixels: jax.Array, rng: jax.Array
) -> dict[str, jax.Array]:
    """Return the losses of the element and its neighbours, as `World.__call__` does."""
    retina = Retina(world.observation_features)
    element = EncodingElement(world.observation_features, world.units, world.iterations)
    observation = retina.apply({'params': params['retina']}, pixels)
    inference = infer(element, observation, rng, params['encoding'])
    drawing = Perceptron(64).apply({'params': params['reader']}, inference.message)
    return {'reader': squared_error(drawing, pixels), **inference.losses}


def losses_by_blocks(
    world: World, params: Params, pixels: jax.Array, rng: jax.Array
) -> dict[str, jax.Array]:
    """Return the same from two_pass_encoding.py."""
    return world.apply({'params': params}, pixels, rng)


Losses = Callable[[World, Params, jax.Array, jax.Array], dict[str, jax.Array]]


def gradients(
    losses: Losses, world: World, params: Params, pixels: jax.Array, rng: jax.Array
) -> dict[str, Params]:
    """Return the gradient of each loss."""
    return jax.jacrev(lambda params: losses(world, params, pixels, rng))(params)


jitted_gradients = jax.jit(gradients, static_argnums=(0, 1))


def train(losses: Losses, world: World, params: Params, pixels: np.ndarray, steps: int) -> Params:
    """Train on the same digits for some steps, with one Adam for everything."""
    optimizer = optax.adam(1e-3)
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, rng):
        grads = jax.grad(lambda p: sum(losses(world, p, pixels, rng).values()))(params)
        changes, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, changes), state

    for step in range(steps):
        params, state = update(params, state, jax.random.key(step))
    return params


def unequal(a: Any, b: Any) -> list[str]:
    """Return the paths of the leaves that differ in any bit."""
    pairs = jax.tree.leaves_with_path(
        jax.tree.map(lambda x, y: (x, y), a, b), is_leaf=lambda x: isinstance(x, tuple)
    )
    return [
        jax.tree_util.keystr(path)
        for path, (x, y) in pairs
        if np.asarray(x).tobytes() != np.asarray(y).tobytes()
    ]


def main(argv: Sequence[str] | None = None) -> bool:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--quick', action='store_true', help='jitted only')
    args = parser.parse_args(argv)

    world, (digits, _, _) = World(iterations=10), load_data()
    params, pixels, rng = init(world, jax.random.key(0)), digits.pixels[:64], jax.random.key(1)
    both = losses_by_blocks, losses_by_hand
    found = {}
    for how, run in {'jitted': jitted_gradients, 'eager': gradients}.items():
        if how == 'jitted' or not args.quick:
            blocks, copies = (run(losses, world, params, pixels, rng) for losses in both)
            found |= {f'gradient of {name}, {how}': (blocks[name], copies[name]) for name in LOSSES}
    found['parameters after 20 steps'] = tuple(
        train(losses, world, params, pixels, 20) for losses in both
    )

    for name, (blocks, copies) in found.items():
        differ, count = unequal(blocks, copies), len(jax.tree.leaves(blocks))
        print(f'{name:32} {count - len(differ)} of {count} arrays equal bit for bit', *differ)
    return not any(unequal(blocks, copies) for blocks, copies in found.values())


if __name__ == '__main__':
    sys.exit(not main())
