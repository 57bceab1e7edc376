"""A recurrent encoder with three losses, in Linen: an element with parts, iterated by a scan.

The first code message is computed with all parameters held, so that its cotangents reach nothing
but the observation. Then the scan runs once for each loss, and each loss trains its own part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

__all__ = [
    'LOSSES',
    'PARTS',
    'Element',
    'Encoding',
    'Part',
    'begin',
    'code_width',
    'iterate',
    'observations',
]

Carry = tuple[jax.Array, jax.Array]
Outputs = dict[str, jax.Array]

code_width = 32

# Which parameters each loss trains, as paths below the element.
PARTS = {'gln': 'gln', 'code': 'code_*', 'explanation': 'explanation'}

LOSSES: dict[str, Callable[[Outputs, jax.Array], jax.Array]] = {
    'gln': lambda out, seen: jnp.mean((out['guess'] - seen) ** 2),
    'code': lambda out, seen: (
        jnp.mean((out['explained'] - seen) ** 2) + 0.01 * jnp.mean(out['presence'])
    ),
    'explanation': lambda out, seen: jnp.mean((out['explained'] - seen) ** 2),
}


class Part(nn.Module):
    """Two dense layers."""

    hidden: int
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(self.features, name='down')(jnp.tanh(nn.Dense(self.hidden, name='up')(x)))


class Element(nn.Module):
    """One iteration: guess the observation, improve the code, explain the observation by it."""

    features: int
    hidden: int

    def setup(self) -> None:
        self.gln = Part(self.hidden, self.features)
        self.code_value = Part(self.hidden, code_width)
        self.code_presence = Part(self.hidden, code_width)
        self.explanation = Part(self.hidden, self.features)

    def __call__(self, carry: Carry, seen: jax.Array) -> tuple[Carry, Outputs]:
        parts = ('gln', 'code_value', 'code_presence', 'explanation')
        return iterate({name: getattr(self, name) for name in parts}, carry, seen)


def iterate(parts: Mapping[str, Callable], carry: Carry, seen: jax.Array) -> tuple[Carry, Outputs]:
    """Run one iteration with the given parts; the Haiku version shares it."""
    value, presence = carry
    guess = parts['gln'](jnp.concatenate([value * presence, seen], axis=-1))
    error = jnp.concatenate([seen - guess, value, presence], axis=-1)
    value = jnp.tanh(value + parts['code_value'](error))
    presence = jax.nn.sigmoid(parts['code_presence'](error))
    explained = parts['explanation'](value * presence)
    return (value, presence), {'guess': guess, 'presence': presence, 'explained': explained}


class Encoding(nn.Module):
    """The element, its first message, and the scan over its iterations."""

    features: int = 64
    hidden: int = 128
    iterations: int = 20

    def setup(self) -> None:
        self.element = Element(self.features, self.hidden)

    def code_message(self, seen: jax.Array) -> Carry:
        return self.element(begin(seen), seen)[0]

    def sample(self, carry: Carry, seen: jax.Array, element: Element | None = None) -> Outputs:
        run = nn.scan(
            lambda element, carry, seen: element(carry, seen),
            variable_broadcast='params',
            split_rngs={'params': False},
            in_axes=nn.broadcast,
            length=self.iterations,
        )
        return run(element or self.element, carry, seen)[1]

    def __call__(self, seen: jax.Array) -> jax.Array:
        """Return the sum of the losses, nothing held."""
        first = self.code_message(seen)
        return sum(loss(self.sample(first, seen), seen) for loss in LOSSES.values())


def begin(seen: jax.Array) -> Carry:
    """Return the code before the first message."""
    zeros = jnp.zeros((*seen.shape[:-1], code_width))
    return zeros, zeros


def observations(batch: int, features: int = 64) -> jax.Array:
    """Return random observations."""
    return jax.random.normal(jax.random.key(1), (batch, features))
