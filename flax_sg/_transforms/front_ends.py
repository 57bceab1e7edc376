"""The libraries of modules that transforms know: each enters itself when it is imported.

What is the same for all of them asks here what is not: which module's code opens a block, and what
a transform or some views make of a target.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

from flax_sg._errors import UsageError
from flax_sg._filters.slips import kind_of
from flax_sg._transforms.block import OpenBlock
from flax_sg._transforms.change import Change

__all__ = [
    'FrontEnd',
    'block_of',
    'check_once',
    'enter',
    'expect',
    'is_running',
    'method',
    'modules',
    'transformed',
    'viewed',
    'viewed_call',
]


class FrontEnd(Protocol):
    """What a library of modules says; it returns NotImplemented of what is not its own.

    Attributes:
      module: what its modules are called, in messages.
    """

    module: str

    def is_module(self, value: Any) -> bool:
        """Say whether a value is a module."""

    def check(self) -> None:
        """Raise UnsupportedVersionError if reads do not pass the taps."""

    def is_running(self) -> bool:
        """Say whether a module's code is running in this thread."""

    def block(self, transform: Change, frame: FrameType) -> OpenBlock:
        """Return an opening at the module whose code a frame runs."""

    def block_at(self, transform: Change, module: Any) -> OpenBlock:
        """Return an opening at a module."""

    def transformed(self, transform: Any, target: Any) -> Any:
        """Transform a class or an instance."""

    def method(self, transform: Any, fn: Callable) -> Callable:
        """Transform a function that takes a module first."""

    def viewed(self, views: Any, target: Any) -> Any:
        """Return a class, an instance or a method with views for its output."""

    def viewed_call(self, views: Any, fn: Callable, args: tuple, kwargs: dict) -> Any:
        """Call a function that takes a module first, with views for its output."""


_entered: list[FrontEnd] = []
_expected: dict[str, str] = {}


def enter(front_end: FrontEnd) -> None:
    """Enter a front end, once."""
    _entered.append(front_end)


def expect(library: str, front_end: str) -> None:
    """Import a front end when its library has been imported, which may be slow, or never."""
    _expected[library] = front_end


def check_once() -> None:
    """Raise UnsupportedVersionError if blocks do not work with the libraries at hand."""
    for library in [library for library in _expected if library in sys.modules]:
        importlib.import_module(_expected[library])  # which may fail, and is tried again then
        _expected.pop(library, None)
    for front_end in _entered:
        _check(front_end)


@functools.cache
def _check(front_end: FrontEnd) -> None:
    front_end.check()


def modules() -> str:
    """Return what modules are called, in messages."""
    return ' or '.join(front_end.module for front_end in _entered)


def is_running() -> bool:
    """Say whether a module's code is running in this thread."""
    return any(front_end.is_running() for front_end in _entered)


def block_of(transform: Change, frame: FrameType) -> OpenBlock:
    """Return an opening at the module whose code a frame runs, or outside all modules."""
    made = _first('block', transform, frame)
    return OpenBlock(transform, ()) if made is NotImplemented else made


def block_at(transform: Change, module: Any) -> OpenBlock:
    """Return an opening at a module.

    Raises:
      UsageError: it is none, or one at which no block can be opened.
    """
    made = _first('block_at', transform, module)
    if made is NotImplemented:
        raise UsageError(
            f'{transform!r}.on: got {kind_of(module)}; expected a {modules()} whose parts are '
            'named in the predicate.'
        )
    return made


def transformed(transform: Any, target: Any) -> Any:
    """Return a transformed target, or NotImplemented."""
    return _first('transformed', transform, target)


def method(transform: Any, fn: Callable) -> Callable:
    """Wrap a method, or a function that takes a module first, to run in a block at the module.

    Raises:
      UsageError: at a call, if it does not take a module first.
    """
    made = {front_end: front_end.method(transform, fn) for front_end in _entered}

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        check_once()
        for front_end in _entered:
            if args and front_end.is_module(args[0]):
                if front_end not in made:  # it was entered since
                    made[front_end] = front_end.method(transform, fn)
                return made[front_end](*args, **kwargs)
        got = type(args[0]).__name__ if args else 'no argument'
        raise UsageError(
            f'{transform!r} decorates {getattr(fn, "__name__", fn)!r}, whose first argument should '
            f'be a {modules()}; got {got}. Decorate a method of a Module, or open a block with '
            '`with`.'
        )

    return wrapped


def viewed(views: Any, target: Any) -> Any:
    """Return a target with views for its output, or NotImplemented."""
    return _first('viewed', views, target)


def viewed_call(views: Any, fn: Callable, args: tuple, kwargs: dict) -> Any:
    """Return the views of a function's output, or NotImplemented where it takes no module."""
    return _first('viewed_call', views, fn, args, kwargs)


def _first(question: str, *args: Any) -> Any:
    answers = (getattr(front_end, question)(*args) for front_end in _entered)
    return next((answer for answer in answers if answer is not NotImplemented), NotImplemented)
