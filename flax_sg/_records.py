"""Records of gradient_flow, one for each parameter and loss, and the collection of them."""

from __future__ import annotations

import dataclasses
import difflib
import os
from typing import Any

from flax_sg._errors import UnknownRecordError
from flax_sg._obstacles import Obstacle, Verdict

__all__ = ['Flow', 'FlowRecord', 'shortened']


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FlowRecord:
    """What becomes of the gradient of one loss with respect to one parameter.

    Attributes:
      loss: the loss's name.
      name: the parameter's path, '/'-joined.
      verdict: a :class:`Verdict`, which is a string.
      operation: the operation at which the gradient, or part of it, ends: the block with its
        predicate, the function of JAX and its primitive, the function with a rule of its own.
      source: the user's line, ``'file:line (function)'``: where the operation is, for a block where
        it was opened; of a gradient that comes, where the parameter is first used.
      used_at: of a gradient that comes, the line where the parameter is first used on its way.
      norm: the norm of the gradient, if norms were asked for.
      reason: why it is UNKNOWN, or a remark; '' mostly.
      obstacles: all the operations at which parts of the gradient end, the one above first.
    """

    loss: str
    name: str
    verdict: Verdict
    operation: str | None = None
    source: str | None = None
    used_at: str | None = None
    norm: float | None = None
    reason: str = ''
    obstacles: tuple[Obstacle, ...] = ()

    @property
    def reached(self) -> bool:
        """Whether a gradient gets there, the whole or a part."""
        return self.verdict in (Verdict.REACHED, Verdict.REACHED_PARTLY)

    def explain(self) -> str:
        """Return the operation, the line and the reason as a phrase; '' if there is nothing."""
        parts = [self.operation or '']
        if self.source:
            parts.append(f'at {shortened(self.source)}')
        if self.reason:
            parts.append(f'({self.reason})')
        return ' '.join(part for part in parts if part)


class Flow:
    """The records that :func:`gradient_flow` found; prints as a table, problems first.

    Attributes:
      records: all of them, loss by loss.
      losses, names: what there is of each, in order.
    """

    def __init__(self, records: tuple[FlowRecord, ...], shapes: tuple[Any, ...] = ()):
        self.records = records
        self.losses = tuple(dict.fromkeys(r.loss for r in records))
        self.names = tuple(dict.fromkeys(r.name for r in records))
        self.shapes = dict(zip(self.names, shapes, strict=False))
        self._by_key = {(r.loss, r.name): r for r in records}

    def __getitem__(self, key: tuple[str, str]) -> FlowRecord:
        """Return the record of a loss and a parameter: ``flow['gln', 'encoder/kernel']``."""
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

    def __iter__(self) -> Any:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

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


def shortened(source: str) -> str:
    """Return a source with paths seen from the working directory, where that is shorter."""
    here = os.getcwd() + os.sep
    return source.replace(here, '')
