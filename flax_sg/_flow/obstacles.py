"""What stands in a gradient's way: an equation that a value goes through, and its tangent not."""

from __future__ import annotations

import os

from jax.extend.core import jaxprs_in_params

from flax_sg._flow.origin import Origin
from flax_sg._flow.records import Obstacle, Verdict
from flax_sg._jax.jaxprs import has_tangent
from flax_sg._jax.lines import owner
from flax_sg._views.masks import is_view_mask

__all__ = ['FIRST', 'NOT_SEEN', 'obstacle']

# What explains a gradient that is not there, first: what stands in the way is said to be a mask
# only if there is one, and a mask can be taken away.
FIRST = {
    Verdict.UNKNOWN: 0,
    Verdict.MASKED: 1,
    Verdict.CUSTOM_ZERO: 2,
    Verdict.PIECEWISE_CONSTANT: 3,
}
NOT_SEEN = 'what is inside was not looked at'


def obstacle(origin: Origin, output: int, failure: str) -> Obstacle:
    """Describe what stands in the way in an equation.

    Args:
      origin: where it comes from.
      output: the position of the output that has the value without its tangent.
      failure: why JAX does not differentiate the equation, or ''.
    """
    eqn, block, (name, has_rules) = origin.eqn, origin.block, origin.primitive
    if failure:
        return Obstacle(Verdict.UNKNOWN, origin.operation, origin.line, failure)
    if name == 'stop_gradient' or is_view_mask(eqn):
        return _stop(origin)
    if has_rules and has_tangent(eqn.outvars[output].aval):
        return Obstacle(Verdict.CUSTOM_ZERO, origin.operation, origin.line)
    if name == 'flax_sg_map_gradient' and block is not None:
        return Obstacle(Verdict.CUSTOM_ZERO, block[0], block[1] or origin.line)
    if not has_rules and any(True for _ in jaxprs_in_params(eqn.params)):
        return Obstacle(Verdict.UNKNOWN, origin.operation, origin.line, NOT_SEEN)
    return Obstacle(Verdict.PIECEWISE_CONSTANT, origin.operation, origin.line)


def _stop(origin: Origin) -> Obstacle:
    by = origin.stopped_by
    whose = owner(by.file) if by is not None else ''
    if origin.block is not None and (whose == 'flax_sg' or is_view_mask(origin.eqn)):
        operation, line = origin.block
        if origin.context.entry:
            operation += f', entry {origin.context.entry!r}'
        return Obstacle(Verdict.MASKED, operation, line or origin.line)
    operation = 'stop_gradient'
    if whose:
        operation += f' in {whose} ({os.path.basename(by.file)}, {by.function})'
    return Obstacle(Verdict.MASKED, operation, origin.line)
