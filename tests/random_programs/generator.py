"""Random programs, drawn from a source of randomness."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable

from random_programs.filters import Bool, Glob
from random_programs.mask_generator import MaskGenerator
from random_programs.masks import Mask
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


class Generator(MaskGenerator):
    """Draw a program from a source of randomness (`random.Random` or hypothesis's)."""

    COST = 40  # reads and updates in one run of a method, those of the methods it calls included

    def __init__(self, rng: random.Random):
        super().__init__(rng)
        self.fresh = itertools.count()
        self.cost: dict[int, int] = {}
        self.raws = False

    def program(self) -> Program:
        classes: list[Class] = []
        for i in range(self.rng.randint(0, 3)):
            classes.append(self.cls(f'M{i}', classes))
        classes.append(self.cls('Root', classes, root=True))
        wraps = [
            (self.rng.choice(['class', 'instance']), self.mask(classes[-1]))
            for _ in range(self.chance(0.15))
        ]
        root = classes[-1]
        one, two = [self.mask(root)], [self.mask(root), self.mask(root)]
        if self.chance(0.2):
            one[0] = dataclasses.replace(self.selection(root, 'params'), kind='map_values, centre')
        runs = self.rng.choice(
            [[[]], [[]], [one], [one, [], one], [[], one], [one, two, []], [[], two, one, []]]
        )
        outer = self.chance(0.3)
        # What is bound is read once more for its statistics, outside of all blocks.
        bind = not outer and not wraps and self.chance(0.2)
        return Program(
            classes,
            wraps,
            runs,
            around_grad=outer,
            bind=bind,
            mutable_params=not self.raws and self.chance(0.2),
        )

    # Classes.

    def cls(self, name: str, pool: list[Class], root: bool = False) -> Class:
        c = Class(
            name, compact=self.chance(0.4), scanned=not root and self.chance(0.25), pool=list(pool)
        )
        c.params = {
            p: 'mat' if p == 'k' else 'vec'
            for p in self.rng.sample(['w', 'v', 'k'], self.rng.randint(1, 2))
        }
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
        for method in ['__call__', 'aux'][: 1 if c.compact else self.rng.choice([1, 1, 2])][::-1]:
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
        uses = [
            self.use(c, self.rng.choice(pool), lambda f: self.setup_field(c, f)) for _ in range(2)
        ]
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
            items = (
                enumerate(sub)
                if isinstance(sub, list)
                else sub.items()
                if isinstance(sub, dict)
                else [(None, sub)]
            )
            found += [(('attr', base, name, i), use) for i, use in items]
        return found

    def op(self, kind: str) -> str:
        return (
            'mat'
            if kind == 'mat'
            else self.rng.choice(['mul', 'add', 'wave', 'mul', 'add', 'wave', 'tied', 'ruled'])
        )

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
        for weight, maker in makers:  # noqa: B007
            total -= weight
            if total <= 0:
                break
        return maker(env, depth)

    def read(self, env: Env, depth: int) -> list:
        options: list[tuple[Ref, str, str, str]] = [
            (('self',), name, 'held', kind) for name, kind in env.held.items()
        ]
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
                options += [
                    (ref, name, how, kind)
                    for name, kind in d.params.items()
                    for how in ('get_variable', 'variables')
                ]
            # Flax would set a module up in the trace of a function, and its values would leak.
            if not d.compact and (env.place != 'raw' or called and not use.names):
                hidden = {p for _, p, direct in d.derived.values() if direct}
                options += [
                    (ref, name, 'attr', kind)
                    for name, kind in d.params.items()
                    if name not in hidden
                ]
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
        options = [
            (ref, use.cls, name)
            for ref, use in self.modules(env)
            if use.open and not use.cls.compact
            for name in use.cls.derived
        ]
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
