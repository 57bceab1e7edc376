"""What stands in a gradient's way: which kind of thing, its name, and the user's line.

It takes an equation through which a parameter's value goes, and its tangent does not.
"""

from __future__ import annotations

import functools
import os

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, jaxprs_in_params

from flax_sg._compat import jax as jax_compat
from flax_sg._flow.graph import Context
from flax_sg._flow.origin import calls_of_jax, line_of
from flax_sg._flow.records import Obstacle, Verdict
from flax_sg._jax.block_names import block_of
from flax_sg._jax.jaxprs import has_tangent
from flax_sg._jax.lines import call_into_jax, caller, frames_of, owner

__all__ = ['NOT_SEEN', 'obstacle']


def obstacle(eqn: JaxprEqn, context: Context, output: int, failure: str) -> Obstacle:
    """Describe what stands in the way in an equation.

    Args:
      output: the position of the output that has the value without its tangent.
      failure: why JAX does not differentiate the equation, or ''.
    """
    (name, rules), source = jax_compat.operation_of(eqn), line_of(eqn, context)
    if failure:
        return Obstacle(Verdict.UNKNOWN, _operation(eqn, context), source, failure)
    if name in ('stop_gradient', 'flax_sg_view', 'flax_sg_view_tangent'):
        return _stop(eqn, context, source)
    if rules:
        kind = Verdict.CUSTOM_ZERO
        if not has_tangent(eqn.outvars[output].aval):
            kind = Verdict.PIECEWISE_CONSTANT
        return Obstacle(kind, _operation(eqn, context), source)
    block = block_of(eqn)
    if name == 'flax_sg_map_gradient' and block is not None:
        return Obstacle(Verdict.CUSTOM_ZERO, block[0], block[1] or source)
    if any(True for _ in jaxprs_in_params(eqn.params)):
        return Obstacle(Verdict.UNKNOWN, _operation(eqn, context), source, NOT_SEEN)
    return Obstacle(Verdict.PIECEWISE_CONSTANT, _operation(eqn, context), source)


NOT_SEEN = 'what is inside was not looked at'


def _stop(eqn: JaxprEqn, context: Context, source: str) -> Obstacle:
    by = caller(frames_of(eqn.source_info.traceback), 'stop_gradient')
    whose = owner(by.file) if by is not None else ''
    block = block_of(eqn)
    if block is not None and (whose == 'flax_sg' or eqn.primitive.name != 'stop_gradient'):
        operation, line = block
        if context.entry:
            operation += f', entry {context.entry!r}'
        return Obstacle(Verdict.MASKED, operation, line or source)
    if not whose:
        return Obstacle(Verdict.MASKED, 'stop_gradient', source)
    operation = f'stop_gradient in {whose} ({os.path.basename(by.file)}, {by.function})'
    return Obstacle(Verdict.MASKED, operation, source)


def _operation(eqn: JaxprEqn, context: Context) -> str:
    """Name an equation after the function of JAX that the user called, and its own primitive."""
    name, calls = jax_compat.operation_of(eqn)[0], calls_of_jax(context)
    if name in ('custom_jvp_call', 'custom_vjp_call'):
        name = name.removesuffix('_call')
        called = jax_compat.written_at(eqn.params['call_jaxpr'])[0]
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
