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

from flax_sg._compat import jax as jax_compat
from flax_sg._transforms import front_ends
from flax_sg._transforms.cache_keys import note_read
from flax_sg._transforms.open_blocks import reopened
from flax_sg._transforms.thread_state import state

__all__ = []


def _in_blocks(rule: Callable | None) -> Callable | None:
    """Return a rule that runs in the blocks that are open now, and in no others."""
    if rule is None:
        return None
    stack = state.stack
    if stack:
        note_read(None)  # a trace of the call has the rule in it
    inside = state.inside or front_ends.is_running()

    @functools.wraps(rule)
    def run(*args: Any, **kwargs: Any) -> Any:
        if state.stack == stack and state.inside == inside:
            return rule(*args, **kwargs)
        with reopened(stack, inside=inside):
            return rule(*args, **kwargs)

    return run


@jax_compat.tap_rules
def _call(original, self, rules, /, *args, **kwargs):
    call = object.__new__(type(self))
    vars(call).update(vars(self))
    for name in rules:
        setattr(call, name, _in_blocks(getattr(self, name)))
    return original(call, *args, **kwargs)


@jax_compat.tap_linear_call
def _linear_call(original, /, fun, fun_transpose, *args, **kwargs):
    return original(fun, _in_blocks(fun_transpose), *args, **kwargs)
