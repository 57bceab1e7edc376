"""Losses as a function of parameters: its jaxpr, and JAX's derivative of the whole."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from flax_sg._errors import UsageError
from flax_sg._flow.backward import Gradient, gradients
from flax_sg._flow.graph import Graph
from flax_sg._flow.tangents import dependence
from flax_sg._views.masks import all_in_sight

__all__ = ['Program', 'is_array']


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced function of parameters to losses.

    Attributes:
      run: returns the losses, in a list, for a list of parameters and some more arrays.
      jaxpr: what it was traced to.
      losses: their names.
      count: how many parameters there are.
      shapes: what the further arrays are like.
    """

    run: Callable[[list[Any], list[Any]], list[Any]]
    jaxpr: ClosedJaxpr
    losses: tuple[str, ...]
    count: int
    shapes: list[jax.ShapeDtypeStruct]

    @classmethod
    def trace(
        cls, name: str | None, fn: Callable, params: Any, args: tuple, kwargs: dict
    ) -> Program:
        others, other_tree = jax.tree.flatten((args, kwargs))
        places = [i for i, x in enumerate(others) if isinstance(x, jax.ShapeDtypeStruct)]
        shapes = [others[i] for i in places]

        given, rebuilt = _arrays_of(params)

        def call(given: Any, more: list[Any]) -> Any:
            args, kwargs = other_tree.unflatten(_with(others, places, more))
            return fn(rebuilt(given), *args, **kwargs)

        with all_in_sight(True):
            traced = jax.jit(call).trace(given, shapes)  # which hands on modules as they lie
        jaxpr, out = traced.jaxpr, traced.out_info
        if name is not None or not isinstance(out, Mapping):
            out = {name or 'loss': out}
        for key, value in out.items():
            shape, dtype = getattr(value, 'shape', None), getattr(value, 'dtype', None)
            if shape != () or not jnp.issubdtype(dtype, jnp.floating):
                got = f'{dtype}{list(shape)}' if shape is not None else type(value).__name__
                raise UsageError(
                    f'gradient_flow: the loss {str(key)!r} returns {got}; expected a real scalar. '
                    'Of a loss with further results take the first: '
                    'lambda *args: loss(*args)[0].'
                )
        names = tuple(str(keys[0].key) for keys, _ in jax.tree_util.tree_leaves_with_path(out))
        count = len(jaxpr.in_avals) - len(shapes)

        def run(leaves: list[Any], more: list[Any]) -> list[Any]:
            args, _ = traced.in_tree.unflatten([*leaves, *more])
            return jax.tree.leaves(call(*args))

        return cls(run, jaxpr, names, count, shapes)

    def gradients(
        self, graph: Graph, values: list[Any], params: list[int], *, tries: int = 16
    ) -> dict[int, list[Gradient]]:
        """Run the losses, and return the gradient of each with respect to some parameters.

        Where JAX does not differentiate it is asked of each half, as in `depends`; parameters of
        which it says nothing are left out.
        """
        if not params:
            return {}
        try:
            rows = gradients(self.jaxpr, graph, values, params)
            return {p: [row[i] for row in rows] for i, p in enumerate(params)}
        except Exception:  # whatever the rules in the program raise
            if len(params) == 1 or tries < 2:
                return {}
        half = len(params) // 2
        return {
            **self.gradients(graph, values, params[:half], tries=tries // 2),
            **self.gradients(graph, values, params[half:], tries=tries // 2),
        }

    def depends(
        self, params: list[int], *, forward: bool = False, tries: int = 16
    ) -> dict[int, int | str]:
        """Ask JAX's derivative of the whole which losses depend on which of some parameters.

        Where it fails it is asked of each half, so that one parameter does not spoil it for all.

        Returns:
          By parameter, the losses as bits; or why JAX does not say.
        """
        if not params:
            return {}
        try:
            found = self._pushed(params) if forward else self._pulled(params)
            return dict(zip(params, found, strict=True))
        except Exception as error:  # whatever the rules in the program raise
            if len(params) == 1 or tries < 2:
                first = str(error).strip().partition('\n')[0]
                why = f'JAX does not differentiate it: {type(error).__name__}: {first}'
                return dict.fromkeys(params, why)
        half = len(params) // 2
        return {
            key: value
            for part in (params[:half], params[half:])
            for key, value in self.depends(part, forward=forward, tries=tries // 2).items()
        }

    def _pulled(self, params: list[int]) -> list[int]:
        def pulled(values: list[Any], more: list[Any], cts: list[Any]) -> Any:
            of = lambda *moved: self.run(_with(values, params, moved), more)
            return jax.vjp(of, *(values[p] for p in params))[1](cts)

        avals = self.jaxpr.in_avals
        traced = jax.make_jaxpr(pulled)(
            _like(avals[: self.count]), self.shapes, _like(self.jaxpr.out_avals)
        )
        outer = set(map(id, self.jaxpr.consts))
        if any(isinstance(x, jax.core.Tracer) and id(x) not in outer for x in traced.consts):
            # JAX itself finds that only when it compiles.
            raise jax.errors.UnexpectedTracerError(
                'a function with a rule of its own closes over a parameter or what depends on it'
            )
        return [bits >> len(avals) for bits in dependence(traced)]

    def _pushed(self, params: list[int]) -> list[int]:
        def pushed(values: list[Any], more: list[Any], tangents: list[Any]) -> Any:
            of = lambda *moved: self.run(_with(values, params, moved), more)
            return jax.jvp(of, [values[p] for p in params], tangents)[1]

        avals = self.jaxpr.in_avals
        traced = jax.make_jaxpr(pushed)(
            _like(avals[: self.count]), self.shapes, _like(avals[p] for p in params)
        )
        bits = [b >> len(avals) for b in dependence(traced)]
        return [sum(1 << k for k, b in enumerate(bits) if b >> j & 1) for j in range(len(params))]


def is_array(leaf: Any) -> bool:
    """Say whether a leaf of a tree is an array, or what JAX takes for one."""
    return hasattr(leaf, 'dtype') and hasattr(leaf, 'shape') or isinstance(leaf, numbers.Number)


def _arrays_of(params: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Return the arrays of a tree, and what puts them together with its other leaves."""
    leaves, treedef = jax.tree.flatten(params)
    places = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
    if len(places) == len(leaves):
        return params, lambda params: params
    return [leaves[i] for i in places], lambda new: treedef.unflatten(_with(leaves, places, new))


def _with(values: list[Any], places: list[int], new: Any) -> list[Any]:
    values = list(values)
    for i, x in zip(places, new, strict=True):
        values[i] = x
    return values


def _like(avals: Iterable[Any]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
