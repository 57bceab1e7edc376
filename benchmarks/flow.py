"""What gradient_flow costs: its time over that of `jax.make_jaxpr` of the same loss, side by side.

    python benchmarks/flow.py
    python benchmarks/flow.py --repeats 3 --depths 3 12

Processor time of one thread, caches of JAX warm for both, median of the ratios of neighbours; and
the number of equations, those in the bodies of loops and calls counted once for each call.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

import jax

import flax_sg as sg
from flax_sg._flow.graph import Graph
from measure import ratio_of, table, take_turns
from transformer import Encoder, Transformer, loss_of, tokens


def program(depth: int, kind: str) -> tuple[Callable, Any]:
    """Return the loss of a transformer, in a block that holds its first layers, and parameters."""
    seen = tokens(2, 16)
    model = Transformer(Encoder(depth=depth, width=64, scan=kind != 'loop', remat='remat' in kind))
    params = jax.eval_shape(model.init, jax.random.key(0), seen)['params']
    held = 'encoder/embed' if kind != 'loop' else ['encoder/layer_0', 'encoder/layer_1']

    def loss(params: Any) -> jax.Array:
        with sg.stop_gradient(held):
            return loss_of(model.apply({'params': params}, seen), seen)

    return loss, params


def seconds(fn: Callable, params: Any) -> float:
    """Return the processor time of one run, of a function that JAX has not seen."""
    gc.collect()
    start = time.thread_time()
    fn(params)
    return time.thread_time() - start


def measured(kind: str, depth: int, repeats: int) -> list[Any]:
    """Return a row of the table."""
    loss, params = program(depth, kind)
    steps = Graph(jax.make_jaxpr(loss)(params), inside=False).steps
    equations = sum(step.eqn is not None for step in steps)
    runs = {
        'trace': lambda: seconds(lambda p: jax.make_jaxpr(lambda p: loss(p))(p), params),
        'flow': lambda: seconds(lambda p: sg.gradient_flow(lambda p: loss(p))(p), params),
    }
    for run in runs.values():
        run()
    times = take_turns(runs, repeats)
    flow, trace = (sorted(times[name])[repeats // 2] for name in ('flow', 'trace'))
    return [
        kind,
        depth,
        len(jax.tree.leaves(params)),
        equations,
        f'{1e3 * trace:.0f} ms',
        f'{1e3 * flow:.0f} ms',
        ratio_of(times['flow'], times['trace']),
        f'{1e6 * flow / equations:.0f} µs',
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--repeats', type=int, default=7, help='runs of each program')
    parser.add_argument('--depths', type=int, nargs='+', default=[3, 6, 12, 24])
    args = parser.parse_args()
    print(
        table(
            'gradient_flow over jax.make_jaxpr',
            [
                'transformer',
                'layers',
                'parameters',
                'equations',
                'make_jaxpr',
                'gradient_flow',
                'ratio',
                'per equation',
            ],
            [
                measured(kind, depth, args.repeats)
                for kind in ('loop', 'nn.scan', 'nn.scan of nn.remat')
                for depth in args.depths
            ],
        )
    )


if __name__ == '__main__':
    main()
