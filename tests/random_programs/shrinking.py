"""Random programs that fail, made smaller by their syntax."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

from random_programs.checks import check
from random_programs.syntax import Block, Closure, Lifted, New, Program, Stepped


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
        yield from (
            clear(items, i)
            for i in range(len(items))
            if len(program.runs) > 1 or items is not program.runs
        )
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
        uses = [
            u
            for sub in c.subs.values()
            for u in (
                sub if isinstance(sub, list) else sub.values() if isinstance(sub, dict) else [sub]
            )
        ]
        uses += [
            s.use for m in c.methods.values() for b in bodies(m) for s in b if isinstance(s, New)
        ]
        for use in uses:
            for i in range(len(use.lifts)):
                yield lambda use=use, i=i: setattr(use, 'lifts', use.lifts[:i] + use.lifts[i + 1 :])


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


def same_failure(
    error: BaseException, run: Callable = check, **how: Any
) -> Callable[[Program], bool]:
    """Return a predicate: does a program fail as this error did?"""

    def fails(program: Program) -> bool:
        try:
            run(program, **how)
        except Exception as other:
            return kind_of(other) == kind_of(error)
        return False

    return fails
