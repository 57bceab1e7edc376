"""A neural differential equation of a Linen model in diffrax, with each of its adjoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from .comparison import Program
from .small_net import XS, Net, initial


def neural_ode(adjoint: Any) -> Program:
    """Make a loss of where the equation y' = net(y) leads."""
    import diffrax

    def loss(lift: Callable, params: Any) -> jax.Array:
        net = lift(Net)()
        term = diffrax.ODETerm(lambda t, y, args: net.apply({'params': args}, y))
        solution = diffrax.diffeqsolve(
            term,
            diffrax.Tsit5(),
            t0=0.0,
            t1=1.0,
            dt0=0.25,
            y0=XS,
            args=params,
            adjoint=adjoint,
            max_steps=8,
        )
        return (solution.ys**2).mean()

    return Program(loss, initial(), ('first', 'second/bias'), eager=True)


def recursive() -> Program:
    import diffrax

    return neural_ode(diffrax.RecursiveCheckpointAdjoint())


def direct() -> Program:
    import diffrax

    return neural_ode(diffrax.DirectAdjoint())


def backsolve() -> Program:
    import diffrax

    return neural_ode(diffrax.BacksolveAdjoint())
