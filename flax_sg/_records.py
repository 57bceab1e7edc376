"""Records of gradient_flow, one for each parameter and loss."""

from __future__ import annotations

import dataclasses
import os

from flax_sg._obstacles import Obstacle, Verdict

__all__ = ['FlowRecord', 'shortened']


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


def shortened(source: str) -> str:
    """Return a source with paths seen from the working directory, where that is shorter."""
    here = os.getcwd() + os.sep
    return source.replace(here, '')
