"""The tiny module of Linen that is run before the first block; see `_transforms.self_check`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
from flax import linen

from flax_sg._transforms import self_check

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
    """Raise UnsupportedVersionError if a block that holds '**/held' does anything else."""
    self_check.check(lambda: _checked(block))


def _checked(block: Callable[[], AbstractContextManager]) -> str | None:
    leaves = {name: jax.ShapeDtypeStruct((), 'float32') for name in _NAMES}

    def loss(params: Any) -> Any:
        with block():
            return _model().apply({'params': params})

    return self_check.wrong_gradient(loss, {**leaves, 'part': leaves, 'lifted': leaves})
