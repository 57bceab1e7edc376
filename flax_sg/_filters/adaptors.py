"""Filters from the predicates of NNX and of Haiku. A filter is an NNX filter as it is."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import jax

from flax_sg._errors import PredicateError
from flax_sg._filters.callables import callable_key, describe_callable
from flax_sg._filters.filters import Filter, asked, everything, nothing
from flax_sg._filters.slips import check_arity, kind_of
from flax_sg._filters.variables import VariableInfo

__all__ = ['from_haiku', 'from_nnx']


def _abstract(info: VariableInfo) -> jax.ShapeDtypeStruct | None:
    return None if info.shape is None else jax.ShapeDtypeStruct(info.shape, info.dtype)


def _variable_type(collection: str) -> Any:
    from flax import nnx  # slow to import, and here it is there already

    try:
        return nnx.variable_type_from_name(collection)
    except ValueError:  # a collection that NNX does not know
        return nnx.Variable


class _FromNnx:
    """A callable that asks an NNX predicate about a Linen variable."""

    def __init__(self, predicate: Callable[[tuple, Any], bool]):
        self.predicate = predicate

    def __call__(self, info: VariableInfo) -> bool:
        return self.predicate(info.path, _variable_type(info.collection)(_abstract(info)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _FromNnx) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> Hashable:
        return callable_key(self.predicate)


def from_nnx(filter: Any) -> Filter:
    """Make a filter from an NNX one: a variable type, a tag, ``PathContains``, ``All``, ``...``.

    A variable's NNX type is that of its collection: ``nnx.Param`` for ``'params'``,
    ``nnx.BatchStat`` for ``'batch_stats'``. The value it sees has a shape and a dtype and no data.

    >>> from flax import nnx
    >>> from_nnx(nnx.All(nnx.Param, nnx.PathContains('gln'))).mask({'gln': 1.0, 'code': 2.0})
    {'gln': True, 'code': False}

    Args:
      filter: what ``nnx.filterlib.to_predicate`` takes.

    Returns:
      The filter.

    Raises:
      PredicateError: NNX does not take it, or it is a callable of other arguments. When it is
        asked, and returns no bool.
    """
    from flax import nnx

    if isinstance(filter, Filter):
        return filter
    try:
        predicate = nnx.filterlib.to_predicate(filter)
    except (TypeError, ValueError):
        raise PredicateError(
            f'from_nnx: {kind_of(filter)} is no NNX filter; expected a '
            'variable type, a tag, a callable of (path, value), ..., a bool, None, or a list.'
        ) from None
    if isinstance(predicate, (nnx.Everything, nnx.Nothing)):  # a bool, which may select nothing
        return everything if isinstance(predicate, nnx.Everything) else nothing
    check_arity(predicate, ('path', 'value'), 'from_nnx')
    return asked(_FromNnx(predicate), f'from_nnx({_shown(filter)})')


def _shown(filter: Any) -> str:
    if isinstance(filter, type):
        return filter.__name__
    return describe_callable(filter) if hasattr(filter, '__code__') else repr(filter)


class _FromHaiku:
    """A callable that asks a Haiku predicate about a Linen variable."""

    def __init__(self, fn: Callable[[str, str, Any], bool]):
        self.fn = fn

    def __call__(self, info: VariableInfo) -> bool:
        return self.fn('/'.join(info.path[:-1]), info.path[-1], _abstract(info))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _FromHaiku) and callable_key(self.fn) == callable_key(other.fn)

    def __hash__(self) -> int:
        return hash(callable_key(self.fn))


def from_haiku(fn: Callable[[str, str, Any], bool]) -> Filter:
    """Make a filter from a Haiku predicate ``fn(module_name, name, value)``.

    ``module_name`` is the '/'-joined path of the parent, ``value`` has a shape and a dtype only.

    >>> from_haiku(lambda module_name, name, value: name == 'b').mask({'mlp': {'b': 1.0, 'w': 2.0}})
    {'mlp': {'b': True, 'w': False}}

    Args:
      fn: the predicate, as for ``data_structures.partition``.

    Returns:
      The filter.

    Raises:
      PredicateError: ``fn`` is no callable of three arguments. When it is asked, and returns no
        bool, as the class numbers of ``data_structures.partition_n``.
    """
    if not callable(fn):
        raise PredicateError(
            f'from_haiku: expected a callable of (module_name, name, value), got {fn!r}.'
        )
    check_arity(fn, ('module_name', 'name', 'value'), 'from_haiku')
    return asked(_FromHaiku(fn), f'from_haiku({describe_callable(fn)})')
