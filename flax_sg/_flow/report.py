"""What gradient_flow found: its records, to look up and to look at."""

from __future__ import annotations

from typing import Any

from flax_sg._filters.filters import Predicate, as_filter
from flax_sg._filters.unmatched import check_matched
from flax_sg._flow import picture, table
from flax_sg._flow.records import Records

__all__ = ['Flow']


class Flow(Records):
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

    def show(
        self, predicate: Predicate = True, *, depth: int | None = None, rows: int = 40
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
        table.show(self, self._selected(predicate), depth=depth, limit=rows)

    def _selected(self, predicate: Predicate) -> list[str]:
        filter = as_filter(predicate, name='Flow.show')
        check_matched(filter.patterns(), self.infos, where='Flow.show', of='the parameters')
        return [info.name for info in self.infos if filter.selects(info)]

    def __rich__(self) -> Any:
        from rich.console import Group

        rows, (first, *lines) = table.as_rich(self, list(self.names))
        return Group(first, rows, *lines)

    def __str__(self) -> str:
        return table.as_text(self)

    def _repr_html_(self) -> str:
        return table.as_html(self)

    def plot(self, path: Any) -> None:
        """Save a map of parameters by losses, coloured by verdict, to an SVG or PNG file.

        Needs matplotlib, the extra ``flax_sg[plot]``.

        Raises:
          UsageError: the file name does not end in ``.svg`` or ``.png``.
          ImportError: matplotlib is not there.
        """
        picture.draw(self, path)
