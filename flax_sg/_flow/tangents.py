"""Which outputs of an equation move with which inputs, asked of JAX's own differentiation of it.

The equation alone is differentiated, abstractly, and the answer is read off what JAX made of it: a
tangent survives where a path leads from the input's tangent to the output's. So there is no table
of operations here that could go stale, and functions with rules of their own decide for themselves.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, DebugInfo, Jaxpr, JaxprEqn, Literal, Var, jaxprs_in_params
from jax.sharding import PartitionSpec

from flax_sg._compat import jax as jax_compat
from flax_sg._flow.graph import Context, Edge, Graph, Step, sweep
from flax_sg._jax.jaxprs import has_tangent
from flax_sg._views.masks import counts

__all__ = ['Answer', 'Differentiation', 'dependence', 'evaluated', 'value_edges']


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What becomes of tangents in an equation.

    Attributes:
      live: for each output, the positions of the operands whose tangents it has.
      failures: the positions of operands in which JAX does not differentiate, and why.
    """

    live: tuple[frozenset[int], ...]
    failures: dict[int, str] = dataclasses.field(default_factory=dict)


# Of several operands, each comes out by itself. (This is about values, not about tangents.)
_SEPARATE = frozenset(
    {
        'device_put',
        'optimization_barrier',
        'pbroadcast',
        'pmax',
        'pmin',
        'psum',
        'psum2',
        'psum_invariant',
        'pvary',
    }
)


def value_edges(step: Step) -> Iterable[Edge]:
    """Return from which nodes a step computes which."""
    name = None if step.eqn is None else step.eqn.primitive.name
    if name in _SEPARATE:
        pairs = zip(step.ins, step.outs, strict=True)
    elif name == 'sort':  # the keys put each operand in order
        keys = step.ins[: step.eqn.params['num_keys']]
        pairs = {*itertools.product(keys, step.outs), *zip(step.ins, step.outs, strict=True)}
    else:
        pairs = itertools.product(step.ins, step.outs)
    return [(i, o) for i, o in pairs if i is not None]


def dependence(jaxpr: Any) -> list[int]:
    """Return from which inputs each output is computed, as bits."""
    graph = Graph(jaxpr, inside=True)
    start = {node: 1 << i for i, node in enumerate(graph.inputs)}
    sets = sweep(graph, start, _tangent_edges)
    return [0 if node is None else sets[node] for node in graph.outputs]


def _tangent_edges(step: Step) -> Iterable[Edge]:
    """Return from which nodes to which tangents get in a program that computes with tangents."""
    if step.eqn is not None and counts(step.eqn) is False:
        return ()  # the tangent of what another entry of some views marks
    if step.of_nan is None:
        return value_edges(step)
    return [
        (i, o)
        for place, i in enumerate(step.ins)
        if place != step.of_nan and i is not None
        for o in step.outs
    ]


class Differentiation:
    """Answers about the steps of graphs, each kind of which is asked once."""

    def __init__(self) -> None:
        self._answers: dict[Any, Answer] = {}
        self._bodies: dict[int, tuple[Any, list[int]]] = {}

    def failures(self, step: Step) -> dict[int, str]:
        """Return why JAX does not differentiate a step in some of its operands, by position."""
        return {} if step.eqn is None else self._answer(step).failures

    def computed(self, step: Step) -> Iterable[Edge]:
        """Return from which nodes a step computes which."""
        eqn = step.eqn
        body = None if eqn is None else eqn.params.get('call_jaxpr')
        if body is None or len(getattr(body, 'jaxpr', body).invars) != len(eqn.invars):
            return value_edges(step)
        if id(body) not in self._bodies:  # a function with a rule of its own
            self._bodies[id(body)] = body, dependence(body)
        return [
            (i, o)
            for o, bits in zip(step.outs, self._bodies[id(body)][1], strict=True)
            for place, i in enumerate(step.ins)
            if i is not None and bits >> place & 1
        ]

    def moved(self, step: Step) -> Iterable[Edge]:
        """Return from which nodes to which tangents get in a step."""
        if step.eqn is None:
            return value_edges(step)
        return [
            (step.ins[place], o)
            for o, places in zip(step.outs, self._answer(step).live, strict=True)
            for place in places
            if step.ins[place] is not None and place != step.of_nan
        ]

    def _answer(self, step: Step) -> Answer:
        eqn, context = step.eqn, step.context
        key = _key(eqn, context)
        try:
            answer = self._answers.get(key)
        except TypeError:  # a parameter has no hash
            key = id(eqn)
            answer = self._answers.get(key)
        if answer is None:
            answer = self._answers[key] = _ask(eqn, context)
        return answer


def _key(eqn: JaxprEqn, context: Context) -> Any:
    places: dict[int, int] = {}  # one variable may be several operands
    return (
        eqn.primitive,
        tuple(sorted(eqn.params.items(), key=lambda item: item[0])),
        tuple(
            (v.aval, None if isinstance(v, Literal) else places.setdefault(id(v), i))
            for i, v in enumerate(eqn.invars)
        ),
        tuple(id(call) for call in context.manual),
    )


def _ask(eqn: JaxprEqn, context: Context) -> Answer:
    inputs: list[Var] = []
    for v in eqn.invars:
        if not isinstance(v, Literal) and v not in inputs:
            inputs.append(v)
    moving = [i for i, v in enumerate(inputs) if has_tangent(v.aval)]
    live: list[set[int]] = [set() for _ in eqn.outvars]
    failures: dict[int, str] = {}
    if not any(has_tangent(v.aval) for v in eqn.outvars):
        moving = []
    places = [[i for i, v in enumerate(eqn.invars) if v is var] for var in inputs]

    def ask(moving: list[int]) -> None:
        bits, failure = _survive(SingleEquation(eqn, inputs, moving), context)
        if failure and len(moving) > 1:
            ask(moving[: len(moving) // 2])
            ask(moving[len(moving) // 2 :])
        elif failure:
            failures.update(dict.fromkeys(places[moving[0]], failure))
        else:
            for found, b in zip(live, bits, strict=True):
                found.update(p for j, i in enumerate(moving) if b >> j & 1 for p in places[i])

    if moving:
        ask(moving)
    return Answer(tuple(map(frozenset, live)), failures)


def _survive(alone: SingleEquation, context: Context) -> tuple[list[int], str]:
    """Return which of the moving inputs each output moves with, as bits; or why it is not known."""
    # A custom_vjp has a rule in reverse mode alone, though jax.jvp may be traced through it.
    holds = any(True for _ in jaxprs_in_params(alone.eqn.params))
    rules = (_reverse, _forward) if holds else (_forward, _reverse)
    failures = []
    for trace in [alone.trace, alone.trace_manual] if context.manual else [alone.trace]:
        for rule in rules:
            try:
                return rule(alone, functools.partial(trace, context)), ''
            except Exception as error:  # whatever the rule of the primitive raises
                failures.append(f'{type(error).__name__}: {_first_line(error)}')
    return [], failures[-1] if context.manual else failures[0]


def evaluated(eqn: JaxprEqn, args: list[Any]) -> list[Any]:
    """Return the results of an equation."""
    new = [Var(v.aval) for v in eqn.invars]
    return jax.core.eval_jaxpr(_alone(eqn.replace(invars=new), new), [], *args)


def _alone(eqn: JaxprEqn, inputs: list[Var]) -> Jaxpr:
    return Jaxpr(
        constvars=[],
        invars=inputs,
        outvars=list(eqn.outvars),
        eqns=[eqn],
        effects=eqn.effects,
        debug_info=DebugInfo('equation', eqn.primitive.name, None, None),
    )


class SingleEquation:
    """An equation as a function of its inputs, of which some move."""

    def __init__(self, eqn: JaxprEqn, inputs: list[Var], moving: list[int]):
        self.eqn, self.inputs, self.moving = eqn, inputs, moving
        self.moved = [i for i, v in enumerate(eqn.outvars) if has_tangent(v.aval)]
        self.outputs = eqn.outvars
        self._jaxpr = _alone(eqn, inputs)

    def of(self, xs: list[Any]) -> Callable[..., list]:
        """Return the equation as a function of what moves to what may move."""

        def run(*moving: Any) -> list:
            values = list(xs)
            for i, x in zip(self.moving, moving, strict=True):
                values[i] = x
            outs = jax.core.eval_jaxpr(self._jaxpr, [], *values)
            return [outs[i] for i in self.moved]

        return run

    def trace(self, context: Context, fn: Callable, ins: list[Any], outs: list[Any]) -> ClosedJaxpr:
        """Trace ``fn`` of the inputs, and of one more value like each of ``ins``."""
        like = lambda vs: [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in vs]
        return jax.make_jaxpr(fn)(like(self.inputs), like(ins))

    def trace_manual(
        self, context: Context, fn: Callable, ins: list[Any], outs: list[Any]
    ) -> ClosedJaxpr:
        """Do so in the body of a `shard_map` like that around the equation."""
        # What varies gets a leading axis that is divided over the mesh.
        axes = lambda v: tuple(sorted(jax_compat.varying(v.aval)))
        params = context.manual[-1].params
        sizes = params['mesh'].shape

        def size(v: Any) -> int:
            n = 1
            for name in axes(v):
                n *= sizes[name]
            return n

        whole = lambda vs: [
            jax.ShapeDtypeStruct((size(v), *v.aval.shape), v.aval.dtype) for v in vs
        ]
        specs = lambda vs: [PartitionSpec(axes(v) or None) for v in vs]

        def body(xs: list[Any], ts: list[Any]) -> list[Any]:
            strip = lambda values: [x.reshape(x.shape[1:]) for x in values]
            return [x[None] for x in fn(strip(xs), strip(ts))]

        mapped = jax.shard_map(
            body,
            mesh=params['mesh'],
            in_specs=(specs(self.inputs), specs(ins)),
            out_specs=specs(outs),
            axis_names=set(params['newly_manual_axes']),
            check_vma=params['check_vma'],
        )
        return jax.make_jaxpr(mapped)(whole(self.inputs), whole(ins))


def _forward(alone: SingleEquation, trace: Callable) -> list[int]:
    moving = [alone.inputs[i] for i in alone.moving]
    outs = [alone.outputs[i] for i in alone.moved]

    def pushed(xs: list[Any], ts: list[Any]) -> list[Any]:
        return jax.jvp(alone.of(xs), [xs[i] for i in alone.moving], ts)[1]

    jaxpr = trace(pushed, moving, outs)
    bits = [b >> len(alone.inputs) for b in dependence(jaxpr)]
    return _spread(bits, alone)


def _reverse(alone: SingleEquation, trace: Callable) -> list[int]:
    moving = [alone.inputs[i] for i in alone.moving]
    outs = [alone.outputs[i] for i in alone.moved]

    def pulled(xs: list[Any], cts: list[Any]) -> list[Any]:
        return list(jax.vjp(alone.of(xs), *(xs[i] for i in alone.moving))[1](cts))

    jaxpr = trace(pulled, outs, moving)
    back = [b >> len(alone.inputs) for b in dependence(jaxpr)]
    bits = [sum(1 << i for i, b in enumerate(back) if b >> o & 1) for o in range(len(outs))]
    return _spread(bits, alone)


def _spread(bits: list[int], alone: SingleEquation) -> list[int]:
    """Put zeros where an output cannot move."""
    found = dict(zip(alone.moved, bits, strict=True))
    return [found.get(i, 0) for i in range(len(alone.outputs))]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition('\n')[0]
