"""What JAX's trace caches know the open blocks by, so that no trace is used where others are open.

A *context* is part of the key of every cache of JAX. Two stacks of blocks may share one only where
no trace depends on which of them is open. Most traces do not: JAX jits many helpers of its own,
and would trace each of them anew for every block. So a thread gives its blocks one context, for as
long as none of its traces has read a variable; the stack of blocks that reads one in a trace keeps
the context as its own, and the thread goes on with a fresh one:

    with a: f(x)          # f, under jax.jit, reads no variable: traced in context 0
    with b: f(x)          # context 0 still: not traced again
    with a: model(x)      # under jax.jit: its trace depends on a, whose context 0 is now
    with b: model(x)      # context 1
    with a: model(x)      # context 0: not traced again

Blocks that a function opens while JAX traces it, inside of blocks around it, do not share.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable

__all__ = ['Context', 'Contexts', 'no_blocks']


class Context:
    """One context, equal only to itself.

    Attributes:
      owner: the key of the stack of blocks on which traces in this context depend, or None.
      asked: what functions under `nn.jit`, traced in this context, asked for; see `jitted_bodies`.
    """

    __slots__ = ('__weakref__', 'asked', 'owner')

    def __init__(self, owner: Hashable = None):
        self.owner = owner
        self.asked: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


no_blocks = Context(())  # that of programs in which no block is open

# Those that stacks of blocks own. JAX's caches hold a context for as long as they hold a trace.
_owned: weakref.WeakValueDictionary[Hashable, Context] = weakref.WeakValueDictionary()
_lock = threading.Lock()


class Contexts:
    """The contexts of one thread."""

    free: list[Context] = []  # of threads that are gone

    def __init__(self) -> None:
        try:
            context = self.free.pop()
        except IndexError:
            context = Context()
        self._shared = [context]  # a list, as what is in it goes to a later thread
        weakref.finalize(self, self.free.extend, self._shared).atexit = False

    def of(self, key: Hashable, *, share: bool) -> Context:
        """Return the context of a stack of blocks: its own, or one that is nobody's yet."""
        if not share:
            return _own(key)
        return _owned.get(key) or self._shared[0]

    def claim(self, context: Context, key: Hashable) -> None:
        """Say that a trace in a context depends on a stack of blocks."""
        if context.owner is not None:
            return
        context.owner = key
        with _lock:
            _owned.setdefault(key, context)
        if context is self._shared[0]:
            self._shared[0] = Context()


def _own(key: Hashable) -> Context:
    with _lock:
        context = _owned.get(key)
        if context is None:
            context = _owned[key] = Context(key)
        return context
