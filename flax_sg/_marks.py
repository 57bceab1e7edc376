"""Values that are differentiated in some lanes alone, and what becomes of them in one lane.

A mark stands in the jaxpr of a function, in the bodies of its loops and calls too, and so in its
linear map. `of_lane` makes the map of one lane of it. It knows JAX, and nothing of this library.
"""

from __future__ import annotations

import operator
import threading
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.interpreters import ad

from flax_sg._errors import UsageError
from flax_sg._jaxprs import define

__all__ = ['NO_LANE', 'level', 'mark', 'of_lane', 'tracing']

NO_LANE = -1  # in which nothing marked is differentiated


def _tangent(t: jax.Array, *, lanes: Any, level: int) -> jax.Array:
    return jnp.zeros_like(t) if lanes is False else t


# The mark, and the same for tangents. `lanes` has a bool for each lane; in what belongs to one lane
# it is that lane's. `level` counts the functions around this one whose lanes are being traced.
_mark_p = define('flax_sg_lane')
_tangent_p = define('flax_sg_lane_tangent', _tangent)


def mark(x: jax.Array, lanes: tuple[bool, ...], level: int) -> jax.Array:
    """Return x, which is a constant of differentiation in the lanes that are False."""
    return _mark_p.bind(x, lanes=lanes, level=level)


class _Tracing(threading.local):
    """What this thread is doing.

    Attributes:
      levels: how many functions are being traced for their lanes, one inside another.
      linearizing: such a function is being differentiated, after it was traced.
    """

    levels = 0
    linearizing = False


tracing = _Tracing()


def level() -> int:
    """Return the level of the innermost function that is being traced."""
    return tracing.levels - 1


def _jvp(primals: tuple, tangents: tuple, *, lanes: Any, level: int) -> tuple:
    (x,), (t,) = primals, tangents
    if level < tracing.levels:
        raise UsageError(
            'gradient_views: its target differentiates, as with jax.grad, with respect to a '
            'variable that it reads inside the derivative; the result would differ between the '
            'views. Read the variable first, and differentiate a function of its value.')
    out = _mark_p.bind(x, lanes=lanes, level=level)
    return out, t if type(t) is ad.Zero else _tangent_p.bind(t, lanes=lanes, level=level)


def _transpose(cotangent: jax.Array, *, lanes: Any, level: int) -> list:
    return [None if lanes is False else _tangent_p.bind(cotangent, lanes=lanes, level=level)]


ad.primitive_jvps[_mark_p] = _jvp
ad.deflinear(_tangent_p, _transpose)


def of_lane(jaxpr: Jaxpr, level: int, lane: int) -> Jaxpr:
    """Say in a linear map which marks of a level count."""
    eqns = [_equation(eqn, level, lane) for eqn in jaxpr.eqns]
    same = all(map(operator.is_, eqns, jaxpr.eqns))
    return jaxpr if same else jaxpr.replace(eqns=eqns)


def _equation(eqn: JaxprEqn, level: int, lane: int) -> JaxprEqn:
    if eqn.primitive in (_mark_p, _tangent_p):
        if eqn.params['level'] != level:
            return eqn
        lanes = eqn.params['lanes']
        return eqn.replace(params={'level': level, 'lanes': lane != NO_LANE and lanes[lane]})
    params = {k: _parameter(v, level, lane) for k, v in eqn.params.items()}
    same = all(params[k] is v for k, v in eqn.params.items())
    return eqn if same else eqn.replace(params=params)


def _parameter(value: Any, level: int, lane: int) -> Any:
    if isinstance(value, Jaxpr):
        return of_lane(value, level, lane)
    if isinstance(value, ClosedJaxpr):
        jaxpr = of_lane(value.jaxpr, level, lane)
        return value if jaxpr is value.jaxpr else value.replace(jaxpr=jaxpr)
    if type(value) in (tuple, list):  # the branches of a cond
        parts = type(value)(_parameter(v, level, lane) for v in value)
        return value if all(map(operator.is_, parts, value)) else parts
    return value
