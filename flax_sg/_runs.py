"""Runs of code whose values are kept, and which can be made again in other blocks.

A run notes the state that it reads and the random numbers that it draws. Made again it reads the
same, draws the same, and has no effect on anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from flax_sg import _compat
from flax_sg._active import state
from flax_sg._compat import Scope
from flax_sg._info import Path
from flax_sg._mappings import children_of, rebuilt

__all__ = ['Run', 'running', 'written_in_a_run']


class Run:
    """A run.

    Args:
      first: the one that it repeats, if any.

    Attributes:
      read: it has read a variable.
      seen: what was stored in mutable collections when it first read it.
      drawn: counters of random numbers, by identity, as they were when it first drew from them.
      rngs: the streams of its scope, which are others while a jitted class is called.
      written: what it would have written, if it repeats another one.
    """

    def __init__(self, first: Run | None = None):
        self.first = first
        self.read = False
        self.seen: dict[tuple, Any] = {}
        self.drawn: dict[int, tuple[dict, dict]] = {}
        self.rngs: Any = None
        self.written: dict[tuple, Any] = {}

    def saw(self, scope: Scope, collection: str, path: Path, value: Any) -> Any:
        """Note a read of what is stored at a path, and return the value to go on with."""
        self.read = True
        if self.first is None and not scope.is_mutable_collection(collection):
            return value
        if isinstance(value, Mapping):  # which Flax changes in place
            parts = {name: self.saw(scope, collection, (*path, name), child)
                     for name, child in children_of(value).items()}
            return value if self.first is None else rebuilt(value, parts)
        key = _address(scope, collection, path)
        if self.first is None:
            self.seen.setdefault(key, value)
            return value
        return self.written.get(key, self.first.seen.get(key, value))


def _address(scope: Scope, collection: str, path: Path) -> tuple:
    return (id(_compat.root_variables(scope)), collection, path)


@contextlib.contextmanager
def running(run: Run, scope: Scope) -> Iterator[None]:
    """Make a run. A repeated one draws the first one's numbers; then all goes on as it was."""
    first, rngs, now = run.first, scope.rngs, []
    run.rngs = rngs
    if first is not None:
        now = [(counters, _compat.counts(counters)) for counters, _ in first.drawn.values()]
        for counters, counts in first.drawn.values():
            counters.update(counts)
        scope.rngs = first.rngs
    state.setups.append(run)
    try:
        yield
    finally:
        state.setups.remove(run)
        for counters, counts in now:
            counters.update(counts)
        scope.rngs = rngs


def written_in_a_run(scope: Scope, collection: str, path: Path, value: Any) -> bool:
    """Keep a value that a repeated run writes, if one is in progress, and say so."""
    for run in reversed(state.setups):
        if run.first is not None:
            run.written[_address(scope, collection, path)] = value
            return True
    return False


@_compat.tap(Scope, 'make_rng')
def _make_rng(original, self, *args, **kwargs):
    for run in state.setups:
        if run.first is None:
            counters = self.rng_counters
            _, counts = run.drawn.setdefault(id(counters), (counters, {}))
            for name, count in _compat.counts(counters).items():
                counts.setdefault(name, count)
    return original(self, *args, **kwargs)
