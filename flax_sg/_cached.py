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
from flax_sg._runs import Run, running
from flax_sg._scope import effective
from flax_sg._setup import Kept, note_parent

_watched: weakref.WeakSet[type] = weakref.WeakSet()


class _CachedProperty:
    """Stands for a ``functools.cached_property``: keeps its first value, and how it came about."""

    def __init__(self, wrapped: functools.cached_property):
        self.wrapped, self.__doc__ = wrapped, wrapped.__doc__
        self.slot = f'_flax_sg_cached_{wrapped.attrname}'

    def __get__(self, module: Module | None, owner: type) -> Any:
        if module is None:
            return self
        for run in state.setups:
            run.read = True
        values, compute = vars(module), self.wrapped.func
        if self.slot not in values:
            if module.scope is None:
                kept, value = None, compute(module)
            else:
                run, entries = Run(), effective(module.scope)
                with running(run, module.scope):
                    value = compute(module)
                kept = Kept(entries, run)
            values[self.slot] = kept, value
        kept, first = values[self.slot]
        return first if kept is None else kept.read(module, first, lambda run: compute(module))

    def __set__(self, module: Module, value: Any) -> None:  # so as to come before the instance
        raise AttributeError(f'{self.wrapped.attrname!r} is a cached property.')


@_compat.tap(Module, '__post_init__')
def _post_init(original, self):
    _watch(type(self))
    original(self)
    note_parent(self)


def _watch(cls: type[Module]) -> None:
    """Replace the cached properties of a class and its bases, once, before they are used."""
    if cls in _watched:
        return
    _watched.add(cls)
    for base in cls.__mro__:
        for name, member in list(vars(base).items()):
            wrapped = getattr(member, 'wrapped', member)  # Flax wraps descriptors
            if isinstance(wrapped, functools.cached_property):
                setattr(base, name, _CachedProperty(wrapped))
