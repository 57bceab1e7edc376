"""A check that what stands in the way of Flax's reads is in their way, with the Flax at hand.

A Flax that reads past the taps would disable every mask without a word. So a tiny module runs once
in a process, before its first block: what is held must have no gradient, and what is not must have
one. It is only traced; nothing is compiled, and no device is touched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import flax
import jax
from flax import linen

from flax_sg._errors import UnsupportedVersionError
from flax_sg._jax.jaxprs import moves_out

__all__ = ['check']


_NAMES = ('held', 'live')


def _zero(key: Any) -> float:
    return 0.0


def _model() -> linen.Module:
    """Make the tiny model: its classes are made for the check alone."""

    class Part(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            held, live = (self.param(name, _zero) for name in _NAMES)
            return x * held * live

    class Whole(linen.Module):
        def setup(self) -> None:
            self.values = [self.param(name, _zero) for name in _NAMES]
            self.part, self.lifted = Part(), linen.remat(Part)()

        def __call__(self) -> Any:
            held, live = self.values
            stored = self.variables['params']
            again = self.get_variable('params', 'held') * stored['held'] * stored['live']
            return self.lifted(self.part(held * live * again))

    return Whole(parent=None)


def check(block: Callable[[], AbstractContextManager]) -> None:
    """Raise UnsupportedVersionError if a block that holds '**/held' does anything else.

    It runs in a thread of its own, in which no module is running and no block is open.
    """
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(_checked(block)))
    thread.start()
    thread.join()
    if found != [None]:
        what = found[0] if found else 'the check failed'
        raise UnsupportedVersionError(
            f'A tiny model was run in a block to see whether masks work here, and {what}. flax '
            f'{flax.__version__} with jax {jax.__version__} reads variables in a way that this '
            'flax_sg does not know, so that nothing it says about gradients would be true. Install '
            'a newer flax_sg, or an older flax.'
        )


def _checked(block: Callable[[], AbstractContextManager]) -> str | None:
    """Say what is wrong, or None."""
    leaves = {name: jax.ShapeDtypeStruct((), 'float32') for name in _NAMES}
    params = {**leaves, 'part': leaves, 'lifted': leaves}

    def loss(params: Any) -> Any:
        with block():
            return _model().apply({'params': params})

    try:
        made = jax.make_jaxpr(jax.grad(loss))(params).jaxpr
    except Exception as error:
        return f'it raised {type(error).__name__}: {error}'
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for name, moves in zip(names, moves_out(made, [True] * len(made.invars)), strict=True):
        if moves == ('held' in name):
            state = 'held, and has a gradient' if moves else 'not held, and has no gradient'
            return f'its variable {name} is {state}'
    return None
