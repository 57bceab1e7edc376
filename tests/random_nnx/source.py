"""Random programs as source in flax.nnx, with the library's transforms."""

from __future__ import annotations

from typing import Any

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

READS = {  # a Variable's value, given the Variable
    'index': '{v}[...]',
    'get_value': '{v}.get_value()',
    'operator': '({v} + 0.0)',
    'array': 'jnp.asarray({v})',
    'leaves': 'jax.tree.leaves({v})[0]',
    'state': 'nnx.as_pure(nnx.state({m}))[{n!r}]',
    'split': 'nnx.split({m})[1][{n!r}][...]',
    'pure': 'nnx.pure(nnx.split({m})[1])[{n!r}]',
    'copy': '{v}.copy()[...]',
    'raw': '{v}.get_raw_value()',
    'iterated': 'jnp.stack([*{v}])',
    'map': 'jax.tree.map(lambda leaf: 1.0 * leaf, {v})[...]',
}
OF_STATE = ('state', 'split', 'pure')
MADE = {
    'clone': 'nnx.clone({m})',
    'deepcopy': 'copy.deepcopy({m})',
    'map': 'jax.tree.map(lambda leaf: leaf, {m})',
    'split': 'nnx.merge(*nnx.split({m}))',
}
WRITES = {
    'index': '{v}[...] = {new}',
    'set_value': '{v}.set_value({new})',
    'update': 'nnx.update({m}, nnx.State({{{n!r}: {v}.replace({new})}}))',
}


def ref_source(ref: Ref, me: str = 'self') -> str:
    if ref[0] == 'self':
        return me
    if ref[0] == 'local':
        return ref[1]
    index = '' if ref[3] is None else f'[{ref[3]!r}]'
    return f'{ref_source(ref[1], me)}.{ref[2]}{index}'


def filter_source(filter: Any, me: str) -> str:
    if isinstance(filter, Within):
        name = '' if filter.name is None else f'.{filter.name}'
        return f'sg.within({ref_source(filter.ref, me)}{name})'
    if isinstance(filter, Combine):
        parts = [f'({filter_source(part, me)})' for part in filter.parts]
        return f'~{parts[0]}' if filter.symbol == '~' else f' {filter.symbol} '.join(parts)
    return filter.source()


def mask_source(mask: Mask, me: str = 'self') -> str:
    more = '' if mask.collections == 'params' else f', collections={mask.collections!r}'
    name, arguments = mask.kind.partition(',')[0], KINDS[mask.kind][0]
    predicate = filter_source(mask.filter, me)
    made = f'sg.{name}({predicate}{arguments}{more}, allow_unmatched=True)'
    return made if mask.on is None else f'{made}.on({ref_source(mask.on, me)})'


TARGETS = {
    'module': '{m}',
    'bound method': '{m}.__call__',
    'method': 'functools.partial({made}(type({m}).__call__), {m})',
    'function': 'functools.partial({made}(lambda m, x: m(x)), {m})',
}


def call_source(program: Program) -> str:
    """Write what is called with x in each run: the model, or views of it."""
    if program.views is None:
        return 'model'
    entries, target = program.views
    named = ', '.join(f'{k!r}: {filter_source(v, "model")}' for k, v in entries.items())
    made = f'sg.gradient_views({{{named}}}, allow_unmatched=True)'
    written = TARGETS[target].format(m='model', made=made)
    return written if made in written else f'{made}({written})'


class Emitter:
    """Write the classes of a program; `plain` leaves the library's transforms out."""

    def __init__(self, program: Program, *, plain: bool = False):
        self.plain, self.lines = plain, list[str]()
        for cls in program.classes:
            self.cls(cls)
        self.lines += [f'Model = {program.root.name}', '']
        self.source = '\n'.join(self.lines)

    def cls(self, cls: Class) -> None:
        out = [f'class {cls.name}(nnx.Module):', '    def __init__(self, values, at=""):']
        for name in cls.params:
            out.append(f'        self.{name} = nnx.Param(values[at + {name!r}])')
        if cls.stat:
            out.append("        self.n = nnx.BatchStat(values[at + 'n'])")
        if cls.noise:
            out.append('        self.rngs = nnx.Rngs(noise=jax.random.key(7))')
        for name, sub in cls.subs.items():
            at = lambda *keys: ' + '.join(['at', repr('/'.join([*map(str, keys), '']))])
            if isinstance(sub, list):
                made = [f'{each.name}(values, {at(name, i)})' for i, each in enumerate(sub)]
                made = f'nnx.List([{", ".join(made)}])'
            elif isinstance(sub, dict):
                made = [f'{key}={each.name}(values, {at(name, key)})' for key, each in sub.items()]
                made = f'nnx.Dict({", ".join(made)})'
            else:
                made = f'{(sub.cls if isinstance(sub, Stack) else sub).name}(values, {at(name)})'
            out.append(f'        self.{name} = {made}')
        for name, (ref, of) in cls.ties.items():
            out.append(f'        self.{name} = {ref_source(ref)}{"" if of is None else f".{of}"}')
        out += ['        pass'] * (len(out) == 2)
        for method, body in cls.methods.items():
            if method in cls.masks and not self.plain:
                out.append(f'    @{mask_source(cls.masks[method])}')
            out += [f'    def {method}(self, x):', *self.body(body, 'self', 8), '        return x']
        if cls.mask is not None and not self.plain:
            out.append(f'{cls.name} = {mask_source(cls.mask)}({cls.name})')
        self.lines += [*out, '']

    def body(self, body: list, me: str, indent: int) -> list[str]:
        lines = [line for s in body for line in self.stmt(s, me)] or ['pass']
        return [' ' * indent + line for line in lines]

    def stmt(self, s: Any, me: str) -> list[str]:
        if isinstance(s, Read):
            module = ref_source(s.ref, me)
            value = READS[s.how].format(v=f'{module}.{s.name}', m=module, n=s.name)
            return [f'{s.keep} = {value}' if s.keep else f'x = {s.op}(x, {value})']
        if isinstance(s, Held):
            return [f'x = {s.op}(x, {s.name})']
        if isinstance(s, Call):
            method = '' if s.method == '__call__' else f'.{s.method}'
            return [f'x = {ref_source(s.ref, me)}{method}(x)']
        if isinstance(s, Block):
            opened = 'if True' if self.plain else f'with {mask_source(s.mask, me)}'
            return [f'{opened}:', *self.body(s.body, me, 4)]
        if isinstance(s, Made):
            module = ref_source(s.ref, me)
            made = MADE[s.how].format(m=module) if s.how in MADE else module
            if s.mask is not None and not self.plain:
                made = f'{mask_source(s.mask, me)}({module})'
            return [f'{s.local} = {made}']
        if isinstance(s, Traced):
            return [
                f'def {s.local}(mdl, x):',
                *self.body(s.body, 'mdl', 4),
                '    return x',
                f'x = traced[{s.kind!r}]({s.local}, {ref_source(s.ref, me)}, x, {s.mode!r})',
            ]
        if isinstance(s, Captured):
            return [
                f'def {s.local}(x):',
                *self.body(s.body, me, 4),
                '    return x',
                f'x = captured[{s.kind!r}]({s.local}, x)',
            ]
        if isinstance(s, Write):
            module = ref_source(s.ref, me)
            v = f'{module}.{s.name}'
            new = f'0.5 * {v}[...] + like({v}, x)'
            write = WRITES[s.how].format(v=v, m=module, n=s.name, new=new)
            return [write, *[f'x = x + {v}[...]'] * (s.name == 'n')]
        if isinstance(s, Noise):
            return [f'x = x + draw({me}.rngs.noise())']
        raise TypeError(s)


def report(program: Program) -> str:
    """Show a program as it is run."""
    runs = [[mask_source(mask, 'model') for mask in masks] for masks in program.runs]
    return (
        f'{Emitter(program).source}\n# blocks of each run: {runs}\n'
        f'# {program.form}, {program.mode}, around: {program.around}\n# {call_source(program)}(x)'
    )
