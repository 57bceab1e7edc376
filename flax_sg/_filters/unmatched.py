"""Patterns that select nothing: finding them, and saying what may have been meant."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Protocol

from flax_sg._errors import UnmatchedPathError
from flax_sg._filters.variables import VariableInfo

__all__ = ['check_matched', 'may_select', 'unmatched', 'unmatched_collection']

_SHOWN = 5


class Pattern(Protocol):
    """A glob, a regex or a callable of a filter.

    Attributes:
      text: how it is written.
      literal: it is text, and not a callable.
      anywhere: the same at any depth, as text, or '' where that cannot be said.
    """

    text: str
    literal: bool
    anywhere: str

    def selects(self, info: VariableInfo) -> bool: ...


def check_matched(
    patterns: Iterable[Pattern], infos: Iterable[VariableInfo], *, where: str, of: str
) -> None:
    """Raise UnmatchedPathError when a pattern selects none of ``infos``."""
    missing, seen = tuple(patterns), []
    for info in infos:
        if not missing:
            return
        seen.append(info)
        missing = tuple(p for p in missing if not p.selects(info))
    if missing:
        raise unmatched(missing[0], seen, where=where, of=of)


def unmatched(
    pattern: Pattern, infos: Iterable[VariableInfo], *, where: str, of: str
) -> UnmatchedPathError:
    """Build the error for a pattern that selects nothing among ``infos``."""
    infos = list(infos)
    hint = _deeper(pattern, infos)
    if not pattern.literal:
        names = [info.name for info in infos]
        return UnmatchedPathError(
            f'{where}: {pattern.text} selects no variable of {of}. {hint or _there_are(names)} '
            'Fix the predicate, or pass allow_unmatched=True.'
        )
    rooted = pattern.text.startswith('/')
    names = [f'/{info.absolute_name}' if rooted else info.name for info in infos]
    return UnmatchedPathError(
        f'{where}: no variable of {of} matches {pattern.text!r}. '
        f'{hint or _suggest(pattern.text, names)} '
        'Fix the pattern, or pass allow_unmatched=True.'
    )


def unmatched_collection(
    name: str, there: Iterable[str], *, where: str, of: str
) -> UnmatchedPathError:
    """Build the error for a collection that does not exist."""
    return UnmatchedPathError(
        f'{where}: {of} has no collection {name!r}. There are: '
        f'{", ".join(map(repr, there)) or "none"}. Fix collections=, or pass allow_unmatched=True.'
    )


def _deeper(pattern: Pattern, infos: Iterable[VariableInfo]) -> str:
    """Return a sentence if the pattern says what it should but for leading names of the path."""
    for info in infos:
        for depth in range(1, len(info.path)):
            cut = dataclasses.replace(
                info, path=info.path[depth:], absolute_path=info.absolute_path[depth:]
            )
            if may_select(pattern, cut):
                return _missing_level(pattern, info, cut, depth)
    return ''


def _missing_level(pattern: Pattern, info: VariableInfo, cut: VariableInfo, depth: int) -> str:
    if info.path[:depth] == ('params',):
        return "This is the whole dict of variables: pass variables['params']."
    if pattern.anywhere:
        return f'Perhaps {pattern.anywhere!r}: there is {info.name!r}.'
    return (
        f'It would select {cut.name!r}, which is {info.name!r} here: a level of the path is '
        'missing.'
    )


def may_select(pattern: Pattern, info: VariableInfo) -> bool:
    """Say whether a pattern selects a variable that nobody has read."""
    try:
        return pattern.selects(info)
    except Exception:  # of a user's callable, that does not know the variable
        return False


def _there_are(names: list[str]) -> str:
    if not names:
        return 'There are no variables.'
    more = ', ...' if len(names) > _SHOWN else ''
    return f'There are: {", ".join(map(repr, names[:_SHOWN]))}{more}.'


def _suggest(pattern: str, names: Iterable[str]) -> str:
    """Return a sentence with the paths closest to a pattern that matched nothing."""
    prefixes: dict[str, None] = {}
    for name in names:
        rooted = name.startswith('/')
        parts = name.removeprefix('/').split('/')
        for end in range(1, len(parts) + 1):
            shown = '/' * rooted + '/'.join(parts[:end])
            prefixes.setdefault(shown if end == len(parts) else f'{shown}/...')
    if not prefixes:
        return _there_are([])
    close = difflib.get_close_matches(pattern, prefixes, n=3, cutoff=0.6)
    plain = {p.removesuffix('/...'): p for p in prefixes}
    close = [plain[c] for c in difflib.get_close_matches(pattern, plain, n=3, cutoff=0.5)] or close
    if close:
        return f'Close: {", ".join(map(repr, close))}.'
    tops = [p for p in prefixes if '/' not in p.removeprefix('/').removesuffix('/...')]
    return _there_are(tops)
