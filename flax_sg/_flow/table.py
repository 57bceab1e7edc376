"""The table of gradient_flow, in the terminal and as HTML."""

from __future__ import annotations

import html
import io
import shutil
from typing import Any

from flax_sg._flow.records import Records, Verdict
from flax_sg._flow.rows import Row, counts, explanation, fold, notes

__all__ = ['COLOURS', 'as_html', 'as_rich', 'as_text', 'headline', 'label_of', 'show']

# For a light and a dark ground, and told apart by people who see fewer colours.
COLOURS = {
    Verdict.REACHED: '#2a9d5c',
    Verdict.REACHED_PARTLY: '#a6c83c',
    Verdict.MASKED: '#4c78c8',
    Verdict.CUSTOM_ZERO: '#b04fb0',
    Verdict.PIECEWISE_CONSTANT: '#e07b28',
    Verdict.UNUSED: '#8c8c8c',
    Verdict.NUMERIC_ZERO: '#d9b310',
    Verdict.NOT_FINITE: '#a4133c',
    Verdict.UNKNOWN: '#d62f3c',
}
_NOTES = 20  # lines below the table


def headline(flow: Records) -> str:
    """Return how many parameters and losses there are, and what no loss trains."""
    trained = {record.name for record in flow.records if record.reached}
    idle = len(flow.names) - len(trained)
    parameters = f'{len(flow.names)} parameter{"s" * (len(flow.names) != 1)}'
    losses = f'{len(flow.losses)} loss{"es" * (len(flow.losses) != 1)}'
    ending = f'; no loss trains {idle} of them' if idle else ''
    return f'gradient_flow: {parameters}, {losses}{ending}'


def label_of(row: Row) -> str:
    """Return a row's label, with the number of its parameters if there are several."""
    return row.label + (f' ({len(row.names)})' if len(row.names) > 1 else '')


def _said(cell: list[Any], numbers: dict[str, int]) -> list[tuple[Verdict, str]]:
    """Return the verdicts in a cell, each with its number, notes and norms."""
    parts = []
    for verdict, count, records in counts(cell):
        text = str(verdict) + (f' ×{count}' if count < len(cell) else '')
        marks = sorted({numbers[t] for r in records if (t := explanation(r)) in numbers})
        if marks:
            text += f' [{", ".join(map(str, marks[:3]))}{", …" if len(marks) > 3 else ""}]'
        norms = [r.norm for r in records if r.norm]
        if norms:
            low, high = f'{min(norms):.2g}', f'{max(norms):.2g}'
            text += f' {low}' if low == high else f' {low} … {high}'
        parts.append((verdict, text))
    return parts


def as_rich(
    flow: Records, names: list[str], *, depth: int | None = None, limit: int = 40
) -> tuple[Any, list[Any]]:
    """Return the table and the lines around it, of which the first comes before, for rich."""
    from rich.table import Table
    from rich.text import Text

    rows = fold(flow, names, depth=depth, limit=limit)
    numbers = notes(rows)
    table = Table(show_edge=False)
    table.add_column('parameter', overflow='fold')
    for loss in flow.losses:
        table.add_column(Text(loss), overflow='fold')  # not markup
    before = None
    for row in rows:
        if before not in (None, row.rank):
            table.add_section()
        before = row.rank
        cells = []
        for cell in row.cells:
            said = [Text(text, style=COLOURS[verdict]) for verdict, text in _said(cell, numbers)]
            cells.append(Text('\n').join(said))
        table.add_row(Text(label_of(row)), *cells)
    lines = [f'[{n}] {text}' for text, n in numbers.items()]
    if len(lines) > _NOTES:
        more = f'… and {len(lines) - _NOTES} more: show fewer parameters, or look at the records.'
        lines[_NOTES:] = [more]
    return table, list(map(Text, [headline(flow), *lines]))


def show(flow: Records, names: list[str], console: Any = None, **how: Any) -> None:
    """Print the table on a console of rich's."""
    from rich.console import Console

    console = console or Console()
    table, (first, *lines) = as_rich(flow, names, **how)
    console.print(first, table, sep='\n')
    for line in lines:  # a file and line that a terminal breaks cannot be clicked
        console.print(line, soft_wrap=True)


def as_text(flow: Records) -> str:
    """Return the table as plain text."""
    from rich.console import Console

    out = io.StringIO()
    width = max(120, shutil.get_terminal_size().columns)
    show(flow, list(flow.names), Console(file=out, width=width, color_system=None))
    return '\n'.join(line.rstrip() for line in out.getvalue().splitlines())


_STYLE = """<style>
.flow-table {font: 12px monospace} .flow-table small {opacity: .75} .flow-table b {font-weight: 600}
.flow-table div, .flow-table summary {display: grid; gap: 2px 8px; padding: 1px 0}
.flow-table summary {cursor: pointer} .flow-table details details, .flow-table details > div
  {margin-left: 1em}
</style>"""


def as_html(flow: Records) -> str:
    """Return the table as HTML in which a row of several parameters can be opened."""
    numbers = notes(rows := fold(flow, list(flow.names)))
    columns = f'grid-template-columns: minmax(14em, 2fr) repeat({len(flow.losses)}, 1fr)'
    head = ''.join(f'<b>{html.escape(text)}</b>' for text in ('parameter', *flow.losses))
    body = ''.join(_html_row(row, columns, numbers) for row in rows)
    lines = ''.join(f'<br>[{n}] {html.escape(text)}' for text, n in numbers.items())
    return (
        f'{_STYLE}<div class="flow-table" style="display: block"><p>'
        f'{html.escape(headline(flow))}</p><div style="{columns}">{head}</div>{body}'
        f'<small>{lines}</small></div>'
    )


def _html_row(row: Row, columns: str, numbers: dict[str, int]) -> str:
    cells = ''.join(
        '<span>'
        + '<br>'.join(
            f'<b style="color: {COLOURS[verdict]}">{html.escape(text)}</b>'
            for verdict, text in _said(cell, numbers)
        )
        + '</span>'
        for cell in row.cells
    )
    label = html.escape(label_of(row))
    if not row.children:
        return f'<div style="{columns}"><span>{label}</span>{cells}</div>'
    inner = ''.join(_html_row(child, columns, numbers) for child in row.children)
    return (
        f'<details><summary style="{columns}"><span>▸ {label}</span>{cells}</summary>{inner}'
        '</details>'
    )
