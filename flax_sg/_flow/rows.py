"""Rows of a table of gradient_flow: parameters with the same records folded under their prefix."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from flax_sg._flow.records import FlowRecord, Records, Verdict

__all__ = ['Row', 'counts', 'explanation', 'fold', 'in_order', 'notes']


_ENDED = (Verdict.CUSTOM_ZERO, Verdict.PIECEWISE_CONSTANT, Verdict.NUMERIC_ZERO)


@dataclasses.dataclass
class Row:
    """Some parameters that are shown together.

    Attributes:
      label: the parameter's path, or the prefixes that the parameters share.
      names: the parameters.
      cells: for each loss, the records of the parameters.
      inner: what is said of each parameter, by its path below the prefix.
      children: the rows that it is folded from.
      parts: how many rows were put together in it, one after another.
    """

    label: str
    names: list[str]
    cells: list[list[FlowRecord]]
    inner: dict[str, tuple]
    children: list[Row] = dataclasses.field(default_factory=list)
    parts: int = 1

    @property
    def meaning(self) -> Any:
        """What is said of the parameters; once, if it is the same of all."""
        said = set(self.inner.values())
        return said.pop() if len(said) == 1 else self.inner

    @property
    def rank(self) -> int:
        """How much people look for it: what is unknown, what nothing trains, what ends oddly."""
        cells = [record for cell in self.cells for record in cell]
        trained = {record.name for record in cells if record.reached}
        if any(record.verdict in (Verdict.UNKNOWN, Verdict.NOT_FINITE) for record in cells):
            return 0
        if len(trained) < len(self.names):
            return 1
        return 2 if any(record.verdict in _ENDED for record in cells) else 3


def _said(record: FlowRecord) -> tuple:
    if record.verdict is Verdict.REACHED and not record.reason:
        return (record.verdict,)
    return record.verdict, record.operation, record.source, record.reason


def fold(
    flow: Records, names: list[str], *, depth: int | None = None, limit: int = 40
) -> list[Row]:
    """Return the rows for some parameters: as many as are needed, and not more than ``limit``.

    Args:
      depth: fold whatever lies deeper, the same or not; None chooses it by the limit.
    """
    paths = {name: tuple(name.split('/')) for name in names}
    deepest = max((len(path) for path in paths.values()), default=1)
    depths = [depth] if depth is not None else range(deepest, 0, -1)
    for level in depths:
        rows = _level(flow, in_order(names), paths, (), level)
        if len(rows) <= limit:
            break
    return sorted(rows, key=lambda row: row.rank)


def in_order(names: Iterable[str]) -> list[str]:
    """Sort paths in the way that puts layer_2 before layer_10."""
    return sorted(
        names,
        key=lambda name: [
            [
                (part.isdigit(), int(part) if part.isdigit() else part)
                for part in re.split(r'(\d+)', step)
            ]
            for step in name.split('/')
        ],
    )


def _row(flow: Records, names: list[str], start: tuple, children: list[Row]) -> Row:
    cells = [[flow[loss, name] for name in names] for loss in flow.losses]
    prefix = '/'.join(start) + '/'
    inner = {
        name.removeprefix(prefix): tuple(_said(cell[i]) for cell in cells)
        for i, name in enumerate(names)
    }
    return Row(prefix if children else names[0], names, cells, inner, children)


def _level(
    flow: Records, names: list[str], paths: dict[str, tuple], start: tuple, depth: int
) -> list[Row]:
    """Return the rows of the parameters below a prefix."""
    groups: dict[str, list[str]] = collections.defaultdict(list)
    for name in names:
        path = paths[name]
        groups[path[len(start)] if len(path) > len(start) else ''].append(name)
    rows: list[Row] = []
    for part, members in groups.items():
        here = (*start, part)
        if len(members) == 1:
            rows.append(_row(flow, members, paths[members[0]][:-1], []))
            continue
        below = _level(flow, members, paths, here, depth)
        if len(below) == 1 and below[0].parts > 1:
            below = below[0].children
        whole = _row(flow, members, here, below)
        same = not isinstance(whole.meaning, dict)
        rows += [whole] if same or len(here) >= depth else _merged(below)
    return _merged(rows)


def _merged(rows: list[Row]) -> list[Row]:
    """Put neighbours together that say the same, of all their parameters or of each."""
    merged: list[Row] = []
    for row in rows:
        last = merged[-1] if merged else None
        if last is None or last.meaning != row.meaning:
            merged.append(row)
            continue
        children = [*(last.children if last.parts > 1 else [last]), row]
        merged[-1] = Row(
            _label(children),
            last.names + row.names,
            [a + b for a, b in zip(last.cells, row.cells, strict=True)],
            row.inner,
            children,
            last.parts + 1,
        )
    return merged


def _label(parts: list[Row]) -> str:
    first, last = parts[0].label, parts[-1].label
    start = first.rstrip('/').rpartition('/')[0]
    short = last.removeprefix(start + '/') if start else last
    return f'{first} … {short}' if len(parts) > 2 else f'{first}, {short}'


def notes(rows: list[Row]) -> dict[str, int]:
    """Number the explanations of what is no plain REACHED, in the order of the rows."""
    numbers: dict[str, int] = {}
    for row in rows:
        for cell in row.cells:
            for record in cell:
                text = explanation(record)
                if text:
                    numbers.setdefault(text, len(numbers) + 1)
    return numbers


def explanation(record: FlowRecord) -> str:
    """Return what a note says of a record, or ''."""
    if record.verdict is Verdict.REACHED and not record.reason:
        return ''
    return record.explain()


def counts(cell: list[FlowRecord]) -> list[tuple[Verdict, int, Any]]:
    """Return the verdicts of a cell with how often each occurs, and a record of each."""
    found: dict[Verdict, list[FlowRecord]] = {}
    for record in cell:
        found.setdefault(record.verdict, []).append(record)
    return [(verdict, len(records), records) for verdict, records in found.items()]
