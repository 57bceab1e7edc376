"""A transformer in Linen: as a loop of layers, as `nn.scan` over layers, plain or rematerialised.

The embedding is tied: the encoder reads it first and `decode` reads it again, so that a mask on
the encoder needs two copies of it when it is written by hand.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

__all__ = ['Encoder', 'Layer', 'Transformer', 'loss_of', 'tokens']


class Layer(nn.Module):
    """Pre-norm self-attention and a feed-forward part."""

    heads: int = 4

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        width = x.shape[-1]
        y = nn.LayerNorm(name='norm_attention')(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, name='attention')(y)
        y = nn.LayerNorm(name='norm_mlp')(x)
        y = nn.Dense(4 * width, name='up')(y)
        return x + nn.Dense(width, name='down')(nn.gelu(y)), None


class Encoder(nn.Module):
    """An embedding and `depth` layers: `layer_0`, `layer_1`, ..., or `layers` when scanned.

    `layer` is the class of a layer; `scan` and `remat` say how the layers are run.
    """

    vocabulary: int = 256
    depth: int = 12
    width: int = 128
    heads: int = 4
    scan: bool = False
    remat: bool = False
    layer: type[nn.Module] = Layer

    def setup(self) -> None:
        self.embed = nn.Embed(self.vocabulary, self.width)
        layer = nn.remat(self.layer) if self.remat else self.layer
        if self.scan:
            self.layers = nn.scan(
                layer, variable_axes={'params': 0}, split_rngs={'params': True}, length=self.depth
            )(self.heads)
        else:
            self.layer_list = [layer(self.heads, name=f'layer_{i}') for i in range(self.depth)]

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.embed(x)
        for layer in [self.layers] if self.scan else self.layer_list:
            h, _ = layer(h, None)
        return h


class Transformer(nn.Module):
    """An encoder and a norm; the logits come from the encoder's embedding."""

    encoder: Encoder

    def setup(self) -> None:
        self.norm = nn.LayerNorm()

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.decode(self.encode(x))

    def encode(self, x: jax.Array) -> jax.Array:
        return self.encoder(x)

    def decode(self, h: jax.Array) -> jax.Array:
        return self.encoder.embed.attend(self.norm(h))


def loss_of(logits: jax.Array, x: jax.Array) -> jax.Array:
    """Return the mean cross entropy of each token given those before it (no causal mask here)."""
    logs = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(logs, x[:, 1:, None], axis=-1).mean()


def tokens(batch: int, length: int, vocabulary: int = 256) -> jax.Array:
    """Return random tokens."""
    return jax.random.randint(jax.random.key(0), (batch, length), 0, vocabulary)
