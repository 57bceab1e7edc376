"""Runs of code whose values are kept, and which can be made again in other blocks.

A run notes the state that it reads and the random numbers that it draws. Made again it reads the
same, draws the same, and has no effect on anything.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from flax_sg._compat import jax as jax_compat
from flax_sg._compat import linen as linen_compat
from flax_sg._compat.linen import Scope
from flax_sg._filters.mappings import children_of, rebuilt
from flax_sg._filters.variables import Path
from flax_sg._transforms.thread_state import state
from flax_sg.nn._scope_flags import application_of

__all__ = ['Run', 'running', 'written_in_a_run']


class Run:
    """A run.

    Args:
      first: the one that it repeats, if any.

    Attributes:
      read: it has read a variable.
      concrete: one that is an array, of which Python can make a number.
      seen: what was stored in mutable collections when it first read it.
      drawn: counters of random numbers, by identity, as they were when it first drew from them.
      rngs: the streams of its scope, which are others while a jitted class is called.
      written: what it would have written, if it repeats another one.
      handed: the collections that lifted transforms handed to their bodies, by place.
    """

    def __init__(self, first: Run | None = None):
        self.first = first
        self.read = self.concrete = False
        self.seen: dict[tuple, Any] = {}
        self.drawn: dict[int, tuple[dict, dict]] = {}
        self.rngs: Any = None
        self.written: dict[tuple, Any] = {}
        self.handed: dict[tuple, frozenset[str]] = {}

    def saw(self, scope: Scope, collection: str, path: Path, value: Any, missing: Any) -> Any:
        """Note a read of what is stored at a path, and return the value to go on with.

        ``missing`` is the value if there is nothing.
        """
        self.read = True
        self.concrete = self.concrete or any(
            isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
            for leaf in jax.tree.leaves(value)
        )
        if not scope.is_mutable_collection(collection):
            return value
        if self.first is not None:
            found = self._seen(scope, collection, path, value)
            return missing if found is _ABSENT else found
        self._note(scope, collection, path, _ABSENT if value is missing else value)
        return value

    def hand_in(self, scope: Scope, path: Path, variables: dict[str, Any]) -> dict[str, Any]:
        """Note what a lifted transform hands to its body, and return what to hand to it."""
        place = (application_of(scope).life, path)
        there = None if self.first is None else self.first.handed.get(place)
        self.handed.setdefault(place, frozenset(variables))
        return {
            collection: self.saw(scope, collection, path, tree, {})
            if there is None
            or collection in there
            or any(key[:2] == (place[0], collection) for key in self.written)
            else {}
            for collection, tree in variables.items()
        }

    def _note(self, scope: Scope, collection: str, path: Path, value: Any) -> None:
        items = children_of(value) if isinstance(value, Mapping) else None
        for name, child in (items or {}).items():  # Flax changes these in place
            self._note(scope, collection, (*path, name), child)
        self.seen.setdefault(
            _address(scope, collection, path), value if items is None else frozenset(items)
        )

    def _seen(self, scope: Scope, collection: str, path: Path, value: Any) -> Any:
        key = _address(scope, collection, path)
        if key in self.written:
            return self.written[key]
        seen = self.first.seen.get(key, value)
        if not isinstance(value, Mapping):
            return seen
        names = seen if isinstance(seen, frozenset) else frozenset(value)
        parts = {
            name: self._seen(scope, collection, (*path, name), child)
            for name, child in children_of(value).items()
        }
        kept = {
            name: part
            for name, part in parts.items()
            if part is not _ABSENT
            and (name in names or _address(scope, collection, (*path, name)) in self.written)
        }
        return rebuilt(value, kept) if len(kept) == len(value) else type(value)(kept)

    def had(self, scope: Scope, collection: str, path: Path, found: bool) -> bool:
        """Note whether there is a variable, and say whether there is one for this run."""
        key = _address(scope, collection, path)
        if self.first is not None:
            return key in self.written or found and self.first.seen.get(key) is not _ABSENT
        if not found and scope.is_mutable_collection(collection):
            self.seen.setdefault(key, _ABSENT)
        return found


_ABSENT = object()


def _address(scope: Scope, collection: str, path: Path) -> tuple:
    return (application_of(scope).life, collection, path)  # each run of a lifted body has its own


@contextlib.contextmanager
def running(run: Run, scope: Scope) -> Iterator[None]:
    """Make a run. A repeated one draws the first one's numbers; then all goes on as it was."""
    first, rngs, names, now = run.first, scope.rngs, scope.reservations, []
    run.rngs = rngs
    if first is not None:
        now = [(counters, linen_compat.counts(counters)) for counters, _ in first.drawn.values()]
        for counters, counts in first.drawn.values():
            counters.update(counts)
        scope.rngs = first.rngs
        scope.reservations = collections.defaultdict(set)
    state.setups.append(run)
    try:
        yield
    finally:
        state.setups.remove(run)
        for counters, counts in now:
            counters.update(counts)
        scope.rngs, scope.reservations = rngs, names


def written_in_a_run(scope: Scope, collection: str, path: Path, value: Any) -> bool:
    """Keep a value that a repeated run writes, if one is in progress, and say so."""
    for run in reversed(state.setups):
        if run.first is not None:
            run.written[_address(scope, collection, path)] = value
            return True
    return False


@jax_compat.tap(Scope, 'has_variable')
def _has_variable(original, self, col, name):
    found = original(self, col, name)
    for run in state.setups:
        found = run.had(self, col, (*linen_compat.scope_path(self), name), found)
    return found


@jax_compat.tap(Scope, 'make_rng')
def _make_rng(original, self, /, *args, **kwargs):
    for run in state.setups:
        if run.first is None:
            counters = self.rng_counters
            _, counts = run.drawn.setdefault(id(counters), (counters, {}))
            for name, count in linen_compat.counts(counters).items():
                counts.setdefault(name, count)
    return original(self, *args, **kwargs)
