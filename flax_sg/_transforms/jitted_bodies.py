"""Bodies of `nn.jit` while JAX traces them, and the names of variables that they asked for.

Equal layers under `nn.jit` share one trace, made at the path of the first. What depends on a path
in it must not be shared: what a predicate says of a variable there, and what a function of the
user's makes of its name. A body notes both. At another path the predicates are asked again, about
the variables of that path; where they say the same the trace is shared, as it is without blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

from flax_sg._filters.variables import Path, VariableInfo, relative

__all__ = ['Body', 'Question', 'WatchedInfo', 'plain']


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """What a predicate was asked, and its answer.

    Attributes:
      key: what the block means, as a value; equal blocks may be asked in its place.
      says: asks the block's own transform.
      opener: the absolute path of the module that opened the block.
      info: the variable.
      answer: what was said of it.
    """

    key: Hashable
    says: Callable[[VariableInfo], Hashable] = dataclasses.field(compare=False)
    opener: Path
    info: VariableInfo
    answer: Hashable


NOBODY = ()


@dataclasses.dataclass(slots=True, eq=False)
class Body:
    """A run of a function under `nn.jit`, or all those in one context that may share traces.

    Attributes:
      paths: the absolute paths of the scopes that were handed in.
      questions: what predicates were asked in it.
      named: if a name was used in another way, the only paths that may have its trace.
    """

    paths: tuple[Path, ...]
    questions: dict[Question, None] = dataclasses.field(default_factory=dict)
    named: tuple[Path, ...] | None = None

    def use_name(self) -> None:
        """Note that the trace depends on a path in a way that cannot be asked about."""
        self.named = self.paths

    def serves(self, paths: tuple[Path, ...], ask: Callable[[Question], Hashable]) -> bool:
        """Say whether the traces are right for scopes at other paths."""
        return self.named in (None, paths) and all(
            ask(question) == question.answer for question in self.moved(paths)
        )

    def moved(self, paths: tuple[Path, ...]) -> list[Question]:
        """Return what predicates are asked at other paths, with the answers that were given."""
        found = []
        for old in self.questions:
            opener, path = (
                _rebased(path, self.paths, paths) for path in (old.opener, old.info.absolute_path)
            )
            info = dataclasses.replace(old.info, path=relative(path, opener), absolute_path=path)
            found.append(dataclasses.replace(old, opener=opener, info=info))
        return found

    def add(self, other: Body) -> None:
        """Take in another run, whose trace is kept beside the others."""
        self.questions.update(dict.fromkeys(other.moved(self.paths)))
        if other.named is not None:
            self.named = other.named if self.named in (None, other.named) else NOBODY

    def used_in(self, bodies: tuple[Body, ...], paths: tuple[Path, ...]) -> None:
        """Let bodies in which a trace is used know what it depends on."""
        for body in bodies:
            body.questions.update(dict.fromkeys(self.moved(paths)))
            if self.named is not None:
                body.use_name()


def _rebased(path: Path, old: tuple[Path, ...], new: tuple[Path, ...]) -> Path:
    """Return a path below the longest of some paths as one below that of the same place in new."""
    below = [(len(a), a, b) for a, b in zip(old, new, strict=True) if path[: len(a)] == a]
    if not below:
        return path
    length, _, start = max(below)
    return (*start, *path[length:])


class WatchedInfo(VariableInfo):
    """A variable's info, which tells bodies when a name that depends on their path is used."""

    __slots__ = ('around', 'inside', 'plain')

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:  # for dataclasses.replace
        return VariableInfo(*args, **kwargs)

    def __reduce__(self) -> tuple:
        return VariableInfo, tuple(getattr(self, f.name) for f in dataclasses.fields(self))

    def __eq__(self, other: object) -> bool:
        _used(self.inside + self.around)
        return self.plain == (plain(other) if isinstance(other, VariableInfo) else other)

    def __hash__(self) -> int:
        _used(self.inside + self.around)
        return hash(self.plain)

    @classmethod
    def of(
        cls, plain: VariableInfo, inside: tuple[Body, ...], around: tuple[Body, ...]
    ) -> WatchedInfo:
        """Watch an info for bodies inside of the block that reads, and for those around it."""
        self = object.__new__(cls)
        for field in dataclasses.fields(VariableInfo):
            getattr(VariableInfo, field.name).__set__(self, getattr(plain, field.name))
        for name, value in (('plain', plain), ('inside', inside), ('around', around)):
            object.__setattr__(self, name, value)
        return self

    @property
    def path(self) -> Path:
        """The relative path; it depends on where a body is if the block is outside of it."""
        outside = self.plain.path[:1] == ('..',)
        _used(self.inside + self.around * outside)
        return self.plain.path

    @property
    def absolute_path(self) -> Path:
        """The absolute path."""
        _used(self.inside + self.around)
        return self.plain.absolute_path


def _used(bodies: tuple[Body, ...]) -> None:
    for body in bodies:
        body.use_name()


def plain(info: VariableInfo) -> VariableInfo:
    """Return an info that tells nobody."""
    return info.plain if isinstance(info, WatchedInfo) else info
