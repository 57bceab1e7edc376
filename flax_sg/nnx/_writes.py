"""Writes of Variables in blocks: what a read gave is not what lies there, and is not stored."""

from __future__ import annotations

from typing import Any

from flax import nnx

from flax_sg._compat import jax as jax_compat
from flax_sg._compat import nnx as nnx_compat
from flax_sg._compat.nnx import Variable, stored
from flax_sg._errors import FrozenVariableError, UsageError
from flax_sg._filters import of_nnx
from flax_sg._transforms.thread_state import anywhere
from flax_sg._transforms.thread_state import state as state_of_thread
from flax_sg.nnx._blocks import leaves_of, met, refuse_hijax
from flax_sg.nnx._marks import concerns, is_among, live_of, mirrors, seen_of
from flax_sg.nnx._reads import reading_as_it_lies, said_of, thread

__all__: list[str] = []  # it taps writes


def _check(variable: Variable, *, whole: bool = False) -> None:
    """Raise an error if a block is against a change of a Variable."""
    seen = seen_of(variable)
    if seen is not None and seen.is_derivative:
        return
    for block, said in said_of(variable):
        transform = block.transform
        if said.info is None or not (transform.freezes or transform.changes_values):
            continue
        what = (
            f'{transform!r}: the {type(variable).__name__} {said.info.name!r} was to be written in '
            'this block, '
        )
        if transform.freezes:
            raise FrozenVariableError(
                f'{what}in which it is constant. Write it outside of the block, or narrow the '
                'predicate or collections=.'
            )
        if id(variable) in met(block).reads or seen is not None and is_among(said, seen.said):
            raise UsageError(
                f'{what}which reads something else in its place: what was made of that would '
                'replace what is stored. Write it outside of the block, or narrow the predicate '
                'or collections=.'
            )
    if seen is not None and seen.held and seen.live is None and not whole:
        raise UsageError(
            f'a {type(variable).__name__} of a mirror was written in a function that is traced, '
            'where it is another one than the live one. Write the live one there.'
        )


def _gives_back(variable: Variable, value: Any) -> bool:
    """Say whether a value is what the Variable is read as now: then there is nothing to store."""
    live = stored(live_of(variable))
    for block, _ in said_of(variable):
        found = met(block).reads.get(id(variable))
        if found is None or found[1] is not live:
            return False
        if found[2] is value:
            return True
        live = found[2]  # which the next block reads
    return False


def _set_value(original, self, value, **kwargs):
    if not concerns(self):
        return original(self, value, **kwargs)
    if kwargs.get('index', ...) is ... and _gives_back(self, value):
        return None
    _check(self)
    before, thread.writing = thread.writing, self
    try:
        return original(self, value, **kwargs)
    finally:
        thread.writing = before


def _set_raw_value(original, self, value, **kwargs):
    if concerns(self) and not thread.merging:
        if _gives_back(self, value):
            return None
        _check(self, whole=bool(thread.updated))
    return original(self, value, **kwargs)


def _take(original, self, other):
    """Take the value of another Variable; as it lies, if a function of NNX's has given it back."""
    if thread.merging or not concerns(self) and not concerns(other):
        return original(self, other)
    if nnx_compat.takes_back():
        with reading_as_it_lies():
            return original(self, other)
    value = other.get_raw_value()
    return None if _gives_back(self, value) else original(self, other)


def _update(original, node, state, /, *states):
    """Update all or nothing; what a mirror would get is what its live Variable gets."""
    if not anywhere.threads and not mirrors.made or thread.merging:
        return original(node, state, *states)
    new = dict(pair for each in (state, *states) for pair in leaves_of(each))
    below = [(path, variable) for path, variable in of_nnx.paths_below(node) if path in new]
    for path, variable in below:
        if state_of_thread.stack and new[path] is not variable:
            refuse_hijax(variable)
            _check(variable, whole=True)
    before, thread.updated = thread.updated, frozenset(id(variable) for _, variable in below)
    try:
        return original(node, state, *states)
    finally:
        thread.updated = before


jax_compat.tap(Variable, 'set_value')(_set_value)
jax_compat.tap(Variable, 'set_raw_value')(_set_raw_value)
jax_compat.tap(Variable, 'update_from_state')(_take)
jax_compat.tap(Variable, 'copy_from')(_take)
nnx_compat.tap_in_place(nnx.update, _update)
