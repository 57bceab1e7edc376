"""Primitives of our own: how one is evaluated, batched and compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

__all__ = ['at_front', 'define', 'first', 'runs']


def first(x: Any, *_: Any, **__: Any) -> Any:
    """Return the first of some operands."""
    return x


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
