"""Labels for optax from a dict of predicates: each parameter gets exactly one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax

from flax_sg._errors import LabelError, PredicateError
from flax_sg._filters.filters import Filter, Predicate, as_filter
from flax_sg._filters.slips import check_tree, kind_of
from flax_sg._filters.unmatched import check_matched
from flax_sg._filters.variables import filled, map_tree, walk

__all__ = ['labels']

_SHOWN = 6


def labels(
    predicates: Mapping[str, Predicate],
    params: Any,
    *,
    default: str | None = None,
    allow_unmatched: bool = False,
) -> Any:
    """Label every parameter with the name of the one predicate that selects it.

    Use it for ``optax.partition``, so that the optimiser follows the predicates of the model.

    >>> params = {'gln': {'kernel': 1.0}, 'code_value': {'kernel': 2.0}, 'bias': 3.0}
    >>> labels({'gln': 'gln', 'code': 'code_*'}, params, default='frozen')
    {'gln': {'kernel': 'gln'}, 'code_value': {'kernel': 'code'}, 'bias': 'frozen'}

    Args:
      predicates: a predicate for each label; paths are from the root of ``params``.
      params: a nested mapping (a dict, a FrozenDict, an ``nnx.State``), boxed leaves included.
      default: the label of parameters that no predicate selects.
      allow_unmatched: accept a glob, regex or callable that selects nothing.

    Returns:
      The same tree with a string for every array.

    Raises:
      LabelError: predicates overlap, or leave a parameter out and there is no ``default``; the
        paths are listed.
      PredicateError: a predicate is none, or ``predicates`` is no dict of them.
      UnmatchedPathError: a glob, regex or callable selects no parameter.
      UsageError: ``params`` is no mapping, or holds one that cannot be made anew.
    """
    _check_arguments(predicates, params)
    if not predicates and default is None:
        raise LabelError('labels: got no predicates and no default. Pass at least one of them.')
    filters = {label: as_filter(p, name=f'labels[{label!r}]') for label, p in predicates.items()}
    check_tree(params, 'labels')
    pairs = list(walk(params))
    infos = [info for info, _ in pairs]
    if not allow_unmatched:
        for label, item in filters.items():
            check_matched(item.patterns(), infos, where=f'labels[{label!r}]', of='the tree')
    found = [[label for label, f in filters.items() if f.selects(info)] for info in infos]
    empty = [not jax.tree.leaves(value) for _, value in pairs]  # as None, which is no parameter
    both = [
        f'{info.name} ({" and ".join(names)})'
        for info, names, none in zip(infos, found, empty, strict=True)
        if names[1:] and not none
    ]
    if both:
        raise LabelError(
            f'labels: each parameter takes one label; {_list(both)}. Make the predicates disjoint, '
            "for example 'a' and path('b') & ~path('a')."
        )
    left = [
        info.name
        for info, names, none in zip(infos, found, empty, strict=True)
        if not names and not none
    ]
    if left and default is None:
        raise LabelError(f'labels: no predicate selects {_list(left)}. Add one, or pass default=.')
    chosen = iter([(*names, default)[0] for names in found])
    return map_tree(lambda info, leaf: filled(leaf, next(chosen)), params)


def _check_arguments(predicates: Any, params: Any) -> None:
    """Raise PredicateError if the first argument is no dict of predicates."""
    if not isinstance(predicates, Mapping):
        raise PredicateError(
            f'labels: got {kind_of(predicates)} as predicates; expected a dict of a predicate for '
            "each label, such as {'encoder': 'encoder'}."
        )
    if (
        _holds_values(predicates)
        and isinstance(params, Mapping)
        and params
        and all(isinstance(p, (str, re.Pattern, Filter)) for p in params.values())
    ):
        raise PredicateError(
            'labels: got a tree of values as predicates and predicates as the tree; expected '
            f'labels(predicates, params). Swap them: labels({{{next(iter(params))!r}: ...}}, '
            'params).'
        )


def _holds_values(tree: Mapping) -> bool:
    return any(isinstance(v, (Mapping, float)) or hasattr(v, 'shape') for v in tree.values())


def _list(names: list[str]) -> str:
    more = f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''
    return ', '.join(names[:_SHOWN]) + more
