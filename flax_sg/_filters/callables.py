"""The value of a callable: two lambdas from one source line with equal closures are one predicate.

``functools.partial``, bound methods and callable objects count by their parts. What cannot be
compared by value counts by identity.
"""

from __future__ import annotations

import functools
import inspect
import os
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any

__all__ = [
    'callable_key',
    'callable_source',
    'cell_contents',
    'describe_callable',
    'identity_key',
    'lasting_key',
    'value_key',
]


class _Identity:
    """Wrap a value so that it equals only itself.

    JAX's caches keep their keys. So this does not keep the value, which may be a large array or a
    tracer, where it can do without: once the value is gone, nothing equals it.
    """

    __slots__ = ('number', 'value')

    def __init__(self, value: Any):
        self.number = id(value)
        try:
            self.value: Callable[[], Any] = weakref.ref(value)
        except TypeError:
            self.value = lambda: value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Identity) or self.number != other.number:
            return False
        value = self.value()
        return self is other or value is not None and value is other.value()

    def __hash__(self) -> int:
        return self.number


def callable_key(fn: Callable, _seen: tuple[int, ...] = ()) -> Hashable:
    """Return a hashable value that equal callables share, as they are at this moment.

    A closure's cells are read now: a loop variable that a lambda captured changes its key.
    """
    if id(fn) in _seen:
        return ('recursive', _seen.index(id(fn)))
    value = functools.partial(value_key, _seen=(*_seen, id(fn)))
    if isinstance(fn, functools.partial):
        keywords = tuple((name, value(fn.keywords[name])) for name in sorted(fn.keywords))
        return ('partial', value(fn.func), tuple(map(value, fn.args)), keywords)
    if inspect.ismethod(fn):
        return ('method', value(fn.__func__), value(fn.__self__))
    if isinstance(fn, types.FunctionType):
        code, defaults = fn.__code__, fn.__kwdefaults__ or {}
        return (
            'function',
            code,
            code.co_filename,
            fn.__qualname__,
            _Identity(fn.__globals__),
            tuple(map(value, fn.__defaults__ or ())),
            tuple((name, value(defaults[name])) for name in sorted(defaults)),
            tuple(value(cell_contents(cell)) for cell in fn.__closure__ or ()),
        )
    return _hashable(fn)


def callable_source(fn: Callable) -> Hashable:
    """Return a hashable value of a callable's code, whatever it holds."""
    if isinstance(fn, functools.partial):
        return ('partial', callable_source(fn.func))
    if inspect.ismethod(fn):
        return ('method', callable_source(fn.__func__))
    if isinstance(fn, types.FunctionType):
        return ('function', fn.__code__, fn.__code__.co_filename, fn.__qualname__)
    return ('object', type(fn))


def lasting_key(fn: Any) -> Hashable:
    """Return a hashable value that only callables share which stay equal.

    What a list or an object holds may change, and a closure's variable may be bound anew, which
    `callable_key` shows at the moment. So a function counts by value if all that it holds is plain.
    """
    if isinstance(fn, types.FunctionType):
        cells = map(cell_contents, fn.__closure__ or ())
        held = (*cells, *(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values())
        if all(map(_is_plain, held)):
            return callable_key(fn)
    return _Identity(fn)


def identity_key(fn: Any) -> Hashable:
    """Return a hashable value that nothing but the callable itself has."""
    return _Identity(fn)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, frozenset)):
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, bytes, bool, int, float, complex)


def value_key(value: Any, _seen: tuple[int, ...] = ()) -> Hashable:
    """Return a hashable value that equal values share; arrays and trees count by identity."""
    if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
        return callable_key(value, _seen)
    if isinstance(value, (tuple, list)):
        return (type(value), tuple(value_key(v, _seen) for v in value))
    if isinstance(value, (set, frozenset)):
        return (type(value), frozenset(value_key(v, _seen) for v in value))
    if isinstance(value, dict):
        return (dict, tuple((_hashable(k), value_key(v, _seen)) for k, v in value.items()))
    return _hashable(value)


def _hashable(value: Any) -> Hashable:
    if type(value).__hash__ is object.__hash__:  # which may hold arrays, as a trainer does
        return _Identity(value)
    try:
        hash(value)
    except TypeError:
        return _Identity(value)
    kind = type(value)
    if kind is float:  # 0.0 and -0.0 are equal, and a NaN equals nothing
        value = value.hex()
    return (kind, value)  # 1, 1.0 and True are equal, and not the same predicate


def cell_contents(cell: types.CellType) -> Any:
    """Return what a closure's cell holds, or None while it is empty."""
    try:
        return cell.cell_contents
    except ValueError:  # as in a function that calls itself, while it is being defined
        return None


def describe_callable(fn: Callable) -> str:
    """Return the callable's name and, where Python knows it, its file and line."""
    inner = fn.func if isinstance(fn, functools.partial) else fn
    inner = getattr(inner, '__func__', inner)
    code = getattr(inner, '__code__', None)
    name = getattr(inner, '__qualname__', None) or type(inner).__name__
    name = name.rpartition('<locals>.')[2]
    return f'{name} at {os.path.basename(code.co_filename)}:{code.co_firstlineno}' if code else name
