"""A model of Linen in a module of NNX, and one of NNX in a module of Linen.

What the one hands to the other it has read: what is outside of both sees to it once.
"""

from __future__ import annotations

from flax_sg._compat import nnx as nnx_compat
from flax_sg._transforms.cache_keys import set_context
from flax_sg._transforms.thread_state import state, under
from flax_sg.nnx._blocks import thread

__all__: list[str] = []  # it taps calls


def _to_nnx(original, self, *args, **kwargs):
    if not state.stack:
        return original(self, *args, **kwargs)
    try:
        with under(inside=True):
            set_context()
            return original(self, *args, **kwargs)
    finally:
        set_context()


def _to_linen(original, self, *args, **kwargs):
    before, thread.of_linen = thread.of_linen, state.stack
    try:
        return original(self, *args, **kwargs)
    finally:
        thread.of_linen = before


nnx_compat.tap_bridges(_to_nnx, _to_linen)
