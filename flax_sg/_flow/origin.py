"""Where an equation comes from: the function of JAX, the user's line, and the block."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from flax_sg._compat import jax as jax_compat
from flax_sg._flow.graph import Call, Context
from flax_sg._jax.block_names import block_of
from flax_sg._jax.lines import (
    Frame,
    call_into_jax,
    call_into_package,
    caller,
    frames_of,
    is_called_back,
    owner,
    users_line,
)

__all__ = ['Origin']


class Origin:
    """Where an equation comes from; each part is found once, when it is asked for."""

    def __init__(self, eqn: JaxprEqn, context: Context):
        self.eqn, self.context = eqn, context

    @functools.cached_property
    def primitive(self) -> tuple[str, bool]:
        """Its name, and whether it has rules for derivatives of its own."""
        return jax_compat.operation_of(self.eqn)

    @functools.cached_property
    def operation(self) -> str:
        """The function of JAX that the user called, and the name of the equation's primitive."""
        name, calls = self.primitive[0], self._calls_of_jax
        if name in ('custom_jvp_call', 'custom_vjp_call'):
            name = name.removesuffix('_call')
            called = jax_compat.written_at(self.eqn.params['call_jaxpr'])[0]
        elif calls:
            called = calls[0].eqn.params['name'].lstrip('_')
        else:
            into = call_into_jax(self.eqn.source_info.traceback)
            called = into[1] if into and into[1] in _public() else _WORDS.get(name, name)
        return called if called == name else f'{called} ({name})'

    @functools.cached_property
    def line(self) -> str:
        """The user's line, or ''.

        A trace of a jitted function is made once, so the frames around it may be those of another
        call. What stands in a function of JAX's own has the line of the call, what stands in one of
        the user's its own and that of the call.
        """
        inside, calls, where = self._calls_of_jax, self.context.calls, self.context.around
        inner = inside[0].eqn if inside else self.eqn
        if inside:  # from the function of JAX outwards
            where = where[: next(i for i, e in enumerate(where) if e is inner)]
        lines = [next((line for e in (inner, *reversed(where)) if (line := _line(e))), None)]
        for call in reversed(calls[: len(calls) - len(inside)]):
            if _owner_of(call) not in ('jax', 'flax', 'flax_sg'):
                lines.append(_line(call.eqn))
        there = [line for line in lines if line is not None]
        own = [line for line in there if not owner(line.file)]
        return ', called at '.join(dict.fromkeys(map(str, own or there)))

    @functools.cached_property
    def block(self) -> tuple[str, str] | None:
        """The block that made it, and its line; or None."""
        return block_of(self.eqn)

    @functools.cached_property
    def stopped_by(self) -> Frame | None:
        """Who called `stop_gradient`, if that is what it comes from."""
        return caller(frames_of(self.eqn.source_info.traceback), 'stop_gradient')

    @functools.cached_property
    def function(self) -> Any:
        """Which call of a function of JAX's or a package's it is part of, as a value, or None.

        A function under jit is known by its call, any other by the instruction that called it. So
        is a function of an installed package, with all that it calls.
        """
        eqns = (self.eqn, *reversed(self.context.around))
        package = call_into_package(eqn.source_info.traceback for eqn in eqns)
        if package is not None:
            return package
        if self._calls_of_jax:
            return self._calls_of_jax[0]
        place = call_into_jax(self.eqn.source_info.traceback)
        return None if place is None else (place[0], self.context)

    @functools.cached_property
    def _calls_of_jax(self) -> tuple[Call, ...]:
        """The innermost jitted functions around it, as long as they are JAX's own.

        One that calls a function of the user's, as odeint does, is none for what that does.
        """
        calls = self.context.calls
        start, inner = len(calls), self.eqn
        while start:
            file = jax_compat.written_at(calls[start - 1].eqn.params['jaxpr'])[1]
            if owner(file) != 'jax' or is_called_back(inner.source_info.traceback, file):
                break
            start -= 1
            inner = calls[start].eqn
        return calls[start:]


def _line(eqn: JaxprEqn) -> Frame | None:
    return users_line(eqn.source_info.traceback)


def _owner_of(call: Call) -> str:
    return owner(jax_compat.written_at(call.eqn.params['jaxpr'])[1])


# What people type where JAX has another name.
_WORDS = {
    'convert_element_type': 'astype',
    'eq': '==, equal',
    'ge': '>=, greater_equal',
    'gt': '>, greater',
    'le': '<=, less_equal',
    'lt': '<, less',
    'ne': '!=, not_equal',
}


@functools.cache
def _public() -> frozenset[str]:
    """Return the names of functions of JAX that people call."""
    modules = jnp, jnp.fft, jnp.linalg, jax.lax, jax.nn, jax.random, jax.scipy.special
    return frozenset(name for module in modules for name in dir(module) if name[0] != '_')
