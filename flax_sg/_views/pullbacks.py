"""The pullbacks of several views, of which JAX transposes one.

The linear maps of the views are one but for the marks in it, and so are their transposes. So it is
transposed with its marks, once, and each view gets what is left where its own marks count.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var
from jax.interpreters import ad

from flax_sg._compat import jax as jax_compat
from flax_sg._jax.jaxprs import moving_among, opened
from flax_sg._views.masks import counts, for_view, is_view_mask, marked

__all__ = ['ViewMaps']


class ViewMaps:
    """The linear maps of all views: one jaxpr, without constants, with marks of a nesting in it.

    No rule of the user's is in it: that need not be linear, nor depend on cotangents.
    """

    def __init__(self, jaxpr: Jaxpr, nesting: int):
        self.jaxpr, self.nesting, self._places = jaxpr, nesting, marked(jaxpr, nesting)
        self._transposes: dict[tuple, _Transpose | None] = {}

    def __repr__(self) -> str:  # jaxprs print it
        return f'maps of nesting {self.nesting}'

    def of(self, view: int) -> Jaxpr:
        """Return the map of a view."""
        return for_view(self.jaxpr, self.nesting, view, self._places)

    def transposed(
        self, view: int, inputs: list, cotangents: list
    ) -> tuple[Jaxpr, list, list[bool]] | None:
        """Return the transpose of the map of a view, where one can serve all views.

        Args:
          inputs: the inputs of the map; those that it is transposed in are `ad.UndefinedPrimal`.
          cotangents: those of its results.

        Returns:
          The transpose; its operands; and for each of the inputs, whether a result of the
          transpose is its cotangent.
        """
        given = [x for x in inputs if not ad.is_undefined_primal(x)]
        moving = [ct for ct in cotangents if type(ct) is not ad.Zero]
        key = (
            tuple(map(ad.is_undefined_primal, inputs)),
            tuple(type(ct) is ad.Zero for ct in cotangents),
            tuple(map(jax.typeof, [*given, *moving])),
            jax_compat.trace_context(),
        )
        if key not in self._transposes:
            self._transposes[key] = self._trace(inputs, cotangents, given, moving)
        if (made := self._transposes[key]) is None:
            return None
        part, zero = _without_zeros(
            for_view(made.jaxpr, self.nesting, view, made.places), made.moving
        )
        part, used = jax_compat.pruned(part, [not z for z in zero], [False] * len(part.invars))
        operands = [x for x, u in zip([*made.consts, *given, *moving], used, strict=True) if u]
        zeros = iter(zero)
        return part, operands, [r and not next(zeros) for r in made.reached]

    def _trace(
        self, inputs: list, cotangents: list, given: list, moving: list
    ) -> _Transpose | None:
        reached: list[bool] = []

        def pull(*values: Any) -> list:
            known, cts = iter(values[: len(given)]), iter(values[len(given) :])
            found = jax_compat.pulled_back(
                ClosedJaxpr(self.jaxpr, []),
                [x if ad.is_undefined_primal(x) else next(known) for x in inputs],
                [ct if type(ct) is ad.Zero else next(cts) for ct in cotangents],
            )
            reached[:] = [ct is not None and type(ct) is not ad.Zero for ct in found]
            return [ct for ct, r in zip(found, reached, strict=True) if r]

        jaxpr, consts = opened(jax_compat.traced(pull, *given, *moving))
        places = marked(jaxpr, self.nesting)
        if not all(is_view_mask(jaxpr.eqns[i]) for i in places):
            return None
        moved, names = set(jaxpr.invars[len(consts) + len(given) :]), []
        for eqn in jaxpr.eqns:
            names.append([*itertools.compress(eqn.invars, moving_among(eqn.invars, moved))])
            moved.update(eqn.outvars * bool(names[-1]))
        return _Transpose(jaxpr, consts, reached, places, names)


class _Transpose(NamedTuple):
    """The transpose of the maps of all views.

    Attributes:
      jaxpr: it, with marks.
      consts: its first inputs.
      reached: for each input of the map, whether a result is its cotangent.
      places: those of the marks.
      moving: which of the operands of each equation depend on cotangents; it is linear in them.
    """

    jaxpr: Jaxpr
    consts: list
    reached: list[bool]
    places: list[int]
    moving: list[list[Var]]


def _without_zeros(jaxpr: Jaxpr, moving: list[list[Var]]) -> tuple[Jaxpr, list[bool]]:
    """Leave out of sums what marks make zero; and say which results are zero."""
    zeros: set[Var] = set()
    same: dict[Var, Var] = {}
    eqns = []

    def read(var: Any) -> Any:
        return var if isinstance(var, Literal) else same.get(var, var)

    for eqn, names in zip(jaxpr.eqns, moving, strict=True):
        if not same.keys().isdisjoint(names):
            eqn = eqn.replace(invars=list(map(read, eqn.invars)))
            names = list(map(read, names))
        eqns.append(eqn)
        left = [var for var in names if var not in zeros]
        if not names:
            continue
        if not left or counts(eqn) is False:
            zeros.update(eqn.outvars)
        elif counts(eqn) or eqn.primitive.name == 'add_any' and len(left) < len(names):
            same[eqn.outvars[0]] = left[0]
    outvars = list(map(read, jaxpr.outvars))
    return (
        jaxpr.replace(eqns=eqns, outvars=outvars),
        [not isinstance(var, Literal) and var in zeros for var in outvars],
    )
