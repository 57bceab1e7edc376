"""Predicates over variables: which variables a transform selects, by path, pattern or callable.

A filter is a frozen value. It compares, hashes and prints by what it says, so that entering a
block with an equal filter again finds JAX's caches warm. Filters look at names, shapes and
dtypes; nothing here reads or changes a value, that is the transforms' part.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Union

import numpy as np

from flax_sg._errors import PredicateError
from flax_sg._filters.callables import callable_key, describe_callable
from flax_sg._filters.globs import compile_glob, literal_start
from flax_sg._filters.of_nnx import is_variable
from flax_sg._filters.slips import as_bool, check_arity, check_tree, kind_of, order, refuse
from flax_sg._filters.unmatched import check_matched
from flax_sg._filters.variables import IdentifiedInfo, Path, VariableInfo, filled, map_tree, walk

__all__ = [
    'Filter',
    'Predicate',
    'also_accepted',
    'as_filter',
    'asked',
    'everything',
    'nothing',
    'path',
    'regex',
    'where',
    'written',
]

Predicate = Union[
    'Filter', str, re.Pattern, Callable[[VariableInfo], bool], bool, Sequence['Predicate']
]


_NO_VALUE = object()

# What makes filters of other objects, such as modules.
also_accepted: list[Callable[[Any], Filter | None]] = []


class Filter:
    """A set of variables. Combine filters with ``&``, ``|`` and ``~``.

    >>> path('gln') | ~path('**/bias')
    path('gln') | ~path('**/bias')
    >>> path('gln') == path('gln'), path('gln') == path('code_*')
    (True, False)

    A filter is also an NNX filter, a callable of ``(path, value)``:

    >>> path('gln')(('gln', 'kernel'), None)
    True
    """

    __slots__ = ()

    def selects(self, info: VariableInfo) -> bool:
        """Say whether the variable is in the set."""
        raise NotImplementedError

    def selects_any(self, infos: Sequence[VariableInfo]) -> bool:
        """Say so of one that has several names: each pattern selects it by any of them."""
        return any(map(self.selects, infos))

    def key(self, of_callable: Callable[[Callable], Hashable] = callable_key) -> Hashable:
        """Return what the filter says now, as a value; closures are read at the call."""
        raise NotImplementedError

    @property
    def asks(self) -> bool:
        """Whether there are callables in it."""
        return False

    def patterns(self) -> Iterator[Filter]:
        """Yield the globs, regexes and callables inside; each has to select something."""
        return iter(())

    def mask(self, params: Any, *, allow_unmatched: bool = False) -> Any:
        """Return a tree of bools with the structure of ``params``: True where a leaf is selected.

        Use it for ``optax.masked``, ``optax.freeze`` and ``optax.selective_transform``.

        >>> path('gln').mask({'gln': {'kernel': 1.0}, 'code': {'kernel': 2.0}})
        {'gln': {'kernel': True}, 'code': {'kernel': False}}

        Args:
          params: a nested mapping (a dict, a FrozenDict, an ``nnx.State``), boxed leaves
            included; paths are from its root.
          allow_unmatched: accept a glob, regex or callable that selects nothing.

        Returns:
          The same tree with a bool for every array.

        Raises:
          PredicateError: a callable returns no bool.
          UnmatchedPathError: a glob, regex or callable of the filter selects no leaf.
          UsageError: ``params`` is no mapping, or holds one that cannot be made anew.
        """
        check_tree(params, f'{self!r}.mask')
        if not allow_unmatched:
            infos = (info for info, _ in walk(params))
            check_matched(self.patterns(), infos, where=f'{self!r}.mask', of='the tree')

        return map_tree(lambda info, leaf: filled(leaf, self.selects(info)), params)

    def __call__(self, path: Sequence[Any], value: Any = _NO_VALUE) -> bool:
        if value is _NO_VALUE:
            raise PredicateError(
                f'{self!r} was called with one argument, as optax calls a mask. A filter is called '
                f'with (path, value), as NNX does; for optax pass {self!r}.mask, which makes a '
                'tree of bools of the parameters.'
            )
        names = tuple(str(part) for part in path)
        if is_variable(value):
            return self.selects(IdentifiedInfo.of_variable(names, value, value))
        collection = getattr(value, 'collection', None) or 'params'
        shape, dtype = getattr(value, 'shape', None), getattr(value, 'dtype', None)
        return self.selects(VariableInfo(names, names, collection, shape, dtype))

    def __or__(self, other: Predicate) -> Filter:
        return _Any(_flat(_Any, self) + _flat(_Any, as_filter(other)))

    def __ror__(self, other: Predicate) -> Filter:
        return as_filter(other) | self

    def __and__(self, other: Predicate) -> Filter:
        return _All(_flat(_All, self) + _flat(_All, as_filter(other)))

    def __rand__(self, other: Predicate) -> Filter:
        return as_filter(other) & self

    def __invert__(self) -> Filter:
        return self.inner if isinstance(self, _Not) else _Not(self)

    def __eq__(self, other: object) -> bool:
        return self.key() == other.key() if isinstance(other, Filter) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.key())

    def __bool__(self) -> bool:
        raise PredicateError(
            f'{self!r} was used as a bool, as by `not`, `and`, `or` and `if`. Combine filters with '
            '~, & and |; call .mask(params) for bools.'
        )


def _flat(kind: type, item: Filter) -> tuple[Filter, ...]:
    return item.filters if isinstance(item, kind) else (item,)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Constant(Filter):
    value: bool

    def selects(self, info: VariableInfo) -> bool:
        return self.value

    def key(self, of_callable: Callable = callable_key) -> Hashable:
        return ('constant', self.value)

    def __repr__(self) -> str:
        return 'everything' if self.value else 'nothing'


everything: Filter = _Constant(True)
nothing: Filter = _Constant(False)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Glob(Filter):
    pattern: str
    literal = True

    @property
    def text(self) -> str:
        return self.pattern

    @property
    def anywhere(self) -> str:
        """The same at any depth, or '' where there is no such pattern."""
        if self.pattern.startswith(('..', '/..')):
            return ''
        return f'{"/" * self.pattern.startswith("/")}**/{self.pattern.removeprefix("/")}'

    def selects(self, info: VariableInfo) -> bool:
        name = info.absolute_name if self.pattern.startswith('/') else info.name
        return compile_glob(self.pattern).match(name) is not None

    def key(self, of_callable: Callable = callable_key) -> Hashable:
        return ('path', self.pattern)

    def patterns(self) -> Iterator[Filter]:
        yield self

    def start(self, opener: Path) -> Path:
        """Return where in a tree to look first for what the pattern selects."""
        return literal_start(self.pattern, opener)

    def __repr__(self) -> str:
        return f'path({self.pattern!r})'


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Regex(Filter):
    pattern: re.Pattern[str]
    literal, anywhere = True, ''

    @property
    def text(self) -> str:
        return self.pattern.pattern

    def selects(self, info: VariableInfo) -> bool:
        return self.pattern.search(info.name) is not None

    def key(self, of_callable: Callable = callable_key) -> Hashable:
        return ('regex', self.pattern.pattern, self.pattern.flags)

    def patterns(self) -> Iterator[Filter]:
        yield self

    def start(self, opener: Path) -> Path:
        """As for a glob; an expression does not say."""
        return ()

    def __repr__(self) -> str:
        flags = re.RegexFlag(self.pattern.flags & ~re.UNICODE)
        return f'regex({self.pattern.pattern!r}{f", {flags!r}" if flags else ""})'


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Where(Filter):
    fn: Callable[[VariableInfo], bool]
    shown: str
    literal, anywhere = False, ''

    @property
    def text(self) -> str:
        return self.shown

    def selects(self, info: VariableInfo) -> bool:
        try:
            answer = self.fn(info)
        except Exception as error:
            error.add_note(f'flax_sg: in {self!r}, asked about {info.name!r} ({info.collection}).')
            raise
        return as_bool(answer, self, info.name)

    def key(self, of_callable: Callable = callable_key) -> Hashable:
        return ('where', of_callable(self.fn))

    def patterns(self) -> Iterator[Filter]:
        yield self

    def start(self, opener: Path) -> Path:
        """As for a glob; a callable does not say."""
        return ()

    @property
    def asks(self) -> bool:
        return True

    def __repr__(self) -> str:
        return self.shown


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Many(Filter):
    filters: tuple[Filter, ...]
    symbol = ''

    def key(self, of_callable: Callable = callable_key) -> Hashable:
        return (self.symbol, tuple(f.key(of_callable) for f in self.filters))

    @property
    def asks(self) -> bool:
        return any(f.asks for f in self.filters)

    def patterns(self) -> Iterator[Filter]:
        for item in self.filters:
            yield from item.patterns()

    def __repr__(self) -> str:
        inner = (f'({f!r})' if isinstance(f, _Many) else repr(f) for f in self.filters)
        return f' {self.symbol} '.join(inner)


class _Any(_Many):
    symbol = '|'

    def selects(self, info: VariableInfo) -> bool:
        return any(f.selects(info) for f in self.filters)

    def selects_any(self, infos: Sequence[VariableInfo]) -> bool:
        return any(f.selects_any(infos) for f in self.filters)


class _All(_Many):
    symbol = '&'

    def selects(self, info: VariableInfo) -> bool:
        return all(f.selects(info) for f in self.filters)

    def selects_any(self, infos: Sequence[VariableInfo]) -> bool:
        return all(f.selects_any(infos) for f in self.filters)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Not(Filter):
    inner: Filter

    def selects(self, info: VariableInfo) -> bool:
        return not self.inner.selects(info)

    def selects_any(self, infos: Sequence[VariableInfo]) -> bool:
        return not self.inner.selects_any(infos)

    def key(self, of_callable: Callable = callable_key) -> Hashable:
        return ('~', self.inner.key(of_callable))

    @property
    def asks(self) -> bool:
        return self.inner.asks

    def patterns(self) -> Iterator[Filter]:
        return self.inner.patterns()

    def __repr__(self) -> str:
        return f'~({self.inner!r})' if isinstance(self.inner, _Many) else f'~{self.inner!r}'


def path(pattern: str) -> Filter:
    """Select variables by a glob over their '/'-joined path.

    ``*``, ``?`` and ``[a-c]`` (``[!a-c]`` for its complement) match within one name, ``**`` any
    number of names. A variable is selected when the pattern matches its path or any leading part
    of it. Paths are relative to the module that opens the block, and variables outside it have
    ``..`` parts, which only ``..`` and ``**`` match; a leading '/' counts from the root instead.

    >>> path('code_*')(('code_value', 'Dense_0', 'kernel'), None)
    True
    >>> path('**/bias')(('encoder', 'Dense_0', 'bias'), None)
    True

    Args:
      pattern: the glob.

    Returns:
      The filter. A string used as a predicate is this filter.

    Raises:
      PredicateError: the pattern is empty, has an empty name (``'a//b'``), an open ``[``, or a
        ``**`` that is only part of a name.
    """
    if not isinstance(pattern, str):
        raise PredicateError(f'path({pattern!r}): expected a string, got {kind_of(pattern)}.')
    compile_glob(pattern)
    return _Glob(pattern)


def regex(pattern: str | re.Pattern[str], flags: int = 0) -> Filter:
    """Select variables whose '/'-joined relative path has a match of a regular expression.

    The expression may match anywhere, as with ``re.search``; anchor it with ``^`` and ``$``.

    >>> regex(r'^layer_[0-3]/')(('layer_2', 'kernel'), None)
    True

    Args:
      pattern: a string or a compiled pattern. One used as a predicate is this filter.
      flags: as for ``re.compile``; only with a string.

    Returns:
      The filter.

    Raises:
      PredicateError: the pattern is empty, is of bytes, or does not compile.
    """
    try:
        compiled = re.compile(pattern, flags)
    except (re.error, TypeError, ValueError) as error:
        raise PredicateError(f'regex({pattern!r}): {error}. Fix the expression.') from None
    if not isinstance(compiled.pattern, str):
        raise PredicateError(f'regex({pattern!r}): expected a str pattern, got bytes.')
    if not compiled.pattern:
        raise PredicateError("regex(''): an empty pattern. Use flax_sg.everything to select all.")
    return _Regex(compiled)


def where(fn: Callable[[VariableInfo], bool]) -> Filter:
    """Select variables for which a callable of their :class:`VariableInfo` is true.

    Two lambdas from one source line with equal closures give equal filters. The callable should
    depend on its argument and closure alone: like a jitted function it is not watched further.

    >>> where(lambda v: v.name.startswith('gln'))(('gln', 'kernel'), None)
    True

    Args:
      fn: the callable. A callable used as a predicate is this filter.

    Returns:
      The filter.

    Raises:
      PredicateError: ``fn`` is not a callable of one argument, or is a class or a Module. When it
        is asked, and returns anything but a bool, a ``numpy.bool_``, a ``re.Match`` or None.
    """
    if isinstance(fn, Filter):
        return fn
    refuse(fn, 'where')
    if not callable(fn):
        raise PredicateError(
            f'where: got {kind_of(fn)}; expected a callable of one VariableInfo that returns a '
            'bool.'
        )
    return _where(fn, 'where')


def _where(fn: Callable, name: str) -> Filter:
    check_arity(fn, ('info',), name)
    return asked(fn, f'where({describe_callable(fn)})')


def asked(fn: Callable[[VariableInfo], bool], shown: str) -> Filter:
    """Return the filter of a callable that is known to be one, and how it is shown."""
    return _Where(fn, shown)


def as_filter(predicate: Predicate, *, name: str = 'predicate') -> Filter:
    """Return the filter that a predicate stands for; see :data:`Predicate`.

    Raises:
      PredicateError: it stands for none.
    """
    if isinstance(predicate, Filter):
        return predicate
    if isinstance(predicate, (bool, np.bool_)):
        return everything if predicate else nothing
    if isinstance(predicate, str):
        return path(predicate)
    if isinstance(predicate, re.Pattern):
        return regex(predicate)
    if isinstance(predicate, (tuple, list)):
        if not predicate:
            raise PredicateError(
                f'{name}: an empty {type(predicate).__name__} selects nothing. If that is meant, '
                'pass flax_sg.nothing.'
            )
        return functools.reduce(lambda a, b: a | b, (as_filter(p, name=name) for p in predicate))
    for accepted in also_accepted:
        if (made := accepted(predicate)) is not None:
            return made
    refuse(predicate, name)
    if callable(predicate):
        return _where(predicate, name)
    raise PredicateError(
        f'{name}: got {kind_of(predicate)}; expected a string (a glob), a compiled regex, a '
        'callable of a VariableInfo, a bool, a filter, a module or Variable of flax.nnx, or a '
        'tuple or list of these.'
        f'{order(predicate, name)}'
    )


def written(filter: Filter) -> str:
    """Show a filter as the user most likely wrote it."""
    return repr(filter.pattern) if isinstance(filter, _Glob) else repr(filter)
