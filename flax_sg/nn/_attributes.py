"""Attributes that `setup` computes from variables: read afresh under the open transforms.

`self.w = self.param(...)` is no read of a scope when it is used. So a module whose setup read a
variable keeps, beside the values, how they came about; a read of such an attribute under other
transforms than those of its setup runs setup again, on a clone (`_replays`). The first run's values
stay as they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import operator
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from flax_sg._compat import jax as jax_compat
from flax_sg._compat import linen as linen_compat
from flax_sg._compat.linen import Module, Scope, Variable
from flax_sg._errors import UsageError
from flax_sg._filters.callables import cell_contents
from flax_sg._transforms.block import OpenBlock
from flax_sg._transforms.thread_state import state
from flax_sg.nn._arrays import arrays_in, given, is_plain
from flax_sg.nn._reads import effective
from flax_sg.nn._replays import Run, running, written_in_a_run
from flax_sg.nn._scope_flags import application_of
from flax_sg.nn._writes import write

__all__ = ['Kept', 'LIVE', 'first_run', 'note_parent', 'note_run']

LIVE = '_flax_sg_live'  # of a mirror: the module that it mirrors
_OF_SETUP = '_flax_sg_of_setup'  # of a module that was made in a setup
_RUNS = '_flax_sg_runs'  # of a module: first runs, its own and of what stands for its parts
_TABLE = '_flax_sg_setup'
_NUMBERS = (bool, int, float, complex)
_STATIC = (Variable, Scope, str, bytes, np.dtype, types.ModuleType, *_NUMBERS)
_NOTHING = (None, None)


class _Bare(Module):
    """Has the attributes that Flax gives each module, and no others."""


_bare = _Bare().bind({})
linen_compat.run_setup(_bare)
_FLAX = frozenset(vars(_bare)) | {'parent'}


class Kept:
    """How attributes of a module were computed in a run, and their values for the last transforms.

    Attributes:
      names: of the attributes; the first run's values are the module's own.
    """

    def __init__(self, names: tuple[str, ...], blocks: tuple[OpenBlock, ...], run: Run):
        self.names, self.blocks, self.run = names, blocks, run.first or run
        self.trace = jax_compat.trace_state()
        self.setup_replays: dict[int, tuple] = {}

    def read(self, module: Module, name: str, again: Callable[[], dict[str, Any]]) -> Any:
        """Return the first run's value, or that of a run ``again`` under the open transforms."""
        blocks, now, values = effective(module.scope), jax_compat.trace_state(), vars(module)
        # A tracer computed in a function that JAX traced, the body of a scan, stays in there.
        if blocks == self.blocks and (
            self.trace in (now, application_of(module.scope).trace)
            or not any(
                isinstance(leaf, jax.core.Tracer)
                for name in self.names
                for leaf in jax.tree.leaves(values[name])
            )
        ):
            return values[name]
        # Values computed here are tracers of the current trace. They are kept only where what
        # keeps them cannot outlive it: by the innermost block, or by a module of the same trace.
        keeper = state.stack[-1] if state.stack else self
        kept = keeper.setup_replays if keeper.trace == now else {}
        if kept.get(id(self), _NOTHING)[:2] != (self, blocks):
            with running(Run(self.run), module.scope):
                new = again()
            merged = {name: _merge(values[name], new[name]) for name in self.names}
            kept[id(self)] = (self, blocks, merged)
        return kept[id(self)][2][name]


def _setup_again(module: Module, names: tuple[str, ...]) -> dict[str, Any]:
    clone = module.clone(parent=module.scope.rewound())
    linen_compat.run_setup(clone)
    missing = [name for name in names if name not in vars(clone)]
    if missing:
        raise UsageError(
            f'{_setup_of(module)} set {missing[0]!r} when it first ran, and not when it ran again '
            "inside a flax_sg block. Let setup depend on nothing but the module's fields, "
            'variables and random streams.'
        )
    return {name: vars(clone)[name] for name in names}


@contextlib.contextmanager
def _told_of_objects(module: Module, run: Run) -> Iterator[None]:
    """Raise UsageError if a setup in a block puts what it reads into an object that others see."""
    objects = {name: value for name, value in given(module).items() if not is_plain(value)}
    before = {name: list(_values_in(value)) for name, value in objects.items()}
    yield
    for name, value in objects.items():
        if run.read and not {*map(id, _values_in(value))} <= {*map(id, before[name])}:
            raise UsageError(
                f'{_setup_of(module)} put what it reads inside a flax_sg block into the object in '
                f"field {name!r}: code that holds the object would see the block's values after "
                'it. Set attributes of the module itself.'
            )


def _setup_of(module: Module) -> str:
    return f"setup of '/{'/'.join(module.path)}'"


def _values_in(value: Any) -> Iterator[Any]:
    return (array for array in arrays_in(value) if isinstance(array, jax.Array))


def _merge(old: Any, new: Any) -> Any:
    """Take what depends on variables from a run again, and the rest from the module itself."""
    if jax.tree.structure(old) != jax.tree.structure(new):  # it holds what is made anew each time
        return new
    return jax.tree.map(
        lambda a, b: b if _depends(a) or isinstance(a, _NUMBERS) and a != b else a, old, new
    )


def _depends(value: Any, seen: frozenset[int] = frozenset()) -> bool:
    """Say whether a value set in a setup that read variables may depend on what it read.

    It may where it holds an array, or something that cannot be looked into: in a container, in a
    closure, in a class that was defined there, or in a field of a module
    (``self.decoder = Tied(self.embed.embedding)``).
    """
    if id(value) in seen:
        return False
    depends = functools.partial(_depends, seen=seen | {id(value)})
    if isinstance(value, Module):
        return _class_depends(type(value)) or any(map(depends, given(value).values()))
    if isinstance(value, _STATIC):
        return False
    if isinstance(value, type):
        return _class_depends(value)
    if isinstance(value, types.FunctionType):
        return any(
            map(
                depends,
                (
                    *map(cell_contents, value.__closure__ or ()),
                    *(value.__defaults__ or ()),
                    *(value.__kwdefaults__ or {}).values(),
                    *vars(value).values(),
                ),
            )
        )
    if isinstance(value, types.MethodType):
        return depends(value.__self__)
    if isinstance(value, functools.partial):
        return any(map(depends, (value.func, *value.args, *value.keywords.values())))
    leaves = jax.tree.leaves(value)
    return len(leaves) == 1 and leaves[0] is value or any(map(depends, leaves))


def _class_depends(cls: type) -> bool:
    if cls not in _classes:
        _classes[cls] = any(True for _ in arrays_in(cls))
    return _classes[cls]


_classes: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def note_parent(module: Module) -> None:
    """Note of a new module whether a setup made it."""
    if isinstance(module.parent, Module) and linen_compat.in_setup(module.parent):
        object.__setattr__(module, _OF_SETUP, True)


def live_of(module: Module) -> Module:
    """Return the module that a mirror, or a mirror of a mirror, mirrors."""
    while LIVE in vars(module):
        module = vars(module)[LIVE]
    return module


def _places(module: Module) -> list[tuple[Module, tuple]]:
    """Return where a run of a module's setup may be noted: a module, and a path of setups below it.

    A mirror's parts are those of the module that it mirrors, which may not have made its own yet.
    """
    names: tuple = ()
    found = []
    while LIVE not in vars(module):
        found.append((module, names))
        if _OF_SETUP not in vars(module) or not isinstance(module.parent, Module):
            return found
        cls = type(module)  # a lifted class has the names of its base
        names = ((module.name, cls.__module__, cls.__qualname__), *names)
        module = module.parent
    part, found = live_of(module), []
    while part is not None:
        found.append((part, names))
        if not names:
            break
        part, names = linen_compat.child(part, names[0][0]), names[1:]
    return found


def first_run(module: Module, what: str) -> Run | None:
    """Return the first run of a module's setup, or of what has another name, by it or a mirror."""
    return next(
        (
            run
            for place, names in _places(module)
            if (run := vars(place).get(_RUNS, {}).get((what, names)))
        ),
        None,
    )


def note_run(module: Module, what: str, run: Run) -> None:
    """Note a first run."""
    place, names = _places(module)[0]
    if _RUNS not in vars(place):
        object.__setattr__(place, _RUNS, {})
    vars(place)[_RUNS][what, names] = run


@jax_compat.tap(Module, '_try_setup')
def _try_setup(original, self, shallow=False):
    if shallow or not linen_compat.setup_pending(self):
        return original(self, shallow)
    before, blocks = _values(self), effective(self.scope)
    # A module and its mirrors see the same state and draw the same numbers: the first is set up.
    run = Run(first_run(self, 'setup'))
    in_block = _told_of_objects(self, run) if blocks else contextlib.nullcontext()
    with running(run, self.scope), in_block:
        original(self, shallow)
    if run.first is None:
        note_run(self, 'setup', run)
    if run.read:
        names = tuple(
            name
            for name, value in _changed(self, before).items()
            if (_depends(value) or run.concrete and _holds_number(value))
            and not _is_set(type(self), name)
        )
        for name in names:
            _intercept(type(self), name)
        if names:
            object.__setattr__(self, _TABLE, Kept(names, blocks, run))


def _values(module: Module) -> dict[str, tuple[Any, list]]:
    """Return the attributes that setup may set or fill, and the arrays in them."""
    others = _FLAX | {field.name for field in dataclasses.fields(module) if field.init}
    return {
        name: (value, [] if is_plain(value) else list(arrays_in(value)))
        for name, value in vars(module).items()
        if name not in others
    }


def _changed(module: Module, before: dict[str, tuple[Any, list]]) -> dict[str, Any]:
    """Return the attributes that setup has set, or filled."""
    found = {}
    for name, (value, now) in _values(module).items():
        old, arrays = before.get(name, (_NOTHING, []))
        same = value is old and len(now) == len(arrays) and all(map(operator.is_, now, arrays))
        if not same and name != _RUNS:
            found[name] = value
    return found


def _holds_number(value: Any) -> bool:
    return any(isinstance(leaf, _NUMBERS) for leaf in jax.tree.leaves(value))


@jax_compat.tap(Scope, 'put_variable')
def _put_variable(original, self, col, name, value):
    if written_in_a_run(self, col, (*linen_compat.scope_path(self), name), value):
        return
    state.writes += 1
    original(self, col, name, write(self, col, name, value))


def _is_set(cls: type[Module], name: str) -> bool:
    """Say whether a class has a descriptor of its own that is asked for an attribute."""
    member = inspect.getattr_static(cls, name, None)
    return hasattr(type(member), '__set__') and not isinstance(member, _SetupAttribute)


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
        kept = values.get(_TABLE)
        if kept is None or self.name not in kept.names:
            return values[self.name]
        for run in state.setups:
            run.read = True
        return kept.read(module, self.name, lambda: _setup_again(module, kept.names))

    def __set__(self, module: Module, value: Any) -> None:
        vars(module)[self.name] = value

    def __delete__(self, module: Module) -> None:
        del vars(module)[self.name]


_NO_DEFAULT = object()


def _intercept(cls: type, name: str) -> None:
    default = inspect.getattr_static(cls, name, _NO_DEFAULT)
    if not isinstance(default, _SetupAttribute):
        setattr(cls, name, _SetupAttribute(name, default))
