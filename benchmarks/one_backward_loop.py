"""An experiment: one backward loop for all entries of gradient_views, in place of one for each.

The library runs the backward loops of all entries in step where they compute something again, as
those of rematerialised layers do. Here it does so everywhere: one scan that carries a tangent for
each entry and reads the shared residuals once, whose transpose is one backward loop. It does not
compute what an entry does not need, as a vmapped pullback would. What is measured here says why the
library does not.

    python benchmarks/one_backward_loop.py [--quick]
"""

from __future__ import annotations

import argparse
import functools
from unittest import mock

import jax

from measure import cost_of, ratio_of, table, take_turns
from views import Shape, data_of, seconds, step_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--quick', action='store_true', help='fewer repetitions')
    repeats = 5 if parser.parse_args().quick else 15
    print(f'jax {jax.__version__}, {jax.devices()[0].device_kind}\n')
    rows = []
    for width, batch, length in [(8, 1, 512), (16, 8, 256), (64, 32, 64), (256, 32, 32)]:
        for entries in (2, 3, 8):
            shape = Shape(entries, length, batch, width)
            args, each = data_of(shape), step_of('views', shape)
            with mock.patch('flax_sg._views.together._computes_again', lambda jaxpr: True):
                together = step_of('views', shape)
            costs = cost_of(each), cost_of(together)
            same = jax.tree.map(
                lambda a, b: abs(a - b).max() <= 1e-4 * abs(a).max(), each(*args), together(*args)
            )
            assert all(jax.tree.leaves(same)), same
            run = lambda step: functools.partial(seconds(step), args)  # noqa: B023
            times = take_turns({'each': run(each), 'together': run(together)}, repeats + 1)
            rows.append(
                [
                    width,
                    batch,
                    length,
                    entries,
                    f'{costs[0].loops} / {costs[1].loops}',
                    f'{costs[1].flops / costs[0].flops:.2f}',
                    f'{costs[1].temp_bytes / costs[0].temp_bytes:.2f}',
                    ratio_of(times['each'][1:], times['together'][1:]),
                ]
            )
            print(*rows[-1], flush=True)
    print(
        '\n'
        + table(
            'One backward loop against one for each entry',
            [
                'width',
                'batch',
                'steps',
                'entries',
                'loops, each / together',
                'flops',
                'temporary bytes',
                'times as fast',
            ],
            rows,
        )
    )


if __name__ == '__main__':
    main()
