"""Labels for optax from a dict of predicates: each parameter gets exactly one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from flax_sg._errors import LabelError
from flax_sg._filters import Predicate, as_filter
from flax_sg._info import map_tree, walk
from flax_sg._unmatched import check_matched

__all__ = ['labels']

_SHOWN = 6


def labels(predicates: Mapping[str, Predicate], params: Any, *, default: str | None = None,
           allow_unmatched: bool = False) -> Any:
    """Label every parameter with the name of the one predicate that selects it.

    Use it for ``optax.partition``, so that the optimiser follows the predicates of the model.

    >>> params = {'gln': {'kernel': 1.0}, 'code_value': {'kernel': 2.0}, 'bias': 3.0}
    >>> labels({'gln': 'gln', 'code': 'code_*'}, params, default='frozen')
    {'gln': {'kernel': 'gln'}, 'code_value': {'kernel': 'code'}, 'bias': 'frozen'}

    Args:
      predicates: a predicate for each label; paths are from the root of ``params``.
      params: a nested dict or FrozenDict, boxed leaves included.
      default: the label of parameters that no predicate selects.
      allow_unmatched: accept a glob or regex that selects nothing.

    Returns:
      The same tree with a string for every array.

    Raises:
      LabelError: predicates overlap, or leave a parameter out and there is no ``default``; the
        paths are listed.
      PredicateError: a predicate is none.
      UnmatchedPathError: a glob or regex selects no parameter.
    """
    if not predicates and default is None:
        raise LabelError('labels: got no predicates and no default. Pass at least one of them.')
    filters = {label: as_filter(p, name=f'labels[{label!r}]') for label, p in predicates.items()}
    infos = [info for info, _ in walk(params)]
    if not allow_unmatched:
        for label, item in filters.items():
            check_matched(item.patterns(), infos, where=f'labels[{label!r}]', of='the tree')
    found = {i.path: [label for label, f in filters.items() if f.selects(i)] for i in infos}
    both = [f'{i.name} ({" and ".join(found[i.path])})' for i in infos if len(found[i.path]) > 1]
    if both:
        raise LabelError(
            f'labels: each parameter takes one label; {_list(both)}. Make the predicates disjoint, '
            "for example 'a' and path('b') & ~path('a').")
    left = [i.name for i in infos if not found[i.path]]
    if left and default is None:
        raise LabelError(f'labels: no predicate selects {_list(left)}. Add one, or pass default=.')
    return map_tree(
        lambda info, leaf: jax.tree.map(lambda _: (*found[info.path], default)[0], leaf), params)


def _list(names: list[str]) -> str:
    more = f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''
    return ', '.join(names[:_SHOWN]) + more
