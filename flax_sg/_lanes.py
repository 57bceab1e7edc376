"""One computation, several derivatives. It knows JAX, and neither Flax nor predicates.

A function is run once and its outputs come out several times, one for each *lane*. Values in it are
marked with the lanes in which they are differentiated; in all others they are constants. All lanes
share the primal computation and its residuals, at every order of derivative and in both modes.

The rule of the derivative linearises the function once and applies the linear map once for each
lane, in which marks of other lanes are zero. A gradient of that gradient has to see each lane's
residuals as functions of that lane's inputs: so the residuals come out of a computation with lanes
too, that of the function and its residuals.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Primitive
from jax.interpreters import ad, batching, mlir

from flax_sg._errors import UsageError

__all__ = ['in_lanes', 'mark']


class _Open(threading.local):
    """How many functions this thread is tracing for their lanes, one inside another."""

    levels = 0


_open = _Open()

# A value that is differentiated in some lanes alone, and the tangent of such a value. `lanes` has a
# bool for each lane; in what is a single lane's it is that lane's bool. `level` counts the functions
# around this one whose lanes are being traced.
_mark_p = Primitive('flax_sg_lane')
_tangent_p = Primitive('flax_sg_lane_tangent')
_NONE = -1  # the lane in which nothing marked is differentiated


def mark(x: jax.Array, lanes: tuple[bool, ...], level: int) -> jax.Array:
    """Return x, which is a constant of differentiation in the lanes that are False."""
    return _mark_p.bind(x, lanes=lanes, level=level)


def _identity(x: jax.Array, **_: Any) -> jax.Array:
    return x


def _tangent(t: jax.Array, *, lanes: Any, level: int) -> jax.Array:
    return jnp.zeros_like(t) if lanes is False else t


def _mark_jvp(primals: tuple, tangents: tuple, *, lanes: Any, level: int) -> tuple:
    (x,), (t,) = primals, tangents
    if level < _open.levels:
        raise UsageError(
            'gradient_views: its target differentiates, as with jax.grad, with respect to a '
            'variable that it reads inside the derivative; the result would differ between the '
            'views. Read the variable first, and differentiate a function of its value.')
    out = _mark_p.bind(x, lanes=lanes, level=level)
    if type(t) is ad.Zero:
        return out, t
    if lanes is False:
        return out, ad.Zero(jax.typeof(t))
    return out, _tangent_p.bind(t, lanes=lanes, level=level)


def _tangent_transpose(cotangent: jax.Array, *, lanes: Any, level: int) -> list:
    return [None if lanes is False else _tangent_p.bind(cotangent, lanes=lanes, level=level)]


ad.primitive_jvps[_mark_p] = _mark_jvp
ad.deflinear(_tangent_p, _tangent_transpose)
for primitive, run in ((_mark_p, _identity), (_tangent_p, _tangent)):
    primitive.def_impl(run)
    primitive.def_abstract_eval(_identity)
    batching.defvectorized(primitive)
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=False))


def in_lanes(fun: Callable[[int], tuple[Any, Any]], lanes: int) -> tuple[list[Any], Any]:
    """Run a function once, and return its output once for each lane.

    Args:
      fun: gets the level for its marks, and returns the output and what else it made, two trees of
        arrays. It is traced, once. What it closes over is differentiated as usual.
      lanes: how many there are.

    Returns:
      The output for each lane; and what else was made, in which all marked values are constants.
    """
    level = _open.levels
    _open.levels = level + 1
    try:
        closed, shape = jax.make_jaxpr(lambda: fun(level), return_shape=True)()
    finally:
        _open.levels = level
    treedef, count = jax.tree.structure(shape), len(jax.tree.leaves(shape[0]))
    # What was only handed on stays what it is: a variable that was not written is not a constant.
    inputs = dict(zip(map(id, closed.jaxpr.constvars), closed.consts, strict=True))
    handed = [inputs.get(id(var)) for var in closed.jaxpr.outvars[count:]]

    def again(*inputs: Any) -> tuple[list, list]:
        made = jax.core.eval_jaxpr(closed.jaxpr, inputs)
        return made[:count], [x for x, old in zip(made[count:], handed, strict=True) if old is None]

    outs, aside = _lanes_of(again, lanes, level, closed.consts)
    rest = iter(aside)
    aside = [next(rest) if old is None else old for old in handed]
    trees = [treedef.unflatten([*out, *aside]) for out in outs]
    return [out for out, _ in trees], trees[0][1]


def _lanes_of(fun: Callable[..., tuple[Any, Any]], lanes: int, level: int, inputs: Sequence[Any]
              ) -> tuple[list[Any], Any]:
    @jax.custom_jvp
    def run(*inputs: Any) -> tuple[list[Any], Any]:
        out, aside = fun(*inputs)
        return [out] * lanes, aside

    def rule(primals: tuple, tangents: tuple) -> tuple:
        moved = [i for i, t in enumerate(tangents) if type(t) is not SymbolicZero]
        tangents = tuple(tangents[i] for i in moved)
        forward, pushes = _linearized(fun, primals, moved)

        def pushed(made: Any, residuals: list, push: Jaxpr, lane: int) -> Any:
            moving = iter(jax.core.eval_jaxpr(_of_lane(push, level, lane), residuals, *tangents))
            return jax.tree.map(lambda x: next(moving) if _inexact(x) else _no_tangent(x), made)

        outs, (aside, residuals) = _lanes_of(forward, lanes, level, primals)
        return (([out for out, _ in outs], aside),
                ([pushed(*out, pushes[0], lane) for lane, out in enumerate(outs)],
                 pushed(aside, residuals, pushes[1], _NONE)))

    run.defjvp(rule, symbolic_zeros=True)
    return run(*inputs)


def _linearized(fun: Callable, primals: tuple, moved: list[int]) -> tuple[Callable, list[Jaxpr]]:
    """Linearise a function in some of its inputs.

    Returns:
      The function, whose output and whatever else it makes come with their residuals; and two
      linear maps, from tangents of the moved inputs to those of the inexact arrays in each of the
      two, whose constants are the residuals.
    """
    pushes: list[Jaxpr] = []

    def forward(*primals: Any) -> tuple[Any, Any]:
        def of_moved(*moving: Any) -> tuple[tuple, tuple]:
            inputs = list(primals)
            for i, x in zip(moved, moving, strict=True):
                inputs[i] = x
            made = fun(*inputs)
            return tuple([x for x in jax.tree.leaves(part) if _inexact(x)] for part in made), made

        points = [primals[i] for i in moved]
        _, push, made = jax.linearize(of_moved, *points, has_aux=True)
        for i in range(2):
            pushes.append(jax.make_jaxpr(lambda *t, i=i: push(*t)[i])(*points))
        return tuple((part, push.consts) for part, push in zip(made, pushes, strict=True))

    closed, shape = jax.make_jaxpr(forward, return_shape=True)(*primals)
    treedef = jax.tree.structure(shape)
    return lambda *primals: treedef.unflatten(
        jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *primals)), [p.jaxpr for p in pushes]


def _inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _no_tangent(x: Any) -> np.ndarray:
    return np.zeros(x.shape, jax.dtypes.float0)


def _of_lane(jaxpr: Jaxpr, level: int, lane: int) -> Jaxpr:
    """Say in a linear map which marks of a level count, those in loops and branches too."""
    eqns = [_equation_of_lane(eqn, level, lane) for eqn in jaxpr.eqns]
    return jaxpr if eqns == jaxpr.eqns else jaxpr.replace(eqns=eqns)


def _equation_of_lane(eqn: JaxprEqn, level: int, lane: int) -> JaxprEqn:
    if eqn.primitive in (_mark_p, _tangent_p):
        if eqn.params['level'] != level:
            return eqn
        lanes = eqn.params['lanes']
        return eqn.replace(params={'level': level, 'lanes': lane != _NONE and lanes[lane]})
    params = {k: _parameter_of_lane(v, level, lane) for k, v in eqn.params.items()}
    same = all(params[k] is v for k, v in eqn.params.items())
    return eqn if same else eqn.replace(params=params)


def _parameter_of_lane(value: Any, level: int, lane: int) -> Any:
    if isinstance(value, Jaxpr):
        return _of_lane(value, level, lane)
    if isinstance(value, ClosedJaxpr):
        jaxpr = _of_lane(value.jaxpr, level, lane)
        return value if jaxpr is value.jaxpr else value.replace(jaxpr=jaxpr)
    if type(value) in (tuple, list):  # the branches of a cond
        parts = type(value)(_parameter_of_lane(v, level, lane) for v in value)
        return value if all(map(operator.is_, parts, value)) else parts
    return value
