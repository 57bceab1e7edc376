"""Cached properties of modules: one value for each set of transforms.

``functools.cached_property`` keeps its first value in the instance, and would hand a live value to
a block or a stopped one to what comes after it.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from typing import Any

from flax_sg._compat import jax as jax_compat
from flax_sg._compat import linen as linen_compat
from flax_sg._compat.linen import Module
from flax_sg._transforms.thread_state import state
from flax_sg.nn._attributes import Kept, first_run, note_parent, note_run
from flax_sg.nn._reads import effective
from flax_sg.nn._replays import Run, running
from flax_sg.nn._running_code import note_class

__all__ = ['CachedProperty']


_watched: weakref.WeakSet[type] = weakref.WeakSet()


class CachedProperty:
    """Stands for a ``functools.cached_property``: keeps its first value, and how it came about."""

    def __init__(self, wrapped: functools.cached_property):
        self.wrapped, self.__doc__, self.name = wrapped, wrapped.__doc__, wrapped.attrname
        self.slot = f'_flax_sg_cached_{self.name}'

    def __get__(self, module: Module | None, owner: type) -> Any:
        if module is None:
            return self
        values = vars(module)
        if self.name not in values:
            self._compute(module)
        first, kept = values[self.name], values.get(self.slot)
        if kept is None or kept[1] is not first:  # it read no variable, or another one was set
            return first
        for run in state.setups:
            run.read = True
        return kept[0].read(module, self.name, lambda: {self.name: self.wrapped.func(module)})

    def _compute(self, module: Module) -> None:
        values = vars(module)
        if module.scope is None:
            values[self.name] = self.wrapped.func(module)
            return
        run, blocks = Run(first_run(module, self.slot)), effective(module.scope)
        with running(run, module.scope):
            values[self.name] = self.wrapped.func(module)
        if run.first is None:
            note_run(module, self.slot, run)
        if run.read:
            values[self.slot] = Kept((self.name,), blocks, run), values[self.name]

    def __set__(self, module: Module, value: Any) -> None:
        vars(module)[self.name] = value

    def __delete__(self, module: Module) -> None:
        if self.name not in vars(module):
            raise AttributeError(self.name)
        del vars(module)[self.name]


@jax_compat.tap(Module, '__post_init__')
def _post_init(original, self):
    _watch(type(self))
    original(self)
    note_parent(self)


def _watch(cls: type[Module]) -> None:
    """Replace the cached properties of a class and its bases, once, before they are used.

    Those of a base that is no module are replaced in the class alone.
    """
    if cls in _watched:
        return
    _watched.add(cls)
    note_class(cls)
    for base in reversed(cls.__mro__):
        if issubclass(base, Module):
            names = {
                name
                for of in base.__mro__
                if of is base or not issubclass(of, Module)
                for name in vars(of)
            }
            for name in names:
                member = inspect.getattr_static(base, name)
                wrapped = getattr(member, 'wrapped', member)  # Flax wraps descriptors
                if type(wrapped) is functools.cached_property and wrapped.attrname == name:
                    ours = CachedProperty(wrapped)
                    setattr(base, name, ours if wrapped is member else linen_compat.wrapped(ours))
