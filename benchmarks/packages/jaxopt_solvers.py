"""Solvers of jaxopt around a Linen model: implicit layers and an inner optimisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .comparison import Program
from .small_net import XS, Net, initial


def deep_equilibrium(solver_of: Callable) -> Program:
    """Make a loss of a fixed point z = net(z) + x."""

    def loss(lift: Callable, params: Any) -> jax.Array:
        net = lift(Net)()

        def step(z: jax.Array, params: Any) -> jax.Array:
            return net.apply({'params': params}, z) + XS

        return (solver_of(step).run(jnp.zeros_like(XS), params).params ** 2).mean()

    return Program(loss, initial(), ('first', 'second/bias'), eager=True)


def fixed_point() -> Program:
    """A deep equilibrium model, differentiated by the implicit function theorem."""
    import jaxopt

    return deep_equilibrium(
        lambda step: jaxopt.FixedPointIteration(step, maxiter=20, implicit_diff=True)
    )


def unrolled() -> Program:
    """The same, differentiated through the iterations."""
    import jaxopt

    return deep_equilibrium(
        lambda step: jaxopt.FixedPointIteration(step, maxiter=8, implicit_diff=False)
    )


def anderson() -> Program:
    """The same by Anderson acceleration."""
    import jaxopt

    return deep_equilibrium(
        lambda step: jaxopt.AndersonAcceleration(
            step, maxiter=20, history_size=3, implicit_diff=True
        )
    )


def inner_optimisation() -> Program:
    """A loss of the weights that an inner ridge regression on the model's features has found."""
    import jaxopt

    def loss(lift: Callable, params: Any) -> jax.Array:
        net = lift(Net)()

        def inner(weights: jax.Array, params: Any) -> jax.Array:
            features = net.apply({'params': params}, XS)
            return ((features @ weights - 1) ** 2).mean() + 0.1 * (weights**2).sum()

        solver = jaxopt.GradientDescent(inner, maxiter=30, implicit_diff=True)
        return (solver.run(jnp.zeros(3), params).params ** 2).sum()

    return Program(loss, initial(), ('first', 'second/bias'), eager=True)
