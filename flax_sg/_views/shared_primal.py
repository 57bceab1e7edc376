"""One computation, several derivatives. It knows JAX, and neither Flax nor predicates.

A function is run once and its output comes out several times, once for each *view*, in which some
of the marks in it count (`masks`). All views share the primal computation and its residuals, at
every order of derivative and in both modes.

The rule of the derivative linearises the function once, and applies the linear map of each view. A
gradient of that gradient has to see each view's residuals as functions of that view's inputs: so
the residuals come out of a computation with views too, that of the function and its residuals.

It is a primitive and not a `jax.custom_jvp`, whose rule jax 0.10 forgets where it splits the body
of a scan: a second derivative of views in such a body came out wrong, silently.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive
from jax.interpreters import ad, batching

from flax_sg._compat import jax as jax_compat
from flax_sg._jax.jaxprs import as_array, closed_over, evaluate, moves_out, opened
from flax_sg._jax.primitives import runs
from flax_sg._views.masks import BINDER, NO_VIEW, during, for_view, inputs_of_views, tracing
from flax_sg._views.together import Maps, once

__all__ = ['in_views']

# Operands: inputs of `jaxpr`, first `shared` of them that all views have in common, then the others
# for each of `views`, which are equal in value. Its first `count` results are the output, the
# others what else it made. Results: the output for each view, and what else it made.
_views_p = Primitive(BINDER)
_views_p.multiple_results = True


def in_views(fun: Callable[[], tuple[Any, Any]], views: tuple[str, ...]) -> tuple[list[Any], Any]:
    """Run a function once, and return its output once for each view.

    Args:
      fun: returns the output and what else it made, two trees of arrays. It is traced, once. What
        it closes over is differentiated as usual.
      views: their names.

    Returns:
      The output for each view; and what else was made, in which all marked values are constants.
    """
    nesting = tracing.nestings
    with during(nestings=nesting + 1, told_apart=tracing.told_apart - {nesting}):
        closed, shape = jax.make_jaxpr(fun, return_shape=True)()
    treedef, count = jax.tree.structure(shape), len(jax.tree.leaves(shape[0]))
    jaxpr, inputs = opened(closed)
    jaxpr, refs = jax_compat.without_refs(jaxpr)
    given = {i: inputs[i] for i in refs}
    inputs = [x[...] if i in given else x for i, x in enumerate(inputs)]
    # What was only handed on stays what it is: nn.scan wants broadcast variables back unchanged.
    places = {var: i for i, var in enumerate(jaxpr.invars)}
    forwarded = [None] * count + [
        None if isinstance(var, Literal) else places.get(var) for var in jaxpr.outvars[count:]
    ]
    outvars = [var for var, place in zip(jaxpr.outvars, forwarded, strict=True) if place is None]
    outputs = _views_p.bind(
        *inputs,
        jaxpr=ClosedJaxpr(jaxpr.replace(outvars=outvars), []),
        shared=len(inputs),
        count=count,
        views=views,
        nesting=nesting,
    )
    outs, aux = _parts(outputs, count, len(views))
    rest = iter(aux)
    aux = [
        next(rest) if place is None else as_array(inputs[place], jaxpr.invars[place].aval)
        for place in forwarded[count:]
    ]
    for i, place in reversed(
        list(zip(given, forwarded[len(forwarded) - len(given) :], strict=True))
    ):
        last = aux.pop()
        if place is None:
            given[i][...] = last
    trees = [treedef.unflatten([*out, *aux]) for out in outs]
    return [out for out, _ in trees], trees[0][1]


def _parts(outputs: list, count: int, views: int) -> tuple[list[list], list]:
    """Split results of the primitive: the output of each view, and what else was made."""
    return [outputs[i * count : (i + 1) * count] for i in range(views)], outputs[views * count :]


def _run(
    *operands: Any, jaxpr: ClosedJaxpr, shared: int, count: int, views: tuple, nesting: int
) -> list:
    outputs = evaluate(jaxpr, *inputs_of_views(operands, shared, views)[0])
    return outputs[:count] * len(views) + outputs[count:]


def _abstract(
    *_: Any, jaxpr: ClosedJaxpr, shared: int, count: int, views: tuple, nesting: int
) -> tuple:
    avals = list(jaxpr.out_avals)
    return avals[:count] * len(views) + avals[count:], jaxpr.effects


def _jvp(
    primals: tuple,
    tangents: tuple,
    *,
    jaxpr: ClosedJaxpr,
    shared: int,
    count: int,
    views: tuple,
    nesting: int,
) -> tuple[list, list]:
    inputs, moving = (inputs_of_views(values, shared, views) for values in (primals, tangents))
    moved = [
        i
        for i, ts in enumerate(zip(*moving, strict=True))
        if any(type(t) is not ad.Zero for t in ts)
    ]
    tangents = [[ad.instantiate_zeros(ts[i]) for i in moved] for ts in moving]
    with during(reads_closed=True, told_apart=tracing.told_apart | {nesting}):
        linear = _linearized(jaxpr, count, inputs[0], moved)
    n_residuals = linear.n_residuals
    outputs = _views_p.bind(
        *linear.consts,
        *primals,
        jaxpr=linear.forward,
        count=count + n_residuals,
        shared=len(linear.consts) + shared,
        views=views,
        nesting=nesting,
    )
    outs, aux = _parts(outputs, count + n_residuals, len(views))
    residuals, outs = [out[count:] for out in outs], [out[:count] for out in outs]
    rest = len(jaxpr.out_avals) - count
    aux, residuals_aux = aux[:rest], aux[rest:]

    given, of_views = once(tangents)

    # A scan around would stack each view's residuals, which it cannot know to be equal. In a
    # checkpoint it stacks what goes in, of which all but the first view's is not used.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def pushed(residuals: list, residuals_aux: list, given: list) -> list:
        tangents = of_views(given)
        maps = Maps(nesting, functools.partial(_in_common, views, nesting))
        found = maps.apply(
            linear.push,
            [[*own, *ts] for own, ts in zip(maps.share(None, residuals), tangents, strict=True)],
            [False] * len(residuals[0]) + [True] * len(moved),
        )
        found.append(
            evaluate(
                ClosedJaxpr(for_view(linear.push_aux, nesting, NO_VIEW), []),
                *residuals_aux,
                *tangents[0],
            )
        )
        return [t for ts in found for t in ts]

    outputs = [*(x for out in outs for x in out), *aux]
    found = iter(pushed(residuals, residuals_aux, given))
    moves = linear.moves[:count] * len(views) + linear.moves[count:]
    return outputs, [
        next(found) if m else ad.Zero(jax.typeof(x).to_tangent_aval())
        for x, m in zip(outputs, moves, strict=True)
    ]


class _Linear(NamedTuple):
    """A function, linearised in some of its inputs.

    Attributes:
      forward: it, with residuals after the output, and others after what else it made.
      consts: its first inputs: constants, and what rules of `jax.custom_jvp` in it close over.
      n_residuals: the number of residuals of the output.
      push, push_aux: linear maps of residuals and tangents, to the tangents of the output and of
        what else it made.
      moves: for each result of the function, whether it has a tangent.
    """

    forward: ClosedJaxpr
    consts: list
    n_residuals: int
    push: Jaxpr
    push_aux: Jaxpr
    moves: list[bool]


def _linearized(jaxpr: ClosedJaxpr, count: int, primals: list, moved: list[int]) -> _Linear:
    """Linearise a function at some inputs, in those that are moved."""

    def joint(*inputs: Any) -> list:
        def of_moved(*moving: Any) -> list:
            values = list(inputs[: len(primals)])
            for i, x in zip(moved, moving, strict=True):
                values[i] = x
            return evaluate(jaxpr, *values)

        outputs, tangents = jax.jvp(
            of_moved, [inputs[i] for i in moved], list(inputs[len(primals) :])
        )
        return [*outputs, *(t for x, t in zip(outputs, tangents, strict=True) if _inexact(x))]

    closed, consts = closed_over(joint, *primals, *(primals[i] for i in moved))
    total, inexact = len(jaxpr.out_avals), list(map(_inexact, jaxpr.out_avals))
    unknown = [False] * (len(consts) + len(primals)) + [True] * len(moved)
    tangents = iter(moves_out(closed.jaxpr, unknown)[total:])
    moves = [next(tangents) if x else False for x in inexact]
    known, push = jax_compat.split(closed, unknown, [False] * total + [True] * sum(inexact))
    forward, more = opened(known)
    outputs, residuals = forward.outvars[:total], forward.outvars[total:]

    def part(of: Callable[[int], bool]) -> tuple[Jaxpr, list]:
        wanted = [moves[i] and of(i) for i, x in enumerate(inexact) if x]
        push_of, used = jax_compat.pruned(
            push.jaxpr, wanted, [False] * len(residuals) + [True] * len(moved)
        )
        return push_of, [x for x, u in zip(residuals, used, strict=False) if u]

    push_of_output, of_output = part(lambda i: i < count)
    push_aux, of_aux = part(lambda i: i >= count)
    outvars = [*outputs[:count], *of_output, *outputs[count:], *of_aux]
    return _Linear(
        ClosedJaxpr(forward.replace(outvars=outvars), []),
        [*more, *consts],
        len(of_output),
        push_of_output,
        push_aux,
        moves,
    )


def _inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _in_common(
    views: tuple, nesting: int, jaxpr: ClosedJaxpr | None, groups: list[list]
) -> list[list]:
    """Compute a function once, of inputs that are equal in all views but in their derivatives.

    Args:
      jaxpr: the function; None returns its inputs.
      groups: the inputs in each view.

    Returns:
      Its results in each view.
    """
    if jaxpr is None:
        jaxpr = jax_compat.traced(lambda *xs: list(xs), *groups[0])
    count = len(jaxpr.out_avals)
    outputs = _views_p.bind(
        *(x for group in groups for x in group),
        jaxpr=jaxpr,
        shared=0,
        count=count,
        views=views,
        nesting=nesting,
    )
    return _parts(outputs, count, len(views))[0]


def _batched(
    axis: Any,
    operands: list,
    dims: list,
    *,
    jaxpr: ClosedJaxpr,
    shared: int,
    count: int,
    views: tuple,
    nesting: int,
) -> tuple[list, list]:
    of_views = inputs_of_views(dims, shared, views)
    fronts = [None if all(d is None for d in of) else 0 for of in zip(*of_views, strict=True)]
    wanted = [*fronts[:shared], *fronts[shared:] * len(views)]
    operands = [
        x if front is None else batching.bdim_at_front(x, dim, axis.size)
        for x, dim, front in zip(operands, dims, wanted, strict=True)
    ]
    batched, varies = jax_compat.batched(jaxpr, axis, fronts)
    axes = [0 if v else None for v in varies]
    outputs = _views_p.bind(
        *operands, jaxpr=batched, shared=shared, count=count, views=views, nesting=nesting
    )
    return outputs, axes[:count] * len(views) + axes[count:]


runs(_views_p, _run)
_views_p.def_effectful_abstract_eval(_abstract)
ad.primitive_jvps[_views_p] = _jvp
batching.fancy_primitive_batchers[_views_p] = _batched


def _checked(jaxpr: ClosedJaxpr, errors: list, *operands: Any, shared: int, **params: Any) -> list:
    return _views_p.bind(*errors, *operands, jaxpr=jaxpr, shared=len(errors) + shared, **params)


def _first_inputs(*operands: Any, shared: int, views: tuple, **_: Any) -> list:
    return inputs_of_views(operands, shared, views)[0]


jax_compat.checked(_views_p, _first_inputs, _checked)
