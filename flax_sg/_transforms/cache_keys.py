"""The keys of JAX's trace caches, which know the open blocks of a thread."""

from __future__ import annotations

from typing import Any

from flax_sg._compat import jax as jax_compat
from flax_sg._transforms import front_ends
from flax_sg._transforms.block import OpenBlock
from flax_sg._transforms.contexts import Context, no_blocks
from flax_sg._transforms.thread_state import state

__all__ = ['own_cache_key', 'context', 'in_body', 'note_read', 'set_context']


def context() -> Context:
    """Return what JAX's caches know the open blocks by."""
    return _context(_key(state.stack)) if state.stack else no_blocks


def _context(key: tuple) -> Context:
    share = (
        not state.around
        and len(_first_group()) == len(state.stack)
        and (_at_opening() or state.openings[-1].context[1] == key)
    )
    return state.contexts.of(key, share=share)


def set_context(*more: Any, inside: bool | None = None) -> None:
    """Set the key of JAX's caches to the open blocks, and to what else a trace depends on.

    Args:
      more: what else that is.
      inside: whether a module is running, and a model that is applied its own affair; as it is.
    """
    if not state.stack:
        return jax_compat.set_cache_key((no_blocks, *more) if more else ())
    key = _key(state.stack, inside)
    now = _context(key)
    if state.openings and _at_opening():
        state.openings[-1].context = (now, key)
    jax_compat.set_cache_key((now, *more))


def _at_opening() -> bool:
    """Say whether the current trace to a jaxpr is that in which the innermost block was opened."""
    return bool(state.openings) and state.openings[-1].staging == jax_compat.staging_trace()


def _key(stack: tuple[OpenBlock, ...], inside: bool | None = None) -> tuple:
    if inside is None:
        inside = state.inside or front_ends.is_running()
    return (inside, *(block.key for block in stack))


def _first_group() -> tuple[OpenBlock, ...]:
    """Return the outermost blocks, those that were opened in one trace to a jaxpr."""
    stagings = _stagings()
    end = next((i for i, s in enumerate(stagings) if s != stagings[0]), len(stagings))
    return state.stack[:end]


def _stagings() -> list[Any]:
    """Return the traces to a jaxpr in which the blocks of the stack were opened."""
    return [each.staging for each in (*state.around, *state.openings)]


def own_cache_key() -> None:
    """Say that traces in progress, other than that of the blocks, depend on the open blocks."""
    if state.around:  # a rule has contexts of its own, and its call has claimed what is around it
        return
    group = _first_group()
    if group:
        in_force, key = state.openings[len(group) - 1].context
        if in_force is not None:  # a lifted module's, opened in another trace, has one of its own
            state.contexts.claim(in_force, key)


def in_body() -> bool:
    """Say whether a body of nn.jit is being traced, inside of the outermost open block."""
    return bool(state.stack) and state.stack[0].bodies != state.bodies


def note_read(trace: Any) -> None:
    """Say that a variable is read in the current trace.

    Args:
      trace: the trace of the lifted body that the variable's scope was made for, or None.
    """
    now = jax_compat.staging_trace()
    if now is None or trace != now and _stagings()[0] != now:
        own_cache_key()
