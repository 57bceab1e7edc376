"""Random programs of flax.nnx, drawn from a source of randomness."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from random_nnx.source import OF_STATE, READS, TARGETS, WRITES
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
from random_nnx.transforms import OF_STATES
from random_programs.filters import Bool, Combine, Glob, Lambda, Regex
from random_programs.masks import KINDS

UPDATES = 'graph with updates'
SELF: Ref = ('self',)
GRADIENTS = ('stop_gradient', 'scale_gradient', 'map_gradient')
WRITTEN = {'stat', 'noise', 'param'}
# What may write in which transform of NNX, in the mode that hands writes back.
EFFECTS = {
    'jit': {'stat', 'noise', 'param'},
    'remat': {'stat', 'noise', 'param'},
    'cond': {'stat', 'param'},
    'switch': {'stat', 'param'},
    'scan, carrying': {'stat', 'noise', 'param'},
    'fori_loop': {'stat', 'noise', 'param'},
    'stacked scan': {'stat', 'param'},
    'stacked vmap': {'stat', 'param'},
}
KINDS_OF_TRACES = (
    *('jit', 'remat', 'vmap', 'scan', 'scan, carrying', 'fori_loop', 'cond', 'switch'),
    *('grad of input', 'grad of model', *OF_STATES),
)


@dataclasses.dataclass
class Place:
    """Where a statement stands.

    Attributes:
      cls: the class of the module at hand. may: the effects that are allowed here.
      locals: modules: their class, and how they were made. held: values, with their ranks.
      entered: the modules at hand are those of a function that was traced.
    """

    cls: Class
    may: set[str]
    depth: int
    locals: dict[str, tuple[Class, str]] = dataclasses.field(default_factory=dict)
    held: dict[str, str] = dataclasses.field(default_factory=dict)
    stacked: bool = False


class Generator:
    def __init__(self, rng: random.Random):
        self.rng, self.count = rng, 0
        self.kinds = [*['stop_gradient'] * 6, *(kind for kind in KINDS if 'named' not in kind)]
        self.views, self.writes = self.chance(0.2), self.chance(0.35)
        if self.writes:  # what was read is stored, and constants are not to be written
            self.kinds = [kind for kind in self.kinds if kind in GRADIENTS]

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def fresh(self, letter: str) -> str:
        self.count += 1
        return f'{letter}{self.count}'

    # Filters and transforms.

    def leaf(self) -> Any:
        kind = self.rng.randint(0, 7)
        if kind <= 3:
            names = ['a', 'b', 'c', 'w', 'k', 'n', 't', 's', '*', '**', '?', '[ab]', 'layers', '0']
            parts = [self.rng.choice(names) for _ in range(self.rng.choice([1, 1, 1, 2, 2, 3]))]
            lead = self.rng.choice([''] * 8 + ['/', '../'])
            return Glob(lead + '/'.join(parts))
        if kind == 4:
            patterns = ['^a', 'w$', 'b|k', '(^|/)[ab]/', r'\.\.', '^[^/]*$', '^w', 'layers', '/1/']
            return Regex(self.rng.choice(patterns))
        if kind == 5:
            name = self.rng.choice(['a', 'b', 'w', 'k', '..', 'layers', 't'])
            body = f'c.name.startswith({name!r})', f'c.path[-1] == {name!r}', 'len(c.path) > 1'
            return Lambda(self.rng.choice([*body, f'{name!r} not in c.path']))
        return Bool(self.chance(0.85))

    def filter(self, depth: int, at: Place | None, *, named: bool) -> Any:
        if depth and self.chance(0.35):
            symbol = self.rng.choice('~~&|')
            parts = [self.filter(depth - 1, at, named=named) for _ in range(1 + (symbol != '~'))]
            return Combine(symbol, tuple(parts))
        if at is not None and (not named or self.chance(0.15)):
            if not named and self.chance(0.15):
                return Bool(True)
            ref, cls = self.module(at)
            own = [*cls.params, *(t for t, (_, of) in cls.ties.items() if of is not None)]
            return Within(ref, self.rng.choice(own) if own and self.chance(0.35) else None)
        return self.leaf()

    def mask(self, at: Place | None = None) -> Mask:
        """Draw a transform; one for a block, if there is a place where it is opened."""
        collections = self.rng.choice(['params'] * 8 + [True, 'batch_stats'])
        kinds = self.kinds if collections == 'params' else [k for k in self.kinds if k in GRADIENTS]
        named = at is None or self.chance(0.5)
        on = self.module(at)[0] if named and at is not None else None
        kind = self.rng.choice(kinds)
        return Mask(self.filter(2, at, named=named), kind, on, collections)

    # Modules.

    def modules(self, at: Place) -> list[tuple[Ref, Class]]:
        """Return the modules at hand, those of stacks left out."""
        found: list[tuple[Ref, Class]] = []

        def visit(ref: Ref, cls: Class) -> None:
            found.append((ref, cls))
            for name, sub in cls.subs.items():
                if isinstance(sub, list):
                    for i, each in enumerate(sub):
                        visit(('attr', ref, name, i), each)
                elif isinstance(sub, dict):
                    for key, each in sub.items():
                        visit(('attr', ref, name, key), each)
                elif not isinstance(sub, Stack):
                    visit(('attr', ref, name, None), sub)

        visit(SELF, at.cls)
        for name, (cls, _) in at.locals.items():
            visit(('local', name), cls)
        return found

    def module(self, at: Place, *, other: bool = False) -> tuple[Ref, Class]:
        found = self.modules(at)[1 if other else 0 :]
        return self.rng.choice(found[:6]) if found else (SELF, at.cls)

    def stacks(self, at: Place) -> list[tuple[Ref, Class]]:
        return [
            (('attr', SELF, name, None), sub.cls)
            for name, sub in at.cls.subs.items()
            if isinstance(sub, Stack)
        ]

    def cls(self, name: str, before: list[Class], *, noise: bool) -> Class:
        cls = Class(name, noise=noise)
        for param in self.rng.sample('wkv', self.rng.choice([1, 1, 2])):
            cls.params[param] = self.rng.choice(['vec', 'vec', 'mat'])
        cls.stat = self.chance(0.3)
        for sub in 'abc'[: self.rng.choice([1, 2, 2, 3])] if before else '':
            of = self.rng.choice(before)
            deep = len(of.below) > 4
            kind = self.rng.choice(['one'] * 4 + ['list', 'dict', 'stack'] * (not deep))
            kinds = {'list': [of, of], 'dict': {'u': of, 'v': of}, 'stack': Stack(of)}
            cls.subs[sub] = kinds.get(kind, of)
        if cls.subs and self.chance(0.25):
            ref, of = self.module(Place(cls, set(), 0), other=True)
            if ref != SELF:
                cls.ties['t'] = (ref, self.rng.choice([*of.params]))
                if self.chance(0.3):
                    cls.ties['t'] = (ref, None)
        cls.effects = {}
        for method in ('aux', '__call__'):
            self.effects: set[str] = set()
            may = {
                'traced',
                *['derived'] * (not self.views),
                *(WRITTEN if self.chance(0.6) else ()),
            }
            at = Place(cls, may, 0)
            cls.methods[method] = self.body(at, self.rng.randint(2, 4))
            if self.chance(0.2):
                cls.masks[method] = self.mask()
            cls.effects[method] = self.effects
        if self.chance(0.15):
            cls.mask = self.mask()
        return cls

    # Statements.

    def body(self, at: Place, length: int) -> list:
        at = dataclasses.replace(at, locals=dict(at.locals), held=dict(at.held))
        return [s for _ in range(length) for s in self.statement(at)]

    def op(self, rank: str) -> str:
        return 'mat' if rank == 'mat' else self.rng.choice(['mul', 'add', 'wave'])

    def read(self, at: Place) -> list:
        if at.held and self.chance(0.3):
            name = self.rng.choice([*at.held])
            return [Held(name, self.op(at.held[name]))]
        ref, cls = self.module(at)
        name = self.rng.choice([*cls.params])
        hows = [how for how in READS if not (how in OF_STATE and cls.tied)]
        keep = self.fresh('v') if self.chance(0.2) else None
        if keep:
            at.held[keep] = cls.params[name]
        return [Read(ref, name, self.rng.choice(hows), self.op(cls.params[name]), keep)]

    def call(self, at: Place) -> list:
        options = [
            (ref, method)
            for ref, cls in self.modules(at)[1:]
            for method, effects in cls.effects.items()
            if effects <= at.may - ({'derived'} if self.under_local(ref) else set())
        ]
        if 'aux' in at.cls.effects and at.cls.effects['aux'] <= at.may:
            options.append((SELF, 'aux'))
        if not options:
            return self.read(at)
        ref, method = self.rng.choice(options)
        self.effects |= dict(self.modules(at))[ref].effects[method]
        return [Call(ref, method)]

    def statement(self, at: Place) -> list:
        kind = self.rng.choice(
            ['read'] * 5
            + ['call'] * 5
            + (['block'] * 4 + ['made', 'traced', 'traced', 'captured']) * (at.depth < 3)
            + ['write']
            + ['stack'] * 2
        )
        deeper = dataclasses.replace(at, depth=at.depth + 1)
        if kind == 'block':
            return [Block(self.mask(at), self.body(deeper, self.rng.randint(1, 3)))]
        if kind == 'made':
            return self.made(at)
        if kind == 'traced' and 'traced' in at.may:
            return self.traced(at)
        if kind == 'stack' and 'traced' in at.may and self.stacks(at) and at.depth < 3:
            ref, cls = self.rng.choice(self.stacks(at))
            kind = self.rng.choice(['stacked scan', 'stacked vmap'])
            return [self.function(at, kind, ref, cls)]
        if kind == 'captured':
            kind = self.rng.choice(
                ['jit', 'checkpoint', 'scan', 'vmap', 'cond', 'plain', 'nnx.jit']
            )
            pure = dataclasses.replace(deeper, may=at.may if kind == 'plain' else set[str]())
            return [Captured(kind, self.fresh('f'), self.body(pure, self.rng.randint(1, 3)))]
        if kind == 'write':
            return self.write(at)
        return self.call(at) if kind == 'call' else self.read(at)

    def write(self, at: Place) -> list:
        kind = self.rng.choice(['stat', 'param', 'noise'])
        if kind not in at.may or kind == 'param' and not self.writes:
            return self.read(at)
        if kind == 'noise':
            if not at.cls.noise:
                return self.read(at)
            self.effects.add('noise')
            return [Noise()]
        options = [
            (ref, name)
            for ref, cls in self.modules(at)
            if not (ref[0] == 'local' or self.under_local(ref))
            for name in ([*cls.params] if kind == 'param' else ['n'] * cls.stat)
        ]
        if not options:
            return self.read(at)
        self.effects.add(kind)
        ref, name = self.rng.choice(options)
        return [Write(ref, name, self.rng.choice([*WRITES]))]

    def under_local(self, ref: Ref) -> bool:
        return ref[0] == 'local' or ref[0] == 'attr' and self.under_local(ref[1])

    def made(self, at: Place) -> list:
        ref, cls = self.module(at, other=True)
        how = self.rng.choice(['mirror', 'mirror', 'clone', 'deepcopy', 'map', 'split'])
        if ref == SELF or how == 'map' and cls.tied:
            return self.read(at)
        local = self.fresh('m')
        mask = self.mask() if how == 'mirror' else None
        below = [at.locals[ref[1]][1]] if ref[0] == 'local' else []
        at.locals[local] = cls, ' '.join([how, *below])
        return [Made(local, ref, how, mask)]

    def traced(self, at: Place) -> list:
        ref, cls = self.module(at)
        return [self.function(at, self.rng.choice(KINDS_OF_TRACES), ref, cls)]

    def function(self, at: Place, kind: str, ref: Ref, cls: Class) -> Any:
        how = at.locals[self.base(ref)][1] if self.under_local(ref) else ''
        mode = self.rng.choice([UPDATES, UPDATES, 'graph', 'tree'])
        if kind in OF_STATES or cls.tied or 'mirror' in how:
            mode = UPDATES
        may = at.may - {'derived'} if how else at.may  # as a copy has been read
        if kind == 'grad of model' and ('derived' not in may or cls.noise and mode == 'tree'):
            kind = 'grad of input'
        self.effects |= {'traced', *['derived'] * (kind == 'grad of model')}
        kept = {'traced', 'derived'} if kind != 'lax.scan' else set()  # which captures the State
        if mode == UPDATES and 'mirror' not in how:
            kept |= EFFECTS.get(kind, set())
        may &= kept
        inner = Place(cls, may, at.depth + 1)
        return Traced(kind, mode, self.fresh('f'), ref, self.body(inner, self.rng.randint(1, 3)))

    def base(self, ref: Ref) -> str:
        return ref[1] if ref[0] == 'local' else self.base(ref[1])

    # Programs.

    def program(self) -> Program:
        classes: list[Class] = []
        count = self.rng.choice([2, 2, 3, 3, 4])
        for i in range(count):
            noise = i == count - 1 and self.chance(0.3)
            classes.append(self.cls(f'M{i}', list(classes), noise=noise))
        root = classes[-1]
        at = Place(root, set(), 0)
        runs = [[self.mask(at) for _ in range(self.rng.choice([0, 1, 1, 2]))] for _ in range(2)]
        runs = [*runs, runs[0]] if self.chance(0.3) else runs
        form = self.rng.choice(['values', 'nnx.grad', 'jit of nnx.grad', 'split'])
        pure = not root.effects['__call__'] & WRITTEN
        if form == 'split' and not pure:
            form = 'nnx.grad'
        mode = self.rng.choice([UPDATES, 'graph', 'tree'] if pure else [UPDATES])
        if root.tied or root.noise:
            mode = UPDATES
        views = None
        if self.views:
            named = lambda: self.filter(1, at, named=self.chance(0.6))
            target = self.rng.choice([*TARGETS])
            views = {name: named() for name in 'uvw'[: self.rng.randint(1, 3)]}, target
        return Program(classes, runs, form, mode, form != 'values' and self.chance(0.5), views)
