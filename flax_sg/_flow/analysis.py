"""Verdicts of all parameters and losses, by sweeps of the graph, checked by the whole pullback."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from flax_sg._flow.cuts import Cuts
from flax_sg._flow.graph import Edge, Graph, Step, sweep
from flax_sg._flow.losses import Program
from flax_sg._flow.obstacles import FIRST, NOT_SEEN, obstacle
from flax_sg._flow.origin import Origin
from flax_sg._flow.others import Opened, in_step, is_anothers
from flax_sg._flow.records import Obstacle, Verdict
from flax_sg._flow.tangents import Differentiation
from flax_sg._jax.jaxprs import has_tangent

__all__ = ['Analysis']


class Analysis:
    """What is found for the parameters and losses of a jaxpr, which are numbered."""

    def __init__(self, program: Program):
        jaxpr, count = program.jaxpr, program.count
        self.avals = jaxpr.in_avals[:count]
        self.graph = graph = Graph(jaxpr, inside=False)
        self.rules = rules = Differentiation()
        self.params = graph.inputs[:count]
        moving = [p for p in range(count) if has_tangent(self.avals[p])]
        outputs = graph.losses
        # Sets of parameters: whose tangents get to a node. Sets of losses: which need a node's
        # value, and to which its tangent gets.
        self.cuts = Cuts(graph, rules, {self.params[p]: 1 << p for p in moving}, outputs)
        self.live, self.alive = self.cuts.front(0), self.cuts.tail(0)
        self.need = sweep(graph, outputs, rules.computed, back=True)
        self.jaxpr, self.moving = jaxpr, moving
        self._origins: dict[int, Origin] = {}
        self.users: dict[int, list[Step]] = {}
        for step in graph.steps:
            for i in step.ins:
                if i is not None:
                    self.users.setdefault(i, []).append(step)
        # By parameter and loss; and how harmless it looks: 1 if it only chooses among values, as a
        # comparison does, 2 if the tangent goes on past it, see _tangent_escapes.
        self.obstacles: dict[tuple[int, int], dict[tuple[int, Obstacle], None]] = {}
        self.rows: dict[tuple[int, int], dict[Obstacle, None]] = {}  # of those in a row
        self._find_obstacles()
        self.lines: dict[tuple[int, int], str] = {}
        self._find_lines()
        self.checked = check_whole(program, self, moving)

    def _origin(self, step: Step) -> Origin:
        if id(step) not in self._origins:
            self._origins[id(step)] = Origin(step.at, step.context)
        return self._origins[id(step)]

    def _find_obstacles(self) -> None:
        for step, (i, o) in self.cuts.crossed:
            alone = self.alive[o]
            self._add(step, (i, o), self.live[i], self.need[o] & alone, alone=True)
            self._add(step, (i, o), self.live[i], self.need[o] & ~alone)
        self._find_rows()

    def _find_rows(self) -> None:
        """Find what stands one behind the other, where none alone would let a gradient through."""
        rows: dict[int, dict[int, int]] = {}  # by the number in a row and the loss: parameters
        for p, node in enumerate(self.params):
            for k in _bits(self.need[node] & ~self.alive[node]) if self.live[node] else ():
                count = self.cuts.needed(node, k)
                if count is not None and count > 1:
                    rows.setdefault(count, {}).setdefault(k, 0)
                    rows[count][k] |= 1 << p
        for count, of_losses in sorted(rows.items()):
            for step, edge in self.cuts.crossed:
                for params, losses in self.cuts.on_the_way(edge, count):
                    for k in _bits(losses):
                        self._add(step, edge, params & of_losses.get(k, 0), 1 << k, row=count)

    def _add(
        self, step: Step, edge: Edge, params: int, losses: int, *, alone: bool = False, row: int = 0
    ) -> None:
        if not params or not losses:
            return
        i, o = edge
        failures = self.rules.failures(step)
        failure = next((f for at, f in failures.items() if step.ins[at] == i), '')
        past = self._tangent_escapes(step, step.outs.index(o))
        for found in self._described(step, edge, failure):
            if row and found.verdict is Verdict.UNKNOWN:
                continue  # no tangent gets there, so that it need not be known
            in_row = row or alone and not found.alone  # the row is in a function with a rule
            found = dataclasses.replace(found, alone=alone and found.alone)
            for p in _bits(params):
                for k in _bits(losses):
                    chooses = alone and not self.cuts.unchosen[o] >> k & 1
                    harmless = 2 if past >> p & 1 else int(chooses)
                    self.obstacles.setdefault((p, k), {})[harmless, found] = None
                    if in_row:
                        self.rows.setdefault((p, k), {})[found] = None

    def _described(self, step: Step, edge: Edge, failure: str) -> list[Obstacle]:
        """Describe what is in the way in a step; in a function with a rule, what ends in there."""
        found = obstacle(self._origin(step), step.outs.index(edge[1]), failure)
        inside = found.verdict is Verdict.CUSTOM_ZERO and in_step(self.rules, step, edge)
        return inside or [dataclasses.replace(found, alone=True)]

    @functools.cached_property
    def _opened(self) -> Opened | None:
        """The same with functions laid open whose rules are somebody's; None if there are none."""
        rules = (step for step in self.graph.steps if step.eqn is not None)
        there = any(is_anothers(step.eqn) for step in rules)
        return Opened(self.jaxpr, self.rules, self.moving) if there else None

    def ended_inside(self, p: int, k: int) -> dict[str, Any]:
        """Return what `of` does if no rule of others counts; {} if the gradient gets there then."""
        if self._opened is None or p not in self.moving:
            return {}
        found = self._opened.of(p, k)
        row = found if found and not found[0].alone else []
        return _found(found[0].verdict, found[0], tuple(found), _in_a_row(row)) if found else {}

    def _tangent_escapes(self, step: Step, output: int) -> int:
        """Return the parameters whose tangents leave the function of JAX that a step is part of.

        As softmax subtracts a constant maximum, and leaky_relu compares: that is how they are
        computed, and their derivatives are right. So only the results count, which the output of
        the step goes into.
        """
        function = self._origin(step).function
        if function is None:
            return 0
        nodes, seen, past = [step.outs[output]], {step.outs[output]}, 0
        while nodes:
            node = nodes.pop()
            for user in self.users.get(node, ()):
                if self._origin(user).function != function:
                    past |= self.live[node]
                    continue
                new = [o for i, o in self.rules.computed(user) if i == node and o not in seen]
                seen.update(new)
                nodes += new
            if node in self.graph.losses:
                past |= self.live[node]
        return past

    def _find_lines(self) -> None:
        """Find where each parameter is first used on a path along which its gradient comes."""
        first: dict[int, list[tuple[Step, int]]] = {}
        params = {node: p for p, node in enumerate(self.params)}
        for step in self.graph.steps:
            if any(i in params for i in step.ins):
                for i, o in self.rules.moved(step):
                    if i in params:
                        first.setdefault(params[i], []).append((step, self.alive[o]))
        for p, uses in first.items():
            for k in _bits(self.alive[self.params[p]]):
                step = next((step for step, losses in uses if losses >> k & 1), None)
                if step is not None:
                    self.lines[p, k] = self._origin(step).line

    def differentiable(self, k: int) -> list[int]:
        """Return the parameters with a gradient that `jax.grad` can be asked for, of a loss."""
        return [
            p
            for p, aval in enumerate(self.avals)
            if has_tangent(aval)
            and self.checked.get((p, k), (True, ''))[0] is not None
            and not any(
                o.verdict is Verdict.UNKNOWN and o.reason != NOT_SEEN
                for _, o in self.obstacles.get((p, k), ())
            )
        ]

    def located(self, step: Step | None) -> dict[str, Any]:
        """Return operation and source of a step."""
        if step is None:
            return {'operation': None, 'source': None}
        origin = self._origin(step)
        return {'operation': origin.operation, 'source': origin.line or None}

    def reached(self, p: int, k: int) -> bool:
        return bool(has_tangent(self.avals[p]) and self.alive[self.params[p]] >> k & 1)

    def of(self, p: int, k: int) -> dict[str, Any]:
        """Return verdict, operation, source, reason and obstacles for a parameter and a loss."""
        rank = lambda o: (not o[1].alone, o[0], FIRST[o[1].verdict])
        found = sorted(self.obstacles.get((p, k), ()), key=rank)
        row = sorted(self.rows.get((p, k), ()), key=lambda o: FIRST[o.verdict])
        row = [] if found and found[0][1].alone else row
        obstacles = tuple(dict.fromkeys([*row, *(o for _, o in found)]))
        reached = self.reached(p, k)
        unknown = next(
            (
                o
                for o in obstacles
                if o.verdict is Verdict.UNKNOWN and not (reached and o.reason == NOT_SEEN)
            ),
            None,
        )
        checked, reason = self.checked.get((p, k), (reached, ''))
        if reached or not obstacles or _is_a_rule(obstacles[0]):
            ended = self.ended_inside(p, k)
            if ended and (not reached or not checked or _is_a_block(ended)):
                return ended
        if checked is False and (obstacles or not reached):
            reached = False  # a proof, whatever is not known
        elif unknown is not None:
            return _found(Verdict.UNKNOWN, unknown, obstacles)
        elif checked is not reached:
            why = _found(Verdict.UNKNOWN, obstacles[0], obstacles) if obstacles else {}
            return {**why, 'verdict': Verdict.UNKNOWN, 'reason': reason}
        if reached:
            line = self.lines.get((p, k)) or None
            beside = next((o for harmless, o in found if harmless < 2), None)
            if beside is not None:
                found = _found(Verdict.REACHED_PARTLY, beside, obstacles, reason)
                return {**found, 'used_at': line}
            return {
                'verdict': Verdict.REACHED,
                'source': line,
                'used_at': line,
                'reason': reason,
                'obstacles': obstacles,
            }
        if obstacles:
            return _found(obstacles[0].verdict, obstacles[0], obstacles, _in_a_row(row))
        if not self.need[self.params[p]] >> k & 1:
            return {'verdict': Verdict.UNUSED}
        if not has_tangent(self.avals[p]):
            return {
                'verdict': Verdict.PIECEWISE_CONSTANT,
                'operation': f'its dtype, {self.avals[p].dtype}',
            }
        return {'verdict': Verdict.UNKNOWN, 'reason': 'no operation was found that stops it'}


def _is_a_rule(o: Obstacle) -> bool:
    """Say whether an obstacle is a function with a rule whose result is whole numbers."""
    rules = ('(custom_jvp)', '(custom_vjp)')
    return o.verdict is Verdict.PIECEWISE_CONSTANT and o.operation.endswith(rules)


def _is_a_block(ended: dict[str, Any]) -> bool:
    """Say whether a block ends a gradient in a function with a rule, which then cannot pass it on.

    What solvers derive from a function has a path for all that they compute in a loop, and zeros on
    it. Anybody's own stop_gradient may stand in a function whose rule passes a gradient on purpose.
    """
    return ended['verdict'] is Verdict.MASKED and ended['operation'].split()[0] != 'stop_gradient'


def _in_a_row(row: list[Obstacle]) -> str:
    """Say of the first of some obstacles that it is not the only one in the way."""
    others = ', '.join(o.explain() for o in row[1:])
    return f'in a row with {others}' if others else ''


def _found(
    verdict: Verdict, obstacle: Obstacle, obstacles: tuple, reason: str = ''
) -> dict[str, Any]:
    return {
        'verdict': verdict,
        'operation': obstacle.operation,
        'obstacles': obstacles,
        'source': obstacle.source or None,
        'reason': obstacle.reason or reason,
    }


def _bits(bits: int) -> Iterator[int]:
    while bits:
        low = bits & -bits
        yield low.bit_length() - 1
        bits ^= low


def check_whole(
    program: Program, findings: Analysis, moving: list[int]
) -> dict[tuple[int, int], tuple[bool | None, str]]:
    """Ask JAX's derivative of the whole program which losses depend on which parameters.

    Returns:
      By parameter and loss, whether a gradient comes, or None if JAX does not say; and a remark.
    """
    failed = {
        p
        for (p, _), found in findings.obstacles.items()
        if any(o.verdict is Verdict.UNKNOWN and o.reason != NOT_SEEN for _, o in found)
    }
    looped = 0  # a tangent in the carry of a while loop, which has no reverse mode
    for node in findings.graph.carried:
        looped |= findings.live[node] if findings.alive[node] else 0
    moving = [p for p in moving if p not in failed]
    answers = program.depends([p for p in moving if not looped >> p & 1])
    pushed = program.depends([p for p in moving if looped >> p & 1], forward=True)
    checked: dict[tuple[int, int], tuple[bool | None, str]] = {}
    for p in moving:
        for k in range(len(program.losses)):
            found, said = findings.reached(p, k), (answers | pushed)[p]
            remark = ''
            if isinstance(said, str):
                says, remark = None, said
            else:
                says = bool(said >> k & 1)
                if says is not found:
                    words = {True: 'a path', False: 'no path'}
                    remark = (
                        f'the operations one by one have {words[found]} for its gradient, '
                        f"JAX's derivative of the whole has {words[says]}"
                    )
                elif found and p in pushed:
                    remark = (
                        'forward mode alone: jax.grad does not differentiate the while loop '
                        'that it goes through'
                    )
            checked[p, k] = says, remark
    return checked
