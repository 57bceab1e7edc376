"""Programs in pairs: the masked loss, and the same by hand with two copies of the parameters.

By hand means `jax.lax.stop_gradient` on the selected leaves of the tree, outside the model, and
nothing of flax_sg.
"""

from __future__ import annotations

import contextlib
import fnmatch
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
from flax import linen as nn

import encoder as recurrent
import transformer
from flax_sg import path, stop_gradient
from transformer import Encoder, Layer, Transformer

__all__ = ['Case', 'Cases', 'encoder_cases', 'example_cases', 'held', 'transformer_cases']

Loss = Callable[[Any], jax.Array]


class Case(NamedTuple):
    """A masked loss and its like by hand, both functions of the parameters."""

    masked: Loss
    by_hand: Loss


class Cases(NamedTuple):
    """Pairs by name, their parameters, and the loss without any mask."""

    params: Any
    unmasked: Loss
    pairs: dict[str, Case]


def held(params: Any, names: Iterable[str] = ('*',)) -> Any:
    """Stop the gradient of each leaf that has one of the names (with wildcards) in its path."""

    def stop(keys: Any, leaf: Any) -> Any:
        found = any(fnmatch.fnmatch(k.key, name) for k in keys for name in names)
        return jax.lax.stop_gradient(leaf) if found else leaf

    return jax.tree_util.tree_map_with_path(stop, params)


SELECTED = ('attention', 'embed')
mask = stop_gradient([f'**/{name}' for name in SELECTED])
mask_layer = stop_gradient('attention')


class InsideBlock(Transformer):
    """The encoder runs in a block; the embedding is live again in `decode`."""

    def __call__(self, x: jax.Array) -> jax.Array:
        with mask:
            h = self.encode(x)
        return self.decode(h)


class MaskedMethod(Transformer):
    @mask
    def encode(self, x: jax.Array) -> jax.Array:
        return self.encoder(x)


class MaskedInstance(Transformer):
    def encode(self, x: jax.Array) -> jax.Array:
        return mask(self.encoder)(x)


def transformer_cases(
    *,
    depth: int = 12,
    width: int = 128,
    heads: int = 4,
    batch: int = 4,
    length: int = 64,
    scan: bool = False,
    remat: bool = False,
) -> Cases:
    """Return masked transformers: by blocks around and inside, instance, method, classes."""
    fields = dict(depth=depth, width=width, heads=heads, scan=scan, remat=remat)
    model, x = Transformer(Encoder(**fields)), transformer.tokens(batch, length)

    def loss(model: nn.Module, params: Any) -> jax.Array:
        return transformer.loss_of(model.apply(params, x), x)

    def two_copies(params: Any) -> jax.Array:
        h = model.apply(held(params, SELECTED), x, method='encode')
        return transformer.loss_of(model.apply(params, h, method='decode'), x)

    def one_copy(params: Any) -> jax.Array:
        return loss(model, held(params, SELECTED))

    def attention(params: Any) -> jax.Array:
        return loss(model, held(params, ('attention',)))

    def attention_in_body(params: Any) -> jax.Array:
        layer = Layer(heads)

        def body(h: jax.Array, params: Any) -> tuple[jax.Array, None]:
            return layer.apply({'params': held(params, ('attention',))}, h)

        h = model.apply(params, x, method=lambda model, x: model.encoder.embed(x))
        stacked = params['params']['encoder']['layers']
        h, _ = jax.lax.scan(jax.checkpoint(body, prevent_cse=True) if remat else body, h, stacked)
        return transformer.loss_of(model.apply(params, h, method='decode'), x)

    def around(params: Any) -> jax.Array:
        with mask:
            return loss(model, params)

    def of(model: nn.Module) -> Loss:
        return lambda params: loss(model, params)

    in_layers = of(Transformer(Encoder(**fields, layer=mask_layer(Layer))))
    pairs = {
        'block around apply': Case(around, one_copy),
        'block inside': Case(of(InsideBlock(Encoder(**fields))), two_copies),
        'method': Case(of(MaskedMethod(Encoder(**fields))), two_copies),
        'instance, bound': Case(of(MaskedInstance(Encoder(**fields))), two_copies),
        'instance, unbound': Case(of(mask(model)), one_copy),
        'class of the encoder': Case(of(Transformer(mask(Encoder)(**fields))), one_copy),
    }
    if scan:
        pairs['class of the layer, held in the scan by hand too'] = Case(
            in_layers, attention_in_body
        )
    else:
        pairs['class of the layer'] = Case(in_layers, attention)
    return Cases(model.init(jax.random.key(0), x), of(model), pairs)


class EncodingByBlocks(recurrent.Encoding):
    """The losses, each of which trains its own part, with blocks in the model."""

    def __call__(self, seen: jax.Array) -> jax.Array:
        with stop_gradient(True):
            first = self.code_message(seen)
        total = 0.0
        for name, part in recurrent.PARTS.items():
            with stop_gradient(~path(f'element/{part}')):
                total += recurrent.LOSSES[name](self.sample(first, seen), seen)
        return total


class EncodingByInstances(recurrent.Encoding):
    """The same with masked instances of the element."""

    def __call__(self, seen: jax.Array) -> jax.Array:
        first = stop_gradient(True)(self.element)(recurrent.begin(seen), seen)[0]
        total = 0.0
        for name, part in recurrent.PARTS.items():
            element = stop_gradient(~path(part))(self.element)
            total += recurrent.LOSSES[name](self.sample(first, seen, element), seen)
        return total


class EncodingByMethods(recurrent.Encoding):
    """The same with masked methods."""

    def __call__(self, seen: jax.Array) -> jax.Array:
        first = self.first(seen)
        return (
            self.gln_loss(first, seen)
            + self.code_loss(first, seen)
            + self.explanation_loss(first, seen)
        )

    @stop_gradient(True)
    def first(self, seen: jax.Array) -> recurrent.Carry:
        return self.code_message(seen)

    @stop_gradient(~path('element/gln'))
    def gln_loss(self, first: recurrent.Carry, seen: jax.Array) -> jax.Array:
        return recurrent.LOSSES['gln'](self.sample(first, seen), seen)

    @stop_gradient(~path('element/code_*'))
    def code_loss(self, first: recurrent.Carry, seen: jax.Array) -> jax.Array:
        return recurrent.LOSSES['code'](self.sample(first, seen), seen)

    @stop_gradient(~path('element/explanation'))
    def explanation_loss(self, first: recurrent.Carry, seen: jax.Array) -> jax.Array:
        return recurrent.LOSSES['explanation'](self.sample(first, seen), seen)


def encoder_cases(
    *, features: int = 64, hidden: int = 128, iterations: int = 20, batch: int = 64
) -> Cases:
    """Return masked encoders: by blocks around and inside, instances, methods."""
    fields = dict(features=features, hidden=hidden, iterations=iterations)
    model, seen = recurrent.Encoding(**fields), recurrent.observations(batch, features)
    everything = ('gln', 'code_*', 'explanation')

    def by_hand(params: Any) -> jax.Array:
        first = model.apply(held(params), seen, method='code_message')
        total = 0.0
        for name, part in recurrent.PARTS.items():
            copy = held(params, [other for other in everything if other != part])
            out = model.apply(copy, first, seen, method='sample')
            total += recurrent.LOSSES[name](out, seen)
        return total

    def around(params: Any) -> jax.Array:
        with stop_gradient(True):
            first = model.apply(params, seen, method='code_message')
        total = 0.0
        for name, part in recurrent.PARTS.items():
            with stop_gradient(~path(f'element/{part}')):
                out = model.apply(params, first, seen, method='sample')
            total += recurrent.LOSSES[name](out, seen)
        return total

    def of(model: nn.Module) -> Loss:
        return lambda params: model.apply(params, seen)

    pairs = {
        'blocks around apply': Case(around, by_hand),
        'blocks inside': Case(of(EncodingByBlocks(**fields)), by_hand),
        'methods': Case(of(EncodingByMethods(**fields)), by_hand),
        'instances, bound': Case(of(EncodingByInstances(**fields)), by_hand),
    }
    return Cases(model.init(jax.random.key(0), seen), of(model), pairs)


def example_cases(*, iterations: int = 80, batch: int = 64) -> Cases:
    """Return the training loss of examples/two_pass_encoding.py, and that of its four copies."""
    examples = str(Path(__file__).resolve().parents[1] / 'examples')
    if examples not in sys.path:
        sys.path.append(examples)
    import two_pass_encoding
    import two_pass_encoding_by_hand as copies

    world = two_pass_encoding.World(iterations=iterations)
    pixels, rng = jax.random.normal(jax.random.key(1), (batch, 64)), jax.random.key(2)

    def of(losses: Callable) -> Loss:
        return lambda params: sum(losses(world, params, pixels, rng).values())

    def unmasked(params: Any) -> jax.Array:
        with mock.patch.object(
            two_pass_encoding.nn, 'stop_gradient', lambda *_: contextlib.nullcontext()
        ):
            return of(copies.losses_by_blocks)(params)

    pairs = {'blocks inside': Case(of(copies.losses_by_blocks), of(copies.losses_by_hand))}
    return Cases(two_pass_encoding.init(world, jax.random.key(0)), unmasked, pairs)
