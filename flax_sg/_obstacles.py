"""What stands in a gradient's way: which kind of thing, its name, and the user's line.

It takes an equation through which a parameter's value goes, and its tangent does not.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, jaxprs_in_params

from flax_sg import _compat
from flax_sg._active import AT, NAME
from flax_sg._graph import Call, Context
from flax_sg._jaxprs import moves
from flax_sg._lines import Frame, call_into_jax, caller, frames_of, owner, users_line

__all__ = ['NOT_SEEN', 'Obstacle', 'Verdict', 'line_of', 'obstacle', 'within']


class Verdict(enum.StrEnum):
    """What becomes of a loss's gradient on its way to a parameter; each is a string.

    REACHED: it gets there. REACHED_PARTLY: it does on one way, and on another it ends.
    MASKED: it ends at stop_gradient: of a block, the user's own, or a library's.
    CUSTOM_ZERO: it ends in a custom_jvp or custom_vjp whose rule returns zeros, or in
    ``map_gradient``. PIECEWISE_CONSTANT: it ends at an operation whose derivative is zero, such as
    the indices of a sort, a comparison, a rounding. UNUSED: the loss does not depend on the
    parameter. NUMERIC_ZERO: it gets there, and is exactly zero on this input; found with norms.
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
    """

    verdict: Verdict
    operation: str
    source: str
    reason: str = ''


def obstacle(eqn: JaxprEqn, context: Context, output: int, failure: str) -> Obstacle:
    """Describe what stands in the way in an equation.

    Args:
      output: the position of the output that has the value without its tangent.
      failure: why JAX does not differentiate the equation, or ''.
    """
    (name, rules), source = _compat.operation_of(eqn), line_of(eqn, context)
    if failure:
        return Obstacle(Verdict.UNKNOWN, _operation(eqn, context), source, failure)
    if name in ('stop_gradient', 'flax_sg_lane', 'flax_sg_lane_tangent'):
        return _stop(eqn, context, source)
    if rules:
        kind = Verdict.CUSTOM_ZERO
        if not moves(eqn.outvars[output].aval):
            kind = Verdict.PIECEWISE_CONSTANT
        return Obstacle(kind, _operation(eqn, context), source)
    block = _block(eqn)
    if name == 'flax_sg_map_gradient' and block is not None:
        return Obstacle(Verdict.CUSTOM_ZERO, block[0], block[1] or source)
    if any(True for _ in jaxprs_in_params(eqn.params)):
        return Obstacle(Verdict.UNKNOWN, _operation(eqn, context), source, NOT_SEEN)
    return Obstacle(Verdict.PIECEWISE_CONSTANT, _operation(eqn, context), source)


NOT_SEEN = 'what is inside was not looked at'


def _stop(eqn: JaxprEqn, context: Context, source: str) -> Obstacle:
    by = caller(frames_of(eqn.source_info.traceback), 'stop_gradient')
    whose = owner(by.file) if by is not None else ''
    block = _block(eqn)
    if block is not None and (whose == 'flax_sg' or eqn.primitive.name != 'stop_gradient'):
        operation, line = block
        if context.entry:
            operation += f', entry {context.entry!r}'
        return Obstacle(Verdict.MASKED, operation, line or source)
    if not whose:
        return Obstacle(Verdict.MASKED, 'stop_gradient', source)
    operation = f'stop_gradient in {whose} ({os.path.basename(by.file)}, {by.function})'
    return Obstacle(Verdict.MASKED, operation, source)


def _block(eqn: JaxprEqn) -> tuple[str, str] | None:
    """Return which transform of this library made an equation, and the line of its block."""
    names = [name for name in _compat.scope_names(eqn) if name.startswith(NAME)]
    if not names:
        return None
    transform, line = names[-1].removeprefix(NAME).rsplit(AT, 1)
    return transform, line


def _operation(eqn: JaxprEqn, context: Context) -> str:
    """Name an equation after the function of JAX that the user called, and its own primitive."""
    name, calls = _compat.operation_of(eqn)[0], _of_jax(context)
    if name in ('custom_jvp_call', 'custom_vjp_call'):
        name = name.removesuffix('_call')
        called = _compat.written_at(eqn.params['call_jaxpr'])[0]
    elif calls:
        called = calls[0].eqn.params['name'].lstrip('_')
    else:
        into = call_into_jax(eqn.source_info.traceback)
        called = into[1] if into and into[1] in _public() else name
    return called if called == name else f'{called} ({name})'


@functools.cache
def _public() -> frozenset[str]:
    """Return the names of functions of JAX that people call."""
    modules = jnp, jnp.fft, jnp.linalg, jax.lax, jax.nn, jax.random, jax.scipy.special
    return frozenset(name for module in modules for name in dir(module) if name[0] != '_')


def _of_jax(context: Context) -> tuple[Call, ...]:
    """Return the innermost jitted functions around an equation, as long as they are JAX's own."""
    calls = context.calls
    start = len(calls)
    while start and owner(_compat.written_at(calls[start - 1].eqn.params['jaxpr'])[1]) == 'jax':
        start -= 1
    return calls[start:]


def line_of(eqn: JaxprEqn, context: Context) -> str:
    """Return the user's line behind an equation, or ''.

    A trace of a jitted function is made once, so the frames around it may be those of another call.
    What stands in a function of JAX's own has the line of the call, what stands in one of the
    user's its own and that of the call.
    """
    inside = _of_jax(context)
    around = context.calls[:len(context.calls) - len(inside)]
    inner = inside[0].eqn if inside else eqn
    where = context.around
    if inside:  # from the function of JAX outwards
        where = where[:next(i for i, e in enumerate(where) if e is inner)]
    line = next((line for e in (inner, *reversed(where)) if (line := _line(e)) is not None), None)
    lines = [line]
    for call in reversed(around):
        if owner(_compat.written_at(call.eqn.params['jaxpr'])[1]) not in ('jax', 'flax', 'flax_sg'):
            lines.append(_line(call.eqn))
    found = list(dict.fromkeys(str(line) for line in lines if line is not None))
    return ', called at '.join(found)


def _line(eqn: JaxprEqn) -> Frame | None:
    return users_line(eqn.source_info.traceback)


def within(eqn: JaxprEqn, context: Context) -> Any:
    """Return which call of one of JAX's own functions an equation is part of, as a value.

    A function under jit is known by its call, any other by the instruction that called it.
    """
    calls = _of_jax(context)
    if calls:
        return calls[0]
    place = call_into_jax(eqn.source_info.traceback)
    return None if place is None else (place[0], context)
