"""Filters of random programs: their source, and what they select, without the library."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import re
from typing import Any

Path = tuple[str, ...]


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
