"""Small tools for jaxprs and primitives, made of public parts of JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Primitive
from jax.interpreters import batching, mlir

__all__ = ['closed_over', 'define', 'evaluate']


def evaluate(jaxpr: ClosedJaxpr, *args: Any) -> list:
    """Run a jaxpr."""
    return jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *args)


def closed_over(fn: Callable, *args: Any) -> tuple[ClosedJaxpr, list]:
    """Trace a function of flat arguments, and make an argument of each array it closes over.

    A jaxpr may keep tracers that it closes over, and would carry them out of their trace.

    Returns:
      The jaxpr, of these arrays and then the arguments; and the arrays.
    """
    closed = jax.make_jaxpr(fn)(*args)
    if not closed.consts:
        return closed, []
    return jax.make_jaxpr(lambda consts, *args: jax.core.eval_jaxpr(closed.jaxpr, consts, *args))(
        closed.consts, *args), closed.consts


def define(primitive: Primitive, run: Callable) -> None:
    """Say what a primitive does whose one output is like its first operand."""
    primitive.def_impl(run)
    primitive.def_abstract_eval(lambda x, *_, **__: x)
    batching.defvectorized(primitive)
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=False))
