"""Lines of the user's own code: which one stands behind a frame stack or an equation's traceback.

The user's own is what lies neither in jax, flax, flax_sg and the standard library nor, where there
is a choice, in an installed package.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FrameType
from typing import Any

import flax
import jax
import jaxlib

__all__ = [
    'Frame',
    'call_into_jax',
    'call_into_package',
    'caller',
    'frames_of',
    'here',
    'is_called_back',
    'owner',
    'users_line',
]


_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # of the package
_OWNERS = {
    os.path.dirname(os.path.abspath(m.__file__)) + os.sep: m.__name__ for m in (jax, jaxlib, flax)
}
_OWNERS[_HERE + os.sep] = 'flax_sg'
_STDLIB = tuple(
    {os.path.abspath(sysconfig.get_path(name)) + os.sep for name in ('stdlib', 'platstdlib')}
)
_INSTALLED = ('site-packages', 'dist-packages')


@dataclasses.dataclass(frozen=True, slots=True)
class Frame:
    """A place in a file: 'file:line (function)'."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f'{self.file}:{self.line} ({self.function})'


@functools.cache
def owner(file: str) -> str:
    """Return whose a file is: a package's name, 'python' for its own library, '' for the user's."""
    if file.startswith('<frozen'):
        return 'python'
    for start, name in _OWNERS.items():
        if file.startswith(start):
            return name
    parts = file.split(os.sep)
    for place in _INSTALLED:
        if place in parts[:-1]:
            return parts[parts.index(place) + 1].removesuffix('.py')
    return 'python' if file.startswith(_STDLIB) else ''


@functools.cache
def _whose(code: CodeType) -> str:
    """Say whether code is the user's 'own', of an 'installed' package, or of a 'library' below."""
    name = code.co_filename
    if name == '<string>' and code.co_name.startswith('__'):
        return 'library'  # of dataclasses and the like
    return {
        '': 'own',
        'python': 'library',
        'jax': 'library',
        'jaxlib': 'library',
        'flax': 'library',
        'flax_sg': 'library',
    }.get(owner(name), 'installed')


def _chosen(
    frames: Iterable[Any], code: Callable[[Any], CodeType], line: Callable[[Any], int]
) -> Frame | None:
    """Return the innermost frame that is the user's own, or one of another package, or None."""
    installed = None
    for frame in frames:
        whose = _whose(code(frame))
        if whose == 'own':
            return Frame(code(frame).co_filename, line(frame), code(frame).co_qualname)
        if whose == 'installed' and installed is None:
            installed = frame
    if installed is None:
        return None
    return Frame(code(installed).co_filename, line(installed), code(installed).co_qualname)


def users_line(traceback: Any) -> Frame | None:
    """Return the user's line in a traceback of JAX's, or None."""
    if traceback is None:
        return None
    frames = zip(*traceback.raw_frames(), strict=True)
    return _chosen(frames, lambda f: f[0], lambda f: traceback.code_addr2line(*f))


def here() -> Frame | None:
    """Return the user's line that is being run in this thread."""
    return _chosen(_stack(), lambda f: f.f_code, lambda f: f.f_lineno)


def _stack() -> Iterator[FrameType]:
    frame = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def frames_of(traceback: Any) -> Iterator[Frame]:
    """Yield the frames of a traceback of JAX's, the innermost first."""
    if traceback is not None:
        for code, at in zip(*traceback.raw_frames(), strict=True):
            yield Frame(code.co_filename, traceback.code_addr2line(code, at), code.co_qualname)


def caller(frames: Iterator[Frame], function: str) -> Frame | None:
    """Return who called a function of JAX, directly or through jax.tree.map.

    JAX's own rules, for batches and derivatives, may call it again further in.
    """
    found, called = None, False
    for frame in frames:
        if frame.function == function:
            called = True
        elif (
            called and owner(frame.file) != 'python' and os.path.basename(frame.file) not in _TREES
        ):
            found, called = frame, False
        if owner(frame.file) not in ('jax', 'jaxlib', 'python'):
            break
    return found


def call_into_jax(traceback: Any) -> tuple[tuple[CodeType, int], str] | None:
    """Return the instruction that called into JAX, and the name of the function it called."""
    called = ''
    if traceback is not None:
        for code, at in zip(*traceback.raw_frames(), strict=True):
            if owner(code.co_filename) not in ('jax', 'jaxlib', 'python'):
                return (code, at), called
            if owner(code.co_filename) == 'jax' and code.co_name != _FILTER:
                # jax.tree.map is not what the user did to a leaf.
                named = os.path.basename(code.co_filename) not in _TREES
                called = code.co_name if named else called
    return None


def call_into_package(tracebacks: Iterable[Any]) -> tuple[CodeType, int] | None:
    """Return the user's instruction that called into an installed package, if it is one's code.

    ``tracebacks`` are those of an equation and of the equations around it, the innermost first.
    What a package has traced before has its own frames alone.
    """
    inside = False
    for traceback in tracebacks:
        for code, at in zip(*traceback.raw_frames(), strict=True) if traceback is not None else ():
            whose = _whose(code)
            if whose == 'own':
                return (code, at) if inside else None
            inside |= whose == 'installed'
    return None


def is_called_back(traceback: Any, file: str) -> bool:
    """Say whether the user's own code stands between an equation and the code in a file."""
    for code, _ in zip(*traceback.raw_frames(), strict=True) if traceback is not None else ():
        if code.co_filename == file:
            return False
        if _whose(code) == 'own':
            return True
    return False


_TREES = ('tree_util.py', 'tree.py', 'traceback_util.py', 'flattree.py')
_FILTER = 'reraise_with_filtered_traceback'  # around many of JAX's functions
