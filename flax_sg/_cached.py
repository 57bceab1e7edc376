"""Cached properties of modules: one value for each set of transforms.

``functools.cached_property`` keeps its first value in the instance, and would hand a live value to
a block or a stopped one to what comes after it.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

from flax_sg import _compat
from flax_sg._active import state
from flax_sg._compat import Module
from flax_sg._scope import APPLICATION, effective

__all__ = ['watch']

_watched: weakref.WeakSet[type] = weakref.WeakSet()


class _CachedProperty:
    """Stands for a ``functools.cached_property``: keeps its first value, and whose it is."""

    def __init__(self, wrapped: functools.cached_property):
        self.wrapped, self.__doc__ = wrapped, wrapped.__doc__
        self.slot = f'_flax_sg_cached_{wrapped.attrname}'

    def __get__(self, module: Module | None, owner: type) -> Any:
        if module is None:
            return self
        for run in state.setups:
            run.read = True
        scope, now = module.scope, _compat.trace_state()
        entries = () if scope is None else effective(scope)
        # What is computed in a function that JAX traced, the body of a scan, stays in there.
        if scope is not None and now != scope.flags[APPLICATION].trace:
            kept = vars(module).get(self.slot)
            return kept[1] if kept and kept[0] == entries else self.wrapped.func(module)
        if self.slot not in vars(module):
            vars(module)[self.slot] = (entries, self.wrapped.func(module))
        first, value = vars(module)[self.slot]
        return value if first == entries else self.wrapped.func(module)

    def __set__(self, module: Module, value: Any) -> None:  # so as to come before the instance
        raise AttributeError(f'{self.wrapped.attrname!r} is a cached property.')


def watch(cls: type[Module]) -> None:
    """Replace the cached properties of a class and its bases, once."""
    if cls in _watched:
        return
    _watched.add(cls)
    for base in cls.__mro__:
        for name, member in list(vars(base).items()):
            wrapped = getattr(member, 'wrapped', member)  # Flax wraps descriptors
            if isinstance(wrapped, functools.cached_property):
                setattr(base, name, _CachedProperty(wrapped))
