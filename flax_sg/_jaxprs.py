"""Small tools for jaxprs and primitives, made of public parts of JAX."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive
from jax.interpreters import batching, mlir

from flax_sg._compat import traced, varying

__all__ = ['at_front', 'closed_over', 'define', 'evaluate', 'first', 'moves', 'moves_out',
           'moving_among', 'opened', 'runs', 'varied']


def first(x: Any, *_: Any, **__: Any) -> Any:
    """Return the first of some operands."""
    return x


def moves(aval: Any) -> bool:
    """Say whether values of a type have tangents."""
    return jnp.issubdtype(getattr(aval, 'dtype', jnp.int32), jnp.inexact)


def evaluate(jaxpr: ClosedJaxpr, *args: Any) -> list:
    """Run a jaxpr."""
    return jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *args)


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
    return jaxpr.replace(constvars=[], invars=inputs,
                         debug_info=jaxpr.debug_info.with_unknown_names()), list(closed.consts)


def closed_over(fn: Callable, *args: Any) -> tuple[ClosedJaxpr, list]:
    """Trace a function of arrays to a list, and make an argument of each array it closes over.

    A jaxpr may keep tracers that it closes over, and would carry them out of their trace.

    Returns:
      The jaxpr, of these arrays and then the arguments; and the arrays.
    """
    jaxpr, consts = opened(traced(fn, *args))
    return ClosedJaxpr(jaxpr, []), consts


def define(name: str, run: Callable = first) -> Primitive:
    """Make a primitive that works element by element on operands of one shape.

    Its one output is of the shape and dtype of the first operand; ``run`` says what it does.
    """
    primitive = Primitive(name)
    primitive.def_abstract_eval(first)
    batching.fancy_primitive_batchers[primitive] = functools.partial(_batched, primitive)
    runs(primitive, run)
    return primitive


def runs(primitive: Primitive, run: Callable) -> None:
    """Say what a primitive does, where it is evaluated and where it is compiled."""
    primitive.def_impl(run)
    # Since 0.12 a jaxpr may hold objects with rules of their own, which JAX has to expand before it
    # runs what has such a parameter (test_an_object_with_rules_in_a_target).
    primitive.to_lojax = run
    lower = mlir.lower_fun(run, multiple_results=primitive.multiple_results)
    mlir.register_lowering(primitive, lower)


def _batched(primitive: Primitive, axis: Any, args: tuple, dims: tuple, **params: Any) -> tuple:
    if all(dim is None for dim in dims):
        return primitive.bind(*args, **params), None
    return primitive.bind(*at_front(axis, args, dims), **params), 0


def at_front(axis: Any, args: tuple, dims: tuple) -> list:
    """Return the operands of a batched primitive with the batch in front, one that has none too."""
    return [batching.bdim_at_front(x, dim, axis.size) for x, dim in zip(args, dims, strict=True)]
