"""Flax models of Hugging Face, through their public calls, with random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .comparison import Program, remade

TOKENS = np.array([[3, 5, 7, 11, 2], [4, 6, 8, 2, 9]])
PIXELS = jax.random.normal(jax.random.key(1), (2, 3, 16, 16))


def program_of(model: Any, read: Callable, parts: tuple[str, ...], **inputs: Any) -> Program:
    """Make a program of a model's public call; `read` takes a loss from what it returns."""

    def loss(lift: Callable, params: Any) -> jax.Array:
        called = copy.copy(model)
        called._module = remade(model.module, lift)
        return read(called(**inputs, params=params, train=False))

    return Program(loss, jax.tree.map(jnp.asarray, model.params), parts)


def next_token(output: Any) -> jax.Array:
    """Return the cross entropy of each token given those before it."""
    logits = jax.nn.log_softmax(output.logits[:, :-1])
    return -jnp.take_along_axis(logits, TOKENS[:, 1:, None], axis=-1).mean()


def take_old_names_in_clip() -> None:
    """Let jnp.clip take a_min and a_max, as T5 calls it: JAX has renamed them."""
    clip = jnp.clip

    def old_and_new(x: Any, *args: Any, a_min: Any = None, a_max: Any = None, **kwargs: Any) -> Any:
        return clip(x, *args or (a_min, a_max), **kwargs)

    jnp.clip = old_and_new


def t5_model(**options: Any) -> Any:
    from transformers import FlaxT5ForConditionalGeneration, T5Config

    take_old_names_in_clip()
    config = T5Config(
        vocab_size=13,
        d_model=8,
        d_kv=4,
        d_ff=12,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return FlaxT5ForConditionalGeneration(config, **options)


def t5() -> Program:
    return program_of(
        t5_model(),
        next_token,
        ('shared', 'encoder/block/0'),
        input_ids=TOKENS,
        decoder_input_ids=TOKENS,
    )


def t5_checkpointed() -> Program:
    """T5 with nn.remat around its layers."""
    return program_of(
        t5_model(gradient_checkpointing=True),
        next_token,
        ('shared', 'encoder'),
        input_ids=TOKENS,
        decoder_input_ids=TOKENS,
    )


def bart() -> Program:
    from transformers import BartConfig, FlaxBartForConditionalGeneration

    config = BartConfig(
        vocab_size=13,
        d_model=8,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=12,
        decoder_ffn_dim=12,
        max_position_embeddings=16,
    )
    return program_of(
        FlaxBartForConditionalGeneration(config),
        next_token,
        ('model/shared', 'model/decoder/layers/*/fc1'),
        input_ids=TOKENS,
        decoder_input_ids=TOKENS,
    )


def whisper() -> Program:
    from transformers import FlaxWhisperForConditionalGeneration, WhisperConfig

    config = WhisperConfig(
        vocab_size=13,
        num_mel_bins=4,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=12,
        decoder_ffn_dim=12,
        max_source_positions=6,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = FlaxWhisperForConditionalGeneration(config, input_shape=(1, 4, 12))
    return program_of(
        model,
        next_token,
        ('model/decoder/embed_tokens', 'model/encoder'),
        input_features=jax.random.normal(jax.random.key(2), (2, 4, 12)),
        decoder_input_ids=TOKENS,
    )


def clip() -> Program:
    from transformers import CLIPConfig, FlaxCLIPModel

    both = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    config = CLIPConfig(
        text_config=dict(
            **both,
            vocab_size=13,
            max_position_embeddings=16,
            eos_token_id=2,
            bos_token_id=0,
            pad_token_id=1,
        ),
        vision_config=dict(**both, image_size=16, patch_size=8),
        projection_dim=8,
    )
    model = FlaxCLIPModel(config, input_shape=((1, 5), (1, 16, 16, 3)))
    return program_of(
        model,
        lambda output: -jax.nn.log_softmax(output.logits_per_text)[jnp.arange(2), [0, 1]].mean(),
        ('text_model', 'vision_model/encoder'),
        input_ids=TOKENS,
        pixel_values=PIXELS,
        attention_mask=np.ones_like(TOKENS),
    )


def vit() -> Program:
    from transformers import FlaxViTForImageClassification, ViTConfig

    config = ViTConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    return program_of(
        FlaxViTForImageClassification(config),
        lambda output: -jax.nn.log_softmax(output.logits)[:, 1].mean(),
        ('vit/embeddings', 'classifier'),
        pixel_values=PIXELS,
    )


def llama() -> Program:
    from transformers import FlaxLlamaForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=13,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    return program_of(
        FlaxLlamaForCausalLM(config),
        next_token,
        ('model/embed_tokens', 'model/layers/*/self_attn'),
        input_ids=TOKENS,
    )


def gpt2() -> Program:
    from transformers import FlaxGPT2LMHeadModel, GPT2Config

    config = GPT2Config(vocab_size=13, n_positions=16, n_embd=8, n_layer=2, n_head=2, n_inner=12)
    return program_of(
        FlaxGPT2LMHeadModel(config),
        next_token,
        ('transformer/wte', 'transformer/h/0'),
        input_ids=TOKENS,
    )
