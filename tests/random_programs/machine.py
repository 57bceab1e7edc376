"""What random programs mean, as pure functions of two copies of the parameters."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from random_programs.filters import Path
from random_programs.masks import ALL_KINDS, Mask
from random_programs.operations import OPS, pair, put
from random_programs.syntax import (
    Alias,
    Block,
    Call,
    Class,
    Closure,
    Lifted,
    Mirror,
    New,
    Noise,
    Program,
    Raw,
    Read,
    Ref,
    Stat,
    Stepped,
    Use,
)


@dataclasses.dataclass
class Inst:
    """A module: its class, where its variables are, and what is attached to it."""

    cls: Class
    path: Path
    lifts: tuple = ()
    fields: dict[str, Inst] = dataclasses.field(default_factory=dict)
    masks: tuple = ()  # of the class and of mirrors: (mask, opener)


class Machine:
    """Run a program on two copies of its parameters: reads inside blocks take selected ones of bar.

    Loops are unrolled. The statistics are threaded through as a dict.
    """

    def __init__(self, phi: Any, bar: Any, stats: Any, noise: list[jax.Array]):
        self.copies = {k: flatten(v) for k, v in (('phi', phi), ('bar', bar))}
        self.stats = flatten(stats)
        self.noise = iter(noise)
        self.stack: list[tuple[Mask, Path]] = []
        self.slices: list[tuple[Path, int, tuple[str, ...]]] = []

    @contextlib.contextmanager
    def open(self, *masks: tuple[Mask, Path]) -> Iterator[None]:
        before = list(self.stack)
        self.stack += masks
        yield
        self.stack = before

    @contextlib.contextmanager
    def slice(self, path: Path, i: int, *collections: str) -> Iterator[None]:
        self.slices.append((path, i, collections))
        yield
        self.slices.pop()

    def covering(self, path: Path, collection: str, masks: tuple = ()) -> list[str]:
        """Return the kinds of the transforms of a variable, outermost first.

        A masked module's own is open while one of its methods runs, and does not count twice.
        """
        open_now = {(id(m), opener): m for m, opener in (*self.stack, *masks)}
        return [
            m.kind for (_, opener), m in open_now.items() if m.selects(opener, path, collection)
        ]

    def index(self, path: Path, collection: str) -> tuple[int, ...]:
        return tuple(i for p, i, cols in self.slices if path[: len(p)] == p and collection in cols)

    def param(self, inst: Inst, name: str) -> jax.Array:
        path = (*inst.path, name)
        kinds = self.covering(path, 'params', inst.masks)
        copy = 'phi' if all(ALL_KINDS[kind][1] for kind in kinds) else 'bar'
        value = self.copies[copy][path]  # as a whole: Flax hands on what is transformed
        return transformed(kinds, value, path)[self.index(path, 'params')]

    def value(self, inst: Inst, name: str) -> jax.Array:
        if name in inst.cls.derived:
            fn, param, _ = inst.cls.derived[name]
            return OPS[fn](self.param(inst, param))
        return self.param(inst, name)

    def resolve(self, ref: Ref, me: Inst, env: dict) -> Inst:
        if ref[0] == 'self':
            return me
        if ref[0] == 'local':
            return env[ref[1]]
        _, base, name, index = ref
        base = self.resolve(base, me, env)
        if name in base.cls.fields:
            return base.fields[name]
        sub = base.cls.subs[name]
        if index is not None:
            sub, name = sub[index], f'{name}_{index}'
        return self.make(sub, (*base.path, name), base, env, base.masks)

    def make(self, use: Use, path: Path, me: Inst, env: dict, masks: tuple = ()) -> Inst:
        own = tuple((lift, path) for lift in use.lifts if isinstance(lift, Mask))
        fields = {k: self.resolve(v, me, env) for k, v in use.fields.items()}
        return Inst(use.cls, path, use.lifts, fields, (*masks, *own))

    def call(self, inst: Inst, method: str, x: jax.Array) -> jax.Array:
        lifts = [lift for lift in inst.lifts if isinstance(lift, str)] * (method == '__call__')
        return self.lift(inst, method, lifts, x)

    def lift(self, inst: Inst, method: str, lifts: list[str], x: jax.Array) -> jax.Array:
        if not lifts:
            masks = [(m, inst.path) for m in (inst.cls.masks.get(method),) if m]
            with self.open(*inst.masks, *masks):
                return self.run(inst.cls.methods[method], inst, x, {}, Counter())
        *lifts, last = lifts
        if last in ('remat', 'jit'):
            return self.lift(inst, method, lifts, x)
        if last == 'scan_b':
            for _ in range(2):
                x = self.lift(inst, method, lifts, x)
            return x
        sliced = ('batch_stats',) if last == 'vmap_b' else ('params', 'batch_stats')
        xs, outs = pair(x), []
        for i in range(2):
            with self.slice(inst.path, i, *sliced):
                if last == 'scan_s':
                    x = self.lift(inst, method, lifts, x)
                else:
                    outs.append(self.lift(inst, method, lifts, xs[i]))
        return x if last == 'scan_s' else jnp.stack(outs).sum(0)

    def run(self, body: list, me: Inst, x: jax.Array, env: dict, made: Counter) -> jax.Array:
        for s in body:
            x = self.stmt(s, me, x, env, made)
        return x

    def stmt(self, s: Any, me: Inst, x: jax.Array, env: dict, made: Counter) -> jax.Array:
        if isinstance(s, Read):
            if s.how == 'held':
                value = env[s.name]
            else:
                value = self.value(self.resolve(s.ref, me, env), s.name)
            if not s.keep:
                return OPS[s.op](x, value)
            env[s.keep] = value
        elif isinstance(s, Call):
            return self.call(self.resolve(s.ref, me, env), s.method, x)
        elif isinstance(s, Block):
            with self.open((s.mask, me.path)):
                return self.run(s.body, me, x, env, made)
        elif isinstance(s, Mirror):
            inst = self.resolve(s.ref, me, env)
            env[s.local] = dataclasses.replace(inst, masks=((s.mask, inst.path), *inst.masks))
        elif isinstance(s, Alias):
            env[s.local] = self.resolve(s.ref, me, env)
        elif isinstance(s, New):
            name = s.local
            if s.auto:
                name = f'{s.use.cls.name}_{made[s.use.cls.name]}'
                made[s.use.cls.name] += 1
            env[s.local] = self.make(s.use, (*me.path, name), me, env)
        elif isinstance(s, Closure):
            env[s.local] = s.body
        elif isinstance(s, (Raw, Lifted)):
            body = env[s.local] if isinstance(s, Raw) else s.body
            if s.kind == 'vmap':
                return sum(self.run(body, me, y, dict(env), made) for y in pair(x))
            for _ in range(2 if s.kind == 'scan' else 1):
                x = self.run(body, me, x, dict(env), made)
        elif isinstance(s, Stepped):
            with self.open((s.mask, me.path)):
                return self.run(s.body, me, x, dict(env), made)
        elif isinstance(s, Noise):
            return x + next(self.noise)
        elif isinstance(s, Stat):
            path = (*me.path, 'n')
            index = self.index(path, 'batch_stats')

            def read():
                kinds, value = self.covering(path, 'batch_stats'), self.stats[path]
                live = all(ALL_KINDS[kind][1] for kind in kinds)
                value = value if live else lax.stop_gradient(value)
                return transformed(kinds, value, path)[index]

            new = 0.9 * read() + 0.1 * x
            self.stats[path] = put(self.stats[path], index, new)
            return x + read()
        return x


def transformed(kinds: list[str], value: jax.Array, path: Path) -> jax.Array:
    for kind in kinds:
        value = (ALL_KINDS[kind][1] or (lambda v, path: v))(value, path)
    return value


def flatten(tree: Any, path: Path = ()) -> dict[Path, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {k: v for name in tree for k, v in flatten(tree[name], (*path, name)).items()}


def unflatten(leaves: dict[Path, Any]) -> Any:
    tree: dict = {}
    for path, leaf in leaves.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def meaning(
    program: Program,
    around: list[Mask],
    phi: Any,
    bar: Any,
    stats: Any,
    x: jax.Array,
    noise: list[jax.Array],
) -> dict[str, Any]:
    """Return what one application of the program gives, as a function of two copies."""
    machine = Machine(phi, bar, stats, noise)
    root = Inst(program.root, (), masks=tuple((mask, ()) for _, mask in program.wraps))
    with machine.open(*((mask, ()) for mask in around)):
        y = machine.call(root, '__call__', x)
    out = {'y': y, 'stats': unflatten(machine.stats)}
    return out | ({'params': phi} if program.mutable_params else {})
