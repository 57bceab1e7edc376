"""The backward pass as it runs: norms of gradients, and where a cotangent becomes zero or infinite.

The losses are run as their jaxpr says, each equation under a name, which JAX hands on to what it
makes of the equation's derivative. The pullback is run one equation at a time too, once for each
loss, of which it takes only what that loss's cotangent gets to; each result is asked two things:
whether all of it is finite, and whether any of it is not zero. So the first operation that loses a
gradient, or spoils it, is known. Nothing is compiled but single operations and loops.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from flax_sg._compat import jax as jax_compat
from flax_sg._flow.graph import CALLS, Graph, Step, sweep
from flax_sg._flow.tangents import evaluated, value_edges

__all__ = ['BackwardPass', 'Gradient']

Key = tuple[int, ...]  # the ids of the equations around an equation, and of it


@dataclasses.dataclass(frozen=True)
class Gradient:
    """What came of the gradient of a loss with respect to a parameter.

    Attributes:
      norm: in as many digits as Python has.
      is_zero, is_finite: of all of it.
      zero, infinite: find the step in whose derivative it becomes all zero; in whose a cotangent on
        its way, or it itself, becomes infinite or NaN; or None.
    """

    norm: float
    is_zero: bool
    is_finite: bool
    zero: Callable[[], Step | None]
    infinite: Callable[[], Step | None]


class BackwardPass:
    """A backward pass of losses, and what is seen of it.

    Args:
      jaxpr: gives the losses, real scalars, for some arrays.
      graph: of that.
      moving: the places of arrays of real or complex numbers, to differentiate with respect to.

    Attributes:
      graph: of the pullback, from the cotangents of the losses to those of the arrays.
      moved: which losses' cotangents each node depends on.
    """

    def __init__(self, jaxpr: ClosedJaxpr, graph: Graph, moving: list[int]):
        self.jaxpr, self.moving = jaxpr, moving
        self.steps = {_key(step): step for step in graph.steps if step.eqn is not None}
        self.names = {key: f'{_NAME}{i}' for i, key in enumerate(self.steps)}
        self.by_name = dict(zip(self.names.values(), self.steps.values(), strict=True))

    def run(self, values: list[Any]) -> list[list[Gradient]]:
        """Return for each loss the gradients.

        Raises:
          Whatever JAX raises where it does not differentiate.
        """

        def of(*moved: Any) -> list[Any]:
            new = dict(zip(self.moving, moved, strict=True))
            args = [new.get(i, value) for i, value in enumerate(values)]
            return _Named(self.names).run(self.jaxpr, args)

        outs, pull = jax.vjp(of, *(jnp.asarray(values[i]) for i in self.moving))
        closed = jax.make_jaxpr(lambda cts: pull(cts))(list(map(jnp.zeros_like, outs)))
        self.graph = Graph(closed, inside=False)
        starts = {node: 1 << k for k, node in enumerate(self.graph.inputs)}
        self.moved = sweep(self.graph, starts, value_edges)
        losses_of: dict[Key, int] = {}
        for step in self.graph.steps:
            if step.eqn is not None:
                sets = (self.moved[n] for n in step.ins if n is not None)
                losses_of[_key(step)] = functools.reduce(
                    int.__or__, sets, losses_of.get(_key(step), 0)
                )
        keys = {key for key, losses in losses_of.items() if losses}
        compiled: dict[Key, Any] = {}
        rows = []
        for k, out in enumerate(outs):
            alive = {key for key in keys if losses_of[key] >> k & 1}
            watch = _Watch(keys, alive, compiled)
            cts = [jnp.ones_like(out) if j == k else _ZERO for j in range(len(outs))]
            sizes = [_SIZES if g is _ZERO else _size(g) for g in watch.run(closed, cts)]
            sizes, signs = jax.device_get((sizes, watch.found))
            largest = np.concatenate([np.zeros(0), *map(np.atleast_1d, signs)])
            rows.append(self._row(k, sizes, largest, watch.seen))
        return rows

    def _row(
        self, k: int, sizes: list[tuple], signs: np.ndarray, seen: list[tuple[Key, int]]
    ) -> list[Gradient]:
        finite = dict(zip(seen, np.isfinite(signs).tolist(), strict=True))
        moving = dict(zip(seen, (signs != 0).tolist(), strict=True))
        given = {node: j == k for j, node in enumerate(self.graph.inputs)}
        row = []
        for i, (most, relative, is_zero) in enumerate(sizes):
            is_finite = bool(np.isfinite(most))
            first = functools.partial(self._first, i, k)
            zero = functools.partial(first, moving, given, any)
            infinite = lambda: None
            if not all(finite.values()):
                infinite = functools.partial(first, finite, dict.fromkeys(given, True), all)
            norm = float(most) * float(relative) if is_finite else float('nan')
            row.append(Gradient(norm, bool(is_zero), is_finite, zero, infinite))
        return row

    def _needed(self, i: int) -> list[int]:
        node = self.graph.outputs[i]
        return sweep(self.graph, {} if node is None else {node: 1}, value_edges, back=True)

    def _first(
        self,
        i: int,
        k: int,
        found: dict[tuple[Key, int], bool],
        given: dict[int, bool],
        among: Callable[[Iterable[bool]], bool],
    ) -> Step | None:
        """Return the first step on the way that makes of what is well something that is not.

        Args:
          i, k: the places of the gradient and of the loss.
          found: whether results are well, and ``given`` whether cotangents of losses are.
          among: whether several values are well together, where all or any are.
        """
        needed = self._needed(i)
        ins_of = lambda step: [n for n in step.ins if n is not None and self.moved[n] >> k & 1]
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


@jax.jit
def _size(grad: jax.Array) -> tuple[jax.Array, ...]:
    """Return the largest entry, the norm in units of it, and whether all are zero."""
    size = jnp.abs(grad)
    wide = size.astype(jnp.promote_types(jnp.float32, size.dtype))
    largest = jnp.max(wide, initial=0.0)
    unit = jnp.where(largest > 0, largest, 1.0)
    return largest, jnp.sqrt(jnp.sum((wide / unit) ** 2)), ~jnp.any(grad != 0)


_SIZES = (0.0, 0.0, True)  # of nothing


@jax.jit
def _sign(value: jax.Array) -> jax.Array:
    """Return a number that is zero if all of a value is, and not finite if any of it is not."""
    size = jnp.abs(value)
    return jnp.max(size.astype(jnp.promote_types(jnp.float32, size.dtype)), initial=0.0)


def _key(step: Step) -> Key:
    return (*map(id, step.context.around), id(step.eqn))


_ZERO = object()  # a cotangent that is not there


class _Watch:
    """Runs a jaxpr, and looks at the results of some of its equations.

    Args:
      keys: of the equations that depend on cotangents.
      alive: those of them that are to be run; the results of others are zero. None: all.
      compiled: loops and branches that were compiled before.

    Attributes:
      seen: the results that were looked at.
      found: the `_sign` of each, one or several together.
    """

    def __init__(
        self,
        keys: Collection[Key],
        alive: set[Key] | None = None,
        compiled: dict[Key, Any] | None = None,
    ):
        self._keys, self._alive, self._compiled = keys, alive, compiled
        self._around = _around(keys)
        self._entered = self._around if alive is None else _around(alive)
        self.seen: list[tuple[Key, int]] = []
        self.found: list[jax.Array] = []

    def signs(self) -> jax.Array:
        """Return the `_sign` of each of `seen`."""
        return jnp.concatenate([jnp.zeros(0), *map(jnp.atleast_1d, self.found)])

    def run(self, jaxpr: Any, args: list, around: Key = ()) -> list:
        """Run a jaxpr that stands in some equations."""
        consts, jaxpr = getattr(jaxpr, 'consts', ()), getattr(jaxpr, 'jaxpr', jaxpr)
        env = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        read = lambda v: v.val if isinstance(v, Literal) else env[v]
        for eqn in jaxpr.eqns:
            key = (*around, id(eqn))
            if self._is_left_out(key):
                env.update(dict.fromkeys(eqn.outvars, _ZERO))
                continue
            ins = list(map(read, eqn.invars))
            there = [x for x in ins if x is not _ZERO]
            if eqn.primitive.name == 'add_any' and len(there) == 1:
                env[eqn.outvars[0]] = there[0]  # another loss adds nothing
                continue
            way = self.ways.get(eqn.primitive.name) if key in self._entered else None
            ins = [_zeros(v) if x is _ZERO else x for v, x in zip(eqn.invars, ins, strict=True)]
            outs = (way or type(self)._whole)(self, eqn, ins, key)
            env.update(zip(eqn.outvars, outs, strict=True))
        return list(map(read, jaxpr.outvars))

    def _is_left_out(self, key: Key) -> bool:
        if self._alive is None or key in self._alive or key in self._entered:
            return False
        return key in self._keys or key in self._around

    def _whole(self, eqn: JaxprEqn, args: list, key: Key) -> list:
        outs = evaluated(eqn, args)
        if key in self._keys:
            for place, out in enumerate(outs):
                if jnp.issubdtype(jnp.result_type(out), jnp.inexact):
                    self.seen.append((key, place))
                    self.found.append(_sign(out))
        return outs

    def _inner(self, run: Callable[[_Watch], Any]) -> tuple[Any, jax.Array, list]:
        """Run something with another watch; return its results, and what that has seen."""
        watch = type(self)(self._keys)
        outs = run(watch)
        return outs, watch.signs(), watch.seen

    def _compile(self, key: Key, run: Callable[[list], tuple], args: list) -> list:
        """Run what has an inner watch; compiled once for all losses."""
        if self._compiled is None:
            outs, signs, seen = run(args)
        else:
            if key not in self._compiled:
                seen = []

                def traced(args: list) -> tuple:
                    outs, signs, now = run(args)
                    seen[:] = now
                    return outs, signs

                self._compiled[key] = jax.jit(traced), seen
            fn, seen = self._compiled[key]
            outs, signs = fn(args)
        self.seen += seen
        self.found.append(signs)
        return outs

    def _call(self, eqn: JaxprEqn, args: list, key: Key) -> list:
        return self.run(eqn.params[CALLS[eqn.primitive.name]], args, key)

    def _scan(self, eqn: JaxprEqn, args: list, key: Key) -> list:
        consts, carries = jax_compat.scan_counts(eqn.params)

        def run(args: list) -> tuple:
            seen: list[tuple[Key, int]] = []

            def step(carry: list, xs: list) -> tuple:
                body, ins = eqn.params['jaxpr'], [*args[:consts], *carry, *xs]
                outs, signs, seen[:] = self._inner(lambda watch: watch.run(body, ins, key))
                return outs[:carries], (outs[carries:], signs)

            carry, xs = args[consts : consts + carries], args[consts + carries :]
            length, reverse = eqn.params['length'], eqn.params['reverse']
            carry, (ys, signs) = lax.scan(step, carry, xs, length=length, reverse=reverse)
            return [*carry, *ys], jnp.max(signs, 0, initial=0.0), seen

        return self._compile(key, run, args)

    def _cond(self, eqn: JaxprEqn, args: list, key: Key) -> list:
        branches = eqn.params['branches']

        def run(args: list) -> tuple:
            def branch(b: int, args: list) -> tuple:
                return self._inner(lambda watch: watch.run(branches[b], args, key))

            seen: dict[int, list[tuple[Key, int]]] = {}

            def shape(b: int) -> Any:
                def signs(args: list) -> jax.Array:
                    _, found, seen[b] = branch(b, args)
                    return found

                return jax.eval_shape(signs, args[1:])

            shapes = [shape(b) for b in range(len(branches))]

            def taken(b: int, args: list) -> tuple:
                outs, signs, _ = branch(b, args)
                rest = [jnp.zeros(other.shape) for other in shapes]
                return outs, jnp.concatenate([*rest[:b], signs, *rest[b + 1 :]])

            each = [functools.partial(taken, b) for b in range(len(branches))]
            outs, signs = lax.switch(args[0], each, args[1:])
            return outs, signs, [at for b in range(len(branches)) for at in seen[b]]

        return self._compile(key, run, args)

    # What stands in other calls, as in the loops of a rule of somebody's, is looked at as a whole.
    ways: dict[str, Callable] = {
        **dict.fromkeys(('jit', 'pjit', 'closed_call', 'core_call'), _call),
        **dict.fromkeys(('checkpoint', 'remat', 'remat2'), _call),
        'scan': _scan,
        'cond': _cond,
    }


def _around(keys: Collection[Key]) -> set[Key]:
    return {key[:n] for key in keys for n in range(1, len(key))}


def _zeros(v: Any) -> jax.Array:
    return jnp.zeros(v.aval.shape, v.aval.dtype)


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
