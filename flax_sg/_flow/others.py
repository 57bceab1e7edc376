"""Functions with rules of somebody else's: what ends a gradient in them, if the rule is left out.

A solver or a loop of a package has a rule for its derivative, around a function of the user's.
What is not there in the derivative of the function is not there in that of the rule: the operation
in the function is the cause, and not the rule.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from jax.extend.core import JaxprEqn

from flax_sg._compat.jax import written_at
from flax_sg._flow.cuts import Cuts
from flax_sg._flow.graph import Edge, Graph, Step
from flax_sg._flow.obstacles import FIRST, obstacle
from flax_sg._flow.origin import Origin
from flax_sg._flow.records import Obstacle, Verdict
from flax_sg._flow.tangents import Differentiation
from flax_sg._jax.lines import owner

__all__ = ['Opened', 'in_step', 'is_anothers']


def is_anothers(eqn: JaxprEqn) -> bool:
    """Say whether an equation is a call of a function with a rule that is not JAX's own."""
    body = eqn.params.get('call_jaxpr')
    if body is None or eqn.primitive.name not in ('custom_jvp_call', 'custom_vjp_call'):
        return False
    file = written_at(body)[1]
    return owner(file) != 'jax' or 'experimental' in file.split(os.sep)  # odeint


class Opened:
    """A program with the rules of others left out.

    Args:
      jaxpr: of the program.
      moving: the places of its parameters that have tangents.
    """

    def __init__(self, jaxpr: Any, rules: Differentiation, moving: list[int]):
        self.graph = Graph(jaxpr, inside=is_anothers)
        params = {self.graph.inputs[p]: 1 << p for p in moving}
        self.cuts = Cuts(self.graph, rules, params, self.graph.losses)

    def of(self, p: int, k: int) -> list[Obstacle]:
        """Return what ends the gradient of a loss, that which is to be named first."""
        return _ending(self.cuts, self.graph.inputs[p], p, k)


def in_step(rules: Differentiation, step: Step, edge: Edge) -> list[Obstacle]:
    """Return what ends a gradient in a step that is a call of such a function.

    Returns:
      Nothing, if the gradient does not end in there, or JAX does not differentiate what is inside.
    """
    body = step.eqn.params.get('call_jaxpr')
    if not is_anothers(step.eqn) or len(getattr(body, 'jaxpr', body).invars) != len(step.ins):
        return []
    around = (*step.context.around, step.eqn)
    context = dataclasses.replace(step.context, around=around)
    graph = Graph(body, inside=is_anothers, context=context)
    out = graph.outputs[step.outs.index(edge[1])]
    places = [n for n, i in zip(graph.inputs, step.ins, strict=True) if i == edge[0]]
    if out is None:
        return []
    cuts = Cuts(graph, rules, dict.fromkeys(places, 1), {out: 1})
    each = [_ending(cuts, node, 0, 0) for node in places]
    return [] if not all(each) else min(each, key=len)


def _ending(cuts: Cuts, node: int, p: int, k: int) -> list[Obstacle]:
    """Return the obstacles between a parameter's node and a loss: those alone, or a whole row."""
    count = cuts.needed(node, k)
    if not count:
        return []
    found: dict[Obstacle, None] = {}
    for step, edge in cuts.crossed:
        if any(a >> p & 1 and b >> k & 1 for a, b in cuts.on_the_way(edge, count)):
            origin, failures = Origin(step.at, step.context), cuts.failures(step)
            one = obstacle(origin, step.outs.index(edge[1]), failures.get(edge[0], ''))
            found[dataclasses.replace(one, alone=count == 1)] = None
    if any(o.verdict is Verdict.UNKNOWN for o in found):
        return []
    return sorted(found, key=lambda o: FIRST[o.verdict])
