"""Trace a transformer in a process of its own, with flax_sg imported or not; print the seconds.

`run.py` starts it in turns with and without `--flax-sg`, to tell what the import costs while no
block is open.
"""

from __future__ import annotations

import argparse
import json
import sys

import jax

import transformer
from measure import trace_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--flax-sg', action='store_true')
    parser.add_argument('--scan', action='store_true')
    parser.add_argument('--depth', type=int, default=12)
    parser.add_argument('--repeats', type=int, default=5)
    args = parser.parse_args()
    if args.flax_sg:
        import flax_sg  # noqa: F401
    assert ('flax_sg' in sys.modules) == args.flax_sg
    model = transformer.Transformer(transformer.Encoder(depth=args.depth, scan=args.scan))
    x = transformer.tokens(2, 16)
    params = jax.eval_shape(model.init, jax.random.key(0), x)

    def make() -> tuple:
        return jax.value_and_grad(lambda params: transformer.loss_of(model.apply(params, x), x)), (
            params,
        )

    trace_seconds(make)
    print(json.dumps([trace_seconds(make) for _ in range(args.repeats)]))


if __name__ == '__main__':
    main()
