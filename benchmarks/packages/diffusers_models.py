"""The Flax models of diffusers: the UNet and the autoencoder of Stable Diffusion, tiny."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .comparison import Program

PIXELS = jax.random.normal(jax.random.key(1), (1, 3, 8, 8))
LATENTS = jax.random.normal(jax.random.key(2), (1, 4, 8, 8))
TEXT = jax.random.normal(jax.random.key(3), (1, 3, 8))


def program_of(model_class: type, fields: dict, inputs: tuple, parts: tuple[str, ...]) -> Program:
    """Make a loss of what a model of a class makes of its inputs."""

    def loss(lift: Callable, params: Any) -> jax.Array:
        return (lift(model_class)(**fields).apply({'params': params}, *inputs).sample ** 2).mean()

    params = model_class(**fields).init(jax.random.key(0), *inputs)['params']
    return Program(loss, jax.tree.map(lambda leaf: leaf + 0.01, params), parts)


def unet() -> Program:
    from diffusers.models.unets.unet_2d_condition_flax import FlaxUNet2DConditionModel

    fields = dict(
        sample_size=8,
        down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'),
        up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'),
        block_out_channels=(32, 32),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=8,
    )
    return program_of(
        FlaxUNet2DConditionModel,
        fields,
        (LATENTS, jnp.array([3]), TEXT),
        ('down_blocks_0', 'time_embedding'),
    )


def vae() -> Program:
    from diffusers.models.vae_flax import FlaxAutoencoderKL

    fields = dict(block_out_channels=(8,), norm_num_groups=4, sample_size=8)
    return program_of(FlaxAutoencoderKL, fields, (PIXELS,), ('encoder', 'decoder/conv_in'))
