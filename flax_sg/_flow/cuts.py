"""Which obstacle is the cause: how many stand between a parameter and a loss, one behind the other.

A gradient crosses an edge of the graph for nothing where a tangent does, and for one obstacle where
a value goes on without its tangent. What needs one crossing at least has obstacles each of which,
let through, would let the gradient through alone. Where two or more are needed no single one would.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from flax_sg._flow.graph import Edge, Graph, Step, sweep
from flax_sg._flow.tangents import Differentiation
from flax_sg._jax.jaxprs import has_tangent

__all__ = ['Cuts']

_MOST = 6  # in a row


class Cuts:
    """Distances in a graph, in obstacles.

    Args:
      params, losses: the nodes from which and to which gradients are asked for, each with a set,
        the bits of an int.
    """

    def __init__(
        self, graph: Graph, rules: Differentiation, params: dict[int, int], losses: dict[int, int]
    ):
        self._graph, self._rules, self._losses = graph, rules, losses
        # What does not depend on a parameter is not asked about.
        self._touched = sweep(graph, dict.fromkeys(params, 1), rules.computed)
        self._fronts = [sweep(graph, params, rules.moved)]
        self._tails = [sweep(graph, losses, self._passed, back=True)]

    def _concerns(self, step: Step) -> bool:
        return any(node is not None and self._touched[node] for node in step.ins)

    @functools.cached_property
    def unchosen(self) -> list[int]:
        """The losses to which each node's tangent gets otherwise than by a choice among values."""
        return sweep(self._graph, self._losses, self._valued, back=True)

    def _valued(self, step: Step) -> Iterator[Edge]:
        chosen_by = None if step.choice is None else step.ins[step.choice]
        values = [n for place, n in enumerate(step.ins) if place != step.choice]
        for edge in self._passed(step):
            if edge[0] != chosen_by or edge[0] in values:
                yield edge

    @functools.cached_property
    def crossed(self) -> list[tuple[Step, Edge]]:
        """The edges along which a value goes that depends on parameters, and its tangent not."""
        steps = (step for step in self._graph.steps if self._concerns(step))
        return [(step, edge) for step in steps for edge in self._crossings(step)]

    def _crossings(self, step: Step) -> list[Edge]:
        if step.eqn is None:
            return []
        free = _without_tangents(step)
        moved = set(self._rules.moved(step))
        edges = dict.fromkeys(self._rules.computed(step))
        return [edge for edge in edges if edge not in moved and edge[0] not in free]

    def _passed(self, step: Step) -> Iterator[Edge]:
        if not self._concerns(step):
            return
        # An integer has no tangent; what turned a value into it is the obstacle.
        yield from self._rules.moved(step)
        if step.eqn is not None:
            free = _without_tangents(step)
            yield from (edge for edge in self._rules.computed(step) if edge[0] in free)

    def _beyond(self, sets: list[int], *, back: bool) -> list[int]:
        """Return what can be got to from some sets with one obstacle more."""
        start = {node: bits for node, bits in enumerate(sets) if bits}
        for _, (source, target) in self.crossed:
            if back:
                source, target = target, source
            if sets[source]:
                start[target] = start.get(target, 0) | sets[source]
        return sweep(self._graph, start, self._passed, back=back)

    def failures(self, step: Step) -> dict[int, str]:
        """Return why JAX does not differentiate a step, by the node."""
        return {step.ins[at]: why for at, why in self._rules.failures(step).items()}

    def front(self, count: int) -> list[int]:
        """Return the parameters whose tangents would get to each node past some obstacles."""
        while len(self._fronts) <= count:
            self._fronts.append(self._beyond(self._fronts[-1], back=False))
        return self._fronts[count]

    def tail(self, count: int) -> list[int]:
        """Return the losses to which each node's tangent would get past some obstacles."""
        while len(self._tails) <= count:
            self._tails.append(self._beyond(self._tails[-1], back=True))
        return self._tails[count]

    def needed(self, node: int, loss: int) -> int | None:
        """Return how many obstacles keep a loss from a node, at least; None if no value does."""
        return next((n for n in range(_MOST + 1) if self.tail(n)[node] >> loss & 1), None)

    def on_the_way(self, edge: Edge, count: int) -> list[tuple[int, int]]:
        """Return pairs of sets, parameters and losses, between which an obstacle is one of some.

        They are those that would have to be let through, together, if no fewer would do.
        """
        source, target = edge
        pairs = [
            (self.front(before)[source], self.tail(count - 1 - before)[target])
            for before in range(count)
        ]
        return [(params, losses) for params, losses in pairs if params and losses]


def _without_tangents(step: Step) -> set[int]:
    return {
        node
        for node, v in zip(step.ins, step.eqn.invars, strict=False)
        if node is not None and not has_tangent(v.aval)
    }
