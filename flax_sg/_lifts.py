"""What Flax's lifted transforms hand to their bodies while blocks are open.

A lifted transform is a read of all that it hands in, outside its loop or checkpoint. The values of
collections that the body cannot write are transformed there. What it may write goes in as it is, or
the body would hand transformed values back; what a read of it gives goes in beside it, under a name
that the body does not see, and is sliced by a scan as it is. So a predicate and a function see the
stored variable, whatever the body may write.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
from flax.core.scope import DenyList, in_filter

from flax_sg import _compat
from flax_sg._active import Application, context, set_context, state, under
from flax_sg._bodies import Body, Question
from flax_sg._compat import Scope
from flax_sg._info import Path, walk
from flax_sg._scope import (
    APPLICATION,
    FLAG,
    Mark,
    Reads,
    application_of,
    mark_of,
    set_mark,
)

__all__: list[str] = []  # it taps Flax

_BESIDE = 'flax_sg: '  # before the name of a collection: what reads of its variables give
_LEFT = ()  # what is there cannot be said beforehand: it is transformed at each read inside
_CARRY = {'scan': 1, 'while_loop': 0}  # the group of variables that change from step to step
_DERIVES = ('vjp', 'jvp', 'custom_vjp')
_SPLITS = ('scan', 'vmap')


@_compat.tap_pack
def _pack(original, fn, in_filters, out_filters, rng_filters, name=None, enable_kwargs=False):
    jitted = _Jitted() if name == 'jit' else None  # JAX keeps traces of fn for all its calls

    def packed(scope_tree, *args, **kwargs):
        def body(scope_fn, repack_fn, groups, rngs, *args, **kwargs):
            lift = _Lifted(scope_tree, in_filters, out_filters, name)
            groups = lift.read(groups)
            call = functools.partial(
                fn, lift.bind(scope_fn), repack_fn, groups, rngs, *args, **kwargs)
            out, written = jitted.run(call, lift.paths()) if jitted else call()
            state.publishing = True
            return out, _seen(written)
        run = original(body, in_filters, out_filters, rng_filters, name, enable_kwargs)
        with under(publishing=state.publishing):
            return run(scope_tree, *args, **kwargs)
    return packed


@_compat.tap_map_variables
def _map_variables(original, fn, mapped_collections, map_in_fn=lambda x: x, *args, **kwargs):
    def map_in(variables):
        beside = {name: variables[name] for name in variables if name.startswith(_BESIDE)}
        before = _effects()
        out = map_in_fn({name: variables[name] for name in variables if name not in beside})
        if beside and _effects() == before:  # what reads give is mapped as what is stored is
            seen = map_in_fn(_beside_in_place(variables))
            return {**out, **{_BESIDE + name: tree for name, tree in seen.items()}}
        return {**out, **dict.fromkeys(beside, _LEFT)}
    return original(fn, mapped_collections, map_in, *args, **kwargs)


def _effects() -> tuple:
    """Return what shows whether a function has drawn random numbers or touched variables."""
    module = _compat.current_module()
    if module is None:
        return (state.writes,)
    names = sum(map(len, module.scope.reservations.values()))
    return state.writes, _compat.draws(module.scope.root), names


def _seen(written: tuple) -> tuple:
    """Leave out of what a body returns the collections that it does not see."""
    return jax.tree.map(
        lambda group: {col: tree for col, tree in group.items() if not col.startswith(_BESIDE)},
        written, is_leaf=lambda node: isinstance(node, Mapping))


def _beside_in_place(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return collections with what reads of their variables give in place of what is stored."""
    out = {}
    for name, tree in variables.items():
        if not name.startswith(_BESIDE):
            beside = variables.get(_BESIDE + name)
            out[name] = tree if beside is None else _laid_over(tree, beside)
    return out


def _laid_over(tree: Any, over: Any) -> Any:
    if not isinstance(over, Mapping):
        return over
    return {**tree, **{name: _laid_over(tree[name], value) for name, value in over.items()}}


class _Lifted:
    """One call of a lifted transform: what it hands to its body, and in what state."""

    def __init__(self, scope_tree: Any, in_filters: Any, out_filters: Any, name: str | None):
        self.scopes, self.treedef = jax.tree.flatten(scope_tree)
        self.packed, self.places = _compat.packed_scopes(self.scopes)
        self.out_filters = out_filters
        self.carry = _CARRY.get(name)
        self.split = name in _SPLITS
        self.open = [self._open_about(scope) for scope in self.packed]
        self.given = self._given(in_filters[0]) if name in _DERIVES else frozenset()
        self.applied: list[frozenset[str]] = [frozenset() for _ in self.packed]
        # What is transformed at each read inside, as a step of a loop, or the body, writes it.
        self.left: list[frozenset[str]] = [frozenset() for _ in self.packed]

    def _given(self, differentiated: Any) -> frozenset[str]:
        """Return the collections that a derivative is taken of, and that open blocks look into."""
        return frozenset(
            collection for scope, entries in zip(self.packed, self.open, strict=True)
            if not scope.get_flag('initializing', False)
            for collection in _compat.root_variables(scope)
            if in_filter(differentiated, collection)
            and any(entry.transform.in_collections(collection) for entry in entries))

    def _open_about(self, scope: Scope) -> tuple:
        reads = Reads(scope, '', idle=False)
        return (*reads.mark.outer, *reads.inside)

    def _writable(self, scope: Scope, collection: str) -> bool:
        # A derivative in a block is one with respect to what the block hands in, and that cannot be
        # handed back (test_an_explicit_derivative_in_a_block).
        return collection not in self.given and scope.is_mutable_collection(
            collection) and any(in_filter(f, collection) for f in self.out_filters)

    def read(self, groups: tuple) -> tuple:
        """Transform the values that the body cannot write, and lay what reads give beside others.

        Args:
          groups: for each filter of the transform, for each scope, variables by collection.
        """
        return tuple(
            tuple(self._read_group(i, variables, carried=number == self.carry)
                  for i, variables in enumerate(group))
            for number, group in enumerate(groups))

    def _read_group(self, i: int, variables: Mapping[str, Any], *, carried: bool) -> dict:
        scope, out = self.packed[i], dict(variables)
        path = _compat.scope_path(scope)
        for run in state.setups:
            out = run.hand_in(scope, path, out)
        for collection, tree in list(out.items()):
            writable = self._writable(scope, collection)
            if writable and carried or self._follows(i, collection):
                self.left[i] |= {collection}
                continue
            if not writable:
                self.applied[i] |= {collection}
            reads = Reads(scope, collection, idle=False)
            if reads.idle:
                continue
            seen = reads.of(path, tree)
            if not writable:
                out[collection] = seen
            elif (changed := _changed(tree, seen)) is not None:
                out[_BESIDE + collection] = changed
        return out

    def _follows(self, i: int, collection: str) -> bool:
        """Say whether reads of a collection give what the body may write elsewhere meanwhile."""
        return any(entry.transform.in_collections(collection) and self._writable(
            self.packed[i], source) for entry in self.open[i]
            for source in entry.transform.read_from())

    def bind(self, scope_fn: Callable) -> Callable:
        """Make ``scope_fn`` mark the body's scopes with what was done and what is left to do."""
        if self.given:
            scope_fn = functools.partial(scope_fn, mutable_filter=DenyList(tuple(self.given)))

        def bound(*args, **kwargs):
            inner = self.treedef.flatten_up_to(scope_fn(*args, **kwargs))
            for i, root in dict(zip(self.places, map(_root, inner), strict=True)).items():
                self._mark(i, root)
            return self.treedef.unflatten(map(self._bind, self.scopes, inner))
        return bound

    def _mark(self, i: int, root: Scope) -> None:
        """Mark a scope that was handed in, and all below it."""
        outer = mark_of(self.packed[i])
        mark = Mark(outer.family, outer.variables, self.applied[i], self._copies(i, root),
                    self.open[i], trace=_compat.staging_trace(), split=outer.split or self.split)
        inner = application_of(self.packed[i]).inner
        root.flags = root.flags.copy({FLAG: mark, APPLICATION: Application(inner=inner)})

    def _copies(self, i: int, root: Scope) -> dict[tuple, tuple]:
        """Take what lies beside the stored variables out of a body's scope."""
        variables = _compat.root_variables(root)
        copies: dict[tuple, tuple] = {}
        if not self.open[i]:
            return copies
        start = _compat.scope_path(root)
        for collection in [name for name in variables if not name.startswith(_BESIDE)]:
            beside = variables.pop(_BESIDE + collection, {})
            if beside == _LEFT or collection in self.applied[i] | self.left[i]:
                continue
            for info, stored in walk(variables[collection], collection, start):
                path = info.absolute_path
                copies[collection, path] = stored, _at(beside, path[len(start):], stored)
        return copies

    def _bind(self, outer: Scope, inner: Scope) -> Scope:
        root, scope = _root(inner), inner
        while scope is not root:
            scope.flags = scope.flags.copy({name: root.flags[name] for name in (FLAG, APPLICATION)})
            scope = scope.parent
        own = mark_of(outer).own
        if own:
            # The same scope may be handed in twice, as a live module's and as its mirror's.
            inner = inner.rewound()
            set_mark(inner, mark_of(root).with_own(own))
        return inner

    def paths(self) -> tuple[Path, ...]:
        """Return where the scopes are."""
        return tuple(map(_compat.scope_path, self.scopes))


def _root(scope: Scope) -> Scope:
    while scope.parent is not None:
        scope = scope.parent
    return scope


def _changed(tree: Any, seen: Any) -> Any:
    """Return the part of a tree in which reads give something else, or None."""
    if not isinstance(tree, Mapping):
        return None if seen is tree else seen
    parts = {name: _changed(value, seen[name]) for name, value in tree.items()}
    return {name: part for name, part in parts.items() if part is not None} or None


def _at(tree: Any, path: Path, default: Any) -> Any:
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            return default
        tree = tree[name]
    return tree


class _Jitted:
    """A function under nn.jit, of which JAX shares a trace among modules at different paths."""

    def run(self, call: Callable[[], Any], paths: tuple[Path, ...]) -> Any:
        """Call it in a context in which JAX finds no trace that is wrong at these paths."""
        around, body = state.bodies, Body(paths)
        asked = context().asked.setdefault(self, {})  # by the number of scopes
        known: Body | None = asked.get(len(paths))
        serves = known is None or known.serves(paths, _ask)
        try:
            set_context(*() if serves else (paths,))
            with under(bodies=(*around, body)):
                return call()
        finally:
            set_context()
            if not serves:
                Body(paths, named=paths).used_in(around, paths)
            elif known is not None:
                known.add(body)
                known.used_in(around, paths)
            elif body.questions or body.named is not None:
                asked[len(paths)] = body


def _ask(question: Question) -> Hashable:
    """Ask the block that is open now, or the one that was open in the body."""
    for entry in state.stack:
        if entry.key == question.key:
            return entry.says(question.info)
    return question.says(question.info)
