"""Why is a gradient zero: a verdict, the operation and the line for each parameter and loss.

The loss is traced, its jaxpr laid open as a graph (`_graph`), and three questions are asked of all
its paths at once: which tangents get where, which values get where, and where a value goes on
without its tangent (`_survival`, `_obstacles`). JAX's own pullback of the whole loss has to agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flax_sg._errors import UsageError
from flax_sg._graph import Graph, Step, sweep
from flax_sg._info import VariableInfo, names_of
from flax_sg._jaxprs import moves
from flax_sg._obstacles import NOT_SEEN, Obstacle, Verdict, line_of, obstacle, within
from flax_sg._program import Program
from flax_sg._records import FlowRecord
from flax_sg._report import Flow
from flax_sg._survival import Differentiation

__all__ = ['gradient_flow']


def gradient_flow(losses: Any, *, norms: bool = False) -> Callable[..., Flow]:
    """Say for each parameter and loss whether a gradient gets there, and if not, which line did it.

    Use it when a parameter does not train, or trains when it should not. It works on any JAX
    function, and looks at the program: the losses are traced, twice, and not run.

    >>> import jax.numpy as jnp
    >>> def loss(params, x):
    ...     order = jnp.argsort(params['scores'])
    ...     return (params['w'] * x[order]).sum()
    >>> params = {'scores': jnp.ones(3), 'w': jnp.ones(3), 'old': jnp.ones(3)}
    >>> flow = gradient_flow(loss)(params, jnp.arange(3.0))
    >>> flow['loss', 'w'].verdict, flow['loss', 'old'].verdict
    (<Verdict.REACHED: 'REACHED'>, <Verdict.UNUSED: 'UNUSED'>)
    >>> record = flow['loss', 'scores']
    >>> str(record.verdict), record.operation
    ('PIECEWISE_CONSTANT', 'argsort (sort)')

    Args:
      losses: a dict of functions that return a scalar, a function that returns a dict of scalars,
        or one that returns a scalar, which is called ``'loss'``.
      norms: compile and run the losses once too, and give each record the norm of its gradient;
        finds gradients that are zero on this input alone.

    Returns:
      A function of ``(params, *args, **kwargs)`` as the losses take them, that returns a
      :class:`Flow` of records. ``params`` is any pytree; its arrays, and those of the arguments,
      may be ``jax.ShapeDtypeStruct`` unless ``norms``.

    Raises:
      UsageError: ``losses`` are none, a loss does not return a real scalar, or two parameters have
        one name, as 'a/b' and b in a.

    Source: jax issue 10867, google/flax issue 1857.
    """
    if not callable(losses) and not (
            isinstance(losses, Mapping) and losses and all(map(callable, losses.values()))):
        raise UsageError(
            f'gradient_flow was given an object of type {type(losses).__name__}; expected a '
            'function of (params, *args), or a dict of such functions by name.')

    def flow(params: Any, /, *args: Any, **kwargs: Any) -> Flow:
        infos, leaves, treedef = names_of(params)
        twice = [name for name, n in Counter(info.name for info in infos).items() if n > 1]
        if twice:
            raise UsageError(f'gradient_flow: params has two leaves named {twice[0]!r}.')
        programs = losses if isinstance(losses, Mapping) else {None: losses}
        records: list[FlowRecord] = []
        for name, fn in programs.items():
            program = Program.trace(name, fn, leaves, treedef, args, kwargs)
            records += _records(program, infos, leaves if norms else None)
        return Flow(tuple(records), infos)

    return flow


def _records(program: Program, infos: list[VariableInfo], values: list[Any] | None
             ) -> Iterator[FlowRecord]:
    findings = _Findings(program)
    norms = None if values is None else program.norms(values)
    for k, loss in enumerate(program.losses):
        for p, info in enumerate(infos):
            found = findings.of(p, k)
            if norms is not None and moves(program.jaxpr.in_avals[p]):
                found = _with_norm(found, float(norms[k][p]))
            yield FlowRecord(loss=loss, name=info.name, **found)


def _with_norm(found: dict[str, Any], norm: float) -> dict[str, Any]:
    verdict = found['verdict']
    if verdict in (Verdict.REACHED, Verdict.REACHED_PARTLY):
        if norm == 0:
            found = {**found, 'verdict': Verdict.NUMERIC_ZERO}
    elif norm != 0 and verdict is not Verdict.UNKNOWN:
        found = {**found, 'verdict': Verdict.UNKNOWN,
                 'reason': f'the program says {verdict}, and the gradient has the norm {norm}'}
    return {**found, 'norm': norm}


# What explains a gradient that is not there, first: what stands in the way is said to be a mask
# only if there is one, and a mask can be taken away.
_FIRST = {Verdict.UNKNOWN: 0, Verdict.MASKED: 1, Verdict.CUSTOM_ZERO: 2,
          Verdict.PIECEWISE_CONSTANT: 3}


class _Findings:
    """What is found for the parameters and losses of a jaxpr, which are numbered."""

    def __init__(self, program: Program):
        jaxpr, count = program.jaxpr, program.count
        self.avals = jaxpr.in_avals[:count]
        self.graph = graph = Graph(jaxpr, inside=False)
        self.rules = rules = Differentiation()
        self.params = graph.inputs[:count]
        moving = [p for p in range(count) if moves(self.avals[p])]
        outputs: dict[int, int] = {}
        for k, node in enumerate(graph.outputs):
            if node is not None:
                outputs[node] = outputs.get(node, 0) | 1 << k
        # Sets of parameters: whose tangents get to a node. Sets of losses: which need a node's
        # value, and which its tangent.
        self.live = sweep(graph, {self.params[p]: 1 << p for p in moving}, rules.moved)
        self.need = sweep(graph, outputs, rules.computed, back=True)
        alive = lambda step: [(i, o) for i, o in rules.moved(step) if self.live[i]]
        self.alive = sweep(graph, outputs, lambda step: (
            alive(step) if any(i is not None and self.live[i] for i in step.ins) else ()),
            back=True)
        self.outputs = outputs
        self.users: dict[int, list[Step]] = {}
        for step in graph.steps:
            for i in step.ins:
                if i is not None:
                    self.users.setdefault(i, []).append(step)
        # By parameter and loss; and whether the tangent goes on past it, see _past.
        self.obstacles: dict[tuple[int, int], dict[tuple[bool, Obstacle], None]] = {}
        self._find_obstacles()
        self.lines: dict[tuple[int, int], str] = {}
        self._find_lines()
        self.checked = _check(program, self, moving)

    def _find_obstacles(self) -> None:
        for step in self.graph.steps:
            if step.eqn is None:
                continue
            edges = [(i, o) for i, o in self.rules.computed(step) if self.live[i] and self.need[o]]
            if not edges:
                continue
            moved, failures = set(self.rules.moved(step)), self.rules.failures(step)
            for i, o in dict.fromkeys(edges):
                if (i, o) not in moved:
                    failure = next((f for at, f in failures.items() if step.ins[at] == i), '')
                    self._add(step, step.outs.index(o), failure, self.live[i], self.need[o])

    def _add(self, step: Step, output: int, failure: str, params: int, losses: int) -> None:
        found = obstacle(step.eqn, step.context, output, failure)
        past = self._past(step, output)
        for p in _bits(params):
            for k in _bits(losses):
                self.obstacles.setdefault((p, k), {})[bool(past >> p & 1), found] = None

    def _past(self, step: Step, output: int) -> int:
        """Return the parameters whose tangents leave the function of JAX that a step is part of.

        As softmax subtracts a constant maximum, and leaky_relu compares: that is how they are
        computed, and their derivatives are right. So only the results count, which the output of
        the step goes into.
        """
        function = within(step.eqn, step.context)
        if function is None:
            return 0
        nodes, seen, past = [step.outs[output]], {step.outs[output]}, 0
        while nodes:
            node = nodes.pop()
            for user in self.users.get(node, ()):
                if within(user.at, user.context) != function:
                    past |= self.live[node]
                    continue
                new = [o for i, o in self.rules.computed(user) if i == node and o not in seen]
                seen.update(new)
                nodes += new
            if node in self.outputs:
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
                    self.lines[p, k] = line_of(step.at, step.context)

    def reached(self, p: int, k: int) -> bool:
        return bool(moves(self.avals[p]) and self.alive[self.params[p]] >> k & 1)

    def of(self, p: int, k: int) -> dict[str, Any]:
        """Return verdict, operation, source, reason and obstacles for a parameter and a loss."""
        found = sorted(self.obstacles.get((p, k), ()), key=lambda o: (o[0], _FIRST[o[1].verdict]))
        obstacles = tuple(o for _, o in found)
        reached = self.reached(p, k)
        unknown = next((o for o in obstacles if o.verdict is Verdict.UNKNOWN and not (
            reached and o.reason == NOT_SEEN)), None)
        checked, reason = self.checked.get((p, k), (reached, ''))
        if unknown is not None:
            return _found(Verdict.UNKNOWN, unknown, obstacles)
        if checked is not reached:
            why = _found(Verdict.UNKNOWN, obstacles[0], obstacles) if obstacles else {}
            return {**why, 'verdict': Verdict.UNKNOWN, 'reason': reason}
        if reached:
            line = self.lines.get((p, k)) or None
            beside = next((o for past, o in found if not past), None)
            if beside is not None:
                found = _found(Verdict.REACHED_PARTLY, beside, obstacles, reason)
                return {**found, 'used_at': line}
            return {'verdict': Verdict.REACHED, 'source': line, 'used_at': line,
                    'reason': reason, 'obstacles': obstacles}
        if obstacles:
            return _found(obstacles[0].verdict, obstacles[0], obstacles)
        if not self.need[self.params[p]] >> k & 1:
            return {'verdict': Verdict.UNUSED}
        if not moves(self.avals[p]):
            return {'verdict': Verdict.PIECEWISE_CONSTANT,
                    'operation': f'its dtype, {self.avals[p].dtype}'}
        return {'verdict': Verdict.UNKNOWN, 'reason': 'no operation was found that stops it'}


def _found(verdict: Verdict, obstacle: Obstacle, obstacles: tuple, reason: str = ''
           ) -> dict[str, Any]:
    return {'verdict': verdict, 'operation': obstacle.operation, 'obstacles': obstacles,
            'source': obstacle.source or None, 'reason': obstacle.reason or reason}


def _bits(bits: int) -> Iterator[int]:
    while bits:
        low = bits & -bits
        yield low.bit_length() - 1
        bits ^= low


def _check(program: Program, findings: _Findings, moving: list[int]
           ) -> dict[tuple[int, int], tuple[bool | None, str]]:
    """Ask JAX's derivative of the whole program which losses depend on which parameters.

    Returns:
      By parameter and loss, whether a gradient comes, or None if JAX does not say; and a remark.
    """
    failed = {p for (p, _), found in findings.obstacles.items()
              if any(o.verdict is Verdict.UNKNOWN and o.reason != NOT_SEEN for _, o in found)}
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
                    remark = (f'the operations one by one have {words[found]} for its gradient, '
                              f"JAX's derivative of the whole has {words[says]}")
                elif found and p in pushed:
                    remark = ('forward mode alone: jax.grad does not differentiate the while loop '
                              'that it goes through')
            checked[p, k] = says, remark
    return checked
