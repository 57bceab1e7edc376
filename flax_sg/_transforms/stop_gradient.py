"""The transform that stops gradients; and constants, which refuse writes too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from flax_sg._filters.filters import Predicate
from flax_sg._filters.variables import VariableInfo
from flax_sg._transforms.transform import Transform, make, map_traced

__all__ = ['StopGradient', 'constant', 'stop_gradient']


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class StopGradient(Transform):
    """The transform that :func:`stop_gradient` makes."""

    name = 'stop_gradient'
    idempotent = True

    def read(self, info: VariableInfo, value: Any, other: Callable[[str], Any]) -> Any:
        return map_traced(jax.lax.stop_gradient, value)


def stop_gradient(
    predicate: Predicate = True, *, collections: Any = 'params', allow_unmatched: bool = False
) -> Transform:
    """Make selected variables constants of differentiation: in a block, module, method or tree.

    Use it when a loss must train some parameters and not others. Every read of a selected variable
    inside gives a copy with the variable's value that is not differentiated; activations and inputs
    stay differentiable, forward values do not change, and reads outside stay live. A block covers
    the module that opens it and every module bound under the same root; opened outside all modules,
    it covers every module applied inside it.

    >>> import jax, jax.numpy as jnp
    >>> from flax_sg import nn
    >>> class Net(nn.Module):
    ...     def setup(self):
    ...         self.encoder, self.head = nn.Dense(4), nn.Dense(1)
    ...     def __call__(self, x):
    ...         with nn.stop_gradient('encoder'):
    ...             h = self.encoder(x)
    ...         return self.head(h).sum()
    >>> params = Net().init(jax.random.key(0), jnp.ones((1, 3)))
    >>> grads = jax.grad(Net().apply)(params, jnp.ones((1, 3)))['params']
    >>> bool((grads['encoder']['kernel'] == 0).all()), bool((grads['head']['kernel'] == 0).all())
    (True, False)

    The same object decorates a Module class, an instance (the result mirrors the live one's
    parameters), a method, and a nested dict of parameters:

    >>> Frozen = stop_gradient('Dense_0/kernel')(Net)
    >>> held = stop_gradient('encoder')(params['params'])

    Args:
      predicate: what is stopped: a filter, a glob over '/'-joined paths, a compiled regex, a
        callable of a :class:`flax_sg.VariableInfo`, a bool, a module or Variable of flax.nnx, or a
        list or tuple of these (any). Around modules of flax.nnx names need :meth:`Transform.on`.
        "Only gln trains here" is ``~flax_sg.path('gln')``.
      collections: a Flax collection filter, the collections in which it selects.
      allow_unmatched: accept a glob, regex or callable that selects nothing.

    Returns:
      A transform, for ``with`` or to be called on a class, an instance, a method or a tree. Trees
      keep their structure, shapes and dtypes.

    Raises:
      PredicateError: the predicate or ``collections`` is none.
      UnmatchedPathError: at the end of a block, when a glob, regex or callable selects no variable.
      UsageError: the transform is called on something else.

    Source: google/flax issue 1857.
    """
    return make(StopGradient, predicate, collections, allow_unmatched)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Constant(StopGradient):
    """The transform that :func:`constant` makes."""

    name = 'constant'
    freezes = True


def constant(
    predicate: Predicate = True, *, collections: Any = 'params', allow_unmatched: bool = False
) -> Transform:
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
