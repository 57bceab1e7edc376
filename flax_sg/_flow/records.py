"""Records of gradient_flow, one for each parameter and loss."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import os
from collections.abc import Iterator
from typing import Any

from flax_sg._errors import UnknownRecordError
from flax_sg._filters.variables import VariableInfo

__all__ = ['Records', 'FlowRecord', 'Obstacle', 'Verdict', 'shortened']


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
      obstacles: all the operations at which parts of the gradient end, the one above first. Each
        says whether the gradient would get there if it alone let it through.
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


def shortened(source: str) -> str:
    """Return a source with paths seen from the working directory, where that is shorter."""
    here = os.getcwd() + os.sep
    return source.replace(here, '')


class Verdict(enum.StrEnum):
    """What becomes of a loss's gradient on its way to a parameter; each is a string.

    REACHED: it gets there. REACHED_PARTLY: it does on one way, and on another it ends.
    MASKED: it ends at stop_gradient: of a block, the user's own, or a library's.
    CUSTOM_ZERO: it ends in a custom_jvp or custom_vjp whose rule returns zeros, or in
    ``map_gradient``. PIECEWISE_CONSTANT: it ends at an operation whose derivative is zero, such as
    the indices of a sort, a comparison, a rounding. UNUSED: the loss does not depend on the
    parameter. NUMERIC_ZERO: it gets there, and is exactly zero on this input; NOT_FINITE: it, or a
    cotangent on its way, has a NaN or an infinity on this input. Both are found with norms.
    UNKNOWN: JAX does not differentiate it, or two ways to find out disagree; the record says why.

    >>> Verdict('MASKED') is Verdict.MASKED, Verdict.MASKED == 'MASKED'
    (True, True)
    """

    REACHED = 'REACHED'
    REACHED_PARTLY = 'REACHED_PARTLY'
    MASKED = 'MASKED'
    CUSTOM_ZERO = 'CUSTOM_ZERO'
    PIECEWISE_CONSTANT = 'PIECEWISE_CONSTANT'
    UNUSED = 'UNUSED'
    NUMERIC_ZERO = 'NUMERIC_ZERO'
    NOT_FINITE = 'NOT_FINITE'
    UNKNOWN = 'UNKNOWN'


@dataclasses.dataclass(frozen=True, slots=True)
class Obstacle:
    """An operation at which gradients end.

    Attributes:
      verdict: MASKED, CUSTOM_ZERO, PIECEWISE_CONSTANT or UNKNOWN.
      operation: what it is, as ``"stop_gradient('gln')"`` or ``'argsort (sort)'``.
      source: the user's line, ``'file:line (function)'``, and where that was called from if it is
        under a jit of the user's own; '' if there is none.
      reason: what JAX says of it, if it is UNKNOWN.
      alone: whether the gradient would get there if it alone let it through.
    """

    verdict: Verdict
    operation: str
    source: str
    reason: str = ''
    alone: bool = False

    def explain(self) -> str:
        """Return the operation and the line as a phrase."""
        return f'{self.operation} at {shortened(self.source)}' if self.source else self.operation


class Records:
    """Records of all losses and parameters, to look up; `Flow` shows them."""

    def __init__(self, records: tuple[FlowRecord, ...], infos: list[VariableInfo]):
        self.records = records
        self.losses = tuple(dict.fromkeys(r.loss for r in records))
        self.names = tuple(info.name for info in infos)
        self.infos = tuple(infos)
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
        for what, wanted, there in (
            ('loss', key[0], self.losses),
            ('parameter', key[1], self.names),
        ):
            if wanted not in there:
                close = difflib.get_close_matches(str(wanted), there, 3, 0.4) or there[:3]
                return UnknownRecordError(
                    f'flow{list(key)}: there is no {what} {wanted!r}. '
                    f'Close: {", ".join(map(repr, close))}.'
                )
        raise AssertionError(key)

    def __iter__(self) -> Iterator[FlowRecord]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def to_dict(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return ``{loss: {name: {'verdict': ..., 'operation': ..., ...}}}`` of plain data."""
        plain: dict[str, dict[str, Any]] = {loss: {} for loss in self.losses}
        for record in self.records:
            plain[record.loss][record.name] = {
                'verdict': str(record.verdict),
                'operation': record.operation,
                'source': record.source,
                'used_at': record.used_at,
                'norm': record.norm,
                'reason': record.reason,
                'obstacles': [
                    {
                        'verdict': str(o.verdict),
                        'operation': o.operation,
                        'source': o.source,
                        'reason': o.reason,
                        'alone': o.alone,
                    }
                    for o in record.obstacles
                ],
            }
        return plain
