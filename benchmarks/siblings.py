"""What the siblings of stop_gradient cost to trace: over the unmasked step, and by hand.

    python benchmarks/siblings.py
    python benchmarks/siblings.py --repeats 3

The first trace of the training step of a 12-layer transformer, from empty caches: processor time,
the median of the ratios of neighbours with quartiles, and Python calls, which are exact. By hand,
the selected parameters go through a `jax.custom_vjp`, once each.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
from collections.abc import Callable
from typing import Any

import jax

import flax_sg as sg
from cases import SELECTED
from measure import calls_in, ratio_of, table, time_traces
from transformer import Encoder, Transformer, loss_of, tokens

PATTERNS = [f'**/{name}' for name in SELECTED]
SIBLINGS = {
    'stop_gradient': sg.stop_gradient(PATTERNS),
    'constant': sg.constant(PATTERNS),
    'scale_gradient': sg.scale_gradient(PATTERNS, -1.0),
    'map_gradient': sg.map_gradient(PATTERNS, lambda info, cotangent: 2 * cotangent),
    'map_values': sg.map_values(PATTERNS, lambda info, value: 2 * value),
}
SHAPE = dict(depth=12, width=64, heads=4)


@jax.custom_vjp
def doubled(x: jax.Array) -> jax.Array:
    """Return x, whose cotangent is doubled."""
    return x


doubled.defvjp(lambda x: (x, None), lambda _, cotangent: (2 * cotangent,))


def by_hand(params: Any) -> Any:
    """Return a tree in which the selected parameters have doubled cotangents."""

    def of(path: tuple, leaf: jax.Array) -> jax.Array:
        names = [key.key for key in path]
        return (
            doubled(leaf)
            if any(fnmatch.fnmatch(name, pattern) for name in names for pattern in SELECTED)
            else leaf
        )

    return jax.tree_util.tree_map_with_path(of, params)


def step(
    params: Any,
    seen: jax.Array,
    *,
    around: Any = None,
    inside: Any = None,
    first: Callable = lambda params: params,
) -> Callable[[], tuple[Callable, tuple]]:
    """Make a training step, with a transform around the encoder's call or around the model."""

    class Model(Transformer):
        def __call__(self, x: jax.Array) -> jax.Array:
            with inside or contextlib.nullcontext():
                h = self.encode(x)
            return self.decode(h)

    model = Model(Encoder(**SHAPE))

    def loss(params: Any) -> jax.Array:
        with around or contextlib.nullcontext():
            return loss_of(model.apply(first(params), seen), seen)

    return lambda: (jax.value_and_grad(lambda params: loss(params)), (params,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--repeats', type=int, default=5, help='traces of each program')
    args = parser.parse_args()
    seen = tokens(4, 16)
    params = Transformer(Encoder(**SHAPE)).init(jax.random.key(0), seen)
    makes = {'unmasked': step(params, seen)}
    makes |= {
        (name, where): step(params, seen, **{where: transform})
        for name, transform in SIBLINGS.items()
        for where in ('around', 'inside')
    }
    makes['by hand', 'map_gradient'] = step(params, seen, first=by_hand)
    times = time_traces(makes, args.repeats)
    calls = {name: calls_in(make, cold=True) for name, make in makes.items()}
    print(
        table(
            'Tracing over the unmasked step',
            ['transform', 'block', 'time', 'calls'],
            [
                [
                    *name,
                    ratio_of(times[name], times['unmasked']),
                    f'{calls[name] / calls["unmasked"]:.2f}',
                ]
                for name in makes
                if name != 'unmasked'
            ],
        )
    )


if __name__ == '__main__':
    main()
