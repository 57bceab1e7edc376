"""The arrays that a value holds, wherever in it: in containers, objects, closures and classes.

A class is looked into where a function has defined it. What is found by its name in a module of
Python's is the same for all, and so are the globals of functions.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import gc
import sys
import types
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from flax_sg._compat.linen import Module, Scope, Variable
from flax_sg._filters.callables import cell_contents

__all__ = ['arrays_in', 'given', 'is_plain']

_MOST = 10_000  # objects that are looked at
_PLAIN = (
    str,
    bytes,
    bool,
    int,
    float,
    complex,
    type(None),
    np.dtype,
    enum.Enum,
    Scope,
    Variable,
    types.ModuleType,
    types.CodeType,
    types.FrameType,
    weakref.ref,
)


def given(module: Module) -> dict[str, Any]:
    """Return what a module was made with, but for its place."""
    return {
        field.name: getattr(module, field.name, None)
        for field in dataclasses.fields(module)
        if field.init and field.name not in ('parent', 'name')
    }


def is_plain(value: Any) -> bool:
    """Say whether a value holds no other one, or nothing that it could be given later."""
    return isinstance(
        value,
        (
            *_PLAIN,
            jax.Array,
            np.ndarray,
            type,
            types.FunctionType,
            types.BuiltinFunctionType,
            Module,
        ),
    )


def arrays_in(value: Any) -> Iterator[Any]:
    """Yield the arrays that a value holds, tracers included."""
    seen: dict[int, Any] = {}
    left = [value]
    while left and len(seen) < _MOST:
        value = left.pop()
        if id(value) in seen or isinstance(value, _PLAIN):
            continue
        seen[id(value)] = value
        if isinstance(value, (jax.Array, np.ndarray)):
            yield value
        else:
            left += _parts(value)


def _parts(value: Any) -> list:
    if isinstance(value, Module):
        return [type(value), *given(value).values()]
    if isinstance(value, types.FunctionType):
        return [
            *map(cell_contents, value.__closure__ or ()),
            *(value.__defaults__ or ()),
            *(value.__kwdefaults__ or {}).values(),
            *vars(value).values(),
        ]
    if isinstance(value, types.BuiltinFunctionType):
        return [value.__self__]
    if isinstance(value, type):
        return [] if _is_global(value) else [*vars(value).values(), *value.__bases__]
    return gc.get_referents(value)


def _is_global(cls: type) -> bool:
    """Say whether a class, or one that was lifted to it and gave it its name, is in its module."""
    try:
        found = functools.reduce(getattr, cls.__qualname__.split('.'), sys.modules[cls.__module__])
    except (AttributeError, KeyError):
        return False
    return found in cls.__mro__
