"""Methods, and functions that take a module first, that run in a block."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from flax_sg._compat.linen import Module
from flax_sg._transforms.run_inside import run_inside
from flax_sg.nn._blocks import open_at
from flax_sg.nn._members import ROOTS
from flax_sg.nn._mirrors import mirror_of

if TYPE_CHECKING:
    from flax_sg._transforms.transform import Transform

__all__ = ['transformed_function', 'makes_root']


def transformed_function(transform: Transform, fn: Callable) -> Callable:
    """Wrap a method, or a function that takes a module first, to run inside the block.

    What `apply` and its like read is of another root than the module's, and a module that is not
    bound has no place to open a block at. There it is the method of the transformed module.
    """

    @functools.wraps(fn)
    def wrapped(module, /, *args, **kwargs):
        if makes_root(fn):
            return getattr(mirror_of(transform, module), fn.__name__)(*args, **kwargs)
        if module.scope is None:
            return fn(mirror_of(transform, module), *args, **kwargs)
        return inside(module, *args, **kwargs)

    inside = run_inside(fn, lambda module: open_at(transform, module.scope))
    return wrapped


def makes_root(fn: Callable) -> bool:
    """Say whether a function is `Module.apply` or another one that makes a root, or a module."""
    return any(vars(Module)[name] is fn for name in ROOTS)
