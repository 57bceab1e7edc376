"""Writes of Variables in blocks: what a read gave is not what lies there, and is not stored."""

from __future__ import annotations

from typing import Any

from flax import nnx

from flax_sg._compat import jax as jax_compat
from flax_sg._compat import nnx as nnx_compat
from flax_sg._compat.nnx import Variable
from flax_sg._errors import FrozenVariableError, UsageError
from flax_sg._transforms.thread_state import anywhere
from flax_sg.nnx._blocks import leaves_of, met, paths_below
from flax_sg.nnx._marks import concerns, seen_of
from flax_sg.nnx._reads import reading_as_it_lies, said_of, thread

__all__: list[str] = []  # it taps writes


def _check(variable: Variable) -> None:
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
        if id(variable) in met(block).reads or seen is not None and said in seen.said:
            raise UsageError(
                f'{what}which reads something else in its place: what was made of that would '
                'replace what is stored. Write it outside of the block, or narrow the predicate '
                'or collections=.'
            )
    if seen is not None and seen.held and seen.live is None:
        raise UsageError(
            f'a {type(variable).__name__} of a mirror was written in a function that is traced, '
            'where it is another one than the live one. Write the live one there.'
        )


def _gives_back(variable: Variable, value: Any) -> bool:
    """Say whether a value is what the Variable was read as, so that there is nothing to store."""
    reads = (met(block).reads.get(id(variable)) for block, _ in said_of(variable))
    return any(found is not None and found[2] is value is not None for found in reads)


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
        _check(self)
    return original(self, value, **kwargs)


def _take(original, self, other):
    """Take the value of another Variable, as it lies: NNX does so with what functions give back."""
    if not concerns(self) and not concerns(other):
        return original(self, other)
    with reading_as_it_lies():
        return original(self, other)


def _update(original, node, state, /, *states):
    if anywhere.threads and not thread.merging:
        new = dict(pair for each in (state, *states) for pair in leaves_of(each))
        for path, variable in paths_below(node):
            if path in new and new[path] is not variable:
                _check(variable)
    return original(node, state, *states)


jax_compat.tap(Variable, 'set_value')(_set_value)
jax_compat.tap(Variable, 'set_raw_value')(_set_raw_value)
jax_compat.tap(Variable, 'update_from_state')(_take)
jax_compat.tap(Variable, 'copy_from')(_take)
nnx_compat.tap_in_place(nnx.update, _update)
