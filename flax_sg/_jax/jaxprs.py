"""Small tools for jaxprs and primitives, made of public parts of JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from flax_sg._compat.jax import traced, varying

__all__ = [
    'as_array',
    'closed_over',
    'evaluate',
    'has_tangent',
    'moves_out',
    'moving_among',
    'opened',
    'varied',
]


def has_tangent(aval: Any) -> bool:
    """Say whether values of a type have tangents."""
    return jnp.issubdtype(getattr(aval, 'dtype', jnp.int32), jnp.inexact)


def evaluate(jaxpr: ClosedJaxpr, *args: Any) -> list:
    """Run a jaxpr; its results are arrays, as those of a jitted function, constants among them."""
    found = jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *args)
    return [as_array(x, var.aval) for x, var in zip(found, jaxpr.jaxpr.outvars, strict=True)]


def as_array(value: Any, aval: Any) -> Any:
    """Return what a jaxpr has as a constant, which JAX may keep as a number, as an array."""
    if isinstance(value, jax.Array) or not isinstance(aval, jax.core.ShapedArray):
        return value
    if aval.dtype == jax.dtypes.float0:
        return value
    plain = np.asarray(value, aval.dtype)
    return jnp.asarray(plain.item() if aval.weak_type and plain.ndim == 0 else plain)


def moving_among(names: list, moved: set) -> list[bool]:
    """Say which names of values are among those that move."""
    return [not isinstance(var, Literal) and var in moved for var in names]


def moves_out(jaxpr: Jaxpr, moving: list[bool]) -> list[bool]:
    """Say which results of a jaxpr depend on inputs that move."""
    moved = {var for var, m in zip(jaxpr.invars, moving, strict=True) if m}
    for eqn in jaxpr.eqns:
        moved.update(eqn.outvars * any(moving_among(eqn.invars, moved)))
    return moving_among(jaxpr.outvars, moved)


def varied(x: jax.Array, like: Any) -> jax.Array:
    """Return a value that varies over the axes of a mesh over which one of a type does.

    JAX's own operations do that with their operands, in the body of a `shard_map`. The cotangents
    of what did not vary are summed over these axes.
    """
    axes = varying(like) - varying(jax.typeof(x))
    return jax.lax.pcast(x, tuple(axes), to='varying') if axes else x


def opened(closed: ClosedJaxpr) -> tuple[Jaxpr, list]:
    """Return a jaxpr whose first inputs are the constants, and the constants."""
    jaxpr = closed.jaxpr
    inputs = [*jaxpr.constvars, *jaxpr.invars]
    return jaxpr.replace(
        constvars=[], invars=inputs, debug_info=jaxpr.debug_info.with_unknown_names()
    ), list(closed.consts)


def closed_over(fn: Callable, *args: Any) -> tuple[ClosedJaxpr, list]:
    """Trace a function of arrays to a list, and make an argument of each array it closes over.

    A jaxpr may keep tracers that it closes over, and would carry them out of their trace.

    Returns:
      The jaxpr, of these arrays and then the arguments; and the arrays.
    """
    jaxpr, consts = opened(traced(fn, *args))
    return ClosedJaxpr(jaxpr, []), consts
