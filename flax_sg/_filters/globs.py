"""Globs over '/'-joined variable paths.

Unlike a file glob, a pattern selects everything below what it matches, and ``**`` stands for any
number of names.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from flax_sg._errors import PredicateError

__all__ = ['compile_glob', 'literal_start']


_ONE = r'(?!\.\.(?:/|\Z))'  # a wildcard is a name, and '..' is none


@functools.lru_cache(maxsize=1024)
def compile_glob(pattern: str) -> re.Pattern[str]:
    """Compile a glob to a regex that matches a path or a leading part of it.

    Raises:
      PredicateError: the pattern is not a glob.
    """

    def bad(why: str) -> PredicateError:
        return PredicateError(f'path({pattern!r}): {why}')

    parts = pattern.removeprefix('/').split('/')
    if parts == ['']:
        raise bad('an empty pattern. Use flax_sg.everything (or True) to select all.')
    text = ''
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if not part:
            raise bad("an empty name between, before or after '/'. Remove the extra '/'.")
        if part == '**':
            text += r'(?:[^/]+/)*' + (r'[^/]+' if last else '')
            continue
        if '**' in part:
            raise bad(f"'**' must be a whole name, got {part!r}. Write '*' within a name.")
        text += _name(part, bad) + ('' if last else '/')
    try:
        return re.compile(rf'{text}(?:/|\Z)', re.DOTALL)
    except re.error as error:
        raise bad(f'{error}. Fix the range in brackets.') from None


def _name(part: str, bad: Callable[[str], PredicateError]) -> str:
    """Translate one name of a glob."""
    text, i, wild = '', 0, False
    while i < len(part):
        char, i = part[i], i + 1
        if char == '*':
            text += '[^/]*'
        elif char == '?':
            text += '[^/]'
        elif char == '[':
            end = part.find(']', i + 1 + part.startswith('!', i))  # a first ']' is a literal
            if end < 0:
                raise bad(
                    f"{part!r} has a '[' without a ']'. Close it, or write '[[]' for the "
                    'character itself.'
                )
            negated = part.startswith('!', i)
            members = re.sub(r'([\\\[\]^&~|])', r'\\\1', part[i + negated : end])
            text, i = text + f'(?!/)[{"^" * negated}{members}]', end + 1
        else:
            text += re.escape(char)
            continue
        wild = True
    return _ONE * wild + text


def literal_start(pattern: str, opener: tuple[str, ...]) -> tuple[str, ...]:
    """Return the absolute path of the leading names of a glob that are no wildcards."""
    start = () if pattern.startswith('/') else opener
    for part in pattern.removeprefix('/').split('/'):
        if any(char in part for char in '*?['):
            break
        start = start[:-1] if part == '..' else (*start, part)
    return start
