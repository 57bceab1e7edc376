"""What is open in a thread, and what it is doing."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from flax_sg._transforms.contexts import Contexts

__all__ = ['anywhere', 'state', 'under']


class _State(threading.local):
    """What is open in this thread."""

    def __init__(self) -> None:
        self.around: tuple = ()  # of a rule: what was open at the call
        self.openings: list = []
        self.left: list = []  # with a block around them; their own `with` is still to end
        self.stack: tuple = ()  # the blocks of both, the outermost first
        self.inside = False  # in a rule: its function was called by a running module
        self.setups: list = []  # runs of `setup` in progress
        self.bodies: tuple = ()  # of nn.jit, which JAX is tracing
        self.writes = 0  # how many, ever
        self.storing: tuple | None = None  # a variable that is read in order to be stored
        # While Flax stores what the body of a lifted transform returned: says what to store.
        self.publishing: Callable | None = None
        self.copied_in: tuple = ()  # of a lifted module that is cloned
        self.contexts = Contexts()


state = _State()


class _Anywhere:
    """What is open in any thread; taps on what is read often look here first.

    Attributes:
      threads: how many have blocks open.
    """

    def __init__(self) -> None:
        self.threads = 0
        self._lock = threading.Lock()

    def count(self, change: int) -> None:
        """Note that a thread has opened its first block (1), or left its last (-1)."""
        if change:
            with self._lock:
                self.threads += change


anywhere = _Anywhere()


@contextlib.contextmanager
def under(**changes: Any) -> Iterator[None]:
    """Run a part with some of the thread's state changed."""
    before = {name: getattr(state, name) for name in changes}
    vars(state).update(changes)
    try:
        yield
    finally:
        vars(state).update(before)
