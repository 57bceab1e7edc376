"""Reads of `flax.core` scopes under open transforms. It knows Scope, not nn.Module.

Nothing is swapped or written: each read takes the stored value and returns what the transforms
that cover it make of it. A lifted transform is a read too, of all that it hands to its body
(`_lifts`); what it did and what is left to do in the body stands in the scopes' flags.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
from collections.abc import Mapping
from typing import Any

import jax
from flax.core import DenyList, FrozenDict, meta

from flax_sg import _compat
from flax_sg._active import (
    Application,
    Entry,
    claim,
    in_body,
    opened,
    read_from,
    set_context,
    state,
    under,
)
from flax_sg._compat import Module, Scope
from flax_sg._errors import FrozenVariableError, UsageError
from flax_sg._info import Path, VariableInfo, walk
from flax_sg._mappings import children_of, rebuilt
from flax_sg._marks import tracing
from flax_sg._members import module_of

__all__ = [
    'APPLICATION', 'FLAG', 'Mark', 'Reads', 'application_of', 'attach', 'attached_entry',
    'effective', 'entry_at', 'mark_of', 'may_create', 'open_at', 'set_mark', 'without', 'write',
]

FLAG, APPLICATION = 'flax_sg', 'flax_sg_application'
_MISSING = object()


class Mark:
    """What a scope carries in its flags, which Flax hands on to child scopes and lifted ones.

    Attributes:
      family: the identity of the root outside all lifted transforms.
      variables: the variables of that root.
      applied: collections whose values were transformed when a lifted transform handed them in.
      copies: for the others, by collection and path: the stored value that was handed in, and what
        a read of it gave.
      outer: the entries that were applied to those; the body applies them to what it creates or
        writes.
      own: entries of lifted modules, for every read through the scope and below.
      trace: the JAX trace of the lifted body, of those to a jaxpr.
      split: a body around sees a part of each variable: one layer of a scan, one example of a map.
    """

    __slots__ = ('applied', 'copies', 'family', 'outer', 'own', 'split', 'trace', 'variables')

    def __init__(self, family: Any, variables: dict, applied: frozenset[str] = frozenset(),
                 copies: Mapping[tuple, tuple] = FrozenDict(), outer: tuple[Entry, ...] = (),
                 own: tuple[Entry, ...] = (), trace: Any = None, split: bool = False):
        self.family, self.variables = family, variables
        self.applied, self.copies = applied, copies
        self.outer, self.own, self.trace, self.split = outer, own, trace, split

    def with_own(self, own: tuple[Entry, ...]) -> Mark:
        return Mark(self.family, self.variables, self.applied, self.copies, self.outer, own,
                    self.trace, self.split)

    # nn.jit hashes a scope's flags into its cache key: marks compare by meaning. Which variables
    # there are copies of is in the structure of what nn.jit hands to its function.
    def _value(self) -> tuple:
        entries = (tuple(e.key for e in es) for es in (self.outer, self.own))
        return (self.applied, self.split, *entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mark) and self._value() == other._value()

    def __hash__(self) -> int:
        return hash(self._value())


def mark_of(scope: Scope) -> Mark:
    """Return the mark that a scope carries, or one that says nothing."""
    return scope.flags.get(FLAG) or Mark(
        application_of(scope).life, _compat.root_variables(scope))


def set_mark(scope: Scope, mark: Mark) -> None:
    """Let a scope carry a mark."""
    scope.flags = scope.flags.copy({FLAG: mark})


@_compat.tap(Scope, '__init__')
def _init(original, self, /, *args, **kwargs):
    original(self, *args, **kwargs)
    if self.parent is None and APPLICATION not in self.flags:
        inner = state.inside or _compat.current_module() is not None or (
            bool(state.stack) and module_of(sys._getframe()) is not None)
        self.flags = self.flags.copy({APPLICATION: Application(inner=inner)})


def application_of(scope: Scope) -> Application:
    """Return the application of a model that a scope is of."""
    found = scope.flags.get(APPLICATION)
    if found is None:  # it was made before this library was imported
        root = scope.root
        found = root.flags.get(APPLICATION) or Application()
        root.flags, scope.flags = (s.flags.copy({APPLICATION: found}) for s in (root, scope))
    return found


def _inside(scope: Scope, mark: Mark, idle: bool) -> tuple[Entry, ...]:
    """Return the entries about a scope that no lifted transform has seen to.

    A block that a module below a lifted one opens is inside the lifted one, whether that is running
    or not; ``idle=False`` leaves out those that are neither running nor around a block.
    """
    inner, found = application_of(scope).inner, state.stack
    if mark.own:
        found = [e for block in found for e in (*(o for o in block.around if o in mark.own), block)]
        found += mark.own * idle
    return tuple(dict.fromkeys(
        e for e in found if e not in mark.outer and e.covers(mark.family, inner)))


def effective(scope: Scope) -> tuple[Entry, ...]:
    """Return the entries that apply to reads through the scope, outermost first."""
    if _compat.in_scratch_root(scope):
        return ()
    mark = mark_of(scope)
    if state.stack:
        read_from(mark.trace)
    return (*mark.outer, *_inside(scope, mark, idle=True))


class Reads:
    """Reads of a collection through a scope: what the open entries make of its variables.

    Attributes:
      idle: nothing is open that concerns them.
    """

    def __init__(self, scope: Scope, collection: str, *, idle: bool = True):
        """Ask what is open; ``idle=False`` leaves out lifted modules that are not running."""
        self.scope, self.collection = scope, collection
        self.mark = mark_of(scope)
        self.inside: tuple[Entry, ...] = ()
        self.idle = True
        if _compat.in_scratch_root(scope):
            return
        if state.stack:
            read_from(self.mark.trace)
        self.inside = _inside(scope, self.mark, idle)
        applied = collection in self.mark.applied
        self.outer = () if applied else self.mark.outer
        self.idle = not self.outer and not self.inside
        if self.mark.trace is None:  # in a lifted body it was met on the way in
            for entry in [e for e in self.inside if e.met is not None]:
                entry.met.model(self.mark.family, self.mark.variables)

    def of(self, path: Path, value: Any) -> Any:
        """Return what a read gives of a stored variable, or of the variables below a name."""
        if self.idle:
            if self.collection not in self.mark.applied and in_body():
                claim()
            return value
        if isinstance(value, Mapping):
            return rebuilt(value, {
                name: self.of((*path, name), child) for name, child in children_of(value).items()})
        return self._of_variable(path, value)

    def settle(self) -> None:
        """Raise UnmatchedPathError for a lifted module that is read from outside its methods."""
        for entry in self.mark.own:
            if (not entry.settled and entry in self.inside and entry not in state.stack
                    and not may_create(self.scope, entry.transform)):
                entry.settled = True
                entry.met.check()

    def handed_in(self, path: Path, value: Any) -> tuple[Any, tuple[Entry, ...]]:
        """Return what a lifted transform made of a stored value, and what it left to do."""
        stored, copy = self.mark.copies.get((self.collection, path), (_MISSING, None))
        if stored is not _MISSING and identical(stored, value):  # boxes are made anew
            return copy, self.inside
        if self.collection not in self.mark.applied and in_body():
            claim()  # a trace under nn.jit depends on the blocks around it
        return value, (*self.outer, *self.inside)

    def _of_variable(self, path: Path, value: Any) -> Any:
        value, left = self.handed_in(path, value)
        return self._apply(left, path, value)

    def _apply(self, entries: tuple[Entry, ...], path: Path, value: Any) -> Any:
        initializing = self.scope.get_flag('initializing', False)
        application = application_of(self.scope)
        for entry in entries:
            info = entry.info(path, self.collection, value)
            if not entry.selects(info) or initializing and not entry.transform.at_init:
                continue
            other = functools.partial(self._other, entry, path)
            read = functools.partial(entry.read, application, info, value, other)
            part = initializing and self.mark.split and entry in self.mark.outer
            value = _read_part(read, value) if part else read()
        return value

    def _other(self, entry: Entry, path: Path, collection: str) -> Any:
        """Read the variable at the same path in another collection, in the blocks around one.

        Raises KeyError if there is none.
        """
        value = _compat.stored(self.scope, collection, path)
        if isinstance(value, Mapping):
            return value
        order = (*self.mark.outer, *self.inside)
        reads = Reads(self.scope, collection)
        value, left = reads.handed_in(path, value)
        around = order[:order.index(entry)]
        return reads._apply(tuple(e for e in left if e in around), path, value)

    def given(self, path: Path, stored: Any) -> Any:
        """Return what a stored variable was last read as in this application."""
        value, left = self.handed_in(path, stored)
        for entry in left:
            was = entry.has_read(application_of(self.scope), self.collection, path)
            value = value if was is None else was
        return value


def may_create(scope: Scope, transform: Any) -> bool:
    """Say whether variables that a transform is about may still be created."""
    mutable = scope.mutable
    if isinstance(mutable, (bool, DenyList)):
        return mutable is not False
    names = [mutable] if isinstance(mutable, str) else mutable
    return any(map(transform.in_collections, names))


def _read_part(read: Any, value: Any) -> Any:
    """Read a part of a variable that is being created: there is no whole yet for a function."""
    try:
        out = read()
    except Exception:  # of a function that needs the whole, as at each later read
        return value
    shapes = lambda tree: [jax.numpy.shape(leaf) for leaf in jax.tree.leaves(tree)]
    return out if shapes(out) == shapes(value) else value


def open_at(transform: Any, scope: Scope | None) -> contextlib.AbstractContextManager[None]:
    """Open a transform at a module's scope, or outside all modules."""
    return opened(entry_at(transform, scope, _running()))


def entry_at(transform: Any, scope: Scope | None, by: Scope | None) -> Entry:
    """Return an opening of a transform at a module's scope, or outside all modules.

    ``by`` is the scope of the module whose code opens it.
    """
    return Entry(transform, ()) if scope is None else _entry(transform, scope, _around(scope, by))


def _entry(transform: Any, scope: Scope, around: tuple[Entry, ...], owner: Any = None) -> Entry:
    mark = mark_of(scope)
    return Entry(transform, _compat.scope_path(scope), mark.family, variables=mark.variables,
                 around=around, owner=owner,
                 initializing=bool(scope.get_flag('initializing', False)))


def _around(scope: Scope, by: Scope | None) -> tuple[Entry, ...]:
    """Return those of a scope's attached entries in which the module that opens a block lies too.

    The block is inside them, and around the others.
    """
    own = mark_of(scope).own
    return () if by is None else tuple(entry for entry in own if entry in mark_of(by).own)


def _running() -> Scope | None:
    module = _compat.current_module()
    return None if module is None else module.scope


def attach(scope: Scope, owner: Any, transform: Any, *, mirror: bool = False) -> Scope:
    """Return a view of the scope through which every read is transformed.

    The view shares variables, names and random streams with the scope. A scope that carries the
    owner's transform already, as inside a lifted method, is returned as it is. That of a mirror is
    around what was attached to the scope before.
    """
    if _compat.in_scratch_root(scope) or attached_entry(scope, owner) is not None:
        return scope
    mark = mark_of(scope)
    around = _around(scope, _running()) if mirror else mark.own
    inside = tuple(entry for entry in mark.own if entry not in around)
    view = scope.rewound()
    view.reservations = scope.reservations
    set_mark(view, mark.with_own((*around, _entry(transform, scope, around, owner), *inside)))
    return view


def attached_entry(scope: Scope, owner: Any) -> Entry | None:
    """Return the entry that `attach` gave the scope for an owner, or None."""
    mark, path = mark_of(scope), _compat.scope_path(scope)
    return next((e for e in mark.own if e.owner == owner and e.opener == path
                 and e.family is mark.family), None)


def without(scope: Scope, owners: set) -> Scope:
    """Return a view of the scope that carries nothing of some owners."""
    view, mark = scope.rewound(), mark_of(scope)
    set_mark(view, mark.with_own(tuple(e for e in mark.own if e.owner not in owners)))
    return view


def write(scope: Scope, collection: str, name: str, value: Any) -> Any:
    """Return what to store where a module writes a value.

    What a read in a block gave is not what is stored, and must not be stored in its place: a module
    that writes back what it has read changes nothing.

    Raises:
      FrozenVariableError: an open transform forbids to change the variable.
      UsageError: the value may have been made of what a block reads in its place.
    """
    if state.publishing is not None:
        return state.publishing(scope, collection, name, value)
    if not state.stack and FLAG not in scope.flags:
        return value
    if not scope.has_variable(collection, name):
        return value
    if in_body():
        claim()
    reads = Reads(scope, collection)
    if reads.idle:
        return value
    path = (*_compat.scope_path(scope), name)
    tree = _compat.stored(scope, collection, path)
    found = [(info.absolute_path, stored) for info, stored in walk(tree, collection, path)]
    originals = {}
    for at, stored in found:
        pairs = zip(jax.tree.leaves(reads.given(at, stored)), jax.tree.leaves(stored), strict=False)
        originals.update((id(given), (given, old)) for given, old in pairs)
    restored = jax.tree.map(lambda leaf: originals.get(id(leaf), (leaf, leaf))[1], value)
    if identical(restored, tree):
        return tree
    for at, stored in found:
        for entry in (*reads.mark.outer, *reads.inside):
            _check_write(entry, scope, entry.info(at, collection, stored), name)
    return value if identical(restored, value) else restored


def identical(a: Any, b: Any) -> bool:
    """Say whether the arrays of two variables are the same objects; boxes are made anew."""
    (a, kind_a), (b, kind_b) = jax.tree.flatten(a), jax.tree.flatten(b)
    return kind_a == kind_b and all(map(operator.is_, a, b))


def _check_write(entry: Entry, scope: Scope, info: VariableInfo, name: str) -> None:
    """Raise an error if an entry is against a change of a variable."""
    transform = entry.transform
    if not (transform.freezes or transform.changes_values) or not entry.selects(info):
        return
    what = (f"{transform!r}: {name!r} of module '/{'/'.join(_compat.scope_path(scope))}' "
            f'(collection {info.collection!r}) was to be written in this block, ')
    if transform.freezes:
        raise FrozenVariableError(
            f'{what}in which it is constant. Write it outside of the block, or narrow the '
            'predicate or collections=.')
    mark, key = mark_of(scope), (info.collection, info.absolute_path)
    if entry.was_read(application_of(scope), *key) or entry in mark.outer and key in mark.copies:
        raise UsageError(
            f'{what}which reads something else in its place: what was made of that would replace '
            'what is stored. Write it outside of the block, let the module not update it '
            '(use_running_average=True), or narrow the predicate or collections=.')


def _check_open(scope: Scope, collection: str, name: str) -> None:
    """Raise UsageError if the target of some views is read where none of its blocks is open."""
    if tracing.linearizing and not application_of(scope).linearizing:
        path = '/'.join((*_compat.scope_path(scope), name))
        raise UsageError(
            f"gradient_views: a rule of jax.custom_jvp or jax.custom_vjp reads {collection} "
            f"'/{path}' while the target of views is differentiated, after the target has run. "
            'Read the variable in the target, and give its value to the function as an argument.')


@_compat.tap(Scope, 'get_variable')
def _get_variable(original, self, col, name, default=None):
    _check_open(self, col, name)
    if not state.stack and not state.setups and FLAG not in self.flags:
        return original(self, col, name, default)
    value = original(self, col, name, _MISSING)
    path = (*_compat.scope_path(self), name)
    for run in state.setups:
        value = run.saw(self, col, path, value, _MISSING)
    if value is _MISSING:
        return default
    if state.storing == (col, path):
        return value
    reads = Reads(self, col)
    value = reads.of(path, value)
    reads.settle()
    return value


@_compat.tap(Scope, 'param')
def _param(original, self, /, name, *args, unbox=True, **kwargs):
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
            tree = run.saw(self, col, path, tree, {})
        reads = Reads(self, col)
        out[col] = reads.of(path, tree)
        reads.settle()
        changed |= out[col] is not variables[col]
    return type(variables)(out) if changed else variables


# From here on a model that is applied is the module's own affair: traces depend on that.

@_compat.tap(Scope, 'temporary')
@contextlib.contextmanager
def _applied(original, self):
    around = state.stack
    try:
        with original(self) as root, under(inside=True):
            if around:
                set_context()
            yield root
    finally:
        if around:
            set_context()


@_compat.tap(Module, '_call_wrapped_method')
def _call(original, self, *args):
    running = state.inside or _compat.current_module() is not None
    if not state.stack or running or self.scope is None:
        return original(self, *args)
    set_context(inside=True)
    try:
        return original(self, *args)
    finally:
        set_context()


# Both read a variable in order to store it: that read gives what is stored.

@_compat.tap(Module, 'sow')
def _sow(original, self, /, col, name, *args, **kwargs):
    with _storing(self.scope, col, name):
        return original(self, col, name, *args, **kwargs)


@_compat.tap_value
def _set_value(original, self, value):
    with _storing(self.scope, self.collection, self.name):
        original(self, value)


def _storing(scope: Scope | None, collection: str, name: str) -> contextlib.AbstractContextManager:
    if scope is None or not state.stack and FLAG not in scope.flags:
        return contextlib.nullcontext()
    return under(storing=(collection, (*_compat.scope_path(scope), name)))
