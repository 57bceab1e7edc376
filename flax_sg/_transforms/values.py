"""Transforms of values: given to a function, or taken from elsewhere. Nothing is stored back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import numpy as np

from flax_sg._errors import UsageError
from flax_sg._filters import of_nnx
from flax_sg._filters.callables import value_key
from flax_sg._filters.filters import Predicate
from flax_sg._filters.slips import kind_of, swapped
from flax_sg._filters.variables import VariableInfo
from flax_sg._transforms.transform import Mapped, Transform, make, make_mapped, map_arrays

__all__ = ['map_values', 'replace_values']


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MapValues(Mapped):
    """The transform that :func:`map_values` makes."""

    name = 'map_values'
    changes_values = True

    def read(self, info: VariableInfo, value: Any, other: Callable[[str], Any]) -> Any:
        out = map_arrays(lambda leaf: self.fn(info, leaf), value)
        got, want = jax.tree.structure(out), jax.tree.structure(value)
        if got != want:
            raise UsageError(
                f"{self!r}: the function returned {got} for '/{info.absolute_name}'; expected one "
                'array. A function that has nothing to change returns its argument.'
            )
        return out


def map_values(
    predicate: Predicate,
    fn: Callable[[VariableInfo, jax.Array], jax.Array],
    *,
    collections: Any = 'params',
    allow_unmatched: bool = False,
) -> Transform:
    """Read a function of selected variables instead of their values.

    Use it to cast parameters, add noise to weights or quantise them where they are used. The stored
    variables stay as they are, and gradients flow to them through ``fn``. It has the five uses of
    :func:`flax_sg.stop_gradient`. A block reads a variable once in each application of a model,
    and ``fn`` sees what is stored: in a block around `nn.scan`, the parameters of all layers.

    >>> import jax, jax.numpy as jnp
    >>> from flax_sg import nn, map_values
    >>> model, x = nn.Dense(3), jnp.ones((1, 2))
    >>> params = model.init(jax.random.key(0), x)
    >>> with map_values(True, lambda info, value: value.astype(jnp.bfloat16)):
    ...     model.apply(params, x.astype(jnp.bfloat16)).dtype
    dtype(bfloat16)

    Args:
      predicate: what is mapped; see :func:`flax_sg.stop_gradient`.
      fn: ``fn(info, value) -> value``, called for each floating-point or complex array; boxes stay
        around it. It may return another dtype; Flax checks the shape of a parameter.
      collections: a Flax collection filter, the collections in which it selects.
      allow_unmatched: accept a glob, regex or callable that selects nothing.

    Returns:
      A transform.

    Raises:
      PredicateError: the predicate or ``collections`` is none.
      UnmatchedPathError: at the end of a block, when a glob, regex or callable selects no variable.
      UsageError: ``fn`` is no callable of two arguments, or returns None, a tuple or another tree.

    Source: google/flax issue 1857; Haiku's ``hk.custom_getter``.
    """
    return make_mapped(MapValues, predicate, collections, allow_unmatched, fn, 'value')


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ReplaceValues(Transform):
    """The transform that :func:`replace_values` makes."""

    source: Any  # a collection's name, a mapping, or a module of flax.nnx
    name = 'replace_values'
    changes_values = uses_names = needs_names = idempotent = True
    at_init = False  # when there may be nothing yet to read instead

    def read(self, info: VariableInfo, value: Any, other: Callable[[str], Any]) -> Any:
        found = self._find(info, other)
        old, new = jax.tree.leaves(value), jax.tree.leaves(found)
        got, want = ([np.shape(leaf) for leaf in leaves] for leaves in (new, old))
        if got != want:
            raise UsageError(
                f'{self!r}: the source has {_shapes(got)} for {self._path(info)!r}; expected '
                f"{_shapes(want)}, as '/{info.absolute_name}' is."
            )
        return jax.tree.unflatten(jax.tree.structure(value), new)

    def _find(self, info: VariableInfo, other: Callable[[str], Any]) -> Any:
        try:
            if isinstance(self.source, str):
                return other(self.source)
            found: Any = self.source
            for name in info.path:
                found = of_nnx.child_of(found, name)
        except (KeyError, TypeError):
            found = None
        if of_nnx.is_variable(found):
            found = found.get_raw_value()
        if found is None or isinstance(found, Mapping):
            raise UsageError(
                f'{self!r}: the source has no variable {self._path(info)!r} to read instead of '
                f"'/{info.absolute_name}'. {self._way_out()}"
            ) from None
        return found

    def _path(self, info: VariableInfo) -> str:
        if isinstance(self.source, str):
            return f'/{info.absolute_name}'
        return info.name

    def _way_out(self) -> str:
        if isinstance(self.source, str):
            return (
                f'Pass a collection {self.source!r} with it to the model, and let the lifted '
                'transforms on the way hand it on, or narrow the predicate.'
            )
        named = vars(self.source) if of_nnx.is_module(self.source) else self.source
        names = ', '.join(map(repr, list(named)[:5]))
        return (
            f'It has: {names}. Its paths are those of the module that opens the block, without '
            "a collection's name; or narrow the predicate."
        )

    def read_from(self) -> tuple[str, ...]:
        return (self.source,) if isinstance(self.source, str) else ()

    def arguments(self, of_predicate: Callable, of_function: Callable) -> tuple[Hashable, ...]:
        if isinstance(self.source, str):
            return (self.source,)
        if of_function is not value_key:
            return (of_function(self.source),)
        leaves, structure = jax.tree.flatten(self.source, is_leaf=of_nnx.is_variable)
        values = (x.get_raw_value() if of_nnx.is_variable(x) else x for x in leaves)
        return (structure, tuple(map(value_key, values)))

    def shown_arguments(self) -> tuple[str, ...]:
        return (repr(self.source) if isinstance(self.source, str) else '<tree>',)


def _shapes(shapes: list[tuple[int, ...]]) -> str:
    return f'shape {shapes[0]}' if len(shapes) == 1 else f'{len(shapes)} arrays of shapes {shapes}'


def replace_values(
    predicate: Predicate,
    source: str | Mapping[str, Any],
    *,
    collections: Any = 'params',
    allow_unmatched: bool = False,
) -> Transform:
    """Read the value at the same path of another tree or collection instead of selected variables.

    Use it for target networks and for evaluating with averaged parameters. Gradients flow to the
    source and not to what it replaces; nest `stop_gradient` inside for a source that is held. It
    has the five uses of :func:`flax_sg.stop_gradient`. While a module is initialised nothing is
    replaced, as there may be nothing yet to read instead.

    >>> import jax, jax.numpy as jnp
    >>> from flax_sg import nn, replace_values
    >>> model, x = nn.Dense(1), jnp.ones((1, 2))
    >>> params = model.init(jax.random.key(0), x)
    >>> average = jax.tree.map(jnp.zeros_like, params)
    >>> with replace_values(True, average['params']):
    ...     float(model.apply(params, x)[0, 0])
    0.0

    Args:
      predicate: what is replaced; see :func:`flax_sg.stop_gradient`.
      source: a nested dict or FrozenDict of values, with paths as the module that opens the block
        sees them (a tree of parameters, not ``{'params': ...}``); a State or a module of flax.nnx;
        or the name of a collection of the same model, with the same paths. A block that a jitted
        function opens takes a tree that is an argument of it; a tree from outside would be compiled
        in as a constant.
      collections: a Flax collection filter, the collections in which it selects.
      allow_unmatched: accept a glob, regex or callable that selects nothing.

    Returns:
      A transform. Values keep the dtype that they have in the source, and the variable's box.

    Raises:
      PredicateError: the predicate or ``collections`` is none.
      UnmatchedPathError: at the end of a block, when a glob, regex or callable selects no variable.
      UsageError: the source is no mapping or name; at a read, when it has no such path, or another
        shape there.

    Source: google/flax issue 1857.
    """
    if not isinstance(source, (str, Mapping)) and not of_nnx.is_module(source):
        raise UsageError(
            f'replace_values: got {kind_of(source)} as source; expected a '
            'nested dict of values, a module of flax.nnx, or the name of a collection.'
            f'{swapped("replace_values", predicate, source)}'
        )
    if isinstance(predicate, Mapping):
        raise UsageError(
            f'replace_values: got {kind_of(predicate)} as predicate; '
            f'expected one.{swapped("replace_values", predicate, source)}'
        )
    return make(ReplaceValues, predicate, collections, allow_unmatched, source)
