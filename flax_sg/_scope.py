"""Reads of `flax.core` scopes under open transforms. It knows Scope, not nn.Module.

Nothing is swapped or written: each read takes the stored value and returns what the transforms
that cover it make of it. A lifted transform is a read too, of all that it hands to its body
(`_lifts`); what it did and what is left to do in the body stands in the scopes' flags.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

from flax.core import FrozenDict, meta

from flax_sg import _compat
from flax_sg._active import Application, Entry, opened, read_from, state
from flax_sg._compat import Scope
from flax_sg._errors import FrozenVariableError, UsageError
from flax_sg._info import Path, walk
from flax_sg._marks import tracing

__all__ = [
    'APPLICATION', 'FLAG', 'Mark', 'attach', 'attached_entries', 'check_write', 'effective',
    'family_of', 'mark_of', 'meet', 'open_at', 'positional', 'set_mark', 'transformed',
]

FLAG, APPLICATION = 'flax_sg', 'flax_sg_application'
_MISSING = object()

_positional = False  # True for good once that is so


def positional() -> bool:
    """Say whether a block inside a lifted body has asked for absolute paths."""
    return _positional


class Mark:
    """What a scope carries in its flags, which Flax hands on to child scopes and lifted ones.

    Attributes:
      family: the root variables outside all lifted transforms.
      applied: collections whose values were transformed when a lifted transform handed them in.
      done: the entries that were applied to those.
      pending: the entries that apply inside the body to the others, which it may write.
      own: entries of lifted modules, for every read through the scope and below.
      trace: the JAX trace of the lifted body.
    """

    __slots__ = ('applied', 'done', 'family', 'own', 'pending', 'trace')

    def __init__(self, family: dict, applied: frozenset[str] = frozenset(),
                 done: tuple[Entry, ...] = (), pending: tuple[Entry, ...] = (),
                 own: tuple[Entry, ...] = (), trace: Any = None):
        self.family, self.applied, self.trace = family, applied, trace
        self.done, self.pending, self.own = done, pending, own

    def with_own(self, own: tuple[Entry, ...]) -> Mark:
        return Mark(self.family, self.applied, self.done, self.pending, own, self.trace)

    # nn.jit hashes a scope's flags into its cache key: marks compare by meaning.
    def _value(self) -> tuple:
        entries = (tuple(e.key for e in es) for es in (self.done, self.pending, self.own))
        return (self.applied, *entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mark) and self._value() == other._value()

    def __hash__(self) -> int:
        return hash(self._value())


def mark_of(scope: Scope) -> Mark:
    """Return the mark that a scope carries, or one that says nothing."""
    return scope.flags.get(FLAG) or Mark(_compat.root_variables(scope))


def set_mark(scope: Scope, mark: Mark) -> None:
    """Let a scope carry a mark."""
    scope.flags = scope.flags.copy({FLAG: mark})


def family_of(scope: Scope) -> dict:
    """Return the identity of the scope's root, the same inside and outside lifted transforms."""
    return mark_of(scope).family


def effective(scope: Scope, collection: str | None = None, *, own: bool = True
              ) -> tuple[Entry, ...]:
    """Return the entries to apply to a read through the scope, outermost first.

    Args:
      scope: the scope that is read.
      collection: the collection; None asks for all entries that may apply to any.
      own: include entries of lifted modules that are not running.
    """
    if _compat.in_scratch_root(scope):
        return ()
    mark = mark_of(scope)
    if state.stack:
        read_from(mark.trace)
    pending = () if collection in mark.applied else mark.pending
    skip = mark.done if collection is None or collection in mark.applied else ()
    inside = [e for e in (*state.stack, *mark.own * own) if e not in skip]
    return tuple(dict.fromkeys(e for e in (*pending, *inside) if e.covers(mark.family)))


@_compat.tap(Scope, '__init__')
def _init(original, self, *args, **kwargs):
    original(self, *args, **kwargs)
    if self.parent is None and APPLICATION not in self.flags:
        self.flags = self.flags.copy({APPLICATION: Application()})


def transformed(entries: tuple[Entry, ...], scope: Scope, path: Path, collection: str, value: Any
                 ) -> Any:
    """Apply entries to a stored variable, or to the mapping of variables below a name."""
    if isinstance(value, Mapping):
        items = {k: transformed(entries, scope, (*path, k), collection, v)
                 for k, v in value.items()}
        return FrozenDict(items) if isinstance(value, FrozenDict) else items
    initializing = scope.get_flag('initializing', False)
    for i, entry in enumerate(entries):
        info = entry.info(path, collection, value)
        if entry.selects(info) and (entry.transform.at_init or not initializing):
            other = functools.partial(_other, entries[:i], scope, path)
            value = entry.read(scope.flags[APPLICATION], info, value, other)
    return value


def _other(entries: tuple[Entry, ...], scope: Scope, path: Path, collection: str) -> Any:
    """Read the variable at the same path in another collection; KeyError if there is none."""
    value = _compat.stored(scope, collection, path)
    return transformed(entries, scope, path, collection, value)


def open_at(transform: Any, scope: Scope | None) -> contextlib.AbstractContextManager[None]:
    """Open a transform at a module's scope, or outside all modules."""
    global _positional
    if scope is None:
        return opened(Entry(transform, (), None))
    if FLAG in scope.flags and transform.filter.positional:
        _positional = True
    initializing = bool(scope.get_flag('initializing', False))
    return opened(Entry(
        transform, _compat.scope_path(scope), family_of(scope), initializing=initializing))


def attach(scope: Scope, transforms: tuple[Any, ...]) -> Scope:
    """Return a view of the scope through which every read is transformed.

    The view shares variables, names and random streams with the scope. A scope that carries the
    transforms already, as inside a lifted method, is returned as it is.
    """
    if _compat.in_scratch_root(scope):
        return scope
    mark, path = mark_of(scope), _compat.scope_path(scope)
    found = attached_entries(scope, transforms)
    have, missing = [e.transform for e in found], []
    for transform in reversed(transforms):
        if transform in have:
            have.remove(transform)
        else:
            missing.append(transform)
    if not missing:
        return scope
    initializing = bool(scope.get_flag('initializing', False))
    new = tuple(Entry(t, path, mark.family, attached=True, initializing=initializing)
                for t in missing)
    outer = tuple(e for e in mark.own if e not in found)
    inner = tuple(e for e in mark.own if e in found)
    own = outer + new + inner
    view = scope.rewound()
    view.reservations = scope.reservations
    set_mark(view, mark.with_own(own))
    return view


def attached_entries(scope: Scope, transforms: tuple[Any, ...]) -> tuple[Entry, ...]:
    """Return the entries that `attach` gave the scope for these transforms, outermost first."""
    mark, path = mark_of(scope), _compat.scope_path(scope)
    entries = dict.fromkeys((*mark.own, *mark.done, *mark.pending))
    return tuple(e for e in entries
                 if e.attached and e.opener == path and e.transform in transforms)


def check_write(scope: Scope, collection: str, name: str) -> None:
    """Raise FrozenVariableError if an open transform forbids to change a variable."""
    if state.publishing or not state.stack and FLAG not in scope.flags:
        return
    entries = [e for e in effective(scope, collection) if e.transform.freezes]
    if not entries or not scope.has_variable(collection, name):
        return
    path = _compat.scope_path(scope)
    tree = _compat.stored(scope, collection, (*path, name))
    for info, value in walk(tree, collection, (*path, name)):
        for entry in entries:
            if entry.selects(entry.info(info.absolute_path, collection, value)):
                raise FrozenVariableError(
                    f'{entry.transform!r}: {name!r} of module \'/{"/".join(path)}\' (collection '
                    f'{collection!r}) was to be written in this block, in which it is constant. '
                    'Write it outside of the block, or narrow the predicate or collections=.')


def _check_open(scope: Scope, collection: str, name: str) -> None:
    """Raise UsageError if the target of some views is read where none of its blocks is open."""
    if tracing.linearizing and not scope.flags[APPLICATION].linearizing:
        path = '/'.join((*_compat.scope_path(scope), name))
        raise UsageError(
            f"gradient_views: a rule of jax.custom_jvp or jax.custom_vjp reads {collection} "
            f"'/{path}' while the target of views is differentiated, after the target has run. "
            'Read the variable in the target, and give its value to the function as an argument.')


def meet(scope: Scope, entries: tuple[Entry, ...]) -> None:
    """Let entries see the variables of the scope's root, for patterns that select nothing."""
    for entry in entries:
        entry.meet(scope.root, _compat.root_variables(scope))


@_compat.tap(Scope, 'get_variable')
def _get_variable(original, self, col, name, default=None):
    _check_open(self, col, name)
    if not state.stack and not state.setups and FLAG not in self.flags:
        return original(self, col, name, default)
    value = original(self, col, name, _MISSING)
    if value is _MISSING:
        return default
    for run in state.setups:
        value = run.saw(self, col, name, value)
    entries = effective(self, col)
    if not entries:
        return value
    meet(self, entries)
    return transformed(entries, self, (*_compat.scope_path(self), name), col, value)


@_compat.tap(Scope, 'param')
def _param(original, self, name, *args, unbox=True, **kwargs):
    created = not self.has_variable('params', name)
    value = original(self, name, *args, unbox=unbox, **kwargs)
    if created:  # Flax returns what it has just stored without reading it
        value = self.get_variable('params', name)
        value = meta.unbox(value) if unbox else value
    return value


@_compat.tap(Scope, 'variables')
def _variables(original, self):
    _check_open(self, 'variables of', '')
    variables = original(self)
    if not state.stack and not state.setups and FLAG not in self.flags:
        return variables
    out, path, changed = {}, _compat.scope_path(self), False
    for col, tree in variables.items():
        for run in state.setups:
            run.read = True
        entries = effective(self, col)
        meet(self, entries)
        out[col] = transformed(entries, self, path, col, tree) if entries else tree
        changed |= bool(entries)
    return type(variables)(out) if changed else variables
