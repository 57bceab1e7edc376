"""Predicates that are modules: what lies below them, with no name to mistype."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

from flax_sg._errors import PredicateError
from flax_sg._filters.callables import callable_key
from flax_sg._filters.filters import Filter, also_accepted
from flax_sg._filters.of_nnx import is_module, is_variable, paths_below
from flax_sg._filters.slips import kind_of
from flax_sg._filters.variables import VariableInfo

__all__ = ['Within', 'infos_below', 'within']

# Of front ends: what is known of each variable in a module of theirs.
infos_below: list[Callable[[Any], Iterable[VariableInfo]]] = []


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Within(Filter):
    """The filter that :func:`within` makes."""

    objects: tuple[Any, ...]
    literal, anywhere = False, ''

    @property
    def text(self) -> str:
        return repr(self)

    def selects(self, info: VariableInfo) -> bool:
        if not hasattr(info, 'lies_in'):
            raise PredicateError(
                f'{self!r} was asked about {info.name!r}, which is known by its name alone. A '
                'module selects variables where modules are read; on a tree select by path.'
            )
        return info.lies_in(self.objects)

    def exists(self, in_collections: Callable[[str], bool]) -> bool:
        """Say whether there is such a variable, read or not, in some collections."""
        return any(
            in_collections(info.collection)
            for each in self.objects
            for below in infos_below
            for info in below(each)
        )

    def key(self, of_callable: Callable = callable_key) -> Hashable:
        return ('within', tuple(_key(each) for each in self.objects))

    def patterns(self) -> Iterator[Filter]:
        yield self

    def start(self, opener: tuple[str, ...]) -> tuple[str, ...]:
        """As for a glob; a module does not say."""
        return ()

    def __repr__(self) -> str:
        return f'within({", ".join(type(each).__name__ for each in self.objects)})'


def _key(each: Any) -> Hashable:
    """Return what is in a module now, by which JAX's caches know it; nothing of it is kept.

    A trace holds the Variables that it has read, so that no other one has the id of such a one.
    """
    return tuple(sorted(id(variable) for _, variable in paths_below(each)))


def within(*objects: Any) -> Filter:
    """Select what lies below some modules, or is one of some variables.

    A module is known by identity: there is no name to mistype. A module used as a predicate is this
    filter.

    >>> import jax
    >>> from flax_sg import nnx
    >>> encoder, head = (nnx.Linear(1, 1, rngs=nnx.Rngs(0)) for _ in range(2))
    >>> def loss(encoder, head):
    ...     with nnx.stop_gradient(~within(head)):
    ...         return head(encoder(jax.numpy.ones((1, 1)))).sum()
    >>> float(nnx.grad(loss)(encoder, head)['kernel'][0, 0])
    0.0

    Args:
      *objects: modules and Variables of flax.nnx.

    Returns:
      The filter.

    Raises:
      PredicateError: there are none, or one is something else.

    Source: google/flax issue 1857.
    """
    for each in objects:
        if not _is_known(each):
            raise PredicateError(
                f'within: got {kind_of(each)}; expected modules or Variables of flax.nnx.'
            )
    if not objects:
        raise PredicateError('within: got nothing; expected modules or Variables of flax.nnx.')
    return Within(objects)


def _is_known(value: Any) -> bool:
    return is_module(value) or is_variable(value)


def _of_module(predicate: Any) -> Filter | None:
    return Within((predicate,)) if _is_known(predicate) else None


also_accepted.append(_of_module)
