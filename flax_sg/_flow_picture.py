"""The picture of gradient_flow: a map of parameters by losses, coloured by verdict."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from flax_sg._errors import UsageError
from flax_sg._flow_table import COLOURS, headline
from flax_sg._obstacles import Verdict
from flax_sg._rows import fold, in_order

if TYPE_CHECKING:
    from flax_sg._report import Flow

__all__ = ['draw']

_NAMED = 60  # as many rows have names and words of their own
_LIGHT = (Verdict.REACHED_PARTLY, Verdict.NUMERIC_ZERO)


def draw(flow: Flow, path: Any) -> None:
    """Save the picture to a file, SVG or PNG."""
    if os.path.splitext(path)[1].lower() not in ('.svg', '.png'):
        raise UsageError(f'Flow.plot: {os.fspath(path)!r}; expected a file name ending in .svg or '
                         '.png.')
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("Flow.plot draws with matplotlib: pip install 'flax_sg[plot]'") from error
    names, losses = in_order(flow.names), flow.losses
    named = len(names) <= _NAMED
    longest = max((len(name) for name in names), default=1)
    height = 0.3 * len(names) + 1.6 if named else 11.0
    width = min(0.085 * longest, 4.5) + max(1.5 * len(losses), 2.5) + 2.4
    figure = Figure(figsize=(width, height), layout='constrained')
    axes = figure.add_subplot()
    for y, name in enumerate(names):
        for x, loss in enumerate(losses):
            record = flow[loss, name]
            axes.add_patch(_box(x, y, COLOURS[record.verdict], named))
            if named:
                norm = f'\n{record.norm:.2g}' if record.norm else ''
                axes.text(x + 0.5, y + 0.5, _word(record.verdict) + norm.replace('\n', ' '),
                          ha='center', va='center', fontsize=7,
                          color='black' if record.verdict in _LIGHT else 'white')
    axes.set(xlim=(0, len(losses)), ylim=(len(names), 0), frame_on=False)
    axes.set_xticks([x + 0.5 for x in range(len(losses))], losses)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=8)
    if named:
        axes.set_yticks([y + 0.5 for y in range(len(names))], names)
    else:
        _name_groups(axes, flow, names)
    there = [v for v in COLOURS if any(r.verdict is v for r in flow.records)]
    number = {v: sum(r.verdict is v for r in flow.records) for v in there}
    figure.legend(handles=[Patch(color=COLOURS[v], label=f'{_word(v)} ({number[v]})')
                           for v in there],
                  loc='outside right upper', fontsize=8, frameon=False)
    figure.suptitle(headline(flow).removeprefix('gradient_flow: '), fontsize=9)
    figure.savefig(path, dpi=150)


def _box(x: float, y: float, colour: str, named: bool) -> Any:
    from matplotlib.patches import Rectangle
    edge = {'edgecolor': 'white', 'linewidth': 1.0} if named else {'linewidth': 0}
    return Rectangle((x + 0.01, y), 0.98, 1, facecolor=colour, **edge)


def _word(verdict: Any) -> str:
    return str(verdict).lower().replace('_', ' ')


def _name_groups(axes: Any, flow: Flow, names: list[str]) -> None:
    """Name the parameters that the table would show in one row, in the order of the tree."""
    place = {name: y for y, name in enumerate(names)}
    groups = sorted((min(map(place.get, row.names)), max(map(place.get, row.names)), row.label)
                    for row in fold(flow, names))
    room = len(names) / 70  # rows that a line of text is high
    labels, last = [], -room
    for start, end, label in groups:
        axes.axhline(start, color='white', linewidth=0.8)
        y = (start + end + 1) / 2
        if y - last >= room:
            labels.append((y, label))
            last = y
    axes.set_yticks([y for y, _ in labels], [label for _, label in labels])
