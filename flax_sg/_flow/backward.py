"""The backward pass as it runs: norms of gradients, and where a cotangent becomes zero or infinite.

The losses are run as their jaxpr says, each equation under a name, which JAX hands on to what it
makes of the equation's derivative. The pullback is run one operation at a time too, inside one
compiled program, and each result that depends on the losses' cotangents is asked two things:
whether all of it is finite, and whether any of it is not zero. So the first operation that loses a
gradient, or spoils it, is known. Losses come one after another, through the same program.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from flax_sg._compat import jax as jax_compat
from flax_sg._flow.graph import CALLS, Graph, Step, sweep
from flax_sg._flow.tangents import evaluated, value_edges

__all__ = ['Gradient', 'gradients']

Key = tuple[int, ...]  # the ids of the equations around an equation, and of it


@dataclasses.dataclass(frozen=True)
class Gradient:
    """What came of the gradient of a loss with respect to a parameter.

    Attributes:
      norm: in as many digits as Python has.
      is_zero, is_finite: of all of it.
      zero, infinite: the step in whose derivative it becomes all zero; in whose a cotangent on its
        way, or it itself, becomes infinite or NaN; or None.
    """

    norm: float
    is_zero: bool
    is_finite: bool
    zero: Step | None
    infinite: Step | None


def gradients(
    jaxpr: ClosedJaxpr, graph: Graph, values: list[Any], moving: list[int]
) -> list[list[Gradient]]:
    """Return for each loss the gradients with respect to some values.

    Args:
      jaxpr: gives the losses, real scalars, for the values, which are arrays.
      graph: of that.
      moving: the places of values of real or complex numbers.

    Raises:
      Whatever JAX raises where it does not differentiate.
    """
    losses = range(len(jaxpr.out_avals))
    found = _Pass(jaxpr, graph, moving, losses).run(values)
    for k in losses if len(losses) > 1 else ():
        # Nothing times infinity, of another loss, is a NaN too.
        if not all(g.is_finite and g.infinite is None for g in found[k]):
            found[k] = _Pass(jaxpr, graph, moving, [k]).run(values)[0]
    return found


class _Pass:
    """A backward pass of some losses, and what is seen of it.

    Attributes:
      graph: of the pullback, from the cotangents of the losses to those of the values.
      moved: whether each node depends on the cotangents of the losses.
      seen: the results that are looked at: the equation's key, and which result.
    """

    def __init__(self, jaxpr: ClosedJaxpr, graph: Graph, moving: list[int], losses: Sequence[int]):
        self.jaxpr, self.moving, self.losses = jaxpr, moving, losses
        self.steps = {_key(step): step for step in graph.steps if step.eqn is not None}
        self.names = {key: f'{_NAME}{i}' for i, key in enumerate(self.steps)}
        self.by_name = dict(zip(self.names.values(), self.steps.values(), strict=True))

    def run(self, values: list[Any]) -> list[list[Gradient]]:
        sizes, signs = jax.device_get(jax.jit(self._run)(values))
        return [
            [
                self._gradient(i, k, size, signs[k])
                for i, size in enumerate(zip(*(s[k] for s in sizes), strict=True))
            ]
            for k in range(len(self.losses))
        ]

    def _run(self, values: list[Any]) -> Any:
        def of(*moved: Any) -> list[Any]:
            new = dict(zip(self.moving, moved, strict=True))
            args = [new.get(i, value) for i, value in enumerate(values)]
            outs = _Named(self.names).run(self.jaxpr, args)
            return [outs[k] for k in self.losses]

        outs, pull = jax.vjp(of, *(values[i] for i in self.moving))
        kinds = [x.dtype for x in outs]
        closed = jax.make_jaxpr(lambda cts: pull(cts))([jnp.zeros((), kind) for kind in kinds])
        self.graph = Graph(closed, inside=False)
        self.moved = sweep(self.graph, dict.fromkeys(self.graph.inputs, 1), value_edges)
        moves = lambda step: any(n is not None and self.moved[n] for n in step.ins)
        steps = [step for step in self.graph.steps if step.eqn is not None]
        keys = {_key(step) for step in steps if moves(step)}

        def of_one(row: jax.Array) -> Any:
            watch = _Watch(keys)
            cts = [w.astype(kind) for w, kind in zip(row, kinds, strict=True)]
            grads = watch.run(closed, cts)
            self.seen = watch.seen
            return list(map(jnp.stack, zip(*map(_size, grads), strict=True))), watch.signs()

        return lax.map(of_one, jnp.eye(len(outs)))

    def _gradient(self, i: int, k: int, size: tuple, signs: Any) -> Gradient:
        largest, relative, is_zero, is_finite = size
        norm = float(largest) * float(relative) if is_finite else float('nan')
        finite, moving = (
            dict(zip(self.seen, map(bool, column), strict=True)) for column in signs.T
        )
        needed = self._needed(i)
        given = {node: j == k for j, node in enumerate(self.graph.inputs)}
        zero = self._first(needed, moving, given, any) if is_zero else None
        infinite = None
        if not all(finite.values()):
            infinite = self._first(needed, finite, dict.fromkeys(given, True), all)
        return Gradient(norm, bool(is_zero), bool(is_finite), zero, infinite)

    def _needed(self, i: int) -> list[int]:
        node = self.graph.outputs[i]
        return sweep(self.graph, {} if node is None else {node: 1}, value_edges, back=True)

    def _first(
        self,
        needed: list[int],
        found: dict[tuple[Key, int], bool],
        given: dict[int, bool],
        among: Callable[[Iterable[bool]], bool],
    ) -> Step | None:
        """Return the first step on the way that makes of what is well something that is not.

        Args:
          needed: the nodes that the gradient is computed from.
          found: whether results are well, and ``given`` whether cotangents of losses are.
          among: whether several values are well together, where all or any are.
        """
        ins_of = lambda step: [n for n in step.ins if n is not None and self.moved[n]]
        steps = [step for step in self.graph.steps if ins_of(step)]
        well = {node: among is all for step in steps for node in step.outs} | given
        changed = True
        while changed:
            changed = False
            for step in steps:
                together = among(well.get(n, True) for n in ins_of(step))
                for place, node in enumerate(step.outs):
                    now = together if step.eqn is None else found.get((_key(step), place), together)
                    changed |= now is not well[node]
                    well[node] = now
            changed &= self.graph.loops
        for step in steps:
            bad = any(needed[node] and not well[node] for node in step.outs)
            if bad and step.eqn is not None and among(well.get(n, True) for n in ins_of(step)):
                return self._forward(step)
        return None

    def _forward(self, step: Step) -> Step:
        """Return the step of the losses of whose derivative one is part; or that one itself."""
        names = re.findall(rf'{_NAME}\d+', str(step.eqn.source_info.name_stack))
        found = self.by_name[names[-1]] if names else step
        opened = found.eqn.primitive.name in CALLS
        return step if opened else found


_NAME = 'flax_sg_step_'


def _size(grad: jax.Array) -> tuple[jax.Array, ...]:
    """Return the largest entry, the norm in units of it, and whether all are zero, or finite."""
    wide = jnp.abs(grad).astype(jnp.promote_types(jnp.float32, jnp.abs(grad).dtype))
    largest = jnp.max(wide, initial=0.0)
    unit = jnp.where(largest > 0, largest, 1.0)
    return (
        largest,
        jnp.sqrt(jnp.sum((wide / unit) ** 2)),
        ~jnp.any(grad != 0),
        jnp.all(jnp.isfinite(grad)),
    )


def _key(step: Step) -> Key:
    return (*map(id, step.context.around), id(step.eqn))


class _Watch:
    """Runs a jaxpr, and looks at the results of some of its equations.

    Attributes:
      seen: the results that were looked at.
    """

    def __init__(self, keys: Collection[Key]):
        self._keys = keys
        self._around = {key[:n] for key in keys for n in range(1, len(key))}
        self.seen: list[tuple[Key, int]] = []
        self._signs: list[jax.Array] = []

    def signs(self) -> jax.Array:
        """Return a row for each of `seen`: whether all is finite, and whether any is not zero."""
        return jnp.concatenate([jnp.zeros((0, 2), bool), *self._signs])

    def run(self, jaxpr: Any, args: list, around: Key = ()) -> list:
        """Run a jaxpr that stands in some equations."""
        consts, jaxpr = getattr(jaxpr, 'consts', ()), getattr(jaxpr, 'jaxpr', jaxpr)
        env = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        read = lambda v: v.val if isinstance(v, Literal) else env[v]
        for eqn in jaxpr.eqns:
            key = (*around, id(eqn))
            way = self.ways.get(eqn.primitive.name) if key in self._around else None
            outs = (way or type(self)._whole)(self, eqn, list(map(read, eqn.invars)), key)
            env.update(zip(eqn.outvars, outs, strict=True))
        return list(map(read, jaxpr.outvars))

    def _whole(self, eqn: JaxprEqn, args: list, key: Key) -> list:
        outs = evaluated(eqn, args)
        if key in self._keys:
            for place, out in enumerate(outs):
                if jnp.issubdtype(jnp.result_type(out), jnp.inexact):
                    self.seen.append((key, place))
                    sign = jnp.stack([jnp.all(jnp.isfinite(out)), jnp.any(out != 0)])
                    self._signs.append(sign[None])
        return outs

    def _call(self, eqn: JaxprEqn, args: list, key: Key) -> list:
        return self.run(eqn.params[CALLS[eqn.primitive.name]], args, key)

    def _scan(self, eqn: JaxprEqn, args: list, key: Key) -> list:
        consts, carries = jax_compat.scan_counts(eqn.params)
        seen: list[tuple[Key, int]] = []

        def step(carry: list, xs: list) -> tuple:
            watch = type(self)(self._keys)
            outs = watch.run(eqn.params['jaxpr'], [*args[:consts], *carry, *xs], key)
            seen[:] = watch.seen
            return outs[:carries], (outs[carries:], watch.signs())

        carry, xs = args[consts : consts + carries], args[consts + carries :]
        length, reverse = eqn.params['length'], eqn.params['reverse']
        carry, (ys, signs) = lax.scan(step, carry, xs, length=length, reverse=reverse)
        self.seen += seen
        self._signs.append(jnp.stack([signs[..., 0].all(0), signs[..., 1].any(0)], -1))
        return [*carry, *ys]

    def _cond(self, eqn: JaxprEqn, args: list, key: Key) -> list:
        seen: dict[int, list[tuple[Key, int]]] = {}

        def branch(b: int, args: list) -> tuple:
            watch = type(self)(self._keys)
            outs = watch.run(eqn.params['branches'][b], args, key)
            seen[b] = watch.seen
            return outs, watch.signs()

        places = range(len(eqn.params['branches']))
        shapes = [jax.eval_shape(lambda args, b=b: branch(b, args)[1], args[1:]) for b in places]
        none = jnp.array([True, False])  # of a branch that was not taken

        def taken(b: int, args: list) -> tuple:
            outs, signs = branch(b, args)
            rest = [jnp.broadcast_to(none, shape.shape) for shape in shapes]
            return outs, jnp.concatenate([*rest[:b], signs, *rest[b + 1 :]])

        outs, signs = lax.switch(
            args[0], [lambda args, b=b: taken(b, args) for b in places], args[1:]
        )
        self.seen += [at for b in places for at in seen[b]]
        self._signs.append(signs)
        return outs

    # What stands in other calls, as in the loops of a rule of somebody's, is looked at as a whole.
    ways: dict[str, Callable] = {
        **dict.fromkeys(('jit', 'pjit', 'closed_call', 'core_call'), _call),
        **dict.fromkeys(('checkpoint', 'remat', 'remat2'), _call),
        'scan': _scan,
        'cond': _cond,
    }


class _Named(_Watch):
    """Runs a jaxpr, with some of its equations under names; what is rematerialised stays so."""

    ways = {
        name: way
        for name, way in _Watch.ways.items()
        if 'remat' not in name and name != 'checkpoint'
    }

    def _whole(self, eqn: JaxprEqn, args: list, key: Key) -> list:
        if key not in self._keys:
            return evaluated(eqn, args)
        with jax.named_scope(self._keys[key]):
            return evaluated(eqn, args)
