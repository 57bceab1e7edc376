"""Functions whose body runs inside a block; and those whose body would run after it.

A generator runs when it is asked for its next value, and a coroutine when it is awaited: then a
block around the call has been left. Each step of a generator runs in the block by itself. What
cannot be run so is refused.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import sys
import types
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax

from flax_sg._errors import UsageError
from flax_sg._filters.slips import kind_of

__all__ = ['caller', 'check_frame', 'run_inside']

# Iterators over what is there. Any other one may run code when it is asked for its next value.
_DONE = (
    *(type(iter(x)) for x in ([], (), {}, set(), '', b'', range(0), {}.values(), {}.items())),
    type(reversed([])),
    io.IOBase,
)
_LATER = (types.CoroutineType, types.AsyncGeneratorType, contextlib._GeneratorContextManagerBase)
_ASYNC = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR | inspect.CO_ITERABLE_COROUTINE


def run_inside(fn: Callable, block: Callable[[Any], contextlib.AbstractContextManager]) -> Callable:
    """Wrap a method so that its body runs inside ``block(module)``.

    Raises:
      UsageError: it is a coroutine function; or, at a call, it returns what runs later.
    """
    name = getattr(fn, '__qualname__', repr(fn))
    inner = inspect.unwrap(fn)  # Flax wraps methods
    if inspect.iscoroutinefunction(inner) or inspect.isasyncgenfunction(inner):
        raise UsageError(
            f'{name} is a coroutine function: its body would run after the block was left, when it '
            'is awaited, and other tasks would run inside of the block. Decorate a function that '
            'it calls.'
        )

    @functools.wraps(fn)
    def wrapped(module: Any, /, *args: Any, **kwargs: Any) -> Any:
        with block(module):
            out = fn(module, *args, **kwargs)
        if isinstance(out, types.GeneratorType):
            return _stepped(out, functools.partial(block, module))
        for leaf in jax.tree.leaves(out, is_leaf=lambda node: isinstance(node, Iterator)):
            if (
                isinstance(leaf, _LATER)
                or isinstance(leaf, Iterator)
                and not isinstance(leaf, _DONE)
            ):
                raise UsageError(
                    f'{name} returned {kind_of(leaf)}, which runs after '
                    'the block around the function was left. Return a list or a generator.'
                )
        return out

    return wrapped


def _stepped(
    steps: types.GeneratorType, block: Callable[[], contextlib.AbstractContextManager]
) -> Iterator[Any]:
    """Run each step of a generator inside the block."""
    step, value = steps.send, None
    while True:
        with block():
            try:
                out = step(value)
            except StopIteration as stop:
                return stop.value
        try:
            step, value = steps.send, (yield out)
        except GeneratorExit:
            with block():
                steps.close()
            raise
        except BaseException as error:
            step, value = steps.throw, error


def check_frame(frame: FrameType | None, what: Any) -> None:
    """Raise UsageError where a block would stay open while a coroutine waits.

    Args:
      frame: where a `with` opens the block. Generators and contextlib may stand in between.
      what: the transform.
    """
    while frame is not None:
        code = frame.f_code
        if code.co_flags & _ASYNC:
            raise UsageError(
                f'{what!r} was to be opened in the coroutine {code.co_qualname}: while it waits, '
                'other tasks of the thread would run inside of the block. Open it in a function '
                'that the coroutine calls.'
            )
        if not code.co_flags & inspect.CO_GENERATOR and code.co_filename != contextlib.__file__:
            return
        frame = frame.f_back


def caller() -> FrameType:
    """Return the frame that called the function that calls this one."""
    return sys._getframe(2)
