"""The tiny module of NNX that is run before the first block; see `_transforms.self_check`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
from flax import nnx

from flax_sg._transforms import self_check

__all__ = ['check']


def _by_item(model: nnx.Module) -> tuple[Any, Any]:
    return model.held[...], model.live[...]


# Each reads in another way; a model of its own for each, so that the error says which.
_WAYS: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    'item': _by_item,
    'leaves': lambda model: tuple(jax.tree.leaves(model)),
    'copy': lambda model: _by_item(nnx.clone(model)),
    'jit': nnx.jit(_by_item),
    'tree': nnx.jit(_by_item, graph=False),
    'state': lambda model: jax.checkpoint(lambda state: (state['held'][...], state['live'][...]))(
        nnx.state(model)
    ),
}


def check(block: Callable[[Any], AbstractContextManager]) -> None:
    """Raise UnsupportedVersionError if a block at a module that holds 'held' does anything else."""
    self_check.check(lambda: _checked(block))


def _checked(block: Callable[[Any], AbstractContextManager]) -> str | None:
    kind = jax.ShapeDtypeStruct((), 'float32')

    def loss(params: Any) -> Any:
        product = 1.0
        for way, values in params.items():
            model = nnx.Dict({name: nnx.Param(value) for name, value in values.items()})
            with block(model):
                held, live = _WAYS[way](model)
            product = product * held * live
        return product

    return self_check.wrong_gradient(loss, {way: {'held': kind, 'live': kind} for way in _WAYS})
