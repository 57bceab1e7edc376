"""A jaxpr with its calls, loops and branches laid open, as one graph of values and steps.

A node is a value, a number; a step leads from some nodes to others. What stands in the body of a
scan or of a jitted function is a step like any other, once for each place that it is called from.
So a question about all paths through a program is one sweep over the steps, and as many again as
loops are nested. The graph knows JAX's ways of calling, and nothing about derivatives.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from jax.extend.core import JaxprEqn, Literal

from flax_sg._compat import jax as jax_compat
from flax_sg._views.masks import BINDER, NO_VIEW, for_view, inputs_of_views

__all__ = ['CALLS', 'Call', 'Context', 'Edge', 'Graph', 'Step', 'sweep']

Node = int | None  # None: a literal


@dataclasses.dataclass(eq=False, slots=True)
class Call:
    """A call of a jitted function; two calls are two, though their equation may be one."""

    eqn: JaxprEqn


@dataclasses.dataclass(frozen=True, slots=True)
class Context:
    """Where an equation stands.

    Attributes:
      around: the equations in whose bodies it is, the outermost first.
      calls: the calls of jitted functions among these.
      manual: the `shard_map`s among these.
      entry: the entry of the views whose target it is part of, or ''.
    """

    around: tuple[JaxprEqn, ...] = ()
    calls: tuple[Call, ...] = ()
    manual: tuple[JaxprEqn, ...] = ()
    entry: str = ''


_TOP = Context()


@dataclasses.dataclass(slots=True)
class Step:
    """An equation, or a joint of several values into one.

    Attributes:
      eqn: the equation, or None.
      at: the equation; of a joint that of the loop, branch or reference that it is for.
      of_nan: the operand that comes out for a NaN alone, as in `where(isnan(x), x, 1.0)`, or None.
      choice: the operand that says which of the others comes out, or None.
    """

    ins: tuple[Node, ...]
    outs: tuple[int, ...]
    eqn: JaxprEqn | None
    at: JaxprEqn
    context: Context
    of_nan: int | None = None
    choice: int | None = None


Edge = tuple[int, int]

_MOVED = ('broadcast_in_dim', 'reshape', 'squeeze', 'transpose', 'copy', 'slice')

# Calls of a jaxpr on the equation's operands, and what the parameter is called.
CALLS = {
    'jit': 'jaxpr',
    'pjit': 'jaxpr',
    'closed_call': 'call_jaxpr',
    'core_call': 'call_jaxpr',
    'checkpoint': 'jaxpr',
    'remat': 'jaxpr',
    'remat2': 'jaxpr',
    'shard_map': 'jaxpr',
    'custom_vmap_call': 'call',
    'eval_jaxpr': 'call_jaxpr',
    'flax_sg_push': 'jaxpr',
}
_CUSTOM = {'custom_jvp_call': 'call_jaxpr', 'custom_vjp_call': 'call_jaxpr'}


class Graph:
    """The graph of a jaxpr.

    Args:
      jaxpr: closed or not.
      inside: lay open functions with a derivative rule of their own too; or says of which.
      context: where it stands.

    Attributes:
      inputs: the nodes of its inputs; and ``outputs``, None for a literal.
      steps: in an order in which each comes after what it needs, unless there are ``loops``.
      carried: the nodes in the carries of while loops.
    """

    def __init__(
        self, jaxpr: Any, *, inside: bool | Callable[[JaxprEqn], bool], context: Context = _TOP
    ):
        self.steps: list[Step] = []
        self.size = 0
        self.loops = False
        self.carried: list[int] = []
        self._nan: dict[Node, int] = {}  # what tells a NaN from numbers
        self._inside = inside if callable(inside) else lambda eqn: inside
        self.inputs = self._new(len(_open(jaxpr).invars))
        self.outputs = self._inline(jaxpr, self.inputs, context)

    @functools.cached_property
    def losses(self) -> dict[int, int]:
        """The outputs by node, as sets: which of them it is."""
        found: dict[int, int] = {}
        for k, node in enumerate(self.outputs):
            if node is not None:
                found[node] = found.get(node, 0) | 1 << k
        return found

    def _new(self, count: int) -> list[int]:
        self.size += count
        return list(range(self.size - count, self.size))

    def _join(self, at: JaxprEqn, context: Context, *ins: Node, choice: int | None = None) -> int:
        (node,) = self._new(1)
        self.steps.append(Step(ins, (node,), None, at, context, choice=choice))
        return node

    def _inline(self, jaxpr: Any, ins: list[Node], context: Context) -> list[Node]:
        jaxpr = _open(jaxpr)
        nodes: dict[int, Node] = dict(zip(map(id, jaxpr.invars), ins, strict=True))
        nodes.update(zip(map(id, jaxpr.constvars), self._new(len(jaxpr.constvars)), strict=True))
        of = lambda v: None if isinstance(v, Literal) else nodes[id(v)]
        for eqn in jaxpr.eqns:
            outs = self._equation(eqn, [of(v) for v in eqn.invars], context)
            nodes.update(zip(map(id, eqn.outvars), outs, strict=True))
        return [of(v) for v in jaxpr.outvars]

    def _equation(self, eqn: JaxprEqn, ins: list[Node], context: Context) -> list[Node]:
        name = eqn.primitive.name
        call = CALLS.get(name) or (_CUSTOM.get(name) if self._inside(eqn) else None)
        inner = dataclasses.replace(context, around=(*context.around, eqn))
        if name in ('jit', 'pjit'):
            inner = dataclasses.replace(inner, calls=(*context.calls, Call(eqn)))
        if name == 'shard_map':
            inner = dataclasses.replace(inner, manual=(*context.manual, eqn))
        if call is not None:
            return self._inline(eqn.params[call], ins, inner)
        if name in _LAID_OPEN:
            return _LAID_OPEN[name](self, eqn, ins, context, inner)
        outs = self._new(len(eqn.outvars))
        # What is written to a reference may come out of it wherever it is read.
        refs = [n for n, v in zip(ins, eqn.invars, strict=True) if jax_compat.is_ref(v.aval)]
        joined = refs or any(jax_compat.is_ref(v.aval) for v in eqn.outvars)
        self.loops |= bool(joined)
        step = Step(tuple(ins), (*outs, *refs), None if joined else eqn, eqn, context)
        self._note_nan(name, ins, outs)
        if name == 'select_n':
            step.choice, step.of_nan = 0, self._nan.get(ins[0])
        self.steps.append(step)
        return outs

    def _note_nan(self, name: str, ins: list[Node], outs: list[int]) -> None:
        """Note what tells a NaN from numbers: the place of what a `select_n` takes for it."""
        place = None
        if name in ('ne', 'eq') and ins[0] is not None and ins[0] == ins[1]:
            place = 2 if name == 'ne' else 1
        elif name in _MOVED and ins[0] in self._nan:
            place = self._nan[ins[0]]
        elif name == 'not' and ins[0] in self._nan:
            place = 3 - self._nan[ins[0]]
        if place is not None:
            self._nan.update(dict.fromkeys(outs, place))

    def _scan(self, eqn: JaxprEqn, ins: list[Node], context: Context, inner: Context) -> list[Node]:
        consts, carries = jax_compat.scan_counts(eqn.params)
        carry = ins[consts : consts + carries]
        length, body = eqn.params['length'], eqn.params['jaxpr']
        run = lambda carry: self._inline(
            body, [*ins[:consts], *carry, *ins[consts + carries :]], inner
        )
        if length <= _UNROLLED:
            made = []
            for _ in range(length):
                outs = run(carry)
                carry = outs[:carries]
                made.append(outs[carries:])
            ys = [
                self._join(eqn, context, *(step[i] for step in made))
                for i in range(len(_open(body).outvars) - carries)
            ]
            return [*carry, *ys]
        joins = [self._join(eqn, context, node) for node in carry]
        start = len(self.steps) - carries
        outs = run(joins)
        self._loop_back(start, outs[:carries])
        return outs

    def _loop_back(self, start: int, outs: list[Node]) -> None:
        for step, out in zip(self.steps[start : start + len(outs)], outs, strict=True):
            step.ins = (*step.ins, out)
        self.loops = True

    def _while(
        self, eqn: JaxprEqn, ins: list[Node], context: Context, inner: Context
    ) -> list[Node]:
        params = eqn.params
        cond, body = params['cond_nconsts'], params['body_nconsts']
        carry = ins[cond + body :]
        joins = [self._join(eqn, context, node) for node in carry]
        start = len(self.steps) - len(carry)
        self.carried += joins
        (more,) = self._inline(params['cond_jaxpr'], [*ins[:cond], *joins], inner)
        outs = self._inline(params['body_jaxpr'], [*ins[cond : cond + body], *joins], inner)
        self._loop_back(start, outs)
        return [self._join(eqn, context, join, more, choice=1) for join in joins]

    def _cond(self, eqn: JaxprEqn, ins: list[Node], context: Context, inner: Context) -> list[Node]:
        branches = [self._inline(b, ins[1:], inner) for b in eqn.params['branches']]
        count = len(branches)
        outs = zip(*branches, strict=True)
        return [self._join(eqn, context, *each, ins[0], choice=count) for each in outs]

    def _views(
        self, eqn: JaxprEqn, ins: list[Node], context: Context, inner: Context
    ) -> list[Node]:
        params = eqn.params
        jaxpr, count, nesting = params['jaxpr'].jaxpr, params['count'], params['nesting']
        outs: list[Node] = []
        inputs = inputs_of_views(ins, params['shared'], params['views'])
        for view, name in enumerate(params['views']):
            entry = dataclasses.replace(inner, entry=name)
            outs += self._inline(for_view(jaxpr, nesting, view), inputs[view], entry)[:count]
        return outs + self._inline(for_view(jaxpr, nesting, NO_VIEW), inputs[0], inner)[count:]


# A longer loop counts as one of any number of steps: what needs just so many, as two values that
# change places do, is taken to be possible.
_UNROLLED = 4
_LAID_OPEN = {'scan': Graph._scan, 'while': Graph._while, 'cond': Graph._cond, BINDER: Graph._views}


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, 'jaxpr', jaxpr)


def sweep(
    graph: Graph,
    start: dict[int, int],
    edges: Callable[[Step], Iterator[Edge]],
    *,
    back: bool = False,
) -> list[int]:
    """Carry sets, the bits of an int each, along edges until nothing changes.

    Args:
      start: the sets of some nodes.
      edges: the edges of a step. A step is asked for its edges only when some set gets to it.
      back: go from outputs to inputs.

    Returns:
      The set of each node.
    """
    sets = [0] * graph.size
    for node, bits in start.items():
        sets[node] |= bits
    steps = graph.steps[::-1] if back else graph.steps
    changed = True
    while changed:
        changed = False
        for step in steps:
            for node in step.outs if back else step.ins:
                if node is not None and sets[node]:
                    break
            else:
                continue
            for source, target in edges(step):
                if back:
                    source, target = target, source
                new = sets[source] | sets[target]
                if new != sets[target]:
                    sets[target] = new
                    changed = True
        changed = changed and graph.loops
    return sets
