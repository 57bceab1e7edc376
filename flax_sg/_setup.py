"""Attributes that `setup` computes from variables: read afresh under the open transforms.

`self.w = self.param(...)` is no read of a scope when it is used. So a module whose setup read a
variable keeps, beside the values, how they came about; a read of such an attribute under other
transforms than those of its setup runs setup again, on a clone, with the stored values that the
first run saw, its random streams, and no effect on anything. The first run's values stay as they
are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from flax_sg import _compat
from flax_sg._active import Entry, state
from flax_sg._cached import watch
from flax_sg._callables import cell_contents
from flax_sg._compat import Module, Scope, Variable
from flax_sg._errors import UsageError
from flax_sg._scope import APPLICATION, effective, write

LIVE = '_flax_sg_live'
_START = '_flax_sg_start'
_TABLE = '_flax_sg_setup'
_STATIC = (Variable, Scope, str, bytes, bool, int, float, complex, type, np.dtype,
           types.ModuleType, types.BuiltinFunctionType)


class _Run:
    """A run of setup in progress: the variables it has seen, and in a replay those to show."""

    def __init__(self, replayed: dict | None = None):
        self.read = False
        self.seen: dict[Any, Any] = {}
        self.replayed = replayed
        self.written: dict[Any, Any] = {}

    def saw(self, scope: Scope, collection: str, name: str, value: Any) -> Any:
        """Note a read of a stored value, and return the value to go on with."""
        self.read = True
        key = _address(scope, collection, name)
        if self.replayed is not None:
            return self.written.get(key, self.replayed.get(key, value))
        if scope.is_mutable_collection(collection):
            self.seen.setdefault(key, value)
        return value


def _address(scope: Scope, collection: str, name: str) -> tuple:
    return (id(_compat.root_variables(scope)), _compat.scope_path(scope), collection, name)


@contextlib.contextmanager
def _running(run: _Run) -> Iterator[_Run]:
    state.setups.append(run)
    try:
        yield run
    finally:
        state.setups.remove(run)


_NOTHING = (None, None)


class _Table:
    """How a module's setup values came about, and those of the transforms used last."""

    def __init__(self, names: tuple[str, ...], entries: tuple[Entry, ...], run: _Run):
        self.names, self.entries, self.seen = names, entries, run.seen
        self.trace = _compat.trace_state()
        self.kept: dict[int, tuple] = {}

    def read(self, module: Module, name: str) -> Any:
        entries, now = effective(module.scope), _compat.trace_state()
        # What setup computed in a function that JAX traced, the body of a scan, stays in there.
        if entries == self.entries and self.trace in (now, module.scope.flags[APPLICATION].trace):
            return module.__dict__[name]
        # Values computed here are tracers of the current trace. They are kept only where what
        # keeps them cannot outlive it: by the innermost block, or by a module of the same trace.
        keeper = state.stack[-1] if state.stack else self
        kept = keeper.kept if keeper.trace == now else {}
        if kept.get(id(module), _NOTHING)[:2] != (module, entries):
            kept[id(module)] = (module, entries, self.replay(module))
        return kept[id(module)][2][name]

    def replay(self, module: Module) -> dict[str, Any]:
        scope = module.scope.rewound()
        with _running(_Run(self.seen)), _compat.drawn_again(scope, vars(module)[_START]):
            clone = module.clone(parent=scope)
            _compat.run_setup(clone)
        missing = [name for name in self.names if name not in vars(clone)]
        if missing:
            raise UsageError(
                f"setup of '/{'/'.join(module.path)}' set {missing[0]!r} when it first ran, and "
                'not when it ran again inside a flax_sg block. Let setup depend on nothing but the '
                "module's fields, variables and random streams.")
        return {name: _merge(vars(module)[name], vars(clone)[name]) for name in self.names}


def _merge(old: Any, new: Any) -> Any:
    """Take what depends on variables from a replay, and the rest from the module itself."""
    return jax.tree.map(lambda a, b: b if _depends(a) else a, old, new)


def _depends(value: Any, seen: frozenset[int] = frozenset()) -> bool:
    """Say whether a value set in a setup that read variables may depend on what it read.

    It may where it holds an array, or something that cannot be looked into: in a container, in a
    closure, or in a field of a module (``self.decoder = Tied(self.embed.embedding)``).
    """
    if id(value) in seen:
        return False
    depends = functools.partial(_depends, seen=seen | {id(value)})
    if isinstance(value, Module):
        return any(depends(getattr(value, field.name)) for field in dataclasses.fields(value)
                   if field.init and field.name not in ('parent', 'name'))
    if isinstance(value, _STATIC):
        return False
    if isinstance(value, types.FunctionType):
        return any(map(depends, (*map(cell_contents, value.__closure__ or ()),
                                 *(value.__defaults__ or ()),
                                 *(value.__kwdefaults__ or {}).values())))
    if isinstance(value, types.MethodType):
        return depends(value.__self__)
    if isinstance(value, functools.partial):
        return any(map(depends, (value.func, *value.args, *value.keywords.values())))
    leaves = jax.tree.leaves(value)
    return len(leaves) == 1 and leaves[0] is value or any(map(depends, leaves))


@_compat.tap(Module, '_try_setup')
def _try_setup(original, self, shallow=False):
    if shallow or not _compat.setup_pending(self):
        return original(self, shallow)
    watch(type(self))
    before, entries = set(vars(self)), effective(self.scope)
    # A module and its mirrors draw the same random numbers, and between them draw them once.
    live = vars(self).get(LIVE, self)
    start = vars(live).get(_START)
    drawing = _compat.drawn_again(self.scope, start) if start else contextlib.nullcontext()
    start = start or _compat.random_state(self.scope)
    with _running(_Run()) as run, drawing:
        original(self, shallow)
    for module in (self, live):
        object.__setattr__(module, _START, start)
    if run.read:
        new = {k: v for k, v in vars(self).items() if k not in (*before, 'scope', _START)}
        names = tuple(name for name, value in new.items() if _depends(value))
        for name in names:
            _intercept(type(self), name)
        if names:
            object.__setattr__(self, _TABLE, _Table(names, entries, run))


@_compat.tap(Scope, 'put_variable')
def _put_variable(original, self, col, name, value):
    for run in reversed(state.setups):
        if run.replayed is not None:
            run.written[_address(self, col, name)] = value
            return
    state.writes += 1
    original(self, col, name, write(self, col, name, value))


class _SetupAttribute:
    """A data descriptor in front of an attribute that some instance's setup reads variables for."""

    def __init__(self, name: str, default: Any):
        self.name, self.default = name, default

    def __get__(self, module: Module | None, owner: type) -> Any:
        values = {} if module is None else vars(module)
        if self.name not in values:
            if self.default is _NO_DEFAULT:  # a module not set up yet goes on to Module.__getattr__
                raise AttributeError(self.name)
            bind = getattr(self.default, '__get__', None)
            return self.default if bind is None else bind(module, owner)
        table = values.get(_TABLE)
        if table is None or self.name not in table.names:
            return values[self.name]
        for run in state.setups:
            run.read = True
        return table.read(module, self.name)

    def __set__(self, module: Module, value: Any) -> None:
        vars(module)[self.name] = value

    def __delete__(self, module: Module) -> None:
        del vars(module)[self.name]


_NO_DEFAULT = object()


def _intercept(cls: type, name: str) -> None:
    default = inspect.getattr_static(cls, name, _NO_DEFAULT)
    if not isinstance(default, _SetupAttribute):
        setattr(cls, name, _SetupAttribute(name, default))
