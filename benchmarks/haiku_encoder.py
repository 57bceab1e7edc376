"""The encoder in dm-haiku, with `partition_n`, `merge` and four copies of the parameters."""

from __future__ import annotations

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from encoder import LOSSES, Encoding, begin, code_width, iterate

__all__ = ['copies_of', 'from_linen', 'loss_of', 'networks_of', 'to_linen']

Params = dict[str, dict[str, jax.Array]]
_NAMES = {'kernel': 'w', 'bias': 'b'}


class _Part(hk.Module):
    def __init__(self, hidden: int, features: int, name: str):
        super().__init__(name=name)
        self.hidden, self.features = hidden, features

    def __call__(self, x: jax.Array) -> jax.Array:
        up, down = hk.Linear(self.hidden, name='up'), hk.Linear(self.features, name='down')
        return down(jnp.tanh(up(x)))


class _Element(hk.Module):
    def __init__(self, like: Encoding):
        super().__init__(name='element')
        self.like = like

    def __call__(self, carry: Any, seen: jax.Array) -> Any:
        widths = {
            'gln': self.like.features,
            'code_value': code_width,
            'code_presence': code_width,
            'explanation': self.like.features,
        }
        parts = {name: _Part(self.like.hidden, n, name) for name, n in widths.items()}
        return iterate(parts, carry, seen)


def networks_of(like: Encoding) -> tuple[hk.Transformed, hk.Transformed]:
    """Return the first message and the sampler, as functions of the parameters."""

    def code_message(seen: jax.Array) -> Any:
        return _Element(like)(begin(seen), seen)[0]

    def sample(carry: Any, seen: jax.Array) -> Any:
        element = _Element(like)
        return hk.scan(lambda c, _: element(c, seen), carry, None, length=like.iterations)[1]

    return (
        hk.without_apply_rng(hk.transform(code_message)),
        hk.without_apply_rng(hk.transform(sample)),
    )


def _class_of(module: str, name: str, value: Any) -> int:
    part = module.split('/')[1]
    return 0 if part == 'gln' else 2 if part == 'explanation' else 1


def copies_of(params: Params) -> tuple[Params, ...]:
    """Return the parameters held whole, and held but for each class in turn."""
    parts = hk.data_structures.partition_n(_class_of, params, 3)
    held = tuple(map(jax.lax.stop_gradient, parts))
    return hk.data_structures.merge(*held), *(
        hk.data_structures.merge(*held[:i], parts[i], *held[i + 1 :]) for i in range(3)
    )


def loss_of(like: Encoding, seen: jax.Array) -> Any:
    """Return the loss as a function of Haiku parameters."""
    code_message, sample = networks_of(like)

    def loss(params: Params) -> jax.Array:
        held, *copies = copies_of(params)
        first = code_message.apply(held, seen)
        return sum(
            loss(sample.apply(copy, first, seen), seen)
            for copy, loss in zip(copies, LOSSES.values(), strict=True)
        )

    return loss


def from_linen(params: Any) -> Params:
    """Name the parameters of a Linen encoder as Haiku does."""
    return {
        f'element/{part}/{dense}': {_NAMES[name]: leaf for name, leaf in leaves.items()}
        for part, denses in params['params']['element'].items()
        for dense, leaves in denses.items()
    }


def to_linen(params: Params) -> Any:
    """Name the parameters of a Haiku encoder as Linen does."""
    out: dict[str, Any] = {}
    for module, leaves in params.items():
        _, part, dense = module.split('/')
        out.setdefault(part, {})[dense] = {name: leaves[short] for name, short in _NAMES.items()}
    return {'params': {'element': out}}
