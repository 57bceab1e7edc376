"""Losses as a function of parameters: its jaxpr, and JAX's derivative of the whole."""

from __future__ import annotations

import contextlib
import dataclasses
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from flax_sg._errors import UsageError
from flax_sg._filters.of_nnx import key_name
from flax_sg._filters.slips import kind_of
from flax_sg._flow.backward import BackwardPass, Gradient
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
        cls, losses: Callable | Mapping[Any, Callable], params: Any, args: tuple, kwargs: dict
    ) -> Program:
        others, other_tree = jax.tree.flatten((args, kwargs))
        places = [i for i, x in enumerate(others) if isinstance(x, jax.ShapeDtypeStruct)]
        shapes = [others[i] for i in places]

        given, rebuilt = _arrays_of(params)
        fns = losses if isinstance(losses, Mapping) else {None: losses}

        def call(given: Any, more: list[Any]) -> Any:
            args, kwargs = other_tree.unflatten(_with(others, places, more))
            params = rebuilt(given)
            return [fn(params, *args, **kwargs) for fn in fns.values()]

        with all_in_sight(True):
            traced = jax.jit(call).trace(given, shapes)  # which hands on modules as they lie
        jaxpr, out = traced.jaxpr, traced.out_info
        wanted: dict[int, str] = {}
        start = 0
        for name, of_one in zip(fns, out, strict=True):
            found = _losses_in(None if name is None else str(name), of_one, params)
            wanted |= {start + i: name for i, name in found.items()}
            start += len(jax.tree.leaves(of_one))
        names = tuple(wanted.values())
        count = len(jaxpr.in_avals) - len(shapes)

        def run(leaves: list[Any], more: list[Any]) -> list[Any]:
            (args, _) = traced.in_tree.unflatten([*leaves, *more])
            outs = jax.tree.leaves(call(*args))
            return [outs[i] for i in wanted]

        return cls(run, _outputs(jaxpr, [*wanted]), names, count, shapes)

    def gradients(
        self, graph: Graph, values: list[Any], params: list[list[int]]
    ) -> dict[tuple[int, int], Gradient | str]:
        """Run the losses, and return their gradients, by parameter and loss, or why there is none.

        Where JAX does not differentiate all together, it is asked of each loss by itself, and of
        each half of the parameters, as in `depends`.

        Args:
          graph: of the jaxpr.
          values: of all parameters.
          params: for each loss, those to differentiate with respect to.
        """
        losses = [*range(len(self.losses))]
        if all(each == params[0] for each in params):
            found = self._gradients(graph, values, params[0], losses, 1)
            if not any(isinstance(gradient, str) for gradient in found.values()):
                return found
        each = (self._gradients(graph, values, params[k], [k], 16) for k in losses)
        return {at: gradient for some in each for at, gradient in some.items()}

    def _gradients(
        self, graph: Graph, values: list[Any], params: list[int], losses: list[int], tries: int
    ) -> dict[tuple[int, int], Gradient | str]:
        if not params:
            return {}
        try:
            rows = BackwardPass(_outputs(self.jaxpr, losses), graph, params).run(values)
        except Exception as error:  # whatever the rules in the program raise
            if len(params) == 1 or tries < 2:
                return {(p, k): _why(error) for p in params for k in losses}
        else:
            return {
                (p, k): row[i]
                for k, row in zip(losses, rows, strict=True)
                for i, p in enumerate(params)
            }
        half = len(params) // 2
        halves = (
            self._gradients(graph, values, part, losses, tries // 2)
            for part in (params[:half], params[half:])
        )
        return {at: gradient for some in halves for at, gradient in some.items()}

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
        ask = self._pushed if forward else self._pulled
        with contextlib.suppress(Exception):  # a rule that has closed over the trace of the jaxpr
            return dict(zip(params, ask(params, self._evaluated), strict=True))
        try:
            return dict(zip(params, ask(params, self.run), strict=True))
        except Exception as error:  # whatever the rules in the program raise
            if len(params) == 1 or tries < 2:
                return dict.fromkeys(params, _why(error))
        half = len(params) // 2
        return {
            key: value
            for part in (params[:half], params[half:])
            for key, value in self.depends(part, forward=forward, tries=tries // 2).items()
        }

    def _evaluated(self, values: list[Any], more: list[Any]) -> list[Any]:
        """Do as `run` does, with the functions that were traced not called again."""
        return jax.core.eval_jaxpr(self.jaxpr.jaxpr, self.jaxpr.consts, *values, *more)

    def _pulled(self, params: list[int], run: Callable) -> list[int]:
        def pulled(values: list[Any], more: list[Any], cts: list[Any]) -> Any:
            of = lambda *moved: run(_with(values, params, moved), more)
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

    def _pushed(self, params: list[int], run: Callable) -> list[int]:
        def pushed(values: list[Any], more: list[Any], tangents: list[Any]) -> Any:
            of = lambda *moved: run(_with(values, params, moved), more)
            return jax.jvp(of, [values[p] for p in params], tangents)[1]

        avals = self.jaxpr.in_avals
        traced = jax.make_jaxpr(pushed)(
            _like(avals[: self.count]), self.shapes, _like(avals[p] for p in params)
        )
        bits = [b >> len(avals) for b in dependence(traced)]
        return [sum(1 << k for k, b in enumerate(bits) if b >> j & 1) for j in range(len(params))]


def _losses_in(name: str | None, out: Any, params: Any) -> dict[int, str]:
    """Return which of a function's results are losses, by place, with their names.

    Whole numbers in a dict are metrics, and so is what a function returns beside a loss.
    """
    if isinstance(out, tuple) and len(out) == 2 and _is_loss(out[0]):  # as of has_aux=True
        out = (out[0], None)
    found = jax.tree_util.tree_leaves_with_path(out)
    if isinstance(out, Mapping):
        start = () if name is None else (name,)
        named = [('/'.join([*start, *map(key_name, keys)]), x) for keys, x in found]
        named = [(key, None if _is_metric(x) else x) for key, x in named]
    else:
        named = [(name or 'loss', x) for _, x in found[:1]]
        if len(found) != 1:
            named = [(name or 'loss', out)]
    for key, value in named:
        if value is not None and not _is_loss(value):
            raise UsageError(_no_loss(key, value, out, params))
    losses = {i: key for i, (key, value) in enumerate(named) if value is not None}
    if not losses:
        raise UsageError(
            'gradient_flow: the function returns no loss; expected a real scalar or some in a dict'
        )
    return losses


def _is_loss(value: Any) -> bool:
    return getattr(value, 'shape', None) == () and jnp.issubdtype(value.dtype, jnp.floating)


def _is_metric(value: Any) -> bool:
    return not jnp.issubdtype(getattr(value, 'dtype', jnp.float32), jnp.inexact)


def _no_loss(key: str, value: Any, out: Any, params: Any) -> str:
    same = jax.tree.structure(out) == jax.tree.structure(params)
    shape = getattr(value, 'shape', None)
    if same and [jnp.shape(x) for x in jax.tree.leaves(out)] == [
        jnp.shape(x) for x in jax.tree.leaves(params)
    ]:
        got = 'a tree like the parameters'
        way_out = 'Pass the loss itself, and not its gradient, nor a step that returns parameters.'
    elif shape is not None:
        got = f'{value.dtype}{list(shape)}'
        way_out = 'Of an array take the mean, or leave it out of the dict.'
    else:
        got = kind_of(value)
        way_out = (
            'Of a step of training pass the loss in it; of a loss with further results the first: '
            'lambda *args: loss(*args)[0].'
        )
    return f'gradient_flow: the loss {key!r} returns {got}; expected a real scalar. {way_out}'


def _outputs(jaxpr: ClosedJaxpr, places: list[int]) -> ClosedJaxpr:
    """Return a jaxpr with some of its results alone."""
    if places == list(range(len(jaxpr.out_avals))):
        return jaxpr
    inner = jaxpr.jaxpr
    info = inner.debug_info._replace(result_paths=None)
    outs = [inner.outvars[i] for i in places]
    return ClosedJaxpr(inner.replace(outvars=outs, debug_info=info), jaxpr.consts)


def _why(error: Exception) -> str:
    first = str(error).strip().partition('\n')[0]
    return f'JAX does not differentiate it: {type(error).__name__}: {first}'


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
