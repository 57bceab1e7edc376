"""What random programs of flax.nnx mean, without flax and without the library.

A module is a record of ours, and a Variable a cell that holds a value. What a read gives is written
out by hand: each open transform that selects the cell changes the value, by `jax.lax.stop_gradient`
and arithmetic. Functions that are traced are run, loops are unrolled, and a program is
differentiated by JAX with respect to what its cells start with.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from random_nnx.syntax import (
    Block,
    Call,
    Captured,
    Class,
    Held,
    Made,
    Mask,
    Noise,
    Program,
    Read,
    Ref,
    Stack,
    Traced,
    Within,
    Write,
)
from random_programs.filters import Combine
from random_programs.masks import KINDS
from random_programs.operations import OPS, pair, put

SELF: Ref = ('self',)
OUTSIDE = ('..', '...')
TWICE = ('scan', 'scan, carrying', 'fori_loop', 'lax.scan')


class Cell:
    """A Variable.

    Attributes:
      held: the transforms of mirrors that it belongs to.
      said: what blocks that were open when it was copied said of what it is a copy of.
      done: which of these have made the value that it has since then.
    """

    def __init__(self, kind: str, value: Any):
        self.kind, self.value = kind, value
        self.held: tuple[Open, ...] = ()
        self.said: dict[Open, bool] = {}
        self.done: set[Open] = set()

    @property
    def origin(self) -> Cell:
        return self

    def write(self, value: jax.Array) -> None:
        self.value, self.done = value, set()


class Mirrored(Cell):
    def __init__(self, of: Cell, mask: Open):
        self.of, self.kind, self.held = of, of.kind, (*of.held, mask)

    @property
    def origin(self) -> Cell:
        return self.of.origin

    value = property(lambda self: self.of.value)

    def write(self, value: jax.Array) -> None:
        self.of.write(value)


class Layer(Cell):
    """One layer of a Variable that is a stack."""

    def __init__(self, of: Cell, index: int):
        self.of, self.index, self.kind, self.held = of, index, of.kind, of.held

    @property
    def origin(self) -> Cell:
        return self.of.origin

    value = property(lambda self: self.of.value[self.index])

    def write(self, value: jax.Array) -> None:
        self.of.write(put(self.of.value, (self.index,), value))


@dataclasses.dataclass(eq=False)
class Inst:
    """A module: attributes are cells, modules, and lists and dicts of these."""

    cls: Class
    attrs: dict[str, Any]


@dataclasses.dataclass(eq=False)
class Open:
    """A transform that was opened.

    Attributes:
      names: the paths of the cells of its module, by the cell.
      cells: those below each module that its filter names.
      owner: the class or method that it is of, and the module.
    """

    mask: Mask
    names: dict[Cell, list[tuple[str, ...]]]
    cells: dict[Within, set[Cell]]
    owner: Any = None

    def selects(self, cell: Cell) -> bool:
        origin = cell.origin
        if self in origin.said:
            return origin.said[self]
        if self.mask.collections not in (True, origin.kind):
            return False
        paths = self.names.get(origin, [OUTSIDE])

        def any_of(filter: Any) -> bool:
            if isinstance(filter, Combine):
                found = [any_of(part) for part in filter.parts]
                return {'&': all(found), '|': any(found), '~': not found[0]}[filter.symbol]
            if isinstance(filter, Within):
                return origin in self.cells[filter]
            return any(filter.selects(path, path) for path in paths)

        return any_of(self.mask.filter)


def paths_below(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Cell]]:
    if isinstance(node, Cell):
        yield path, node
        return
    children = node.attrs if isinstance(node, Inst) else node
    for key, child in children.items() if isinstance(children, dict) else enumerate(children):
        yield from paths_below(child, (*path, str(key)))


def cells_in(filter: Any) -> Iterator[Within]:
    if isinstance(filter, Within):
        yield filter
    for part in getattr(filter, 'parts', ()):
        yield from cells_in(part)


def rebuilt(node: Any, new: Any, memo: dict | None = None) -> Any:
    """Return a module like another one, of other cells."""
    memo = {} if memo is None else memo
    if id(node) not in memo:
        if isinstance(node, Cell):
            memo[id(node)] = new(node)
        elif isinstance(node, Inst):
            out = memo[id(node)] = Inst(node.cls, {})
            out.attrs.update({k: rebuilt(v, new, memo) for k, v in node.attrs.items()})
        elif isinstance(node, dict):
            return {k: rebuilt(v, new, memo) for k, v in node.items()}
        else:
            return [rebuilt(v, new, memo) for v in node]
    return memo[id(node)]


def module_of(cls: Class, values: dict[str, jax.Array], at: str = '') -> Inst:
    """Put together a module of a class, of values by name."""
    made = Inst(cls, {name: Cell('params', values[at + name]) for name in cls.params})
    if cls.stat:
        made.attrs['n'] = Cell('batch_stats', values[at + 'n'])
    for name, sub in cls.subs.items():
        under = f'{at}{name}/'
        if isinstance(sub, list):
            it: Any = [module_of(each, values, f'{under}{i}/') for i, each in enumerate(sub)]
        elif isinstance(sub, dict):
            it = {key: module_of(each, values, f'{under}{key}/') for key, each in sub.items()}
        else:
            it = module_of(sub.cls if isinstance(sub, Stack) else sub, values, under)
        made.attrs[name] = it
    for name, (ref, of) in cls.ties.items():
        module = resolve(ref, made, {})
        made.attrs[name] = module if of is None else module.attrs[of]
    return made


def resolve(ref: Ref, me: Inst, env: dict[str, Any]) -> Inst:
    if ref[0] == 'self':
        return me
    if ref[0] == 'local':
        return env[ref[1]]
    found = resolve(ref[1], me, env).attrs[ref[2]]
    return found if ref[3] is None else found[ref[3]]


class Machine:
    """Run a program."""

    def __init__(self, *, plain: bool):
        self.plain, self.stack = plain, list[Open]()
        self.key, self.drawn = jax.random.key(7), 0

    def opening(self, mask: Mask, me: Inst, env: dict, at: Inst | None, owner: Any = None) -> Open:
        names: dict[Cell, list[tuple[str, ...]]] = {}
        for path, cell in paths_below(at) if at is not None else ():
            names.setdefault(cell.origin, []).append(path)
        cells = {}
        for within in cells_in(mask.filter):
            node: Any = resolve(within.ref, me, env)
            node = node if within.name is None else node.attrs[within.name]
            cells[within] = {cell.origin for _, cell in paths_below(node)}
        return Open(mask, names, cells, owner)

    @contextlib.contextmanager
    def open(self, mask: Mask | None, me: Inst, env: dict, at: Any, owner: Any = None) -> Any:
        if mask is None or owner is not None and any(o.owner == owner for o in self.stack):
            yield
            return
        self.stack.append(self.opening(mask, me, env, at, owner))
        try:
            yield
        finally:
            self.stack.pop()

    def block(self, mask: Mask, me: Inst, env: dict) -> Any:
        return self.open(mask, me, env, None if mask.on is None else resolve(mask.on, me, env))

    def read(self, cell: Cell) -> Any:
        value, done = cell.value, cell.origin.done
        for each in () if self.plain else (*self.stack, *cell.held):
            if each not in done and each.selects(cell):
                by_hand = KINDS[each.mask.kind][1]
                value = by_hand(value, ()) if by_hand else lax.stop_gradient(value)
        return value

    def copied(self, cell: Cell) -> Cell:
        out = Cell(cell.kind, self.read(cell))
        out.said = {each: each.selects(cell) for each in self.stack}
        out.done = set(self.stack)
        return out

    def call(self, inst: Inst, method: str, x: jax.Array) -> jax.Array:
        cls = inst.cls
        with self.open(cls.mask, inst, {}, inst, ('class', cls.name, inst)):
            mask = cls.masks.get(method)
            with self.open(mask, inst, {}, inst, (method, cls.name, inst)):
                return self.run(cls.methods[method], inst, x, {})

    def run(self, body: list, me: Inst, x: jax.Array, env: dict) -> jax.Array:
        for s in body:
            x = self.stmt(s, me, x, env)
        return x

    def stmt(self, s: Any, me: Inst, x: jax.Array, env: dict) -> jax.Array:
        if isinstance(s, Read):
            value = self.read(resolve(s.ref, me, env).attrs[s.name])
            if s.keep is None:
                return OPS[s.op](x, value)
            env[s.keep] = value
        elif isinstance(s, Held):
            return OPS[s.op](x, env[s.name])
        elif isinstance(s, Call):
            return self.call(resolve(s.ref, me, env), s.method, x)
        elif isinstance(s, Block):
            with self.block(s.mask, me, env):
                return self.run(s.body, me, x, env)
        elif isinstance(s, Made):
            env[s.local] = self.made(s, resolve(s.ref, me, env), me, env)
        elif isinstance(s, Traced):
            return self.traced(s, resolve(s.ref, me, env), x)
        elif isinstance(s, Captured):
            again = lambda x: self.run(s.body, me, x, dict(env))
            if s.kind == 'vmap':
                return sum(map(again, pair(x)))
            return again(again(x)) if s.kind == 'scan' else again(x)
        elif isinstance(s, Write):
            cell = resolve(s.ref, me, env).attrs[s.name]
            new = 0.5 * self.read(cell) + 0.1 * jnp.broadcast_to(jnp.sin(x), cell.value.shape)
            cell.write(new)
            return x + self.read(cell) if s.name == 'n' else x
        elif isinstance(s, Noise):
            bits = jax.random.bits(jax.random.fold_in(self.key, self.drawn), (len(x),))
            self.drawn += 1
            return x + lax.convert_element_type(bits, jnp.float32) * jnp.float32(2.0**-32)
        return x

    def made(self, s: Made, module: Inst, me: Inst, env: dict) -> Inst:
        if s.how == 'mirror':
            mask = self.opening(s.mask, me, env, module)
            return rebuilt(module, lambda c: Mirrored(c, mask) if mask.selects(c) else c)
        return module if s.how == 'split' else rebuilt(module, self.copied)

    def traced(self, s: Traced, module: Inst, x: jax.Array) -> jax.Array:
        again = lambda x, module=module: self.run(s.body, module, x, {})
        if s.kind in ('vmap', 'jax.vmap'):
            return sum(map(again, pair(x)))
        if s.kind.startswith('stacked'):
            layers = [rebuilt(module, lambda c, i=i: Layer(c, i)) for i in range(2)]
            if s.kind == 'stacked scan':
                return again(again(x, layers[0]), layers[1])
            return sum(again(y, layer) for y, layer in zip(pair(x), layers, strict=True))
        if s.kind == 'grad of input':
            return x + jax.grad(lambda x: jnp.sin(again(x)).sum())(x)
        if s.kind == 'grad of model':
            return x + 0.1 * self.gradient_of_model(again, module, x)
        return again(again(x)) if s.kind in TWICE else again(x)

    def gradient_of_model(self, again: Any, module: Inst, x: jax.Array) -> jax.Array:
        cells = list({c.origin: None for _, c in paths_below(module) if c.kind == 'params'})
        before = [cell.value for cell in cells]

        def loss(values: list) -> jax.Array:
            for cell, value in zip(cells, values, strict=True):
                cell.value = value
            return jnp.sin(again(x)).sum()

        grads = jax.grad(loss)(before)
        for cell, value in zip(cells, before, strict=True):
            cell.value = value
        return sum(map(jnp.sum, grads))


def meaning(
    program: Program, masks: list[Mask], values: dict, x: jax.Array, *, plain: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what one run of a program gives, and what its cells hold then."""
    if program.views is None:
        return _meaning(program, masks, values, x, plain=plain)
    outs = {}
    for name, filter in program.views[0].items():
        mask = Mask(Combine('~', (filter,)), on=SELF)
        out, _ = _meaning(program, [*masks, mask], values, x, plain=plain)
        outs[name] = out['y']
    return {'y': outs}, _meaning(program, masks, values, x, plain=plain)[1]


def _meaning(
    program: Program, masks: list[Mask], values: dict, x: jax.Array, *, plain: bool
) -> Any:
    machine, model = Machine(plain=plain), module_of(program.root, values)
    with contextlib.ExitStack() as blocks:
        for mask in masks:
            blocks.enter_context(machine.block(mask, model, {}))
        y = machine.call(model, '__call__', x)
        if program.around:  # then what the model holds is read in the blocks too
            return {'y': y, **held_by(model, machine.read)}, held_by(model)
    return {'y': y, **held_by(model)}, held_by(model)


def held_by(model: Inst, read: Callable = lambda cell: cell.value) -> dict[str, Any]:
    return {'/'.join(path): read(cell) for path, cell in paths_below(model)}
