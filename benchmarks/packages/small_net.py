"""A small Linen model for packages that bring a solver or a language, and no model."""

from __future__ import annotations

import jax
from flax import linen as nn

XS = jax.random.normal(jax.random.key(7), (4, 3))


class Net(nn.Module):
    """Two layers, scaled so that a fixed point of it is reached."""

    features: int = 3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.tanh(nn.Dense(5, name='first')(x))
        return 0.3 * nn.Dense(self.features, name='second')(h)


def initial(features: int = 3) -> dict:
    """Make parameters of a Net, biases included that are not zero."""
    params = Net(features).init(jax.random.key(0), XS)['params']
    return jax.tree.map(lambda leaf: leaf + 0.1, params)
