"""A variational autoencoder in NumPyro, whose two networks are handed to flax_module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .comparison import Program
from .small_net import XS, Net, initial


def elbo() -> Program:
    import numpyro
    from numpyro.contrib.module import flax_module
    from numpyro.distributions import Normal

    def loss(lift: Callable, params: Any) -> jax.Array:
        def model(xs: jax.Array) -> None:
            decoder = flax_module('decoder', lift(Net)(3), input_shape=(4, 3))
            z = numpyro.sample('z', Normal(jnp.zeros((4, 3)), 1).to_event(2))
            numpyro.sample('x', Normal(decoder(z), 0.5).to_event(2), obs=xs)

        def guide(xs: jax.Array) -> None:
            encoder = flax_module('encoder', lift(Net)(6), input_shape=(4, 3))
            mean, log_scale = jnp.split(encoder(xs), 2, axis=-1)
            numpyro.sample('z', Normal(mean, jnp.exp(log_scale)).to_event(2))

        return numpyro.infer.Trace_ELBO().loss(jax.random.key(3), params, model, guide, XS)

    def each_model(fn: Callable, params: Any) -> Any:
        return {name: fn(tree) for name, tree in params.items()}

    params = {'decoder$params': initial(3), 'encoder$params': initial(6)}
    return Program(loss, params, ('first', 'second/bias'), each_model, eager=True)
