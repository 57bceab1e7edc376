"""Reads of Variables in blocks, and what becomes of Variables in functions that are traced.

A read of a Variable that a block selects gives what the block makes of its value, whoever reads
it; the Variable itself stays as it is. There are two exceptions, where what is read is the value
as it lies there: a Variable that is handed on to a function that is traced, which reads in there;
and one that is written in part.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from flax_sg._compat import jax as jax_compat
from flax_sg._compat import nnx as nnx_compat
from flax_sg._compat.nnx import Pytree, Variable, store, stored, trace_state_of
from flax_sg._errors import UsageError
from flax_sg._filters import of_nnx
from flax_sg._jax.block_names import named
from flax_sg._transforms.block import OpenBlock
from flax_sg._transforms.cache_keys import note_read
from flax_sg._transforms.thread_state import anywhere, state
from flax_sg.nnx._blocks import answer, asking, blocks_about, met, refuse_hijax, selects_others
from flax_sg.nnx._marks import (
    MARK,
    Back,
    Copied,
    Mark,
    Said,
    Seen,
    concerns,
    is_among,
    is_same,
    kept,
    known_of_another,
    live_of,
    mirrors,
    see,
    seen_of,
)

__all__ = ['reading_as_it_lies', 'said_of', 'thread']


class _Thread(threading.local):
    as_it_lies = False  # NNX takes Variables apart for a function, or puts them together
    marking = False  # it takes apart what it gives to a function
    giving_back = False  # or what the function returns
    ruled = False  # a function with a rule of the user's runs, which returns what the rule does
    merging = False  # it puts them together
    given_back: dict[int, Variable]  # what a function has given back and has written
    of_mirrors: dict[int, tuple[Variable, Any]]  # and what it would write to mirrors
    updated: frozenset[int] = frozenset()  # the ids of all that `nnx.update` is given
    writing: Variable | None = None  # in part, so that the rest is read as it lies


thread = _Thread()


@contextlib.contextmanager
def reading_as_it_lies() -> Iterator[None]:
    before, thread.as_it_lies = thread.as_it_lies, True
    try:
        yield
    finally:
        thread.as_it_lies = before


class _Values:
    """What stands before the slot in which the value of a Variable lies."""

    def __get__(self, variable: Variable | None, owner: Any = None) -> Any:
        if variable is None:
            return self
        # As `concerns` has it; a call of that takes as long as all of this.
        if anywhere.threads or mirrors.made and type(trace_state_of(variable)) is Seen:
            return _read(variable)
        return stored(variable)

    def __set__(self, variable: Variable, value: Any) -> None:
        if anywhere.threads or mirrors.made:
            _store(variable, value)
        else:
            store(variable, value)


def _store(variable: Variable, value: Any) -> None:
    seen = seen_of(variable)
    if seen is None or seen.live is None:
        store(variable, value)
        if thread.merging:
            thread.given_back[id(variable)] = variable
    elif thread.merging:
        thread.of_mirrors[id(variable)] = variable, value
    elif id(live_of(variable)) not in thread.updated:
        seen.live._raw_value = value  # and else it is older than what the live one gets


def _read(variable: Variable) -> Any:
    """Return what a Variable is read as."""
    origin = live_of(variable)
    value = stored(origin)
    if thread.as_it_lies or thread.writing is variable:
        return value
    live, seen = value, seen_of(variable)
    of_live = seen if origin is variable else seen_of(origin)
    for block, said in said_of(variable):
        if seen is None or not is_among(said, (*seen.said, *seen.held)):
            note_read(None)
        done = of_live is not None and of_live.is_done(said, live)
        if done and of_live.computed and _only_stops(block):
            done = not selects_others(block, variable)  # it is a new Variable, by whatever name
        if said.info is not None and not done:
            value = value[...] if nnx_compat.is_ref(value) else value
            value = _read_in(block, variable, said, value)
    return value


def said_of(variable: Variable) -> list[tuple[OpenBlock, Said]]:
    """Return what open blocks say of a Variable, outermost first, and the mirrors that it is of."""
    seen = seen_of(variable)
    held = seen.held if seen is not None else ()
    return [*zip(blocks_about(), _said(variable), strict=True), *((s.block, s) for s in held)]


def _said(variable: Variable) -> tuple[Said, ...]:
    """Return what the open blocks say of a Variable."""
    origin = live_of(variable)
    seen = seen_of(origin)
    return tuple(
        (seen.of(block) if seen is not None else None) or answer(block, origin)
        for block in blocks_about()
    )


def _only_stops(block: OpenBlock) -> bool:
    return block.transform.idempotent and not block.transform.changes_values


def _read_in(block: OpenBlock, variable: Variable, said: Said, value: Any) -> Any:
    """Return what a block makes of a value, once in the trace in which it was opened."""
    here = jax_compat.trace_state() == block.trace
    reads = met(block).reads
    found = reads.get(id(variable))
    # A mirror is there for long: its function may draw numbers. A source may change at any time.
    transform = block.transform
    once = here and not (block.of_module and transform.uses_names or transform.needs_names)
    if once and found is not None and is_same(found[1], value):
        return found[2]
    with named(block.transform, block.line), asking(block):
        out = block.transform.read(said.info, value, _no_other)
    reads[id(variable)] = (variable, kept(value), out) if here else (variable, None, None)
    return out


def _no_other(collection: str) -> Any:
    raise KeyError(collection)


def _mark(variable: Variable, *, read: bool = False, differentiated: bool = False) -> Mark | None:
    """Return what goes along with a Variable that is handed on; `read` says that it was read."""
    seen, said, value = seen_of(variable), _said(variable), stored(variable)
    held = seen.held if seen is not None else ()
    if seen is None and not said:
        return None
    if not all(seen is not None and is_among(each, seen.said) for each in said):
        note_read(None)  # JAX may keep the mark, in the structure of what a function returns

    def done(each: Said) -> bool:
        if each.info is None or _only_stops(each.block):
            return False  # it may be read again
        return read or seen is not None and seen.is_done(each, value)

    return Mark(
        said,
        held,
        read=tuple(map(done, (*said, *held))),
        differentiated=differentiated,
        is_derivative=seen is not None and seen.is_derivative,
    )


# JAX takes Variables apart, and puts them together.


def _flatten(original: Any, variable: Variable) -> tuple:
    if not concerns(variable):
        return original(variable)
    handed = nnx_compat.handed_on()
    if handed.on and not handed.rule:
        with reading_as_it_lies():
            children, metadata = original(variable)
        mark: Any = _mark(variable, differentiated=handed.differentiated)
    else:
        children, metadata = original(variable)
        if handed.on:  # a rule says what becomes of the derivative, and the block would not
            mark = _mark(variable, read=True)
        elif state.stack:
            value = children[0][1] if isinstance(children[0], tuple) else children[0]
            mark = Copied(_said(variable), value)
        else:
            mark = None
    return children, metadata if mark is None else (*metadata, (MARK, mark))


def _by_open_blocks(said: tuple[Said, ...]) -> tuple[Said, ...]:
    """Return what blocks have said as said by those that are open.

    JAX keeps the structure of what a function returns, marks included, and uses it in a later block
    that is equal. Which Variables are selected there is the same, as the arguments' marks are.
    """
    now = blocks_about()
    if len(now) != len(said) or [met(block).key for block in now] != [s.means for s in said]:
        return tuple(each for each in said if each.block in now)
    return tuple(
        each if each.block is block else each.by(block)
        for each, block in zip(said, now, strict=True)
    )


def _new(original: Any, cls: type, value: Any, metadata: dict) -> Variable:
    mark = metadata.pop(MARK, None)
    variable = original(cls, value, metadata)
    if mark is None:
        return variable
    if isinstance(mark, Back):
        return variable
    if isinstance(mark, Copied):
        computed = not mark.is_of(value)
        value = _as_it_comes_in(mark, mark.said, value)
        store(variable, value)
        see(variable, mark.said, done=value, by=mark.said, computed=computed)
        return variable
    said = _by_open_blocks(mark.said)
    if mark.is_derivative or mark.differentiated and mark.trace == jax_compat.trace_state():
        see(variable, said, mark.held, is_derivative=True)
        return variable
    by = mark.read_by(said) if len(said) == len(mark.said) else ()
    value = _as_it_comes_in(mark, by, value)
    store(variable, value)
    see(variable, said, mark.held, value, by, came=value, mark=mark)
    return variable


def _as_it_comes_in(mark: Mark | Copied, by: tuple[Said, ...], value: Any) -> Any:
    """Read what was read already, where the function that it is handed to is differentiated.

    What the blocks made of it lies outside of that derivative; so it is read for this one alone.
    """
    trace = jax_compat.derivative_trace()
    if trace is None or not jax_compat.is_around(mark.began):
        return value
    now = blocks_about()
    for said in by:
        if said.info is None or said.block not in now and not is_among(said, mark.held):
            continue
        transform = said.block.transform
        if transform.changes_values and not transform.idempotent:
            raise UsageError(
                f'{transform!r}: a function was differentiated with respect to a copy of '
                f'{said.info.name!r} that was made in the block, and has the changed value. '
                'Copy the model outside of the block, or open the block in the function.'
            )
        read = functools.partial(transform.read, said.info, other=_no_other)
        value = jax.tree.map(
            lambda leaf, read=read: (
                _for_one_derivative(lambda x: read(value=x), leaf)
                if jax_compat.is_of_trace(leaf, trace) and jnp.issubdtype(leaf.dtype, jnp.inexact)
                else leaf
            ),
            value,
        )
    return value


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _for_one_derivative(read: Any, value: Any) -> Any:
    """Return the value, as a read of it for the innermost derivative alone."""
    return value


@_for_one_derivative.defjvp
def _(read, primals, tangents):
    (value,), (tangent,) = primals, tangents
    return value, jax.jvp(read, (value,), (tangent,))[1]


# NNX does, and copies them.


def _handing_on(original, self, *args, **kwargs):
    if not anywhere.threads and not mirrors.made:
        return original(self, *args, **kwargs)
    if blocks_about() and nnx_compat.is_cached(self):
        raise UsageError(
            'a function of nnx.cached_partial was called in a block: it knows its models from '
            'before, and nothing of the block. Use nnx.jit, or open the block in the function.'
        )
    before = thread.marking, thread.giving_back
    back = nnx_compat.gives_back(self)
    thread.giving_back, thread.marking = bool(back) and not thread.ruled, back is False
    try:
        with reading_as_it_lies():
            return original(self, *args, **kwargs)
    finally:
        thread.marking, thread.giving_back = before


def _merging(original, self, graphdef, *args, **kwargs):
    if thread.merging or not anywhere.threads and not mirrors.made:
        return original(self, graphdef, *args, **kwargs)
    as_they_came = [
        (variable, stored(live_of(variable)))
        for variable, metadata in nnx_compat.given_back(self, graphdef)
        if isinstance(back := metadata.get(MARK), Back) and not back.written
    ]
    thread.merging, thread.of_mirrors = True, {}
    thread.given_back = nnx_compat.memory_of(self)  # of all that the function gives back
    try:
        with reading_as_it_lies():
            out = original(self, graphdef, *args, **kwargs)
    finally:
        thread.merging = False
    for variable, value in as_they_came:  # so that what is known of the value stays known
        if thread.of_mirrors.pop(id(variable), None) is None:
            thread.given_back.pop(id(variable), None)
            if jax_compat.is_as_good(value, stored(variable)):
                store(variable, value)
            else:
                known_of_another(variable, value)
    for variable, value in thread.of_mirrors.values():
        live = live_of(variable)
        if id(live) not in thread.given_back:  # which is newer
            store(live, value)
    return out


def _get_metadata(original, self, *args, **kwargs):
    found = original(self, *args, **kwargs)
    if thread.marking and not args and not kwargs:
        mark: Any = _mark(self)
        if mark is not None:
            found[MARK] = mark
    elif thread.giving_back and not args and not kwargs:
        seen = seen_of(self)
        back = seen.gives_back(stored(self)) if seen is not None else None
        if back is not None:
            found[MARK] = back
    return found


def _copy(original, self, *args, **kwargs):
    out = original(self, *args, **kwargs)
    if concerns(self) and type(out) is type(self):
        seen, said = seen_of(self), _said(self)
        held = seen.held if seen is not None else ()
        if seen is not None and seen.is_derivative:
            see(out, seen.said, held, is_derivative=True)
        elif not thread.as_it_lies:
            see(out, said, done=stored(out), by=said)
        else:
            same = seen is not None and seen.is_of(stored(self))
            value = stored(out)
            came = seen is not None and seen.came is stored(self)
            into = {'came': value, 'mark': seen.mark} if came else {}
            if same:
                see(out, said, held, value, seen.by, computed=seen.computed, **into)
            else:
                see(out, said, held, **into)
    return out


def _deepcopy(original, self, memo=None):
    """NNX makes the Variables of the copy anew, of what these are read as."""
    out = original(self, memo)
    if anywhere.threads or mirrors.made:
        pairs = zip(of_nnx.paths_below(self), of_nnx.paths_below(out), strict=True)
        for (_, variable), (_, copied) in pairs:
            if not nnx_compat.is_hijax(variable):
                said = _said(variable)
                see(copied, said, done=stored(copied), by=said)
    return out


def _shallow(original: Any, variable: Variable) -> Variable:
    """`copy.copy` would take along what is known of the value as it lies, and not lie there."""
    return variable.copy() if concerns(variable) else original(variable)


def _custom_vjp(original, self, *args, **kwargs):
    """NNX has such a function give back what it got, and the user's rule the derivative of that."""
    if anywhere.threads or mirrors.made:
        for _, variable in of_nnx.paths_below((args, kwargs)):
            if nnx_compat.is_hijax(variable):
                continue
            for block, said in said_of(variable):
                if said.info is not None:
                    raise UsageError(
                        f'{block.transform!r}: a function of nnx.custom_vjp was called with the '
                        f'{type(variable).__name__} {said.info.name!r}, which the block selects. '
                        'Its rule gives derivatives of all that it got, and of what it writes. '
                        'Pass graph_updates=False to nnx.custom_vjp, or open the block in the '
                        'function.'
                    )
    before, thread.ruled = thread.ruled, True
    try:
        return original(self, *args, **kwargs)
    finally:
        thread.ruled = before


def _read_hijax(original, variable):
    if blocks_about():
        refuse_hijax(variable)
    return original(variable)


nnx_compat.tap_values(_Values())
nnx_compat.tap_flattening(_flatten)
nnx_compat.tap_new(_new)
nnx_compat.tap_hijax(_read_hijax)
nnx_compat.tap_custom_vjp(_custom_vjp)
nnx_compat.tap_handing_on(_handing_on, _merging)
jax_compat.tap(Variable, 'get_metadata')(_get_metadata)
for _name in ('copy', 'replace', 'to_state'):  # names of one method
    jax_compat.tap(Variable, _name)(_copy)
jax_compat.tap(Pytree, '__deepcopy__')(_deepcopy)
nnx_compat.tap_shallow_copies(_shallow)
