"""Reads of `flax.core` scopes under open transforms. It knows Scope, not nn.Module.

Nothing is swapped or written: each read takes the stored value and returns what the transforms
that cover it make of it. A lifted transform is a read too, of all that it hands to its body: the
values of immutable collections are transformed there, outside the loop or the checkpoint. A mutable
collection goes in as it is and is transformed at each read inside, or the body would hand
transformed values back to the store.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax.core import FrozenDict, meta
from flax.core.scope import DenyList, in_filter

from flax_sg import _compat
from flax_sg._active import Application, Entry, claim_key, lifted, opened, read_from, state
from flax_sg._compat import Scope
from flax_sg._errors import FrozenVariableError, UsageError
from flax_sg._info import Path, walk
from flax_sg._marks import tracing

__all__ = ['attach', 'attached_entries', 'check_write', 'effective', 'family_of', 'open_at']

_FLAG, _APPLICATION = 'flax_sg', 'flax_sg_application'
_MISSING = object()

# Set for good once a block inside a lifted body has asked for absolute paths.
_positional = False


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


def _mark_of(scope: Scope) -> Mark:
    return scope.flags.get(_FLAG) or Mark(_compat.root_variables(scope))


def _set_mark(scope: Scope, mark: Mark) -> None:
    scope.flags = scope.flags.copy({_FLAG: mark})


def family_of(scope: Scope) -> dict:
    """Return the identity of the scope's root, the same inside and outside lifted transforms."""
    return _mark_of(scope).family


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
    mark = _mark_of(scope)
    if state.stack:
        read_from(mark.trace)
    pending = () if collection in mark.applied else mark.pending
    skip = mark.done if collection is None or collection in mark.applied else ()
    inside = [e for e in (*state.stack, *mark.own * own) if e not in skip]
    return tuple(dict.fromkeys(e for e in (*pending, *inside) if e.covers(mark.family)))


@_compat.tap(Scope, '__init__')
def _init(original, self, *args, **kwargs):
    original(self, *args, **kwargs)
    if self.parent is None and _APPLICATION not in self.flags:
        self.flags = self.flags.copy({_APPLICATION: Application()})


def _transformed(entries: tuple[Entry, ...], scope: Scope, path: Path, collection: str, value: Any
                 ) -> Any:
    """Apply entries to a stored variable, or to the mapping of variables below a name."""
    if isinstance(value, Mapping):
        items = {k: _transformed(entries, scope, (*path, k), collection, v)
                 for k, v in value.items()}
        return FrozenDict(items) if isinstance(value, FrozenDict) else items
    initializing = scope.get_flag('initializing', False)
    for i, entry in enumerate(entries):
        info = entry.info(path, collection, value)
        if entry.selects(info) and (entry.transform.at_init or not initializing):
            other = functools.partial(_other, entries[:i], scope, path)
            value = entry.read(scope.flags[_APPLICATION], info, value, other)
    return value


def _other(entries: tuple[Entry, ...], scope: Scope, path: Path, collection: str) -> Any:
    """Read the variable at the same path in another collection; KeyError if there is none."""
    value = _compat.stored(scope, collection, path)
    return _transformed(entries, scope, path, collection, value)


def open_at(transform: Any, scope: Scope | None) -> contextlib.AbstractContextManager[None]:
    """Open a transform at a module's scope, or outside all modules."""
    global _positional
    if scope is None:
        return opened(Entry(transform, (), None))
    if _FLAG in scope.flags and transform.filter.positional:
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
    mark, path = _mark_of(scope), _compat.scope_path(scope)
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
    _set_mark(view, mark.with_own(own))
    return view


def attached_entries(scope: Scope, transforms: tuple[Any, ...]) -> tuple[Entry, ...]:
    """Return the entries that `attach` gave the scope for these transforms, outermost first."""
    mark, path = _mark_of(scope), _compat.scope_path(scope)
    entries = dict.fromkeys((*mark.own, *mark.done, *mark.pending))
    return tuple(e for e in entries
                 if e.attached and e.opener == path and e.transform in transforms)


def check_write(scope: Scope, collection: str, name: str) -> None:
    """Raise FrozenVariableError if an open transform forbids to change a variable."""
    if state.publishing or not state.stack and _FLAG not in scope.flags:
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
    if tracing.linearizing and not scope.flags[_APPLICATION].linearizing:
        path = '/'.join((*_compat.scope_path(scope), name))
        raise UsageError(
            f"gradient_views: a rule of jax.custom_jvp or jax.custom_vjp reads {collection} "
            f"'/{path}' while the target of views is differentiated, after the target has run. "
            'Read the variable in the target, and give its value to the function as an argument.')


def _meet(scope: Scope, entries: tuple[Entry, ...]) -> None:
    for entry in entries:
        entry.meet(scope.root, _compat.root_variables(scope))


@_compat.tap(Scope, 'get_variable')
def _get_variable(original, self, col, name, default=None):
    _check_open(self, col, name)
    if not state.stack and not state.setups and _FLAG not in self.flags:
        return original(self, col, name, default)
    value = original(self, col, name, _MISSING)
    if value is _MISSING:
        return default
    for run in state.setups:
        value = run.saw(self, col, name, value)
    entries = effective(self, col)
    if not entries:
        return value
    _meet(self, entries)
    return _transformed(entries, self, (*_compat.scope_path(self), name), col, value)


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
    if not state.stack and not state.setups and _FLAG not in self.flags:
        return variables
    out, path, changed = {}, _compat.scope_path(self), False
    for col, tree in variables.items():
        for run in state.setups:
            run.read = True
        entries = effective(self, col)
        _meet(self, entries)
        out[col] = _transformed(entries, self, path, col, tree) if entries else tree
        changed |= bool(entries)
    return type(variables)(out) if changed else variables


@_compat.tap_pack
def _pack(original, fn, in_filters, out_filters, rng_filters, name=None, enable_kwargs=False):
    def packed(scope_tree, *args, **kwargs):
        def body(scope_fn, repack_fn, groups, rngs, *args, **kwargs):
            lift = _Lifted(scope_tree, in_filters, out_filters, name)
            groups = lift.read(groups)
            with lift.keyed():
                out = fn(lift.bind(scope_fn), repack_fn, groups, rngs, *args, **kwargs)
            state.publishing = True
            return out
        run = original(body, in_filters, out_filters, rng_filters, name, enable_kwargs)
        before = state.publishing
        try:
            return run(scope_tree, *args, **kwargs)
        finally:
            state.publishing = before
    return packed


class _Lifted:
    """One call of a lifted transform: what it hands to its body, and in what state."""

    def __init__(self, scope_tree: Any, in_filters: Any, out_filters: Any, name: str | None):
        self.scopes, self.treedef = jax.tree.flatten(scope_tree)
        self.packed = _compat.packed_scopes(self.scopes)
        self.out_filters = out_filters
        derives = name in ('vjp', 'jvp', 'custom_vjp')
        self.given = in_filters[0] if derives and self._in_block() else False
        self.stack = state.stack  # JAX traces the rules of a custom_vjp after the block has ended
        self.applied: frozenset[str] = frozenset()

    def _in_block(self) -> bool:
        """Say whether variables that exist, and may be read in the body, are in an open block."""
        return any(effective(scope, own=False) and not scope.get_flag('initializing', False)
                   for scope in self.packed)

    def _writable(self, scope: Scope, collection: str) -> bool:
        # A derivative in a block is one with respect to what the block hands in, and that cannot be
        # handed back (test_an_explicit_derivative_in_a_block).
        return not in_filter(self.given, collection) and scope.is_mutable_collection(
            collection) and any(in_filter(f, collection) for f in self.out_filters)

    def read(self, groups: tuple) -> tuple:
        """Transform the values that the body cannot write."""
        def read(scope: Scope, collection: str, tree: Any) -> Any:
            if self._writable(scope, collection):
                return tree
            self.applied |= {collection}
            entries = effective(scope, collection, own=False)
            if not entries:
                return tree
            _meet(scope, entries)
            return _transformed(entries, scope, _compat.scope_path(scope), collection, tree)
        return tuple(
            tuple({col: read(scope, col, tree) for col, tree in group.items()}
                  for scope, group in zip(self.packed, groups_of_scopes, strict=True))
            for groups_of_scopes in groups)

    def bind(self, scope_fn: Callable) -> Callable:
        """Make ``scope_fn`` mark the body's scopes with what was done and what is left to do."""
        if self.given:
            scope_fn = functools.partial(scope_fn, mutable_filter=DenyList(self.given))

        def bound(*args, **kwargs):
            inner = self.treedef.flatten_up_to(scope_fn(*args, **kwargs))
            return self.treedef.unflatten(map(self._bind, self.scopes, inner))
        return bound

    def _bind(self, outer: Scope, inner: Scope) -> Scope:
        mark = _mark_of(outer)
        open_now = tuple(e for e in self.stack if e.covers(mark.family))
        done = tuple(dict.fromkeys((*mark.done, *open_now)))
        pending = tuple(dict.fromkeys((*mark.pending, *open_now)))
        plain = Mark(mark.family, self.applied, done, pending, trace=_compat.trace_state())
        flags = {_FLAG: plain, _APPLICATION: Application()}
        scope: Scope | None = inner
        while scope is not None:
            scope.flags = scope.flags.copy(flags)
            scope = scope.parent
        if mark.own:
            # The same scope may be handed in twice, as a live module's and as its mirror's.
            inner = inner.rewound()
            _set_mark(inner, plain.with_own(mark.own))
        return inner

    def keyed(self) -> contextlib.AbstractContextManager:
        """Add the scopes' paths to JAX's cache keys where the body's trace depends on them.

        nn.jit shares one trace among modules that differ in their path alone.
        """
        pending = any(
            entry.transform.in_collections(col)
            for scope in self.packed
            for entry in effective(scope, own=False)
            for col in _compat.root_variables(scope) if self._writable(scope, col))
        if pending:
            claim_key()
        if not (pending or _positional):
            return contextlib.nullcontext()
        return lifted(tuple(map(_compat.scope_path, self.scopes)))
