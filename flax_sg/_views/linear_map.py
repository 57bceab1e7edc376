"""A linear map as one operation, so that what JAX does to a view's map it does to one equation.

A map inlined would be looked at equation by equation each time that JAX splits what surrounds it
by what is known. Its transpose, and its derivative in what it is not linear in, are those of the
equations in it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Primitive
from jax.interpreters import ad, batching

from flax_sg._compat import jax as jax_compat
from flax_sg._jax.jaxprs import evaluate
from flax_sg._jax.primitives import runs
from flax_sg._views.pullbacks import ViewMaps

__all__ = ['push']

# Operands: the inputs of `jaxpr`, first `count` that it need not be linear in, its residuals.
_push_p = Primitive('flax_sg_push')
_push_p.multiple_results = True


def push(
    jaxpr: Jaxpr, residuals: list, tangents: list, maps: ViewMaps | None = None, view: int = 0
) -> list:
    """Apply a linear map of tangents, a jaxpr without constants; that of a view of some maps."""
    return _push_p.bind(
        *residuals,
        *tangents,
        jaxpr=ClosedJaxpr(jaxpr, []),
        count=len(residuals),
        maps=maps,
        view=view,
    )


def _run(*operands: Any, jaxpr: ClosedJaxpr, **_: Any) -> list:
    return evaluate(jaxpr, *operands)


def _abstract(*_: Any, jaxpr: ClosedJaxpr, **__: Any) -> tuple:
    return list(jaxpr.out_avals), jaxpr.effects


def _jvp(
    primals: tuple, tangents: tuple, *, jaxpr: ClosedJaxpr, count: int, **params: Any
) -> tuple[list, list]:
    if all(type(t) is ad.Zero for t in tangents[:count]):
        bind = functools.partial(_push_p.bind, *primals[:count], jaxpr=jaxpr, count=count, **params)
        return bind(*primals[count:]), bind(*map(ad.instantiate_zeros, tangents[count:]))
    moved = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]

    def of_moved(*moving: Any) -> list:
        inputs = list(primals)
        for i, x in zip(moved, moving, strict=True):
            inputs[i] = x
        return evaluate(jaxpr, *inputs)

    return jax.jvp(of_moved, [primals[i] for i in moved], [tangents[i] for i in moved])


def _transpose(
    cotangents: list, *operands: Any, jaxpr: ClosedJaxpr, maps: ViewMaps | None, view: int, **_: Any
) -> list:
    made = maps and maps.transposed(view, operands, cotangents)
    if not made:
        return jax_compat.pulled_back(jaxpr, operands, cotangents)
    transposed, inputs, reached = made
    found = iter(push(transposed, inputs, []))
    return [next(found) if r else None for r in reached]


def _batched(
    axis: Any, operands: list, dims: list, *, jaxpr: ClosedJaxpr, count: int, **_: Any
) -> tuple[list, list]:
    fronts = [None if dim is None else 0 for dim in dims]
    operands = [
        x if front is None else batching.bdim_at_front(x, dim, axis.size)
        for x, dim, front in zip(operands, dims, fronts, strict=True)
    ]
    jaxpr, varies = jax_compat.batched(jaxpr, axis, fronts)
    made = _push_p.bind(*operands, jaxpr=jaxpr, count=count, maps=None, view=0)
    return made, [0 if v else None for v in varies]


runs(_push_p, _run)
_push_p.def_effectful_abstract_eval(_abstract)
ad.primitive_jvps[_push_p] = _jvp
ad.primitive_transposes[_push_p] = _transpose
batching.fancy_primitive_batchers[_push_p] = _batched


def _checked(jaxpr: ClosedJaxpr, errors: list, *operands: Any, count: int, **_: Any) -> list:
    return _push_p.bind(
        *errors, *operands, jaxpr=jaxpr, count=len(errors) + count, maps=None, view=0
    )


jax_compat.checked(_push_p, lambda *operands, **_: list(operands), _checked)
