"""The stack of open blocks of a thread: entered, left, and opened again for a rule."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from types import FrameType
from typing import Any

from flax_sg._compat import jax as jax_compat
from flax_sg._errors import UsageError
from flax_sg._transforms.block import OpenBlock
from flax_sg._transforms.cache_keys import set_context
from flax_sg._transforms.change import Change
from flax_sg._transforms.contexts import Context
from flax_sg._transforms.thread_state import anywhere, state, under

__all__ = ['Opening', 'close', 'enter', 'opened', 'opening_of', 'reopened']


_STACK = object()  # stands for the frames of an ExitStack, which enters and leaves from two


class Opening:
    """A block on the stack of a thread, until it is left.

    Attributes:
      block: the block.
      left: it is not on the stack any more.
      by: the transform whose `with` opened it, or None.
      place: the frame of the `with`, or _STACK.
      staging: the trace to a jaxpr in which it was opened; a lifted module's block is older.
      context: the context in force while it is the innermost one, see `contexts`, as far as traces
        that begin in its own trace can tell; and the key of that context.
    """

    __slots__ = ('by', 'context', 'block', 'left', 'place', 'staging')

    def __init__(self, block: OpenBlock, by: Change | None, place: Any):
        self.block, self.by, self.place, self.left = block, by, place, False
        self.staging = jax_compat.staging_trace() if block.of_module else block.staging
        self.context: tuple[Context | None, Hashable] = (None, None)


def enter(block: OpenBlock, by: Change | None = None, frame: FrameType | None = None) -> Opening:
    """Open a block; it has to be left with `close`."""
    opening = Opening(block, by, frame and _place(frame))
    state.openings.append(opening)
    _restack()
    return opening


def opening_of(transform: Change, frame: FrameType) -> Opening:
    """Return which opening of a transform a `with` is about to leave: that of its own frame.

    Several may be open at once, as in generators.
    """
    place = _place(frame)
    mine = [o for o in (*state.left, *state.openings) if o.by is transform]
    here = [o for o in mine if o.place is place]
    found = here or [o for o in mine if not o.left]
    if not found:
        raise UsageError(
            f'{transform!r} was left without being open in this thread. Leave a block once, where '
            'it was entered.'
        )
    if found[-1].left:
        state.left.remove(found[-1])
    return found[-1]


def _place(frame: FrameType) -> Any:
    return _STACK if frame.f_code.co_filename == contextlib.__file__ else frame


def close(opening: Opening, *, failed: bool) -> None:
    """Leave a block, and what is still open inside of it.

    Args:
      opening: what `enter` returned.
      failed: an exception leaves the block; there is no other one about the block then.

    Raises:
      UnmatchedPathError: a pattern of the block selected nothing.
      UsageError: a block inside of it was still open, as a generator's that waits in it.
    """
    if opening.left:
        if not failed:
            raise UsageError(
                f'{opening.block.transform!r} was closed before its end, with a block around it '
                'that was left first. Leave blocks in the reverse order of entry: a generator that '
                'yields inside a block must be finished before the block around it ends.'
            )
        return
    if opening not in state.openings:
        raise UsageError(
            f'{opening.block.transform!r} was left in another thread than it was opened in. Leave '
            'it where it was entered.'
        )
    start = state.openings.index(opening)
    gone, state.openings[start:] = state.openings[start:], []
    for each in gone:
        each.left = True
    state.left.extend(each for each in gone[1:] if each.by is not None)
    _restack()
    try:
        if failed:
            for each in gone:
                _note_failed(each.block)
        else:
            _check_closed(gone)
    finally:
        for each in gone:
            each.block.closed()


def _check_closed(gone: list[Opening]) -> None:
    opening = gone[0]
    if len(gone) > 1:
        raise UsageError(
            f'{opening.block.transform!r} was left while {gone[-1].block.transform!r} was still '
            'open inside of it; both are closed now. Leave blocks in the reverse order of entry: '
            'a generator that yields inside a block must be finished before the block around it '
            'ends.'
        )
    if not opening.block.of_module:
        opening.block.matches.check()


def _note_failed(block: OpenBlock) -> None:
    if not block.of_module:
        block.matches.failed()


@contextlib.contextmanager
def opened(block: OpenBlock) -> Iterator[None]:
    """Run a part in an opened block; an UnmatchedPathError gives way to the part's own error."""
    opening = enter(block)
    try:
        yield
    except BaseException:
        close(opening, failed=True)
        raise
    close(opening, failed=False)


@contextlib.contextmanager
def reopened(stack: tuple[OpenBlock, ...], *, inside: bool) -> Iterator[None]:
    """Run a rule in the blocks in which its function was called, and in no others."""
    resumed = [block for block in stack if block.resume()]
    try:
        with under(around=stack, openings=[], inside=inside, setups=[], publishing=None):
            _restack()
            try:
                yield
            finally:
                for opening in state.openings:
                    opening.left = True
    finally:
        for block in resumed:
            block.release()
        _restack()


def _restack() -> None:
    """Set what follows from what is open: the stack, and the key of JAX's caches."""
    before = bool(state.stack)
    state.stack = (*state.around, *(opening.block for opening in state.openings))
    anywhere.count(bool(state.stack) - before)
    set_context()
