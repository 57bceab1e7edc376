"""Where an equation comes from: the user's line, and the function of JAX that was called."""

from __future__ import annotations

from typing import Any

from jax.extend.core import JaxprEqn

from flax_sg._compat import jax as jax_compat
from flax_sg._flow.graph import Call, Context
from flax_sg._jax.lines import Frame, call_into_jax, owner, users_line

__all__ = ['calls_of_jax', 'line_of', 'within']


def calls_of_jax(context: Context) -> tuple[Call, ...]:
    """Return the innermost jitted functions around an equation, as long as they are JAX's own."""
    calls = context.calls
    start = len(calls)
    while start and owner(jax_compat.written_at(calls[start - 1].eqn.params['jaxpr'])[1]) == 'jax':
        start -= 1
    return calls[start:]


def line_of(eqn: JaxprEqn, context: Context) -> str:
    """Return the user's line behind an equation, or ''.

    A trace of a jitted function is made once, so the frames around it may be those of another call.
    What stands in a function of JAX's own has the line of the call, what stands in one of the
    user's its own and that of the call.
    """
    inside = calls_of_jax(context)
    around = context.calls[:len(context.calls) - len(inside)]
    inner = inside[0].eqn if inside else eqn
    where = context.around
    if inside:  # from the function of JAX outwards
        where = where[:next(i for i, e in enumerate(where) if e is inner)]
    line = next((line for e in (inner, *reversed(where)) if (line := _line(e)) is not None), None)
    lines = [line]
    for call in reversed(around):
        if owner(jax_compat.written_at(call.eqn.params['jaxpr'])[1]) not in ('jax', 'flax', 'flax_sg'):
            lines.append(_line(call.eqn))
    found = list(dict.fromkeys(str(line) for line in lines if line is not None))
    return ', called at '.join(found)


def _line(eqn: JaxprEqn) -> Frame | None:
    return users_line(eqn.source_info.traceback)


def within(eqn: JaxprEqn, context: Context) -> Any:
    """Return which call of one of JAX's own functions an equation is part of, as a value.

    A function under jit is known by its call, any other by the instruction that called it.
    """
    calls = calls_of_jax(context)
    if calls:
        return calls[0]
    place = call_into_jax(eqn.source_info.traceback)
    return None if place is None else (place[0], context)
