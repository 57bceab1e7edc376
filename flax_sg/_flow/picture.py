"""The picture of gradient_flow: a map of parameters by losses, coloured by verdict."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from typing import Any, NamedTuple

from flax_sg._errors import UsageError
from flax_sg._flow.records import FlowRecord, Records, Verdict
from flax_sg._flow.rows import fold, in_order
from flax_sg._flow.table import COLOURS, headline, label_of

__all__ = ['draw']

_NAMED = 60  # as many parameters have rows of their own
_LIGHT = (Verdict.REACHED_PARTLY, Verdict.NUMERIC_ZERO)


def draw(flow: Records, path: Any) -> None:
    """Save the picture to a file, SVG or PNG."""
    if os.path.splitext(path)[1].lower() not in ('.svg', '.png'):
        raise UsageError(
            f'Flow.plot: {os.fspath(path)!r}; expected a file name ending in .svg or .png.'
        )
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("Flow.plot draws with matplotlib: pip install 'flax_sg[plot]'") from error
    bands = _bands(flow)
    height = sum(band.height for band in bands)
    longest = max((len(band.label) for band in bands), default=1)
    width = min(0.085 * longest, 4.5) + max(1.5 * len(flow.losses), 2.5) + 2.4
    figure = Figure(figsize=(width, 0.3 * height + 1.3), layout='constrained')
    axes = figure.add_subplot()
    ticks, top = [], 0.0
    for band in bands:
        for x, loss in enumerate(flow.losses):
            records = [flow[loss, name] for name in band.names]
            _draw_cell(axes, x, top, band.height, records)
        ticks.append(top + band.height / 2)
        top += band.height
        axes.axhline(top, color='white', linewidth=1.0)
    axes.set(xlim=(0, len(flow.losses)), ylim=(top, 0), frame_on=False)
    axes.set_xticks([x + 0.5 for x in range(len(flow.losses))], flow.losses)
    axes.set_yticks(ticks, [band.label for band in bands])
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=8)
    axes.set_title(headline(flow).removeprefix('gradient_flow: '), fontsize=9, loc='left')
    number = Counter(record.verdict for record in flow.records)
    figure.legend(
        handles=[
            Patch(color=COLOURS[v], label=f'{_word(v)} ({number[v]})') for v in COLOURS if number[v]
        ],
        loc='outside right upper',
        fontsize=8,
        frameon=False,
    )
    figure.savefig(path, dpi=150)


class _Band(NamedTuple):
    """Parameters under one label, and how high they are drawn together."""

    label: str
    names: list[str]
    height: float


def _bands(flow: Records) -> list[_Band]:
    """Return each parameter, or where there are many the rows of the table.

    A row of many parameters is higher than that of one, but not as many times: one parameter that
    nothing trains is to be seen among hundreds.
    """
    if len(flow.names) <= _NAMED:
        return [_Band(name, [name], 1.0) for name in in_order(flow.names)]
    return [
        _Band(label_of(row), row.names, len(row.names) ** 0.5)
        for row in fold(flow, list(flow.names))
    ]


def _draw_cell(axes: Any, x: float, top: float, height: float, records: list[FlowRecord]) -> None:
    from matplotlib.patches import Rectangle

    step = height / len(records)
    runs = itertools.groupby(range(len(records)), lambda i: records[i].verdict)
    for verdict, places in runs:  # one rectangle each, or there are seams between thin ones
        places = list(places)
        box = Rectangle(
            (x + 0.01, top + places[0] * step),
            0.98,
            len(places) * step,
            linewidth=0,
            facecolor=COLOURS[verdict],
        )
        axes.add_patch(box)
    if len({record.verdict for record in records}) == 1:
        verdict, norm = records[0].verdict, records[0].norm if len(records) == 1 else None
        axes.text(
            x + 0.5,
            top + height / 2,
            _word(verdict) + (f' {norm:.2g}' if norm else ''),
            ha='center',
            va='center',
            fontsize=7,
            color='black' if verdict in _LIGHT else 'white',
        )


def _word(verdict: Any) -> str:
    return str(verdict).lower().replace('_', ' ')
