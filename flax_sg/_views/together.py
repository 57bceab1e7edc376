"""The linear maps of several views, applied together where they compute something again.

A pullback of a rematerialised function computes its residuals again. Those of all views are equal,
so they are computed once here: one checkpoint for all views computes what it has to, and applies
each view's own linear map to that; a loop, a branch or a call around it is one for all views too.
A map that computes nothing again is applied in each view by itself.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxprs_in_params

from flax_sg._compat import jax as jax_compat
from flax_sg._jax.jaxprs import as_array, closed_over, evaluate, moves_out, moving_among, opened
from flax_sg._views.linear_map import push
from flax_sg._views.masks import absent, all_in_sight, counted_in, for_view, needed
from flax_sg._views.pullbacks import ViewMaps

__all__ = ['Maps', 'once']


class Maps:
    """Linear maps, which are one but for the marks that count in each view.

    Args:
      nesting: that of these marks.
      share: computes a function once, whose inputs are equal in all views; it gets a jaxpr and the
        inputs of each view, and returns the results in each.
    """

    def __init__(self, nesting: int, share: Callable[[ClosedJaxpr, list[list]], list[list]]):
        self.nesting, self.share = nesting, share

    def apply(self, jaxpr: Jaxpr, operands: list[list], moving: list[bool]) -> list[list]:
        """Apply the map in each view, and return the results in each.

        Args:
          jaxpr: the map, without constants.
          operands: those of each view.
          moving: which of these the map is linear in; the others are equal in all views.
        """
        if any(moving) and not all_in_sight.value:
            operands = [
                self._thinned(jaxpr, view, values, moving) for view, values in enumerate(operands)
            ]
        if not any(moving) or not _computes_again(jaxpr) and not _asks_the_user(jaxpr):
            return self._each(jaxpr, operands, moving)
        envs = [dict(zip(jaxpr.invars, values, strict=True)) for values in operands]
        moved = {var for var, m in zip(jaxpr.invars, moving, strict=True) if m}
        linear = [next(itertools.compress(of, moving)) for of in operands]
        for eqn in jaxpr.eqns:
            values = [[_read(env, var) for var in eqn.invars] for env in envs]
            flags = moving_among(eqn.invars, moved)
            counts = None if all_in_sight.value else counted_in(eqn, self.nesting)
            rule = _RULES.get(eqn.primitive.name)
            if counts is not None:
                outs = [
                    [of[0] if c else absent(eqn.outvars[0].aval, other)]
                    for of, other, c in zip(values, linear, counts, strict=True)
                ]
            elif rule is None or not any(flags) or not _holds_checkpoint(eqn) or _is_placed(eqn):
                alone = _alone(jaxpr, eqn)
                outs = self._each(
                    alone,
                    [[env[var] for var in alone.invars] for env in envs],
                    moving_among(alone.invars, moved),
                )
            else:
                outs = rule(self, eqn, values, flags)
            for env, out in zip(envs, outs, strict=True):
                env.update(zip(eqn.outvars, out, strict=True))
            moved.update(eqn.outvars * any(flags))
        return [[as_array(_read(env, var), var.aval) for var in jaxpr.outvars] for env in envs]

    def _thinned(self, jaxpr: Jaxpr, view: int, values: list, moving: list[bool]) -> list:
        """Let nothing depend on the tangents that do not count in a view.

        JAX would not see it, and ask a rule of the user's for what such a tangent came from.
        """
        used = needed(jaxpr, self.nesting, view)
        pairs = list(zip(moving, used, strict=True))
        if all(u or not m for m, u in pairs):
            return values
        live = [x for x, (m, u) in zip(values, pairs, strict=True) if m and u]
        other = (live or list(itertools.compress(values, moving)))[0]
        zeros = functools.cache(lambda aval: absent(aval, other))
        return [
            zeros(jax.typeof(x)) if m and not u else x
            for x, (m, u) in zip(values, pairs, strict=True)
        ]

    def _each(self, jaxpr: Jaxpr, operands: list[list], moving: list[bool]) -> list[list]:
        if len(jaxpr.eqns) < 2 or not any(moving):
            return [
                evaluate(ClosedJaxpr(for_view(jaxpr, self.nesting, view), []), *values)
                for view, values in enumerate(operands)
            ]
        if moving != sorted(moving):
            order = sorted(range(len(moving)), key=lambda i: moving[i])
            jaxpr = jaxpr.replace(
                invars=[jaxpr.invars[i] for i in order],
                debug_info=jaxpr.debug_info.with_unknown_names(),
            )
            operands = [[values[i] for i in order] for values in operands]
        count = moving.count(False)
        maps = ViewMaps(jaxpr, self.nesting)
        return [
            push(maps.of(view), values[:count], values[count:], maps, view)
            for view, values in enumerate(operands)
        ]

    def _checkpoint(self, eqn: JaxprEqn, operands: list[list], moving: list[bool]) -> list[list]:
        known, push = jax_compat.split(eqn.params['jaxpr'], moving)
        flat, of_views = once(operands)

        def body(*flat: Any) -> list:
            parts = [_parted(values, moving) for values in of_views(flat)]
            kept = (
                self.share(known, [inputs for inputs, _ in parts])
                if known.jaxpr.eqns
                else [evaluate(known, *inputs) for inputs, _ in parts]
            )
            outs = self.apply(
                push.jaxpr,
                [[*own, *tangents] for own, (_, tangents) in zip(kept, parts, strict=True)],
                [False] * len(kept[0]) + [True] * sum(moving),
            )
            return jax.tree.leaves(outs)

        jaxpr, consts = closed_over(body, *flat)
        params = eqn.params | {'jaxpr': jaxpr.jaxpr}
        if isinstance(flags := params['prevent_cse'], tuple):  # for each operand, since jax 0.11
            barred = {
                id(x) for values in operands for x, flag in zip(values, flags, strict=True) if flag
            }
            params['prevent_cse'] = (*[True] * len(consts), *(id(x) in barred for x in flat))
        outs = eqn.primitive.bind(*consts, *flat, **params)
        return _grouped(outs, len(operands))

    def _scan(self, eqn: JaxprEqn, operands: list[list], moving: list[bool]) -> list[list]:
        params, (body, closed_consts) = eqn.params, opened(eqn.params['jaxpr'])
        consts, carry = jax_compat.scan_counts(params)
        moving = list(moving)
        while True:  # what a step makes of what moves, moves in the next one
            made = moves_out(body, [*[False] * len(closed_consts), *moving])[:carry]
            before = moving[consts : consts + carry]
            moving[consts : consts + carry] = [a or b for a, b in zip(before, made, strict=True)]
            if moving[consts : consts + carry] == before:
                break

        sliced, of_views = once([of[consts + carry :] for of in operands])

        def step(carries: list[list], xs: list) -> tuple[list[list], list[list]]:
            values = [
                [*closed_consts, *of[:consts], *c, *x]
                for of, c, x in zip(operands, carries, of_views(xs), strict=True)
            ]
            outs = self.apply(body, values, [*[False] * len(closed_consts), *moving])
            return [out[:carry] for out in outs], [out[carry:] for out in outs]

        carries, ys = jax.lax.scan(
            step,
            [of[consts : consts + carry] for of in operands],
            sliced,
            params['length'],
            params['reverse'],
            params['unroll'],
        )
        return [[*c, *y] for c, y in zip(carries, ys, strict=True)]

    def _cond(self, eqn: JaxprEqn, operands: list[list], moving: list[bool]) -> list[list]:
        flat, of_views = once([values[1:] for values in operands])

        def of_branch(closed: Any) -> Callable:
            return lambda flat: self.apply(*_with_consts(closed, of_views(flat), moving[1:]))

        return jax.lax.switch(operands[0][0], list(map(of_branch, eqn.params['branches'])), flat)

    def _call(self, eqn: JaxprEqn, operands: list[list], moving: list[bool]) -> list[list]:
        flat, of_views = once(operands)

        def call(flat: list) -> list[list]:
            return self.apply(*_with_consts(eqn.params['jaxpr'], of_views(flat), moving))

        call.__name__ = eqn.params['name']
        return jax.jit(call)(flat)


# By the names of both versions of JAX.
_RULES = {
    'checkpoint': Maps._checkpoint,
    'remat2': Maps._checkpoint,
    'scan': Maps._scan,
    'cond': Maps._cond,
    'pjit': Maps._call,
    'jit': Maps._call,
}


# Operations on tangents whose transposes are the user's: of jax.custom_vjp, of what says its own
# transpose, and of map_gradient. They need not be linear, and are not asked about a cotangent that
# there is not, which JAX sees where they are not hidden in one operation.
_OF_THE_USER = frozenset(
    {'custom_lin', 'custom_transpose_call', 'linear_call', 'flax_sg_map_gradient_tangent'}
)


def _asks_the_user(jaxpr: Jaxpr) -> bool:
    return any(
        eqn.primitive.name in _OF_THE_USER or any(map(_asks_the_user, jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )


def _read(env: dict, var: Any) -> Any:
    return var.val if isinstance(var, Literal) else env[var]


def _computes_again(jaxpr: Jaxpr) -> bool:
    return any(map(_holds_checkpoint, jaxpr.eqns))


def _holds_checkpoint(eqn: JaxprEqn) -> bool:
    return eqn.primitive.name in ('checkpoint', 'remat2') or any(
        map(_computes_again, jaxprs_in_params(eqn.params))
    )


def _is_placed(eqn: JaxprEqn) -> bool:
    """Say whether a jitted function says how its operands or results are sharded."""
    shardings = (*eqn.params.get('in_shardings', ()), *eqn.params.get('out_shardings', ()))
    return any(type(sharding).__name__ != 'UnspecifiedValue' for sharding in shardings)


def _alone(jaxpr: Jaxpr, eqn: JaxprEqn) -> Jaxpr:
    """Return a jaxpr of one equation."""
    names = dict.fromkeys(var for var in eqn.invars if not isinstance(var, Literal))
    return jaxpr.replace(
        constvars=[],
        invars=[*names],
        eqns=[eqn],
        outvars=[*eqn.outvars],
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )


def _parted(values: Any, moving: list[bool]) -> tuple[list, list]:
    pairs = list(zip(values, moving, strict=True))
    return [x for x, m in pairs if not m], [x for x, m in pairs if m]


def once(operands: list[list]) -> tuple[list, Callable[[Any], list[list]]]:
    """Return the operands of all views, each value once; and a function from these to each view's.

    What views have in common then has one cotangent, the sum of theirs, in a loop too.
    """
    flat = {id(x): x for values in operands for x in values}
    place = {key: i for i, key in enumerate(flat)}
    places = [[place[id(x)] for x in values] for values in operands]
    return [*flat.values()], lambda flat: [[flat[i] for i in for_view] for for_view in places]


def _grouped(values: list, views: int) -> list[list]:
    count = len(values) // views
    return [values[i * count : (i + 1) * count] for i in range(views)]


def _with_consts(closed: ClosedJaxpr, operands: list[list], moving: list[bool]) -> tuple:
    jaxpr, consts = opened(closed)
    return jaxpr, [[*consts, *values] for values in operands], [False] * len(consts) + moving
