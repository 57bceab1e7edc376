"""Constants that refuse writes: `stop_gradient` for what must not be changed either."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax_sg._filters import Predicate
from flax_sg._transform import StopGradient, Transform, make

__all__ = ['constant']


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Constant(StopGradient):
    """The transform that :func:`constant` makes."""

    name = 'constant'
    freezes = True


def constant(predicate: Predicate = True, *, collections: Any = 'params',
             allow_unmatched: bool = False) -> Transform:
    """Make selected variables constants: not differentiated, and a write to one is an error.

    Use it where a part must stay as it is, running statistics included. It does what
    :func:`flax_sg.stop_gradient` does, with the same five uses; and in the block a write to a
    selected variable, in whatever form, raises FrozenVariableError and changes nothing. Creating a
    variable is not a change of it.

    >>> import jax, jax.numpy as jnp
    >>> from flax_sg import FrozenVariableError, constant, nn
    >>> model, x = nn.BatchNorm(use_running_average=False), jnp.ones((4, 2))
    >>> variables = model.init(jax.random.key(0), x)
    >>> try:
    ...     with constant(True, collections=['params', 'batch_stats']):
    ...         model.apply(variables, x, mutable=['batch_stats'])
    ... except FrozenVariableError:
    ...     print('the statistics are frozen')
    the statistics are frozen

    Args:
      predicate: what is constant; see :func:`flax_sg.stop_gradient`.
      collections: a Flax collection filter, the collections in which it selects.
      allow_unmatched: accept a glob, regex or callable that selects nothing.

    Returns:
      A transform. On a tree it is `stop_gradient`.

    Raises:
      FrozenVariableError: in the block, at a write; an error of Flax, ModifyScopeVariableError.
      PredicateError: the predicate or ``collections`` is none.
      UnmatchedPathError: at the end of a block, when a glob, regex or callable selects no variable.

    Source: google/flax issue 1857.
    """
    return make(Constant, predicate, collections, allow_unmatched)
