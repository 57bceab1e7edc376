"""One computation, several derivatives. It knows JAX, and neither Flax nor predicates.

A function is run once and its output comes out several times, once for each *lane*, in which some
of the marks in it count (`_marks`). All lanes share the primal computation and its residuals, at
every order of derivative and in both modes.

The rule of the derivative linearises the function once, and applies the linear map of each lane. A
gradient of that gradient has to see each lane's residuals as functions of that lane's inputs: so
the residuals come out of a computation with lanes too, that of the function and its residuals.

It is a primitive and not a `jax.custom_jvp`, whose rule jax 0.10 forgets where it splits the body
of a scan: a second derivative of views in such a body came out wrong, silently.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Primitive
from jax.interpreters import ad, batching

from flax_sg import _compat
from flax_sg._jaxprs import closed_over, define, evaluate, runs
from flax_sg._marks import BINDER, NO_LANE, during, of_lane, tracing

__all__ = ['in_lanes']

# Operands: the inputs of `jaxpr`, whose first `count` results are the output, and the others what
# else it made. Results: the output for each of `lanes`, and what else it made.
_lanes_p = Primitive(BINDER)
_lanes_p.multiple_results = True


def in_lanes(fun: Callable[[], tuple[Any, Any]], lanes: tuple[str, ...]
             ) -> tuple[list[Any], Any]:
    """Run a function once, and return its output once for each lane.

    Args:
      fun: returns the output and what else it made, two trees of arrays. It is traced, once. What
        it closes over is differentiated as usual.
      lanes: their names.

    Returns:
      The output for each lane; and what else was made, in which all marked values are constants.
    """
    level = tracing.levels
    with during(levels=level + 1, told_apart=tracing.told_apart - {level}):
        closed, shape = jax.make_jaxpr(fun, return_shape=True)()
    treedef, count = jax.tree.structure(shape), len(jax.tree.leaves(shape[0]))
    # What was only handed on stays what it is: nn.scan wants broadcast variables back unchanged.
    inputs = dict(zip(map(id, closed.jaxpr.constvars), closed.consts, strict=True))
    handed = [None] * count + [inputs.get(id(var)) for var in closed.jaxpr.outvars[count:]]

    def of_inputs(*inputs: Any) -> list:
        made = jax.core.eval_jaxpr(closed.jaxpr, inputs)
        return [x for x, old in zip(made, handed, strict=True) if old is None]

    jaxpr = jax.make_jaxpr(of_inputs)(*closed.consts)
    made = _lanes_p.bind(*closed.consts, jaxpr=jaxpr, count=count, lanes=lanes, level=level)
    outs, aside = _parts(made, count, len(lanes))
    rest = iter(aside)
    aside = [next(rest) if old is None else old for old in handed[count:]]
    trees = [treedef.unflatten([*out, *aside]) for out in outs]
    return [out for out, _ in trees], trees[0][1]


def _parts(made: list, count: int, lanes: int) -> tuple[list[list], list]:
    """Split results of the primitive: the output of each lane, and what else was made."""
    return [made[i * count:(i + 1) * count] for i in range(lanes)], made[lanes * count:]


def _run(*inputs: Any, jaxpr: ClosedJaxpr, count: int, lanes: tuple, level: int) -> list:
    made = evaluate(jaxpr, *inputs)
    return made[:count] * len(lanes) + made[count:]


def _abstract(*_: Any, jaxpr: ClosedJaxpr, count: int, lanes: tuple, level: int) -> tuple:
    avals = list(jaxpr.out_avals)
    return avals[:count] * len(lanes) + avals[count:], jaxpr.effects


def _jvp(primals: tuple, tangents: tuple, *, jaxpr: ClosedJaxpr, count: int, lanes: tuple,
         level: int) -> tuple[list, list]:
    moved = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]
    tangents = tuple(tangents[i] for i in moved)
    with during(linearizing=True, told_apart=tracing.told_apart | {level}):
        forward, inputs, push, push_aside, kept = _linearized(jaxpr, count, primals, moved)
    made = _lanes_p.bind(*inputs, jaxpr=forward, count=count + kept, lanes=lanes, level=level)
    outs, aside = _parts(made, count + kept, len(lanes))
    residuals, outs = [out[count:] for out in outs], [out[:count] for out in outs]
    rest = len(jaxpr.out_avals) - count
    aside, residuals_aside = aside[:rest], aside[rest:]

    @functools.partial(jax.checkpoint, prevent_cse=False, policy=_is_stored)
    def pushed(residuals: list, residuals_aside: list, tangents: tuple) -> list:
        shared = [map(_seen_as, residuals[0], own) for own in residuals]
        found = _pushed(push, level, {i: [*own, *tangents] for i, own in enumerate(shared)})
        found += _pushed(push_aside, level, {NO_LANE: [*residuals_aside, *tangents]})
        return [t for ts in found for t in ts]

    made = [*(x for out in outs for x in out), *aside]
    moving = iter(pushed(residuals, residuals_aside, tangents))
    return made, [next(moving) if _inexact(x) else ad.Zero(jax.typeof(x).to_tangent_aval())
                  for x in made]


def _pushed(push: ClosedJaxpr, level: int, operands: dict[int, list]) -> list[list]:
    """Apply a linear map to the residuals and tangents of each lane."""
    return [jax.core.eval_jaxpr(of_lane(push.jaxpr, level, lane), push.consts, *values)
            for lane, values in operands.items()]


def _linearized(jaxpr: ClosedJaxpr, count: int, primals: tuple, moved: list[int]
                ) -> tuple[ClosedJaxpr, list, ClosedJaxpr, ClosedJaxpr, int]:
    """Linearise a function in some of its inputs.

    Returns:
      The function, with residuals after the output, and others after what else it made; its inputs,
      which are the given ones after what rules of `jax.custom_jvp` in it close over; two linear
      maps, from the residuals and tangents of the moved inputs to the tangents of the inexact
      arrays in each of the two; and the number of residuals of the first.
    """
    pushes: list[ClosedJaxpr] = []
    kept = 0

    def forward(*primals: Any) -> list:
        def of_moved(*moving: Any) -> tuple[tuple[list, list], list]:
            inputs = list(primals)
            for i, x in zip(moved, moving, strict=True):
                inputs[i] = x
            made = evaluate(jaxpr, *inputs)
            parts = made[:count], made[count:]
            return tuple(list(filter(_inexact, part)) for part in parts), made

        nonlocal kept
        points = [primals[i] for i in moved]
        _, linear, made = jax.linearize(of_moved, *points, has_aux=True)
        residuals = []
        for i in range(2):
            push, found = closed_over(lambda *ts, i=i: linear(*ts)[i], *points)
            pushes.append(push)
            residuals.append(found)
        kept = len(residuals[0])
        return [*made[:count], *residuals[0], *made[count:], *residuals[1]]

    closed, consts = closed_over(forward, *primals)
    return closed, [*consts, *primals], *pushes, kept


def _inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


# All lanes have the same residuals, in value. A scan around them would stack each lane's own: JAX
# tells them apart, as their derivatives differ. So the linear maps see the first lane's values, and
# of the others nothing but their derivatives; that is done in a checkpoint, so that what the scan
# stacks is what goes in there, of which all but the first lane's is not used.
_seen_as_p = define('flax_sg_seen_as')


def _seen_as(value: jax.Array, own: jax.Array) -> jax.Array:
    """Return a value, with the derivative of an equal one."""
    return _seen_as_p.bind(value, own) if _inexact(value) else value


def _is_stored(primitive: Primitive, *avals: Any, **params: Any) -> bool:
    # A checkpoint of JAX cannot store complex numbers, which reduce_precision refuses, as of 0.12.
    dtypes = [getattr(aval, 'dtype', None) for aval in avals] + [params.get('new_dtype')]
    is_complex = primitive.name in ('complex', 'fft') or any(map(_complex, dtypes))
    return primitive is not _seen_as_p and not is_complex


def _complex(dtype: Any) -> bool:
    return dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating)


ad.primitive_jvps[_seen_as_p] = lambda primals, tangents: (_seen_as_p.bind(*primals), tangents[1])


def _batched(axis: Any, inputs: list, dims: list, *, jaxpr: ClosedJaxpr, count: int, lanes: tuple,
             level: int) -> tuple[list, list]:
    batched, varies = _compat.batched(jaxpr, axis, dims)
    axes = [0 if v else None for v in varies]
    made = _lanes_p.bind(*inputs, jaxpr=batched, count=count, lanes=lanes, level=level)
    return made, axes[:count] * len(lanes) + axes[count:]


runs(_lanes_p, _run)
_lanes_p.def_effectful_abstract_eval(_abstract)
ad.primitive_jvps[_lanes_p] = _jvp
batching.fancy_primitive_batchers[_lanes_p] = _batched
_compat.checked(_lanes_p, lambda jaxpr, *inputs, **params: _lanes_p.bind(
    *inputs, jaxpr=jaxpr, **params))
