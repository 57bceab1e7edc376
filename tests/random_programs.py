"""Random Flax programs with blocks, and what they mean.

A program is a small syntax tree. `Emitter` writes it as Flax source with the library's blocks (or
without them); `Machine` says what it means, as a pure function of two copies of the parameters: it
uses neither flax nor the library, keeps its own stack of open blocks, and has its own idea of what
a filter selects. `check` compares the two. The tests run some hundreds; for many thousands:

    python tests/random_programs.py --count 5000 --seed 0
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import fnmatch
import itertools
import linecache
import random
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from flax.core import lift
from jax import lax

import flax_sg
from oracle import assert_same, scalar, tangents_of

WIDTH = 3
Path = tuple[str, ...]


# The syntax --------------------------------------------------------------------------------------
# Filters know their Python source and, independently of the library, what they select.


@dataclasses.dataclass(frozen=True)
class Glob:
    pattern: str

    def source(self) -> str:
        return f'sg.path({self.pattern!r})'

    def selects(self, path: Path, absolute: Path) -> bool:
        rooted = self.pattern.startswith('/')
        return _glob(self.pattern.strip('/').split('/'), list(absolute if rooted else path))


def _glob(parts: list[str], names: list[str]) -> bool:
    """Match a glob against a path or any leading part of it, name by name."""
    if not parts:
        return True
    if parts[0] == '**':
        first = 1 if len(parts) == 1 else 0
        return any(_glob(parts[1:], names[i:]) for i in range(first, len(names) + 1))
    if not names or (names[0] == '..') != (parts[0] == '..'):
        return False
    return fnmatch.fnmatchcase(names[0], parts[0]) and _glob(parts[1:], names[1:])


@dataclasses.dataclass(frozen=True)
class Regex:
    pattern: str

    def source(self) -> str:
        return f'sg.regex({self.pattern!r})'

    def selects(self, path: Path, absolute: Path) -> bool:
        return re.search(self.pattern, '/'.join(path)) is not None


@dataclasses.dataclass(frozen=True)
class Lambda:
    """A predicate written as an expression of `c`; here `c` is a record of our own."""

    body: str

    def source(self) -> str:
        return f'sg.where(lambda c: {self.body})'

    def selects(self, path: Path, absolute: Path) -> bool:
        c = argparse.Namespace(path=path, absolute_path=absolute, name='/'.join(path))
        return bool(eval(self.body, {'c': c}))


@dataclasses.dataclass(frozen=True)
class Bool:
    value: bool

    def source(self) -> str:
        return 'sg.everything' if self.value else 'sg.nothing'

    def selects(self, path: Path, absolute: Path) -> bool:
        return self.value


@dataclasses.dataclass(frozen=True)
class Combine:
    symbol: str  # '&', '|' or '~'
    parts: tuple[Any, ...]

    def source(self) -> str:
        if self.symbol == '~':
            return f'~({self.parts[0].source()})'
        return f' {self.symbol} '.join(f'({p.source()})' for p in self.parts)

    def selects(self, path: Path, absolute: Path) -> bool:
        found = [p.selects(path, absolute) for p in self.parts]
        return {'&': all(found), '|': any(found), '~': not found[0]}[self.symbol]


# Each transform: its name in the library (and which value map, two of which do not commute), its
# arguments, and by hand what it makes of a value at a path. What stops takes the second copy instead.
KINDS: dict[str, tuple[str, Callable | None]] = {
    'stop_gradient': ('', None),
    'constant': ('', None),
    'scale_gradient': (', -0.5', lambda v, path: _rescaled(v, -0.5)),
    'map_gradient': (', double', lambda v, path: _rescaled(v, 2.0)),
    'map_values, bend': (', bend', lambda v, path: _bend(None, v)),
    'map_values, shift': (', shift', lambda v, path: _shift(None, v)),
    'map_values, named': (', named', lambda v, path: _scaled_by(v, len(path))),
}
# One that looks at a variable as a whole, for blocks around a program: inside, a scan has taken it
# apart.
WHOLE = {'map_values, centre': (', centre', lambda v, path: _centre(None, v))}
ALL_KINDS = {**KINDS, **WHOLE}


def _rescaled(v: jax.Array, factor: float) -> jax.Array:
    return v + (factor - 1) * (v - lax.stop_gradient(v))


def _bend(info: Any, v: jax.Array) -> jax.Array:
    return lax.add(lax.mul(v, np.full(v.shape, 1.5, np.float32)), lax.sin(v))


def _shift(info: Any, v: jax.Array) -> jax.Array:
    return lax.sub(v, np.full(v.shape, 0.25, np.float32))


def _named(info: Any, v: jax.Array) -> jax.Array:
    """Depends on where the variable is, which equal layers under nn.jit do not share."""
    return _scaled_by(v, len(info.absolute_path))


def _scaled_by(v: jax.Array, depth: int) -> jax.Array:
    return lax.mul(v, np.full(v.shape, 1 + 0.25 * depth, np.float32))


def _centre(info: Any, v: jax.Array) -> jax.Array:
    mean = lax.mul(lax.reduce_sum(v, tuple(range(v.ndim))), np.float32(0.5 / v.size))
    return lax.sub(v, lax.broadcast_in_dim(mean, v.shape, ()))


@dataclasses.dataclass(frozen=True)
class Mask:
    """A transform: a filter and the collections that it looks at."""

    filter: Any
    collections: str = 'params'
    kind: str = 'stop_gradient'

    def source(self) -> str:
        more = '' if self.collections == 'params' else f', collections={self.collections!r}'
        arguments = ALL_KINDS[self.kind][0]
        name = self.kind.partition(',')[0]
        return f'sg.{name}({self.predicate()}{arguments}{more}, allow_unmatched=True)'

    def predicate(self) -> str:
        """Write the filter; one that stands alone as a plain Python value."""
        f = self.filter
        if isinstance(f, Glob):
            return repr(f.pattern)
        if isinstance(f, Regex):
            return f're.compile({f.pattern!r})'
        if isinstance(f, Bool):
            return repr(f.value)
        if isinstance(f, Lambda):
            return f'lambda c: {f.body}'
        if isinstance(f, Combine) and f.symbol == '|':
            return f'[{", ".join(p.source() for p in f.parts)}]'
        return f.source()

    def selects(self, opener: Path, absolute: Path, collection: str) -> bool:
        if self.collections not in (True, collection):
            return False
        path = absolute
        for i, name in enumerate(opener):
            if absolute[i:i + 1] != (name,):
                path = ('..',) * (len(opener) - i) + absolute[i:]
                break
        else:
            path = absolute[len(opener):]
        return self.filter.selects(path, absolute)


# References to modules: ('self',), ('local', name), ('attr', base, name, index or None).
Ref = tuple


@dataclasses.dataclass
class Read:
    """`x = op(x, <a variable or a value derived from one>)`; `keep` only holds it in a local."""

    ref: Ref
    name: str
    how: str  # 'attr', 'param', 'get_variable', 'variables' or 'held'
    op: str
    keep: str | None = None


@dataclasses.dataclass
class Call:
    ref: Ref
    method: str
    use: Use  # what is called, for its signature


@dataclasses.dataclass
class Block:
    mask: Mask
    body: list


@dataclasses.dataclass
class Mirror:
    """`local = stop_gradient(...)(ref)`."""

    local: str
    mask: Mask
    ref: Ref


@dataclasses.dataclass
class Alias:
    local: str
    ref: Ref


@dataclasses.dataclass
class New:
    """`local = Class(...)` in a compact method."""

    local: str
    use: Use
    auto: bool


@dataclasses.dataclass
class Closure:
    """`def local(x): ...`, a closure over the bound module, to be run under raw JAX transforms."""

    local: str
    body: list


@dataclasses.dataclass
class Raw:
    kind: str  # 'scan', 'checkpoint', 'jit', 'cond', 'vmap' or 'plain'
    local: str


@dataclasses.dataclass
class Lifted:
    """A function of the module under a lifted transform of Flax."""

    kind: str  # 'scan', 'remat', 'jit', 'cond' or 'vmap'
    local: str
    body: list


@dataclasses.dataclass
class Stepped:
    """A decorated generator function of the module, whose steps run in the block."""

    mask: Mask
    local: str
    body: list


@dataclasses.dataclass
class Noise:
    pass


@dataclasses.dataclass
class Stat:
    """Update a running mean in `batch_stats`, and read it."""


@dataclasses.dataclass
class Use:
    """A class as it is instantiated: lifted, masked, with modules handed in as fields."""

    cls: Class
    lifts: tuple = ()  # innermost first: names of lifts, and masks
    fields: dict[str, Ref] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        return {lift for lift in self.lifts if isinstance(lift, str)}

    @property
    def open(self) -> bool:
        """Whether its attributes can be read from outside: not stacked, not in a loop."""
        return self.names <= {'remat', 'jit'}


@dataclasses.dataclass
class Class:
    name: str
    compact: bool
    scanned: bool = False  # has the signature that nn.scan wants
    params: dict[str, str] = dataclasses.field(default_factory=dict)  # name: 'vec' or 'mat'
    derived: dict[str, tuple] = dataclasses.field(default_factory=dict)  # name: (fn, param, direct)
    subs: dict[str, Any] = dataclasses.field(default_factory=dict)  # a Use, or a list or dict
    fields: dict[str, Class] = dataclasses.field(default_factory=dict)
    stat: bool = False
    methods: dict[str, list] = dataclasses.field(default_factory=dict)
    masks: dict[str, Mask] = dataclasses.field(default_factory=dict)  # method decorators
    effects: set[str] = dataclasses.field(default_factory=set)  # 'noise', 'stat'
    created: set[str] = dataclasses.field(default_factory=set)  # parameters of a compact method
    pool: list[Class] = dataclasses.field(default_factory=list)  # what it may instantiate


@dataclasses.dataclass
class Program:
    classes: list[Class]
    wraps: list[tuple[str, Mask]]  # the root's class or instance is masked
    runs: list[list[Mask]]  # blocks around each of several applications of one module object
    around_grad: bool
    bind: bool
    mutable_params: bool

    @property
    def root(self) -> Class:
        return self.classes[-1]


# Source ------------------------------------------------------------------------------------------


class Emitter:
    """Write a program as Flax source; `plain` leaves every transform of the library out."""

    def __init__(self, program: Program, plain: bool):
        self.program, self.plain, self.lines, self.hoisted = program, plain, [], {}

    def source(self) -> str:
        for cls in self.program.classes:
            self.cls(cls)
        made = self.program.root.name
        if not self.plain:
            for _, mask in (w for w in self.program.wraps if w[0] == 'class'):
                made = f'{mask.source()}({made})'
        made += '()'
        if not self.plain:
            for _, mask in (w for w in self.program.wraps if w[0] == 'instance'):
                made = f'{mask.source()}({made})'
        return '\n'.join([*self.lines, f'model = {made}', ''])

    def ref(self, ref: Ref, me: str) -> str:
        if ref[0] == 'self':
            return me
        if ref[0] == 'local':
            return ref[1]
        index = '' if ref[3] is None else f'[{ref[3]!r}]'
        return f'{self.ref(ref[1], me)}.{ref[2]}{index}'

    def use(self, use: Use, name: str | None = None) -> str:
        made = use.cls.name
        for lift in use.lifts:
            if isinstance(lift, Mask):
                made = made if self.plain else f'{lift.source()}({made})'
            else:
                made = f'{lift}({made})'
        if made != use.cls.name:  # one lifted class for all its uses, as at the top of a file
            if made not in self.hoisted:
                self.hoisted[made] = f'L{len(self.hoisted)}'
                self.hoists.append(f'{self.hoisted[made]} = {made}')
            made = self.hoisted[made]
        args = [f'{k}={self.ref(v, "self")}' for k, v in use.fields.items()]
        args += [f'name={name!r}'] if name else []
        return f'{made}({", ".join(args)})'

    def cls(self, cls: Class) -> None:
        self.hoists: list[str] = []
        out = [f'class {cls.name}(nn.Module):']
        out += [f'    {name}: nn.Module' for name in cls.fields]
        if not cls.compact:
            out.append('    def setup(self):')
            hidden = {param for _, param, direct in cls.derived.values() if direct}
            for name, kind in cls.params.items():
                if name not in hidden:
                    out.append(f'        self.{name} = {self.param(cls, name)}')
            for name, (fn, param, direct) in cls.derived.items():
                value = self.param(cls, param) if direct else f'self.{param}'
                out.append(f'        self.{name} = {fn}({value})')
            if cls.stat:
                out.append("        self.n = self.variable('batch_stats', 'n', ones)")
            for name, sub in cls.subs.items():
                if isinstance(sub, list):
                    made = f'[{", ".join(map(self.use, sub))}]'
                elif isinstance(sub, dict):
                    made = f'{{{", ".join(f"{k!r}: {self.use(u)}" for k, u in sub.items())}}}'
                else:
                    made = self.use(sub)
                out.append(f'        self.{name} = {made}')
            if len(out) == 2 + len(cls.fields):
                out.append('        pass')
        for method, body in cls.methods.items():
            if method in cls.masks and not self.plain:
                out.append(f'    @{cls.masks[method].source()}')
            if cls.compact:
                out.append('    @nn.compact')
            scanned = cls.scanned and method == '__call__'
            out.append(f'    def {method}(self, x{", _" if scanned else ""}):')
            out += self.body(body, cls, 'self', 8)
            out.append(f'        return x{", None" if scanned else ""}')
        self.lines += [*self.hoists, *out, '']

    def param(self, cls: Class, name: str) -> str:
        return f'self.param({name!r}, {cls.params[name]}_init)'

    def body(self, body: list, cls: Class, me: str, indent: int) -> list[str]:
        out = []
        for s in body:
            out += self.stmt(s, cls, me, indent)
        return [line if line.startswith(' ' * indent) else ' ' * indent + line for line in out]

    def stmt(self, s: Any, cls: Class, me: str, indent: int) -> list[str]:
        deeper = indent + 4
        if isinstance(s, Read):
            ref = self.ref(s.ref, me)
            if s.how == 'held':
                value = s.name
            elif s.how == 'param':
                value = self.param(cls, s.name)
            elif s.how == 'attr':
                value = f'{ref}.{s.name}'
            elif s.how == 'get_variable':
                value = f"{ref}.get_variable('params', {s.name!r})"
            else:
                value = f"{ref}.variables['params'][{s.name!r}]"
            return [f'{s.keep} = {value}'] if s.keep else [f'x = {s.op}(x, {value})']
        if isinstance(s, Call):
            call = self.ref(s.ref, me) + ('' if s.method == '__call__' else f'.{s.method}')
            if s.method != '__call__':
                return [f'x = {call}(x)']
            if {'vmap_b', 'vmap_s'} & s.use.names:
                return [f'x = {call}(pair(x)).sum(0)']
            return [f'x = {call}(x, None)[0]' if s.use.cls.scanned else f'x = {call}(x)']
        if isinstance(s, Block):
            opened = 'if True' if self.plain else f'with {s.mask.source()}'
            return [f'{opened}:', *self.body(s.body or [Pass()], cls, me, deeper)]
        if isinstance(s, Mirror):
            ref = self.ref(s.ref, me)
            return [f'{s.local} = {ref if self.plain else f"{s.mask.source()}({ref})"}']
        if isinstance(s, Alias):
            return [f'{s.local} = {self.ref(s.ref, me)}']
        if isinstance(s, New):
            return [f'{s.local} = {self.use(s.use, None if s.auto else s.local)}']
        if isinstance(s, Closure):
            return [f'def {s.local}(x, _=None):', *self.body(s.body, cls, me, deeper),
                    ' ' * deeper + 'return x, None']
        if isinstance(s, Raw):
            return [f'x = raw_{s.kind}({me}, {s.local}, x)']
        if isinstance(s, Lifted):
            return [f'def {s.local}(mdl, x, _=None):', *self.body(s.body, cls, 'mdl', deeper),
                    ' ' * deeper + 'return x, None', f'x = lifted_{s.kind}({me}, {s.local}, x)']
        if isinstance(s, Stepped):
            return [*([] if self.plain else [f'@{s.mask.source()}']),
                    f'def {s.local}(mdl, x):', ' ' * deeper + 'yield x',
                    *self.body(s.body, cls, 'mdl', deeper), ' ' * deeper + 'yield x',
                    f'*_, x = {s.local}({me}, x)']
        if isinstance(s, Noise):
            return [f'x = noise({me}, x)']
        if isinstance(s, Stat):
            var = f"{me}.variable('batch_stats', 'n', ones)" if cls.compact else f'{me}.n'
            return [f'x = stat({me}, {var}, x)']
        return ['pass']


class Pass:
    pass


# What programs are written with; the arithmetic is the machine's too.

OPS: dict[str, Callable] = {  # in jax.lax, which traces faster than jax.numpy
    'mul': lambda x, v: lax.mul(lax.cos(x), v),
    'add': lambda x, v: lax.add(lax.sin(x), v),
    'wave': lambda x, v: lax.add(lax.sin(lax.mul(x, v)), x),
    'mat': lambda x, v: lax.sin(lax.dot(x, v)),
    'tied': lambda x, v: lax.add(lax.mul(x, v), v),
    'ruled': lambda x, v: lax.add(lax.mul(x, v), v),
    'exp': lambda v: lax.exp(lax.sin(v)),
    'sine': lambda v: lax.add(lax.sin(v), v),
}


class _Inner(linen.Module):
    """A model that a module applies by itself, to a value that it has read."""

    @linen.compact
    def __call__(self, x):
        return OPS['tied'](x, self.param('w', lambda key: x))


def _tied(x: jax.Array, v: jax.Array) -> jax.Array:
    return _Inner(parent=None).apply({'params': {'w': v}}, x)


def _ruled(x: jax.Array, v: jax.Array) -> jax.Array:
    """Apply it in a function with a rule of its own, which applies it again."""
    f = jax.custom_jvp(lambda x, v: _tied(x, v))
    f.defjvp(lambda primals, tangents: jax.jvp(_tied, primals, tangents))
    return f(x, v)


noises: list[jax.Array] = []


def _draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw numbers below 1 in few operations: Flax traces an initialiser at every use."""
    bits = lax.convert_element_type(jax.random.bits(key, shape), jnp.float32)
    return lax.mul(bits, np.full(shape, 2.0**-32, np.float32))


def _noise(mdl: linen.Module, x: jax.Array) -> jax.Array:
    noises.append(_draw(mdl.make_rng('noise'), (WIDTH,)))
    return x + noises[-1]


def _stat(mdl: linen.Module, var: Any, x: jax.Array) -> jax.Array:
    if mdl.is_mutable_collection('batch_stats'):
        var.value = 0.9 * var.value + 0.1 * x
    return x + var.value


def _raw(run: Callable) -> Callable:
    def outside_init(mdl, body, x):
        return body(x)[0] if mdl.is_initializing() else run(body, x)
    return outside_init


def _put(x: jax.Array, index: tuple[int, ...], value: jax.Array) -> jax.Array:
    if not index:
        return value
    i, *rest = index
    return jnp.stack([_put(y, tuple(rest), value) if j == i else y for j, y in enumerate(x)])


def _pair(x: jax.Array) -> jax.Array:
    return jnp.stack([x, 0.5 * x])


def _yes(x: jax.Array) -> jax.Array:
    return jnp.sum(x) > -1e9


# The stream of noise goes in too, or Flax fails where nn.jit in such a body has met it outside.
_scan_b = {'variable_broadcast': 'params', 'variable_carry': 'batch_stats',
           'split_rngs': {'params': False, 'noise': False}}
_scan_s = {'variable_axes': {'params': 0, 'batch_stats': 0},
           'split_rngs': {'params': True, 'noise': False}}
_vmap_b = {'variable_axes': {'params': None, 'batch_stats': 0},
           'split_rngs': {'params': False, 'noise': False}}


def _lifted_scan(mdl, body, x):
    if mdl.is_initializing():
        return body(mdl, x)[0]
    return linen.scan(body, length=2, **_scan_b)(mdl, x, None)[0]


def _lifted_cond(mdl, body, x):
    if mdl.is_initializing():
        return body(mdl, x)[0]
    return linen.cond(_yes(x), body, lambda mdl, x: (x, None), mdl, x)[0]


NAMES: dict[str, Any] = {
    'nn': linen, 'sg': flax_sg, 're': re, **OPS, 'tied': _tied, 'ruled': _ruled, 'noise': _noise, 'stat': _stat, 'pair': _pair,
    'vec_init': lambda key: lax.add(_draw(key, (WIDTH,)), np.full(WIDTH, 0.5, np.float32)),
    'mat_init': lambda key: 2 * _draw(key, (WIDTH, WIDTH)) - 1,
    'ones': lambda: jnp.ones(WIDTH), 'double': lambda info, cotangent: 2 * cotangent, 'bend': _bend,
    'shift': _shift, 'named': _named, 'centre': _centre,
    'remat': linen.remat, 'jit': linen.jit,
    'scan_b': lambda c: linen.scan(c, length=2, **_scan_b),
    'scan_s': lambda c: linen.scan(c, length=2, **_scan_s),
    'vmap_b': lambda c: linen.vmap(c, axis_size=2, **_vmap_b),
    'vmap_s': lambda c: linen.vmap(c, axis_size=2, **_scan_s),
    'raw_scan': _raw(lambda body, x: lax.scan(body, x, None, length=2)[0]),
    'raw_checkpoint': _raw(lambda body, x: jax.checkpoint(body)(x)[0]),
    'raw_jit': _raw(lambda body, x: jax.jit(body)(x)[0]),
    'raw_vmap': _raw(lambda body, x: jax.vmap(body)(_pair(x))[0].sum(0)),
    'raw_cond': _raw(lambda body, x: lax.cond(_yes(x), body, lambda x: (x, None), x)[0]),
    'raw_plain': _raw(lambda body, x: body(x)[0]),
    'lifted_scan': _lifted_scan,
    'lifted_remat': lambda mdl, body, x: linen.remat(body)(mdl, x)[0],
    'lifted_jit': lambda mdl, body, x: linen.jit(body)(mdl, x)[0],
    'lifted_cond': _lifted_cond,
}

_built = itertools.count()


def build(program: Program, *, plain: bool) -> linen.Module:
    """Return the root module of a program, compiled from its source."""
    source = Emitter(program, plain).source()
    name = f'<random program {next(_built)}>'
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    space = {**NAMES, '__name__': 'random_program'}
    exec(compile(source, name, 'exec', dont_inherit=True), space)
    return space['model']


# Meaning -----------------------------------------------------------------------------------------


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
        return [m.kind for (_, opener), m in open_now.items()
                if m.selects(opener, path, collection)]

    def index(self, path: Path, collection: str) -> tuple[int, ...]:
        return tuple(i for p, i, cols in self.slices
                     if path[:len(p)] == p and collection in cols)

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
        xs, outs = _pair(x), []
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
                return sum(self.run(body, me, y, dict(env), made) for y in _pair(x))
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
            self.stats[path] = _put(self.stats[path], index, new)
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


def meaning(program: Program, around: list[Mask], phi: Any, bar: Any, stats: Any, x: jax.Array,
            noise: list[jax.Array]) -> dict[str, Any]:
    """Return what one application of the program gives, as a function of two copies."""
    machine = Machine(phi, bar, stats, noise)
    root = Inst(program.root, (), masks=tuple((mask, ()) for _, mask in program.wraps))
    with machine.open(*((mask, ()) for mask in around)):
        y = machine.call(root, '__call__', x)
    out = {'y': y, 'stats': unflatten(machine.stats)}
    return out | ({'params': phi} if program.mutable_params else {})


# Generation --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Env:
    """What statements may refer to at one point of a method."""

    cls: Class
    modules: dict[str, Use] = dataclasses.field(default_factory=dict)
    held: dict[str, str] = dataclasses.field(default_factory=dict)
    closures: list[str] = dataclasses.field(default_factory=list)
    touched: set[tuple[Ref, str]] = dataclasses.field(default_factory=set)
    created: set[str] = dataclasses.field(default_factory=set)  # parameters of a compact method
    place: str = 'method'  # 'method', 'lifted' or 'raw'

    def inner(self, place: str) -> Env:
        if place == 'raw':
            return dataclasses.replace(self, held=dict(self.held), place=place)
        return Env(self.cls, held=dict(self.held), place=place)


class Generator:
    """Draw a program from a source of randomness (`random.Random` or hypothesis's)."""

    COST = 40  # reads and updates in one run of a method, those of the methods it calls included

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.fresh = itertools.count()
        self.cost: dict[int, int] = {}
        self.raws = False

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def program(self) -> Program:
        classes: list[Class] = []
        for i in range(self.rng.randint(0, 3)):
            classes.append(self.cls(f'M{i}', classes))
        classes.append(self.cls('Root', classes, root=True))
        wraps = [(self.rng.choice(['class', 'instance']), self.mask(classes[-1]))
                 for _ in range(self.chance(0.15))]
        root = classes[-1]
        one, two = [self.mask(root)], [self.mask(root), self.mask(root)]
        if self.chance(0.2):
            one[0] = dataclasses.replace(
                self.selection(root, 'params'), kind='map_values, centre')
        runs = self.rng.choice([[[]], [[]], [one], [one, [], one], [[], one], [one, two, []],
                                [[], two, one, []]])
        outer = self.chance(0.3)
        # What is bound is read once more for its statistics, outside of all blocks.
        bind = not outer and not wraps and self.chance(0.2)
        return Program(classes, wraps, runs, around_grad=outer, bind=bind,
                       mutable_params=not self.raws and self.chance(0.2))

    # Filters.

    def mask(self, cls: Class | None = None) -> Mask:
        """Draw a transform, most often one that selects some of what the class has."""
        collections = self.rng.choice(['params'] * 8 + [True, 'batch_stats'])
        kinds = ['stop_gradient'] * 6 + [*KINDS]
        # Statistics are updated from what is read, which must be what is stored.
        kind = self.rng.choice([k for k in kinds if collections == 'params'
                                or k != 'constant' and not k.startswith('map_values')])
        return dataclasses.replace(self.selection(cls, collections), kind=kind)

    def selection(self, cls: Class | None, collections: Any) -> Mask:
        if cls and self.chance(0.5):
            names = [*cls.params, *cls.params]
            for name, sub in cls.subs.items():
                keys = range(2) if isinstance(sub, list) else 'uv' * isinstance(sub, dict)
                names += [f'{name}_{k}' for k in keys] or [name]
            return Mask(Glob(self.rng.choice([
                *names, *names, '*/' + self.rng.choice('wvk'), '**/' + self.rng.choice('wvk'),
                '../' + self.rng.choice('wvkabc')])), collections)
        return Mask(self.filter(2), collections)

    def filter(self, depth: int) -> Any:
        kind = self.rng.randint(0, 11 if depth else 7)
        if kind <= 3:
            return Glob(self.glob())
        if kind == 4:
            return Regex(self.rng.choice(
                ['^a', 'w$', 'b|k', '(^|/)[ab]/', r'\.\.', '^[^/]*$', '^w', 'inner', '_0']))
        if kind == 5:
            name = self.rng.choice(['a', 'b', 'w', 'k', '..', 'layers', 'M0'])
            return Lambda(self.rng.choice([
                f'c.name.startswith({name!r})', f'c.path[-1] == {name!r}', 'len(c.path) > 1',
                f'{name!r} in c.absolute_path', 'len(c.absolute_path) % 2 == 0',
                f'{name!r} not in c.path']))
        if kind <= 7:
            return Bool(self.chance(0.85))
        if kind == 8:
            return Combine('~', (self.filter(depth - 1),))
        return Combine(self.rng.choice('&|'), (self.filter(depth - 1), self.filter(depth - 1)))

    def glob(self) -> str:
        names = ['a', 'b', 'c', 'w', 'k', 'v', 'q', 'inner', 'layers_0', 'table_*', 'M0_0', 'M*_*',
                 '*', '*', '**', '?', '[ab]', '[!a]*', '*_[01]']
        parts = [self.rng.choice(names) for _ in range(self.rng.choice([1, 1, 1, 2, 2, 3]))]
        lead = self.rng.choice([''] * 6 + ['/', '/', '../', '../', '../../'])
        return lead + '/'.join(parts)

    # Classes.

    def cls(self, name: str, pool: list[Class], root: bool = False) -> Class:
        c = Class(name, compact=self.chance(0.4), scanned=not root and self.chance(0.25),
                  pool=list(pool))
        c.params = {p: 'mat' if p == 'k' else 'vec'
                    for p in self.rng.sample(['w', 'v', 'k'], self.rng.randint(1, 2))}
        vectors = [p for p, kind in c.params.items() if kind == 'vec']
        if not c.compact:
            if vectors and self.chance(0.5):
                c.derived['s'] = (self.rng.choice(['exp', 'sine']), vectors[0], False)
            if self.chance(0.3):
                c.params['q'] = 'vec'
                c.derived['t'] = (self.rng.choice(['exp', 'sine']), 'q', True)
        c.stat = self.chance(0.2)
        if c.stat and not c.compact:
            c.effects.add('stat')
        fields = [f for f in pool if not f.scanned and not f.effects and not f.fields]
        if not root and fields and self.chance(0.2):
            c.fields['inner'] = self.rng.choice(fields)
        if not c.compact:
            for sub in self.rng.sample(['a', 'b', 'c'], self.rng.randint(min(1, len(pool)), 3)):
                if pool:
                    self.add_sub(c, sub, pool)
        self.cost[id(c)] = 0
        for method in ['__call__', 'aux'][:1 if c.compact else self.rng.choice([1, 1, 2])][::-1]:
            c.methods[method] = self.body(Env(c), self.rng.randint(2, 5 + 2 * root))
            if self.chance(0.15):
                c.masks[method] = self.mask(c)
        if c.compact:
            c.params = {p: kind for p, kind in c.params.items() if p in c.created}
        return c

    def add_sub(self, c: Class, name: str, pool: list[Class]) -> None:
        kind = self.rng.choice(['one', 'one', 'list', 'dict'])
        if kind == 'one':
            use = self.use(c, self.rng.choice(pool), lambda f: self.setup_field(c, f))
            c.subs[name] = use
            return
        uses = [self.use(c, self.rng.choice(pool), lambda f: self.setup_field(c, f))
                for _ in range(2)]
        if kind == 'list':
            c.subs['layers' if 'layers' not in c.subs else name] = uses
        else:
            c.subs['table' if 'table' not in c.subs else name] = dict(zip('uv', uses, strict=True))

    def setup_field(self, c: Class, field: Class) -> Ref:
        """Return a sibling to hand in as a field, made first if there is none."""
        for name, use in c.subs.items():
            if isinstance(use, Use) and use.cls is field and use.open:
                return ('attr', ('self',), name, None)
        name = f'f{next(self.fresh)}'
        c.subs[name] = self.use(c, field, None)
        if not c.subs[name].open:
            c.subs[name].lifts = ()
        return ('attr', ('self',), name, None)

    def use(self, c: Class, cls: Class, field_ref: Callable | None) -> Use:
        c.effects |= cls.effects & {'stat'}  # its setup may run, whether it is called or not
        lifts: list = []
        loop = 'noise' not in cls.effects
        if loop and self.chance(0.2):
            lifts.append(self.rng.choice(['remat', 'jit']))
        if loop and cls.scanned and self.chance(0.7):
            # A carried collection has to be there before the scan, and at init it is not.
            kinds = ['scan_b'] * ('stat' not in cls.effects) + ['scan_s'] * (not cls.fields)
            lifts += [self.rng.choice(kinds)] if kinds else []
        elif loop and not cls.scanned and not cls.fields and self.chance(0.15):
            lifts.append(self.rng.choice(['vmap_b', 'vmap_s']))
        if self.chance(0.12):
            lifts.insert(self.rng.randint(0, len(lifts)), self.mask(cls))
        fields = {name: field_ref(f) for name, f in cls.fields.items()}
        return Use(cls, tuple(lifts), fields)

    # Bodies.

    def body(self, env: Env, length: int, depth: int = 0) -> list:
        out: list = []
        for _ in range(length):
            out += self.stmt(env, depth)
        return out

    def spend(self, env: Env, cost: int) -> bool:
        if self.cost[id(env.cls)] + cost > self.COST:
            return False
        self.cost[id(env.cls)] += cost
        return True

    def modules(self, env: Env) -> list[tuple[Ref, Use]]:
        """List the modules that can be reached here."""
        found: list[tuple[Ref, Use]] = []
        if not env.cls.compact:
            found += self.subs(('self',), env.cls)
        found += [(('attr', ('self',), n, None), Use(f)) for n, f in env.cls.fields.items()]
        found += [(('local', n), u) for n, u in env.modules.items()]
        for ref, use in list(found):
            if use.open and not use.cls.compact:
                found += self.subs(ref, use.cls)
        return found

    def subs(self, base: Ref, cls: Class) -> list[tuple[Ref, Use]]:
        found = []
        for name, sub in cls.subs.items():
            items = (enumerate(sub) if isinstance(sub, list) else
                     sub.items() if isinstance(sub, dict) else [(None, sub)])
            found += [(('attr', base, name, i), use) for i, use in items]
        return found

    def op(self, kind: str) -> str:
        return 'mat' if kind == 'mat' else self.rng.choice(
            ['mul', 'add', 'wave', 'mul', 'add', 'wave', 'tied', 'ruled'])

    def stmt(self, env: Env, depth: int) -> list:
        raw, method = env.place == 'raw', env.place == 'method'
        makers: list[tuple[float, Callable]] = [(4, self.read), (5, self.call)]
        if depth < 3:
            makers.append((4, self.block))
            if not raw or depth < 2:
                makers.append((1, self.raw))
        if not raw:
            makers += [(1.5, self.revisit), (1, self.mirror), (0.5, self.alias), (0.6, self.stat)]
            if not env.cls.compact and depth < 2:
                makers += [(1, self.lifted), (0.7, self.stepped)]
        if method:
            makers.append((0.3, self.noise))
            if env.cls.compact:
                makers += [(4, self.create), (4, self.new)]
        total = self.rng.random() * sum(w for w, _ in makers)
        for weight, maker in makers:
            total -= weight
            if total <= 0:
                break
        return maker(env, depth)

    def read(self, env: Env, depth: int) -> list:
        options: list[tuple[Ref, str, str, str]] = [
            (('self',), name, 'held', kind) for name, kind in env.held.items()]
        c = env.cls
        hidden = {p for _, p, direct in c.derived.values() if direct}
        for name, kind in c.params.items():
            if not c.compact or name in env.created:
                hows = ['get_variable', 'variables']
                hows += ['attr', 'attr'] if not c.compact and name not in hidden else []
                options += [(('self',), name, how, kind) for how in hows]
        options += [(('self',), name, 'attr', 'vec') for name in c.derived for _ in range(3)]
        for ref, use in self.modules(env):
            if not use.open:
                continue
            d, called = use.cls, (ref, '__call__') in env.touched
            if called:
                options += [(ref, name, how, kind) for name, kind in d.params.items()
                            for how in ('get_variable', 'variables')]
            # Flax would set a module up in the trace of a function, and its values would leak.
            if not d.compact and (env.place != 'raw' or called and not use.names):
                hidden = {p for _, p, direct in d.derived.values() if direct}
                options += [(ref, name, 'attr', kind) for name, kind in d.params.items()
                            if name not in hidden]
                options += [(ref, name, 'attr', 'vec') for name in d.derived]
        if not options or not self.spend(env, 1):
            return []
        ref, name, how, kind = self.rng.choice(options)
        if how != 'held' and self.chance(0.15) and env.place != 'raw':
            keep = f'h{next(self.fresh)}'
            env.held[keep] = kind
            return [Read(ref, name, how, '', keep)]
        return [Read(ref, name, how, self.op(kind))]

    def create(self, env: Env, depth: int) -> list:
        missing = [p for p in env.cls.params if p not in env.created]
        if not missing:
            return self.read(env, depth)
        name = self.rng.choice(missing)
        env.created.add(name)
        env.cls.created.add(name)
        kind = env.cls.params[name]
        if self.chance(0.2):
            keep = f'h{next(self.fresh)}'
            env.held[keep] = kind
            return [Read(('self',), name, 'param', '', keep)]
        return [Read(('self',), name, 'param', self.op(kind))]

    def new(self, env: Env, depth: int) -> list:
        if not env.cls.pool:
            return self.create(env, depth)
        out: list = []

        def local_field(field: Class) -> Ref:
            for name, use in env.modules.items():
                if use.cls is field and use.open:
                    return ('local', name)
            name = f'{self.rng.choice("abc")}{next(self.fresh)}'
            env.modules[name] = Use(field)
            out.append(New(name, env.modules[name], auto=False))
            return ('local', name)

        use = self.use(env.cls, self.rng.choice(env.cls.pool), local_field)
        local = f'{self.rng.choice("abc")}{next(self.fresh)}'
        env.modules[local] = use
        out.append(New(local, use, auto=not use.names and self.chance(0.5)))
        return out + (self.call_of(env, ('local', local), use) if self.chance(0.6) else [])

    def call(self, env: Env, depth: int) -> list:
        modules = self.modules(env)
        if 'aux' in env.cls.methods and self.chance(0.3):  # made first, so __call__ may call it
            return self.call_of(env, ('self',), Use(env.cls), 'aux')
        if not modules:
            return self.read(env, depth)
        return self.call_of(env, *self.rng.choice(modules)) or self.read(env, depth)

    def call_of(self, env: Env, ref: Ref, use: Use, method: str = '__call__') -> list:
        if ref != ('self',) and 'aux' in use.cls.methods and use.open and self.chance(0.3):
            method = 'aux'
        if env.place == 'raw' and (ref, method) not in env.touched:
            return []
        if env.place != 'method' and ('noise' in use.cls.effects):
            return []
        if env.place == 'raw' and 'stat' in use.cls.effects:
            return []
        times = 2 ** len(use.names - {'remat', 'jit'})
        if ref != ('self',) and not self.spend(env, max(1, times * self.cost[id(use.cls)])):
            return []
        env.cls.effects |= use.cls.effects
        env.touched.add((ref, method))
        return [Call(ref, method, use)]

    def block(self, env: Env, depth: int) -> list:
        body = self.body(env, self.rng.randint(1, 3), depth + 1)
        return [Block(self.mask(env.cls), body)] if body else []

    def revisit(self, env: Env, depth: int) -> list:
        """Read an attribute in a block, which may set its module up, and again after it."""
        options = [(ref, use.cls, name) for ref, use in self.modules(env)
                   if use.open and not use.cls.compact for name in use.cls.derived]
        if not options or not self.spend(env, 2):
            return []
        ref, cls, name = self.rng.choice(options)
        read = Read(ref, name, 'attr', self.op('vec'))
        filter = Glob('**/' + cls.derived[name][1]) if self.chance(0.7) else Bool(True)
        return [Block(Mask(filter), [read]), dataclasses.replace(read)]

    def mirror(self, env: Env, depth: int) -> list:
        modules = self.modules(env)
        if not modules:
            return []
        ref, use = self.rng.choice(modules)
        local = f'm{next(self.fresh)}'
        env.modules[local] = use
        return [Mirror(local, self.mask(use.cls), ref), *self.call_of(env, ('local', local), use)]

    def alias(self, env: Env, depth: int) -> list:
        modules = self.modules(env)
        if not modules:
            return []
        ref, use = self.rng.choice(modules)
        local = f'm{next(self.fresh)}'
        env.modules[local] = use
        return [Alias(local, ref)]

    def raw(self, env: Env, depth: int) -> list:
        if env.closures and self.chance(0.5):
            return [self.run_raw(env)]
        local = f'body{next(self.fresh)}'
        body = self.body(env.inner('raw'), self.rng.randint(1, 3), depth + 1)
        if not body:
            return []
        self.raws = True  # a lifted transform in it must not write, not even parameters back
        out = [Closure(local, body)]
        if env.place != 'raw':
            env.closures.append(local)
            out.append(self.run_raw(env))
            if self.chance(0.5):
                block = Block(self.mask(env.cls), [self.run_raw(env)])
                out.insert(self.rng.randint(1, 2), block)
            return out
        return [*out, Raw(self.rng.choice(['jit', 'checkpoint', 'plain']), local)]

    def run_raw(self, env: Env) -> Raw:
        self.spend(env, 4)
        kinds = ['scan', 'scan', 'checkpoint', 'jit', 'jit', 'cond', 'vmap', 'plain']
        return Raw(self.rng.choice(kinds), self.rng.choice(env.closures))

    def lifted(self, env: Env, depth: int) -> list:
        kind = self.rng.choice(['scan', 'remat', 'jit', 'cond'])
        body = self.body(env.inner('lifted'), self.rng.randint(1, 3), depth + 1)
        return [Lifted(kind, f'body{next(self.fresh)}', body)] if body else []

    def stepped(self, env: Env, depth: int) -> list:
        body = self.body(env.inner('lifted'), self.rng.randint(1, 3), depth + 1)
        return [Stepped(self.mask(env.cls), f'steps{next(self.fresh)}', body)] if body else []

    def noise(self, env: Env, depth: int) -> list:
        env.cls.effects.add('noise')
        return [Noise()]

    def stat(self, env: Env, depth: int) -> list:
        if not env.cls.stat or env.cls.compact and ('n' in env.created or env.place != 'method'):
            return []
        env.created.add('n')
        env.cls.effects.add('stat')
        return [Stat()]


# Checks ------------------------------------------------------------------------------------------

X = jnp.array([0.7, -1.1, 0.4])
KEYS = {'params': jax.random.key(1), 'noise': jax.random.key(2)}


def _broadcast(x: Any, *, shape: tuple, broadcast_dimensions: tuple, **_: Any) -> np.ndarray:
    new = [1] * len(shape)
    for size, axis in zip(np.shape(x), broadcast_dimensions, strict=True):
        new[axis] = size
    xp = jnp if isinstance(x, jax.Array) else np  # numpy knows no random keys
    return xp.broadcast_to(xp.reshape(x, new), shape)


def _dot(x: Any, y: Any, *, dimension_numbers: Any, **_: Any) -> np.ndarray:
    contract, (batch, _) = dimension_numbers
    return np.asarray(_bind_dot(x, y, dimension_numbers) if batch else np.tensordot(x, y, contract))


def _bind_dot(x: Any, y: Any, dimension_numbers: Any) -> Any:
    return lax.dot_general(jnp.asarray(x), jnp.asarray(y), dimension_numbers)


# The operations that programs consist of, in numpy, so that nothing has to be compiled.
_NUMPY: dict[str, Callable] = {
    'add': lambda x, y, **_: np.add(x, y), 'add_any': lambda x, y, **_: np.add(x, y),
    'sub': lambda x, y, **_: np.subtract(x, y), 'mul': lambda x, y, **_: np.multiply(x, y),
    'neg': lambda x, **_: np.negative(x), 'gt': lambda x, y, **_: np.greater(x, y),
    'sin': lambda x, **_: np.sin(x), 'cos': lambda x, **_: np.cos(x),
    'exp': lambda x, **_: np.exp(x), 'broadcast_in_dim': _broadcast,
    'reduce_sum': lambda x, *, axes, **_: np.sum(x, axis=axes, dtype=x.dtype),
    'squeeze': lambda x, *, dimensions, **_: np.squeeze(x, dimensions),
    'transpose': lambda x, *, permutation, **_: np.transpose(x, permutation),
    'copy': lambda x, **_: x, 'stop_gradient': lambda x, **_: x, 'dot_general': _dot,
    'stack': lambda *xs, axis, **_: np.stack(xs, axis),
    'convert_element_type': lambda x, *, new_dtype, **_: np.asarray(x).astype(new_dtype),
    'slice': lambda x, *, start_indices, limit_indices, **_: x[
        tuple(map(slice, start_indices, limit_indices))],
    'reshape': lambda x, *, new_sizes, **_: np.reshape(x, new_sizes),
}


def evaluate(closed: Any, *args: Any) -> list:
    """Run a jaxpr one operation at a time, loops and calls unrolled.

    It compiles nothing but single operations, and equal operations give equal bits.
    """
    jaxpr, env = getattr(closed, 'jaxpr', closed), {}
    env.update(zip(jaxpr.constvars, getattr(closed, 'consts', ()), strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        vals = [v.val if hasattr(v, 'val') else env[v] for v in eqn.invars]
        name, params = eqn.primitive.name, eqn.params
        if name == 'scan':
            outs = _evaluate_scan(eqn, vals)
        elif name == 'cond':
            outs = evaluate(params['branches'][int(vals[0])], *vals[1:])
        elif name == 'flax_sg_lanes':
            body, count = params['jaxpr'], params['count']  # the inputs of the first lane
            outs = evaluate(body, *vals[:len(getattr(body, 'jaxpr', body).invars)])
            outs = outs[:count] * len(params['lanes']) + outs[count:]
        elif 'jaxpr' in params or 'call_jaxpr' in params:
            outs = evaluate(params.get('jaxpr', params.get('call_jaxpr')), *vals)
        elif name in _NUMPY:
            outs = [_NUMPY[name](*vals, **params)]
        else:
            outs = eqn.primitive.bind(*map(jnp.asarray, vals), **params)
            outs = outs if eqn.primitive.multiple_results else [outs]
        env.update(zip(eqn.outvars, outs, strict=True))
    return [v.val if hasattr(v, 'val') else env[v] for v in jaxpr.outvars]


def _evaluate_scan(eqn: Any, vals: list) -> list:
    # How a scan says what is carried differs between versions; the ranks tell too.
    body, length, reverse = (eqn.params[k] for k in ('jaxpr', 'length', 'reverse'))
    inner = getattr(body, 'jaxpr', body)
    stacked = [a.aval.ndim != b.aval.ndim
               for a, b in zip(eqn.invars, inner.invars, strict=True)]
    collected = [a.aval.ndim != b.aval.ndim
                 for a, b in zip(eqn.outvars, inner.outvars, strict=True)]
    carries = collected.count(False)
    start = stacked.index(True) - carries if True in stacked else len(vals) - carries
    ys: list = []
    for i in reversed(range(length)) if reverse else range(length):
        outs = evaluate(body, *(v[i] if s else v for v, s in zip(vals, stacked, strict=True)))
        vals[start:start + carries] = outs[:carries]
        ys.append(outs[carries:])
    ys = ys[::-1] if reverse else ys
    return [*vals[start:start + carries], *(jnp.stack(y) for y in zip(*ys, strict=True))]


def traced(fn: Callable) -> Callable:
    """Return ``fn`` run as its jaxpr says, one operation at a time."""
    def run(*args):
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        return jax.tree.unflatten(
            jax.tree.structure(shape), evaluate(closed, *jax.tree.leaves(args)))
    return run


MODES: dict[str, Callable] = {'traced': traced, 'eager': lambda fn: fn, 'jit': jax.jit}


@contextlib.contextmanager
def _blocks(masks: list[Mask]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for mask in masks:
            stack.enter_context(eval(mask.source(), dict(NAMES)))
        yield


def application(program: Program, model: linen.Module, masks: list[Mask],
                views: Callable = lambda target: target) -> Callable:
    """Return ``f(params, stats, x) -> (loss, (out, noises))`` for one application of the module."""
    mutable = ['batch_stats', *['params'] * program.mutable_params]
    inside = [] if program.around_grad else masks

    def apply(params, stats, x):
        noises.clear()
        variables, rngs = {'params': params, 'batch_stats': stats}, {'noise': KEYS['noise']}
        with _blocks(inside):
            if program.bind:
                bound = model.bind(variables, rngs=rngs, mutable=mutable)
                y = views(bound)(x)
            else:
                y, variables = model.apply(
                    variables, x, rngs=rngs, mutable=mutable, method=views(type(model).__call__))
        if program.bind:
            variables = bound.variables
        out = {'y': y, 'stats': variables.get('batch_stats', {})}
        if program.mutable_params:
            out['params'] = variables['params']
        seen = [] if isinstance(y, dict) else list(noises)  # those of views are of another trace
        return scalar(lambda: out)(), (out, seen)

    return apply


def gradients(fn: Callable) -> Callable:
    return lambda *args: jax.grad(fn, (0, 1, 2), has_aux=True)(*args)


def around(program: Program, masks: list[Mask], fn: Callable) -> Callable:
    def run(*args):
        with _blocks(masks if program.around_grad else []):
            return fn(*args)
    return run


def check(program: Program, modes: tuple[str, ...] = ('traced',), *, second: bool = False) -> bool:
    """Compare a program with its meaning; return whether a block of it stopped anything."""
    masked, plain = build(program, plain=False), build(program, plain=True)
    source = report(program)
    bent, forward = 'map_values' in source, 'map_gradient' not in source

    def init(model: linen.Module) -> Any:
        variables = traced(lambda x: model.init(KEYS, x))(X)
        return variables['params'] if bent and 'params' in variables else variables

    with streams_told_apart():
        variables = traced(lambda x: plain.init(KEYS, x))(X)
        expected = init(plain)
    assert_same(init(masked), expected, 'init')
    if program.runs[0]:
        with _blocks(program.runs[0]):
            assert_same(init(masked), expected, 'init in a block')
    args = (variables.get('params', {}), variables.get('batch_stats', {}), X)
    # A derived value is computed once in setup, and at each read in the machine.
    # A scaled gradient is a sum of two in the machine, and a mapped value is read once in a block.
    exact = not (re.search(r'scan|vmap|jit|remat|raw|lifted|scale_|map_|tied|ruled|steps', source)
                 or any(c.derived for c in program.classes))
    differs = False
    for mode in modes:
        run, plain_fn = MODES[mode], application(program, plain, [])
        with streams_told_apart():
            plain_grads, (plain_out, noise) = run(gradients(plain_fn))(*args)
        seen: dict[int, Any] = {}
        for masks in program.runs:
            fn = application(program, masked, masks)
            grads, (out, drawn) = run(around(program, masks, gradients(fn)))(*args)
            # What setup derives may be computed again in a block, in a function that is compiled.
            tolerance = 1e-3 if mode == 'jit' or mode == 'eager' and not exact else 0.0
            if not bent:
                assert_same((out, drawn), (plain_out, noise), f'{mode} value', rtol=tolerance)
            if id(masks) in seen:
                assert_same(grads, seen[id(masks)], f'{mode} gradient, again', rtol=0.0)
                continue
            seen[id(masks)] = grads

            def two_copies(params, stats, x, bar, masks=masks):
                out = meaning(program, masks, params, bar, stats, x, noise)
                return scalar(lambda: out)(), (out, ())

            wanted, (meant, _) = run(gradients(two_copies))(*args, args[0])
            tolerance = 0.0 if exact and mode != 'jit' else 1e-3
            try:
                assert_same(out, meant, f'{mode} value', rtol=1e-3 if bent else tolerance)
                assert_same(grads, wanted, f'{mode} gradient', rtol=tolerance)
            except AssertionError:
                if bent or not exact:
                    check_condition(lambda *args: run(gradients(two_copies))(*args), args)
                raise
            differs |= any(bool((a != b).any()) for a, b in zip(
                jax.tree.leaves(grads), jax.tree.leaves(plain_grads), strict=True))
            if second and forward:
                check_second_order(fn, two_copies, args, around(program, masks, lambda f: f()))
    return differs


class IllConditioned(Exception):
    """A program that has no meaning to compare with.

    Rounding alone changes its results by more than two programs may differ; or Flax's `nn.jit` gives
    it random numbers that depend on what ran before.
    """


@contextlib.contextmanager
def streams_told_apart() -> Iterator[None]:
    """Raise IllConditioned where `nn.jit` takes one function of a module for another.

    It counts the random numbers that a jitted function draws by the module alone, so that the
    second of two functions moves the module's streams as far as the first one did.
    """
    original, caches = lift._restore_rng_counters, lift._side_effect_cache.cache

    def restore(scopes: Any, fingerprint: Any, before: Any) -> None:
        count = lambda: [lift.CountsHolder.make(s.rng_counters).flat_d
                         for s in jax.tree.leaves(scopes)]
        known, after = fingerprint in caches, count()
        drawn = after != [c.flat_d for c in jax.tree.leaves(before, is_leaf=_has_counts)]
        original(scopes, fingerprint, before)
        if known and drawn and count() != after:
            raise IllConditioned

    lift._restore_rng_counters = restore
    try:
        yield
    finally:
        lift._restore_rng_counters = original


def _has_counts(node: Any) -> bool:
    return isinstance(node, lift.CountsHolder)


def check_condition(fn: Callable, args: tuple) -> None:
    """Raise IllConditioned if a millionth of its parameters moves a program's meaning too far."""
    near = jax.tree.map(lambda v: lax.mul(v, np.full(v.shape, 1 + 1e-6, np.float32)), args[0])
    try:
        assert_same(fn(near, *args[1:], near), fn(*args, args[0]), 'condition', rtol=1e-3)
    except AssertionError as error:
        raise IllConditioned from error


def check_views(program: Program, filters: dict[str, Mask], *, second: bool = False) -> bool:
    """Compare gradient views of the program's root with their meaning, as `check` does.

    Entry k is the program in one more block, which stops what its predicate does not select. What
    the program writes is that of a block which stops all parameters.
    """
    model, plain = build(program, plain=False), build(program, plain=True)
    source, masks = report(program), program.runs[0]
    forward = 'map_gradient' not in source
    variables = traced(lambda x: plain.init(KEYS, x))(X)
    args = (variables.get('params', {}), variables.get('batch_stats', {}), X)
    _, (_, noise) = traced(application(program, plain, []))(*args)
    entries = ', '.join(f'{k!r}: {m.predicate()}' for k, m in filters.items())
    collections = next(iter(filters.values())).collections
    views = eval(f'sg.gradient_views({{{entries}}}, collections={collections!r}, '
                 'allow_unmatched=True)', dict(NAMES))
    with _blocks(masks):
        assert set(views(model).init(KEYS, X)) == set(variables)
    fn = application(program, model, masks, views)
    stop = lambda f: [*masks, Mask(Combine('~', (f.filter,)), f.collections)]  # noqa: E731

    def two_copies(params, stats, x, bar):
        args = (params, bar, stats, x, noise)
        out = {k: meaning(program, stop(f), *args)['y'] for k, f in filters.items()}
        rest = meaning(program, [*masks, Mask(Bool(True), collections)], *args)
        out = {**rest, 'y': out}
        return scalar(lambda: out)(), (out, ())

    inside = around(program, masks, lambda f: f())
    grads, (out, _) = inside(lambda: traced(gradients(fn))(*args))
    wanted, (meant, _) = traced(gradients(two_copies))(*args, args[0])
    assert_same(out, meant, 'value', rtol=1e-3)
    assert_same(grads, wanted, 'gradient', rtol=1e-3)
    if second and forward:
        check_second_order(fn, two_copies, args, inside)
        check_other_orders(fn, two_copies, args, inside)
    return any(bool((g == 0).all()) for g in jax.tree.leaves(grads[0]))


def check_second_order(fn: Callable, two_copies: Callable, args: tuple, inside: Callable) -> None:
    """Compare a derivative forward over reverse and one forward, both in a fixed direction."""
    step = tangents_of(args)
    meant = lambda *xs: two_copies(*xs, args[0])  # noqa: E731
    first = lambda f: lambda *xs: jax.jvp(lambda *ys: f(*ys)[1][0], xs, step)[1]  # noqa: E731
    again = lambda f: lambda *xs: jax.jvp(  # noqa: E731
        lambda *ys: gradients(f)(*ys)[0], xs, step)[1]
    for name, order in (('jvp', first), ('jvp of grad', again)):
        got = inside(lambda order=order: traced(order(fn))(*args))
        assert_same(got, traced(order(meant))(*args), name, rtol=1e-3)


def check_other_orders(fn: Callable, two_copies: Callable, args: tuple, inside: Callable) -> None:
    """Compare reverse over reverse, reverse over forward, and a third derivative."""
    step = tangents_of(args)
    meant = lambda *xs: two_copies(*xs, args[0])  # noqa: E731

    def along(f: Callable) -> Callable:  # the derivative of a function in a fixed direction
        return lambda *xs: jax.jvp(f, xs, step)[1]

    def slope(f: Callable) -> Callable:  # the same in reverse mode
        return lambda *xs: sum(jax.tree.leaves(jax.tree.map(
            lambda g, s: (g * s).sum(), jax.grad(f, (0, 1, 2))(*xs), step)))

    orders = {'grad of grad': lambda f: jax.grad(slope(f), (0, 1, 2)),
              'grad of jvp': lambda f: jax.grad(along(f), (0, 1, 2)),
              'third': lambda f: jax.grad(slope(along(f)), (0, 1, 2))}
    for name, order in orders.items():
        got, want = (lambda f=f, order=order: traced(order(lambda *xs: f(*xs)[0]))(*args)
                     for f in (fn, meant))
        assert_same(inside(got), want(), name, rtol=1e-3)


# Shrinking ---------------------------------------------------------------------------------------


def _edits(program: Program) -> Iterator[Callable[[], None]]:
    """Yield ways to make a program smaller, each a change in place."""
    def bodies(body: list) -> Iterator[list]:
        yield body
        for s in body:
            if isinstance(s, (Block, Closure, Lifted, Stepped)):
                yield from bodies(s.body)

    def clear(items: Any, key: Any) -> Callable[[], None]:
        return lambda: items.__delitem__(key)

    for items in (program.runs, program.wraps, *program.runs):
        yield from (clear(items, i) for i in range(len(items)) if len(program.runs) > 1
                    or items is not program.runs)
    for c in program.classes:
        for body in [b for m in c.methods.values() for b in bodies(m)]:
            for i, s in enumerate(body):
                yield clear(body, i)
                if isinstance(s, (Block, Lifted)):
                    yield lambda body=body, i=i, s=s: body.__setitem__(slice(i, i + 1), s.body)
        for table in (c.masks, c.subs, c.derived, c.params, c.methods):
            yield from (clear(table, key) for key in list(table))
    yield from (clear(program.classes, i) for i in range(len(program.classes) - 1))
    for c in program.classes:
        uses = [u for sub in c.subs.values() for u in (
            sub if isinstance(sub, list) else sub.values() if isinstance(sub, dict) else [sub])]
        uses += [s.use for m in c.methods.values() for b in bodies(m) for s in b
                 if isinstance(s, New)]
        for use in uses:
            for i in range(len(use.lifts)):
                yield lambda use=use, i=i: setattr(use, 'lifts', use.lifts[:i] + use.lifts[i + 1:])


def shrink(program: Program, fails: Callable[[Program], bool]) -> Program:
    """Return a smaller program that still fails; a trial costs one call of ``fails``."""
    at = 0
    while True:
        trial = copy.deepcopy(program)
        edit = next(itertools.islice(_edits(trial), at, None), None)
        if edit is None:
            return program
        edit()
        if fails(trial):
            program = trial
        else:
            at += 1


def kind_of(error: BaseException) -> str:
    """Name a failure well enough to tell whether another program fails in the same way."""
    text = f'{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ""}'
    return re.sub(r"\[.*|'.*", '', text) if isinstance(error, AssertionError) else text[:60]


def same_failure(error: BaseException, run: Callable = check, **how: Any) -> Callable[[Program], bool]:
    """Return a predicate: does a program fail as this error did?"""
    def fails(program: Program) -> bool:
        try:
            run(program, **how)
        except Exception as other:
            return kind_of(other) == kind_of(error)
        return False
    return fails


def report(program: Program) -> str:
    """Show a program as it was run."""
    runs = [[mask.source() for mask in masks] for masks in program.runs]
    return (f'{Emitter(program, plain=False).source()}\n# blocks around each run: {runs}\n'
            f'# around grad: {program.around_grad}, bound: {program.bind}, '
            f'mutable params: {program.mutable_params}')


# A run of many -----------------------------------------------------------------------------------


def draw(seed: int) -> tuple[Program, dict[str, Any]]:
    """Return the program of a seed, and how to check it."""
    rng = random.Random(seed)
    program = Generator(rng).program()
    modes = ['traced']
    modes += ['eager'] * (rng.random() < 0.05) + ['jit'] * (rng.random() < 0.03)
    return program, {'modes': tuple(modes), 'second': rng.random() < 0.06}


def draw_views(seed: int) -> tuple[Program, dict[str, Any]]:
    """Return the program of a seed, and the views of it to check."""
    generator = Generator(random.Random(seed))
    program = generator.program()
    collections = generator.rng.choice(['params', 'params', 'params', True])
    names = 'uvw'[:generator.rng.randint(1, 3)]
    filters = {name: generator.selection(program.root, collections) for name in names}
    return program, {'filters': filters, 'second': generator.chance(0.1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--count', type=int, default=1000)
    parser.add_argument('--seed', type=int, default=0, help='of the first program')
    parser.add_argument('--views', action='store_true', help='gradient views of the programs')
    parser.add_argument('--stop', action='store_true', help='stop at the first failure, shrunk')
    options = parser.parse_args()
    start, counts = time.time(), Counter()
    for i in range(options.count):
        seed = options.seed + i
        program, how = (draw_views if options.views else draw)(seed)
        run = check_views if options.views else check
        try:
            counts['stopped a gradient'] += run(program, **how)
            counts['ok'] += 1
        except IllConditioned:
            counts['ill-conditioned'] += 1
        except Exception as error:
            counts['failed'] += 1
            print(f'seed {seed}: {type(error).__name__}: {str(error)[:200]}', flush=True)
            if options.stop:
                traceback.print_exc()
                print(report(shrink(program, same_failure(error, run, **how))), how)
                break
        if i % 50 == 49:
            print(f'{i + 1}/{options.count} {dict(counts)} {time.time() - start:.0f} s', flush=True)
            jax.clear_caches() if i % 500 == 499 else None
    print(f'{dict(counts)} in {time.time() - start:.0f} s, jax {jax.__version__}')
    sys.exit(bool(counts['failed']))


if __name__ == '__main__':
    main()
