"""Patterns that select nothing: finding them, and saying what may have been meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Protocol

from flax_sg._errors import UnmatchedPathError
from flax_sg._info import VariableInfo

__all__ = ['check_matched', 'unmatched', 'unmatched_collection']


class Pattern(Protocol):
    """A glob or a regex of a filter."""

    text: str

    def selects(self, info: VariableInfo) -> bool: ...


def check_matched(
        patterns: Iterable[Pattern], infos: Iterable[VariableInfo], *, where: str, of: str) -> None:
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
    rooted = pattern.text.startswith('/')
    names = [f'/{info.absolute_name}' if rooted else info.name for info in infos]
    return UnmatchedPathError(
        f'{where}: no variable of {of} matches {pattern.text!r}. {_suggest(pattern.text, names)} '
        'Fix the pattern, or pass allow_unmatched=True.')


def unmatched_collection(
        name: str, there: Iterable[str], *, where: str, of: str) -> UnmatchedPathError:
    """Build the error for a collection that does not exist."""
    return UnmatchedPathError(
        f'{where}: {of} has no collection {name!r}. There are: '
        f'{", ".join(map(repr, there)) or "none"}. Fix collections=, or pass allow_unmatched=True.')


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
        return 'There are no variables.'
    close = difflib.get_close_matches(pattern, prefixes, n=3, cutoff=0.6)
    plain = {p.removesuffix('/...'): p for p in prefixes}
    close = [plain[c] for c in difflib.get_close_matches(pattern, plain, n=3, cutoff=0.5)] or close
    if close:
        return f'Close: {", ".join(map(repr, close))}.'
    tops = [p for p in prefixes if '/' not in p.removeprefix('/').removesuffix('/...')]
    more = ', ...' if len(tops) > 5 else ''
    return f'There are: {", ".join(map(repr, tops[:5]))}{more}.'
