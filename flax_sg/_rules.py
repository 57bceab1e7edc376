"""Rules of the user's own for derivatives and batches: they run in the blocks of their function.

JAX runs the rules of a `jax.custom_vjp` when it differentiates, which may be after the block around
the call was left, or inside of another one. A rule that applies or reads a model, as those of
implicit and reversible layers do, belongs to the call. So a call hands rules on that open its
blocks again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from flax_sg import _compat
from flax_sg._active import read_from, reopened, state

__all__: list[str] = []  # it taps JAX


def _in_blocks(rule: Callable | None) -> Callable | None:
    """Return a rule that runs in the blocks that are open now, and in no others."""
    if rule is None:
        return None
    stack = state.stack
    if stack:
        read_from(None)  # a trace of the call has the rule in it
    inside = state.inside or _compat.current_module() is not None

    @functools.wraps(rule)
    def run(*args: Any, **kwargs: Any) -> Any:
        if state.stack == stack and state.inside == inside:
            return rule(*args, **kwargs)
        with reopened(stack, inside=inside):
            return rule(*args, **kwargs)

    return run


@_compat.tap_rules
def _call(original, self, rules, /, *args, **kwargs):
    call = object.__new__(type(self))
    vars(call).update(vars(self))
    for name in rules:
        setattr(call, name, _in_blocks(getattr(self, name)))
    return original(call, *args, **kwargs)


@_compat.tap_linear_call
def _linear_call(original, /, fun, fun_transpose, *args, **kwargs):
    return original(fun, _in_blocks(fun_transpose), *args, **kwargs)
