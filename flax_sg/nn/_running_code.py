"""The module whose code is running, where Flax does not know it.

Flax knows of the methods that it wraps. It does not know of properties, of generators that go on
later, of what is marked `nn.nowrap`, and that a function which was written in a method of one
module is that module's when another one calls it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import weakref
from collections.abc import Iterator
from types import CodeType, FrameType, FunctionType
from typing import Any

from flax_sg._compat import jax as jax_compat
from flax_sg._compat import linen as linen_compat
from flax_sg._compat.linen import Module
from flax_sg._filters.callables import cell_contents
from flax_sg._transforms import run_inside

__all__ = ['module_of', 'note_class']

# Code of a member of some class of modules, or of a function written in one; and the member's. By
# identity, as equal code is elsewhere too, and a hash looks at all of it.
_known: dict[int, tuple[weakref.ref[CodeType], weakref.ref[CodeType]]] = {}
# The code of a decorator runs for all that it wraps: it is a member's where it opens the block.
_decorators: weakref.WeakValueDictionary[int, CodeType] = weakref.WeakValueDictionary()
# Wrappers of all methods.
_OWN = (
    linen_compat.CALL.co_filename,
    jax_compat.__file__,
    linen_compat.__file__,
    run_inside.__file__,
)
_members: weakref.WeakKeyDictionary[type, dict[int, CodeType]] = weakref.WeakKeyDictionary()


def module_of(frame: FrameType | None) -> Module | None:
    """Return the bound module whose code a frame runs, or None where Flax knows or it is none's."""
    wanted: CodeType | None = None  # the member in which the innermost function was written
    first = True  # no method that Flax runs was passed yet: it knows that one's module
    opener = frame
    while frame is not None:
        code, back = frame.f_code, frame.f_back
        by_flax = back is not None and back.f_code is linen_compat.CALL
        shared = frame is not opener and _decorators.get(id(code)) is code
        member = None if shared else _member_of(code)
        if (
            wanted is None
            and (by_flax or code is linen_compat.CALL)
            or (by_flax and first and member is wanted)
        ):
            return None
        if wanted is None and member is not None and member is not code:
            wanted = member
            if _name(member) in code.co_freevars and (module := _argument(frame, member)):
                return module
        elif member is code or by_flax and wanted is not None:
            module = _argument(frame, wanted or code)
            if module is not None:
                return module
        first = first and not by_flax
        frame = back
    return None


def _argument(frame: FrameType, member: CodeType) -> Module | None:
    """Return the bound module that a member's code, or a function written in it, is run for."""
    # Before Python 3.13 a frame keeps a copy of its variables once it was asked for them.
    values, code = frame.f_locals, frame.f_code
    given = [values.get(name) for name in (_name(member), *code.co_varnames[: code.co_argcount])]
    if code.co_flags & inspect.CO_VARARGS:
        given += values.get(code.co_varnames[code.co_argcount + code.co_kwonlyargcount], ())
    return next(
        (
            x
            for x in given
            if isinstance(x, Module) and x.scope is not None and id(member) in _members_of(type(x))
        ),
        None,
    )


def _name(member: CodeType) -> str | None:
    return member.co_varnames[0] if member.co_argcount else None


def _member_of(code: CodeType) -> CodeType | None:
    """Return the member in which code was written, which may be all of it."""
    found = _known.get(id(code))
    return found[1]() if found is not None and found[0]() is code else None


def _note(code: CodeType, member: CodeType) -> None:
    gone = functools.partial(_forget, id(code))
    _known[id(code)] = weakref.ref(code, gone), weakref.ref(member)


def _forget(key: int, _: Any) -> None:
    _known.pop(key, None)


def note_class(cls: type[Module]) -> None:
    """Note the members of a class of modules, of which there is one from now on."""
    _members_of(cls)


def _members_of(cls: type[Module]) -> dict[int, CodeType]:
    if cls not in _members:
        fields = {field.name for field in dataclasses.fields(cls)}
        members = [
            member
            for base in cls.__mro__
            if base not in (object, Module)
            for name, member in vars(base).items()
            if name not in fields
        ]
        found = [
            code for member in members for code in _codes_in(member) if code.co_filename not in _OWN
        ]
        _members[cls] = {id(code): code for code in found}
        for member in found:
            for code in _written_in(member):
                _note(code, member)
            _note(member, member)
    return _members[cls]


def _written_in(code: CodeType) -> Iterator[CodeType]:
    """Yield the code of functions in a function, but for members of modules defined there."""
    for const in code.co_consts:
        if isinstance(const, CodeType) and _member_of(const) is not const:
            yield const
            yield from _written_in(const)


def _codes_in(member: Any, depth: int = 0) -> Iterator[CodeType]:
    if depth > 4:
        return
    if isinstance(member, FunctionType):
        yield member.__code__
        if hasattr(member, '__wrapped__'):
            _decorators[id(member.__code__)] = member.__code__
        cells = map(cell_contents, member.__closure__ or ())  # what a decorator wraps
        inner = [getattr(member, '__wrapped__', None), *cells]
    elif isinstance(member, property):
        inner = [member.fget]
    elif isinstance(member, (staticmethod, classmethod)):
        inner = [member.__func__]
    else:  # another descriptor, as of Flax around one of Python
        is_one = hasattr(type(member), '__get__')
        inner = [*getattr(member, '__dict__', {}).values(), type(member).__get__] if is_one else []
    for part in inner:
        if isinstance(part, FunctionType) or hasattr(type(part), '__get__'):
            yield from _codes_in(part, depth + 1)
