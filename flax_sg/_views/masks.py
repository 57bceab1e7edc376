"""Values that are differentiated in some views alone, and what becomes of them in one view.

A mark stands in the jaxpr of a function, in the bodies of its loops and calls too, and so in its
linear map. `for_view` makes the map of one view of it. It knows JAX, and nothing of this library.

A mark names its function by a *nesting*: how many such functions were being traced around it. JAX
may keep a trace and use it again at any depth, so a nesting says nothing about where it is used. It
is a bound name: the marks of a function are those with its nesting in its jaxpr, but for what
stands in another function of the same nesting inside. What belongs to one view has no nesting any
more.
"""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Primitive
from jax.interpreters import ad, batching

from flax_sg._errors import UsageError
from flax_sg._jax.primitives import define, runs

__all__ = [
    'BINDER',
    'NO_VIEW',
    'absent',
    'all_in_sight',
    'counted_in',
    'counts',
    'during',
    'inputs_of_views',
    'is_view_mask',
    'nesting',
    'view_mask',
    'marked',
    'needed',
    'for_view',
    'tracing',
]

NO_VIEW = -1  # in which nothing marked is differentiated
BINDER = 'flax_sg_views'  # the primitive that has such a function


def _tangent(t: jax.Array, *, views: Any, nesting: int | None) -> jax.Array:
    if nesting is not None:
        raise UsageError(_OUTSIDE)
    return t if views else jnp.zeros_like(t)


_OUTSIDE = (
    'gradient_views: a variable that its target reads is differentiated where the views cannot be '
    'told apart: in a function that JAX keeps as an object, such as those given to '
    'jax.lax.custom_root, or in a jaxpr that was taken out of the target. Read the variable '
    'before, in the target, and give its value to that function.'
)
_INSIDE = (
    'gradient_views: its target differentiates, as with jax.grad, with respect to a variable that '
    'it reads inside the derivative; the result would differ between the views. Read the variable '
    'first, and differentiate a function of its value.'
)

# The mark, and the same for tangents. `views` has a bool for each view; in what belongs to one view
# it is that view's, and `nesting` is None.
_view_mask_p = define('flax_sg_view')
_tangent_p = define('flax_sg_view_tangent', _tangent)


def view_mask(x: jax.Array, views: tuple[bool, ...], nesting: int) -> jax.Array:
    """Return x, which is a constant of differentiation in the views that are False."""
    return _view_mask_p.bind(x, views=views, nesting=nesting)


class _Tracing(threading.local):
    """What this thread is doing.

    Attributes:
      nestings: how many functions are being traced for their views, one inside another.
      reads_closed: such a function is being differentiated, after it was traced.
      told_apart: the nestings of the marks that may be differentiated, as `for_view` will see them.
    """

    nestings = 0
    reads_closed = False
    told_apart: frozenset[int] = frozenset()


tracing = _Tracing()


@contextlib.contextmanager
def during(**changes: Any) -> Iterator[None]:
    """Run a block in which this thread does something else."""
    before = {name: getattr(tracing, name) for name in changes}
    vars(tracing).update(changes)
    try:
        yield
    finally:
        vars(tracing).update(before)


def nesting() -> int:
    """Return the nesting of the innermost function that is being traced."""
    return tracing.nestings - 1


def _jvp(primals: tuple, tangents: tuple, *, views: Any, nesting: int | None) -> tuple:
    (x,), (t,) = primals, tangents
    if nesting is not None and nesting not in tracing.told_apart:
        raise UsageError(_INSIDE if nesting < tracing.nestings else _OUTSIDE)
    out = _view_mask_p.bind(x, views=views, nesting=nesting)  # not x: its derivatives pass here too
    return out, t if type(t) is ad.Zero else _tangent_p.bind(t, views=views, nesting=nesting)


def _transpose(cotangent: jax.Array, *, views: Any, nesting: int | None) -> list:
    return [None if views is False else _tangent_p.bind(cotangent, views=views, nesting=nesting)]


ad.primitive_jvps[_view_mask_p] = _jvp
ad.deflinear(_tangent_p, _transpose)


# Zeros in place of a tangent that does not count. They are linear in another one: a rule of the
# user's for what the tangent came from is not asked about a cotangent that there is not.
_absent_p = Primitive('flax_sg_absent_tangent')


def _absent_batched(args: tuple, dims: tuple, *, aval: Any) -> tuple:
    return _absent_p.bind(*args, aval=aval), None


runs(_absent_p, lambda _, *, aval: jnp.zeros(aval.shape, aval.dtype))
_absent_p.def_abstract_eval(lambda _, *, aval: aval)
ad.deflinear(_absent_p, lambda _, *, aval: [None])
batching.primitive_batchers[_absent_p] = _absent_batched


# Whether what does not count stays in sight, for `gradient_flow`, which says so. JAX's caches know.
all_in_sight = jax.make_user_context(False)


def absent(like: Any, other: Any) -> Any:
    """Return zeros of a type in place of a tangent, linear in another one."""
    return _absent_p.bind(other, aval=like)


def counted_in(eqn: JaxprEqn, nesting: int) -> tuple[bool, ...] | None:
    """Return in which views a mark of tangents of a nesting counts; None for other equations."""
    return (
        eqn.params['views']
        if (eqn.primitive is _tangent_p and eqn.params['nesting'] == nesting)
        else None
    )


def needed(jaxpr: Jaxpr, nesting: int, view: int) -> list[bool]:
    """Say on which inputs of a linear map its results depend in a view."""
    live = {var for var in jaxpr.outvars if not isinstance(var, Literal)}
    for eqn in reversed(jaxpr.eqns):
        if not live.isdisjoint(eqn.outvars):
            views = counted_in(eqn, nesting)
            if views is None or views[view]:
                live.update(var for var in eqn.invars if not isinstance(var, Literal))
    return [var in live for var in jaxpr.invars]


def inputs_of_views(operands: Any, shared: int, views: tuple) -> list[list]:
    """Return the inputs of the function in each view: what all have in common, and its own."""
    own = (len(operands) - shared) // len(views)
    return [
        [*operands[:shared], *operands[shared + i * own : shared + (i + 1) * own]]
        for i in range(len(views))
    ]


def marked(jaxpr: Jaxpr, nesting: int) -> list[int]:
    """Return the places of the equations that `for_view` changes."""
    return [i for i, eqn in enumerate(jaxpr.eqns) if _equation(eqn, nesting, NO_VIEW) is not eqn]


def for_view(jaxpr: Jaxpr, nesting: int, view: int, places: list[int] | None = None) -> Jaxpr:
    """Say in a linear map which marks of a nesting count; `places` is what `marked` returns."""
    places = marked(jaxpr, nesting) if places is None else places
    eqns = list(jaxpr.eqns)
    for i in places:
        eqns[i] = _equation(eqns[i], nesting, view)
    return jaxpr.replace(eqns=eqns) if places else jaxpr


def counts(eqn: JaxprEqn) -> bool | None:
    """Say whether a mark of tangents counts in its view; None for other equations."""
    return (
        eqn.params['views']
        if (eqn.primitive is _tangent_p and eqn.params['nesting'] is None)
        else None
    )


def is_view_mask(eqn: JaxprEqn) -> bool:
    """Say whether an equation is a mark, and not one with marks inside."""
    return eqn.primitive in (_view_mask_p, _tangent_p)


def _equation(eqn: JaxprEqn, nesting: int, view: int) -> JaxprEqn:
    if is_view_mask(eqn):
        if eqn.params['nesting'] != nesting:
            return eqn
        views = eqn.params['views']
        return eqn.replace(params={'nesting': None, 'views': view != NO_VIEW and views[view]})
    if eqn.primitive.name == BINDER and eqn.params['nesting'] == nesting:
        return eqn
    params = {k: _parameter(v, nesting, view) for k, v in eqn.params.items()}
    same = all(params[k] is v for k, v in eqn.params.items())
    # What is kept of the maps of all views of another nesting has marks of this one in it.
    return eqn if same else eqn.replace(params=params | dict.fromkeys({'maps'} & params.keys()))


def _parameter(value: Any, nesting: int, view: int) -> Any:
    if isinstance(value, Jaxpr):
        return for_view(value, nesting, view)
    if isinstance(value, ClosedJaxpr):
        jaxpr = for_view(value.jaxpr, nesting, view)
        return value if jaxpr is value.jaxpr else value.replace(jaxpr=jaxpr)
    if type(value) in (tuple, list):  # the branches of a cond
        parts = type(value)(_parameter(v, nesting, view) for v in value)
        return value if all(map(operator.is_, parts, value)) else parts
    return value
