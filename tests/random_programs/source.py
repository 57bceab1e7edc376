"""Random programs as Flax source, with the library's blocks or without them."""

from __future__ import annotations

from typing import Any

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
    Pass,
    Program,
    Raw,
    Read,
    Ref,
    Stat,
    Stepped,
    Use,
)


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
            for name in cls.params:
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
            return [
                f'def {s.local}(x, _=None):',
                *self.body(s.body, cls, me, deeper),
                ' ' * deeper + 'return x, None',
            ]
        if isinstance(s, Raw):
            return [f'x = raw_{s.kind}({me}, {s.local}, x)']
        if isinstance(s, Lifted):
            return [
                f'def {s.local}(mdl, x, _=None):',
                *self.body(s.body, cls, 'mdl', deeper),
                ' ' * deeper + 'return x, None',
                f'x = lifted_{s.kind}({me}, {s.local}, x)',
            ]
        if isinstance(s, Stepped):
            return [
                *([] if self.plain else [f'@{s.mask.source()}']),
                f'def {s.local}(mdl, x):',
                ' ' * deeper + 'yield x',
                *self.body(s.body, cls, 'mdl', deeper),
                ' ' * deeper + 'yield x',
                f'*_, x = {s.local}({me}, x)',
            ]
        if isinstance(s, Noise):
            return [f'x = noise({me}, x)']
        if isinstance(s, Stat):
            var = f"{me}.variable('batch_stats', 'n', ones)" if cls.compact else f'{me}.n'
            return [f'x = stat({me}, {var}, x)']
        return ['pass']


def report(program: Program) -> str:
    """Show a program as it was run."""
    runs = [[mask.source() for mask in masks] for masks in program.runs]
    return (
        f'{Emitter(program, plain=False).source()}\n# blocks around each run: {runs}\n'
        f'# around grad: {program.around_grad}, bound: {program.bind}, '
        f'mutable params: {program.mutable_params}'
    )
