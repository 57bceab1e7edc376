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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive
from jax.interpreters import ad, batching

from flax_sg._compat import jax as jax_compat
from flax_sg._jax.jaxprs import closed_over, evaluate, moves_out, opened
from flax_sg._jax.primitives import runs
from flax_sg._views.masks import BINDER, NO_LANE, during, inputs_of_lanes, of_lane, tracing
from flax_sg._views.together import Maps, once

__all__ = ['in_lanes']

# Operands: inputs of `jaxpr`, first `shared` of them that all lanes have in common, then the others
# for each of `lanes`, which are equal in value. Its first `count` results are the output, the
# others what else it made. Results: the output for each lane, and what else it made.
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
    jaxpr, inputs = opened(closed)
    jaxpr, refs = jax_compat.without_refs(jaxpr)
    given = {i: inputs[i] for i in refs}
    inputs = [x[...] if i in given else x for i, x in enumerate(inputs)]
    # What was only handed on stays what it is: nn.scan wants broadcast variables back unchanged.
    places = {var: i for i, var in enumerate(jaxpr.invars)}
    handed = [None] * count + [
        None if isinstance(var, Literal) else places.get(var) for var in jaxpr.outvars[count:]]
    outvars = [var for var, place in zip(jaxpr.outvars, handed, strict=True) if place is None]
    made = _lanes_p.bind(*inputs, jaxpr=ClosedJaxpr(jaxpr.replace(outvars=outvars), []),
                         shared=len(inputs), count=count, lanes=lanes, level=level)
    outs, aside = _parts(made, count, len(lanes))
    rest = iter(aside)
    aside = [next(rest) if place is None else inputs[place] for place in handed[count:]]
    for i, place in reversed(list(zip(given, handed[len(handed) - len(given):], strict=True))):
        last = aside.pop()
        if place is None:
            given[i][...] = last
    trees = [treedef.unflatten([*out, *aside]) for out in outs]
    return [out for out, _ in trees], trees[0][1]


def _parts(made: list, count: int, lanes: int) -> tuple[list[list], list]:
    """Split results of the primitive: the output of each lane, and what else was made."""
    return [made[i * count:(i + 1) * count] for i in range(lanes)], made[lanes * count:]


def _run(*operands: Any, jaxpr: ClosedJaxpr, shared: int, count: int, lanes: tuple, level: int
         ) -> list:
    made = evaluate(jaxpr, *inputs_of_lanes(operands, shared, lanes)[0])
    return made[:count] * len(lanes) + made[count:]


def _abstract(*_: Any, jaxpr: ClosedJaxpr, shared: int, count: int, lanes: tuple, level: int
              ) -> tuple:
    avals = list(jaxpr.out_avals)
    return avals[:count] * len(lanes) + avals[count:], jaxpr.effects


def _jvp(primals: tuple, tangents: tuple, *, jaxpr: ClosedJaxpr, shared: int, count: int,
         lanes: tuple, level: int) -> tuple[list, list]:
    inputs, moving = (inputs_of_lanes(values, shared, lanes) for values in (primals, tangents))
    moved = [i for i, ts in enumerate(zip(*moving, strict=True))
             if any(type(t) is not ad.Zero for t in ts)]
    tangents = [[ad.instantiate_zeros(ts[i]) for i in moved] for ts in moving]
    with during(linearizing=True, told_apart=tracing.told_apart | {level}):
        linear = _linearized(jaxpr, count, inputs[0], moved)
    kept = linear.kept
    made = _lanes_p.bind(*linear.consts, *primals, jaxpr=linear.forward, count=count + kept,
                         shared=len(linear.consts) + shared, lanes=lanes, level=level)
    outs, aside = _parts(made, count + kept, len(lanes))
    residuals, outs = [out[count:] for out in outs], [out[:count] for out in outs]
    rest = len(jaxpr.out_avals) - count
    aside, residuals_aside = aside[:rest], aside[rest:]

    given, of_lanes = once(tangents)

    # A scan around would stack each lane's residuals, which it cannot know to be equal. In a
    # checkpoint it stacks what goes in, of which all but the first lane's is not used.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def pushed(residuals: list, residuals_aside: list, given: list) -> list:
        tangents = of_lanes(given)
        maps = Maps(level, functools.partial(_in_common, lanes, level))
        found = maps.apply(linear.push, [
            [*own, *ts] for own, ts in zip(maps.share(None, residuals), tangents, strict=True)],
            [False] * len(residuals[0]) + [True] * len(moved))
        found.append(jax.core.eval_jaxpr(of_lane(linear.push_aside, level, NO_LANE), (),
                                         *residuals_aside, *tangents[0]))
        return [t for ts in found for t in ts]

    made = [*(x for out in outs for x in out), *aside]
    found = iter(pushed(residuals, residuals_aside, given))
    moves = linear.moves[:count] * len(lanes) + linear.moves[count:]
    return made, [next(found) if m else ad.Zero(jax.typeof(x).to_tangent_aval())
                  for x, m in zip(made, moves, strict=True)]


class _Linear(NamedTuple):
    """A function, linearised in some of its inputs.

    Attributes:
      forward: it, with residuals after the output, and others after what else it made.
      consts: its first inputs: constants, and what rules of `jax.custom_jvp` in it close over.
      kept: the number of residuals of the output.
      push, push_aside: linear maps of residuals and tangents, to the tangents of the output and of
        what else it made.
      moves: for each result of the function, whether it has a tangent.
    """

    forward: ClosedJaxpr
    consts: list
    kept: int
    push: Jaxpr
    push_aside: Jaxpr
    moves: list[bool]


def _linearized(jaxpr: ClosedJaxpr, count: int, primals: list, moved: list[int]) -> _Linear:
    """Linearise a function at some inputs, in those that are moved."""
    def joint(*inputs: Any) -> list:
        def of_moved(*moving: Any) -> list:
            values = list(inputs[:len(primals)])
            for i, x in zip(moved, moving, strict=True):
                values[i] = x
            return evaluate(jaxpr, *values)
        made, tangents = jax.jvp(of_moved, [inputs[i] for i in moved], list(inputs[len(primals):]))
        return [*made, *(t for x, t in zip(made, tangents, strict=True) if _inexact(x))]

    closed, consts = closed_over(joint, *primals, *(primals[i] for i in moved))
    total, inexact = len(jaxpr.out_avals), list(map(_inexact, jaxpr.out_avals))
    unknown = [False] * (len(consts) + len(primals)) + [True] * len(moved)
    tangents = iter(moves_out(closed.jaxpr, unknown)[total:])
    moves = [next(tangents) if x else False for x in inexact]
    known, push = jax_compat.split(closed, unknown, [False] * total + [True] * sum(inexact))
    forward, more = opened(known)
    made, residuals = forward.outvars[:total], forward.outvars[total:]

    def part(of: Callable[[int], bool]) -> tuple[Jaxpr, list]:
        wanted = [moves[i] and of(i) for i, x in enumerate(inexact) if x]
        push_of, used = jax_compat.pruned(
            push.jaxpr, wanted, [False] * len(residuals) + [True] * len(moved))
        return push_of, [x for x, u in zip(residuals, used, strict=False) if u]
    push_of_output, kept = part(lambda i: i < count)
    push_aside, kept_aside = part(lambda i: i >= count)
    outvars = [*made[:count], *kept, *made[count:], *kept_aside]
    return _Linear(ClosedJaxpr(forward.replace(outvars=outvars), []), [*more, *consts], len(kept),
                   push_of_output, push_aside, moves)


def _inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _in_common(lanes: tuple, level: int, jaxpr: ClosedJaxpr | None, groups: list[list]
               ) -> list[list]:
    """Compute a function once, of inputs that are equal in all lanes but in their derivatives.

    Args:
      jaxpr: the function; None returns its inputs.
      groups: the inputs in each lane.

    Returns:
      Its results in each lane.
    """
    if jaxpr is None:
        jaxpr = jax_compat.traced(lambda *xs: list(xs), *groups[0])
    count = len(jaxpr.out_avals)
    made = _lanes_p.bind(*(x for group in groups for x in group), jaxpr=jaxpr, shared=0,
                         count=count, lanes=lanes, level=level)
    return _parts(made, count, len(lanes))[0]


def _batched(axis: Any, operands: list, dims: list, *, jaxpr: ClosedJaxpr, shared: int,
             count: int, lanes: tuple, level: int) -> tuple[list, list]:
    of_lanes = inputs_of_lanes(dims, shared, lanes)
    fronts = [None if all(d is None for d in of) else 0 for of in zip(*of_lanes, strict=True)]
    wanted = [*fronts[:shared], *fronts[shared:] * len(lanes)]
    operands = [x if front is None else batching.bdim_at_front(x, dim, axis.size)
                for x, dim, front in zip(operands, dims, wanted, strict=True)]
    batched, varies = jax_compat.batched(jaxpr, axis, fronts)
    axes = [0 if v else None for v in varies]
    made = _lanes_p.bind(*operands, jaxpr=batched, shared=shared, count=count, lanes=lanes,
                         level=level)
    return made, axes[:count] * len(lanes) + axes[count:]


runs(_lanes_p, _run)
_lanes_p.def_effectful_abstract_eval(_abstract)
ad.primitive_jvps[_lanes_p] = _jvp
batching.fancy_primitive_batchers[_lanes_p] = _batched


def _checked(jaxpr: ClosedJaxpr, errors: list, *operands: Any, shared: int, **params: Any) -> list:
    return _lanes_p.bind(*errors, *operands, jaxpr=jaxpr, shared=len(errors) + shared, **params)


def _first_inputs(*operands: Any, shared: int, lanes: tuple, **_: Any) -> list:
    return inputs_of_lanes(operands, shared, lanes)[0]


jax_compat.checked(_lanes_p, _first_inputs, _checked)
