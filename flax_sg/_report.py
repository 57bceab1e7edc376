"""What gradient_flow found: its records, to look up and to look at."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from flax_sg import _flow_picture, _flow_table
from flax_sg._errors import UnknownRecordError
from flax_sg._filters import Predicate, as_filter
from flax_sg._info import VariableInfo
from flax_sg._records import FlowRecord
from flax_sg._unmatched import check_matched

__all__ = ['Flow']


class Flow:
    """The records that :func:`gradient_flow` found; prints as a table, problems first.

    >>> import jax, jax.numpy as jnp
    >>> from flax_sg import gradient_flow
    >>> loss = lambda params: (params['head'] * jax.lax.stop_gradient(params['body'])).sum()
    >>> flow = gradient_flow(loss)({'body': jnp.ones(3), 'head': jnp.ones(3)})
    >>> [(record.name, str(record.verdict)) for record in flow]
    [('body', 'MASKED'), ('head', 'REACHED')]
    >>> flow.to_dict()['loss']['body']['operation'], flow['loss', 'head'].reached
    ('stop_gradient', True)

    Attributes:
      records: all of them, loss by loss.
      losses, names: what there is of each, in order.
    """

    def __init__(self, records: tuple[FlowRecord, ...], infos: list[VariableInfo]):
        self.records = records
        self.losses = tuple(dict.fromkeys(r.loss for r in records))
        self.names = tuple(info.name for info in infos)
        self._infos = tuple(infos)
        self._by_key = {(r.loss, r.name): r for r in records}

    def __getitem__(self, key: tuple[str, str]) -> FlowRecord:
        """Return the record of a loss and a parameter: ``flow['gln', 'encoder/kernel']``.

        Raises:
          UnknownRecordError: there is none; it names close ones.
        """
        try:
            return self._by_key[key]
        except (KeyError, TypeError):
            raise self._unknown(key) from None

    def _unknown(self, key: Any) -> UnknownRecordError:
        if not isinstance(key, tuple) or len(key) != 2:
            return UnknownRecordError(f'flow[{key!r}]: expected flow[loss, name].')
        for what, wanted, there in (('loss', key[0], self.losses),
                                    ('parameter', key[1], self.names)):
            if wanted not in there:
                close = difflib.get_close_matches(str(wanted), there, 3, 0.4) or there[:3]
                return UnknownRecordError(
                    f'flow{list(key)}: there is no {what} {wanted!r}. '
                    f'Close: {", ".join(map(repr, close))}.')
        raise AssertionError(key)

    def __iter__(self) -> Iterator[FlowRecord]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def show(self, predicate: Predicate = True, *, depth: int | None = None, rows: int = 40
             ) -> None:
        """Print the table with rich, in colour where the terminal has it.

        Parameters that say the same are folded under their common prefix; what no loss trains, and
        gradients that end for another reason than a mask, come first.

        Args:
          predicate: which parameters to show, as for :func:`flax_sg.stop_gradient`.
          depth: fold whatever lies deeper in the tree, the same or not.
          rows: how many rows may be shown; sets ``depth`` if that is None.

        Raises:
          UnmatchedPathError, PredicateError: the predicate selects nothing, or is none.
        """
        _flow_table.show(self, self._selected(predicate), depth=depth, limit=rows)

    def _selected(self, predicate: Predicate) -> list[str]:
        filter = as_filter(predicate, name='Flow.show')
        check_matched(filter.patterns(), self._infos, where='Flow.show', of='the parameters')
        return [info.name for info in self._infos if filter.selects(info)]

    def __rich__(self) -> Any:
        from rich.console import Group
        table, (first, *lines) = _flow_table.as_rich(self, list(self.names))
        return Group(first, table, *lines)

    def __str__(self) -> str:
        return _flow_table.as_text(self)

    def _repr_html_(self) -> str:
        return _flow_table.as_html(self)

    def plot(self, path: Any) -> None:
        """Save a map of parameters by losses, coloured by verdict, to an SVG or PNG file.

        Needs matplotlib, the extra ``flax_sg[plot]``.

        Raises:
          UsageError: the file name does not end in ``.svg`` or ``.png``.
          ImportError: matplotlib is not there.
        """
        _flow_picture.draw(self, path)

    def to_dict(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return ``{loss: {name: {'verdict': ..., 'operation': ..., ...}}}`` of plain data."""
        plain: dict[str, dict[str, Any]] = {loss: {} for loss in self.losses}
        for record in self.records:
            plain[record.loss][record.name] = {
                'verdict': str(record.verdict), 'operation': record.operation,
                'source': record.source, 'used_at': record.used_at, 'norm': record.norm,
                'reason': record.reason,
                'obstacles': [{'verdict': str(o.verdict), 'operation': o.operation,
                               'source': o.source, 'reason': o.reason} for o in record.obstacles]}
        return plain
