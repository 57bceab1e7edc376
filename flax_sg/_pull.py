"""The pullbacks of several lanes, of which JAX transposes one.

The linear maps of the lanes are one but for the marks in it, and so are their transposes. So it is
transposed with its marks, once, and each lane gets what is left where its own marks count.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.interpreters import ad

from flax_sg import _compat
from flax_sg._jaxprs import moving_among, opened
from flax_sg._marks import counts, marked_inside, of_lane

__all__ = ['LaneMaps']

class LaneMaps:
    """The linear maps of all lanes: one jaxpr, without constants, with marks of a level in it.

    No rule of the user's is in it: that need not be linear, nor depend on cotangents.
    """

    def __init__(self, jaxpr: Jaxpr, level: int):
        self.jaxpr, self.level = jaxpr, level
        self._transposes: dict[tuple, tuple[Jaxpr, list, list[bool]] | None] = {}

    def __repr__(self) -> str:  # jaxprs print it
        return f'maps of level {self.level}'

    def transposed(self, lane: int, inputs: list, cotangents: list
                   ) -> tuple[Jaxpr, list, list[bool]] | None:
        """Return the transpose of the map of a lane, where one can serve all lanes.

        Args:
          inputs: the inputs of the map; those that it is transposed in are `ad.UndefinedPrimal`.
          cotangents: those of its results.

        Returns:
          The transpose; its operands; and for each of the inputs, whether a result of the
          transpose is its cotangent.
        """
        given = [x for x in inputs if not ad.is_undefined_primal(x)]
        moving = [ct for ct in cotangents if type(ct) is not ad.Zero]
        key = (tuple(map(ad.is_undefined_primal, inputs)),
               tuple(type(ct) is ad.Zero for ct in cotangents),
               tuple(map(jax.typeof, [*given, *moving])), _compat.trace_context())
        if key not in self._transposes:
            self._transposes[key] = self._trace(inputs, cotangents, given, moving)
        if (made := self._transposes[key]) is None:
            return None
        jaxpr, consts, reached = made
        count = len(consts) + len(given)
        part, zero = _without_zeros(of_lane(jaxpr, self.level, lane), count)
        part, used = _compat.pruned(part, [not z for z in zero], [False] * (count + len(moving)))
        operands = [x for x, u in zip([*consts, *given, *moving], used, strict=True) if u]
        places = iter(zero)
        return part, operands, [r and not next(places) for r in reached]

    def _trace(self, inputs: list, cotangents: list, given: list, moving: list
               ) -> tuple[Jaxpr, list, list[bool]] | None:
        reached: list[bool] = []

        def pull(*values: Any) -> list:
            known, cts = iter(values[:len(given)]), iter(values[len(given):])
            found = _compat.pulled_back(
                ClosedJaxpr(self.jaxpr, []),
                [x if ad.is_undefined_primal(x) else next(known) for x in inputs],
                [ct if type(ct) is ad.Zero else next(cts) for ct in cotangents])
            reached[:] = [ct is not None and type(ct) is not ad.Zero for ct in found]
            return [ct for ct, r in zip(found, reached, strict=True) if r]
        jaxpr, consts = opened(_compat.traced(pull, *given, *moving))
        return None if marked_inside(jaxpr, self.level) else (jaxpr, consts, reached)


def _without_zeros(jaxpr: Jaxpr, count: int) -> tuple[Jaxpr, list[bool]]:
    """Leave out of sums what marks make zero; and say which results are zero.

    The jaxpr is linear in its inputs but for the first `count`.
    """
    moved, zeros, same = set(jaxpr.invars[count:]), set(), {}
    eqns = []

    def read(var: Any) -> Any:
        return var if isinstance(var, Literal) else same.get(var, var)
    for eqn in jaxpr.eqns:
        values = list(map(read, eqn.invars))
        if any(a is not b for a, b in zip(values, eqn.invars, strict=True)):
            eqn = eqn.replace(invars=values)
        eqns.append(eqn)
        moving = [var for var, m in zip(values, moving_among(values, moved), strict=True) if m]
        if not moving:
            continue
        moved.update(eqn.outvars)
        left = [var for var in moving if var not in zeros]
        if counts(eqn) is False or not left:
            zeros.update(eqn.outvars)
        elif counts(eqn) or eqn.primitive.name == 'add_any' and len(left) < len(moving):
            same[eqn.outvars[0]] = left[0]
    outvars = list(map(read, jaxpr.outvars))
    return (jaxpr.replace(eqns=eqns, outvars=outvars),
            [not isinstance(var, Literal) and var in zeros for var in outvars])
