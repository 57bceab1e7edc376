"""What gradient_views cost to trace: the first trace of a step, over that of the step by hand.

The target is the encoder of transformer.py, as a loop of layers or one `nn.scan`; each of K losses
trains one kind of matrix in all layers. By hand it is one `jax.vjp` of the encoder and K pullbacks;
and the same where parameters that no loss trains are held constant, as the views do. Processor time
from empty caches, in turns; Python calls are exact.

    python benchmarks/views_trace.py [--remat] [--quick]
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import flax_sg
from measure import calls_in, ratio_of, table, time_traces
from transformer import Encoder, tokens

PARTS = (
    'attention/query',
    'attention/key',
    'attention/value',
    'attention/out',
    'up',
    'down',
    'norm_attention',
    'norm_mlp',
)


def loss_of(k: int, out: jax.Array) -> jax.Array:
    return jnp.sin(out * (k + 1)).sum()


def views(model: Encoder, entries: int) -> Callable:
    each = flax_sg.gradient_views({part: f'layer*/{part}' for part in PARTS[:entries]})

    def loss(params: Any, x: jax.Array) -> jax.Array:
        outs = model.apply({'params': params}, x, method=each(Encoder.__call__))
        return sum(loss_of(k, out) for k, out in enumerate(outs.values()))

    return jax.value_and_grad(loss)


def by_hand(model: Encoder, entries: int, masks: list[Any], hold: bool) -> Callable:
    live = jax.tree.map(lambda *ms: any(ms) or not hold, *masks)

    def run(params: Any, x: jax.Array) -> jax.Array:
        held = jax.tree.map(lambda p, m: p if m else jax.lax.stop_gradient(p), params, live)
        return model.apply({'params': held}, x)

    def step(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        out, pull = jax.vjp(lambda p: run(p, x), params)
        value, grads = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
        for k, mask in enumerate(masks):
            loss, cotangent = jax.value_and_grad(functools.partial(loss_of, k))(out)
            add = lambda total, g, mine: total + g if mine else total
            value, grads = value + loss, jax.tree.map(add, grads, pull(cotangent)[0], mask)
        return value, grads

    return step


def row(depth: int, scan: bool, remat: bool, entries: int, repeats: int) -> list:
    model, x = Encoder(depth=depth, width=32, scan=scan, remat=remat), tokens(2, 8)
    params = model.init(jax.random.key(0), x)['params']
    masks = [flax_sg.path(f'layer*/{part}').mask(params) for part in PARTS[:entries]]
    makes = {
        'views': lambda: (views(model, entries), (params, x)),
        'by hand': lambda: (by_hand(model, entries, masks, hold=False), (params, x)),
        'held': lambda: (by_hand(model, entries, masks, hold=True), (params, x)),
    }
    times = time_traces(makes, repeats)
    views_calls, *others = (calls_in(make, cold=True) for make in makes.values())
    ratios = [ratio_of(times['views'], times[name]) for name in ('by hand', 'held')]
    return [
        'scan' if scan else 'loop',
        depth,
        entries,
        *(
            part
            for ratio, calls in zip(ratios, others, strict=True)
            for part in (ratio, f'{views_calls / calls:.2f}')
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--remat', action='store_true', help='rematerialise each layer')
    parser.add_argument('--quick', action='store_true', help='fewer rows and repetitions')
    args = parser.parse_args()
    print(f'jax {jax.__version__}\n')
    shapes = [(depth, False) for depth in ((3, 12) if args.quick else (3, 12, 24))] + [(12, True)]
    rows = []
    for depth, scan in shapes:
        for entries in (2, 8) if args.quick else (2, 3, 6, 8):
            rows.append(row(depth, scan, args.remat, entries, 3 if args.quick else 5))
            print(*rows[-1], flush=True)
    print(
        '\n'
        + table(
            'First trace of views over that by hand' + ', rematerialised' * args.remat,
            ['layers', 'depth', 'entries', 'time', 'Python calls', 'time, the rest held', 'calls'],
            rows,
        )
    )


if __name__ == '__main__':
    main()
