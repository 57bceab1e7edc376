"""What gradient_views cost: one scan that feeds K losses, each of which trains its own part.

Beside it the same step three ways: by hand, one vjp of the scan and K pullbacks; K masked calls,
which run the scan K times; and K gradients, each compiled and run by itself. With --remat each step
of the scan is rematerialised. Flops, matrix products, loops and temporary bytes are those of the
compiled programs, and exact; the body of a loop is counted once.

    python benchmarks/views.py [--remat] [--quick] [--save FILE]
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

import flax_sg
from measure import cost_of, ratio_of, table, take_turns

__all__ = ['Shape', 'WAYS', 'data_of', 'step_of']

Array = jax.Array


class Shape(NamedTuple):
    """The problem: entries, scan length, batch, features; and whether steps are rematerialised."""

    entries: int = 3
    length: int = 64
    batch: int = 32
    width: int = 64
    remat: bool = False


class Cell(nn.Module):
    """One step of the scan, through all parts in turn."""

    parts: int
    width: int

    @nn.compact
    def __call__(self, c: Array, x: Array) -> tuple[Array, Array]:
        for i in range(self.parts):
            c = jnp.tanh(nn.Dense(self.width, name=f'part_{i}')(c) + x)
        return c, c.mean(-1)


class Net(nn.Module):
    """The scan: an initial state [batch, width] and inputs [length, batch, width]."""

    shape: Shape

    @nn.compact
    def __call__(self, c: Array, xs: Array) -> tuple[Array, Array]:
        cell = nn.remat(Cell, prevent_cse=False) if self.shape.remat else Cell
        scan = nn.scan(cell, variable_broadcast='params', split_rngs={'params': False})
        return scan(self.shape.entries, self.shape.width, name='scan')(c, xs)


def data_of(shape: Shape) -> tuple[Any, Array, Array]:
    """Return parameters, the initial state and the inputs."""
    xs = jax.random.normal(jax.random.key(1), (shape.length, shape.batch, shape.width))
    params = Net(shape).init(jax.random.key(0), xs[0], xs)['params']
    return params, xs[0], xs


def loss_of(k: int, out: tuple[Array, Array]) -> Array:
    """Return the loss of entry k, which looks at all of the output."""
    return ((out[0] - k) ** 2).sum() + (jnp.sin(k + 1 + out[1])).sum()


def part(k: int) -> str:
    return f'scan/part_{k}'


def total(shape: Shape, outs: Any) -> Array:
    return sum(loss_of(k, outs[part(k)]) for k in range(shape.entries))


def views(shape: Shape) -> Callable:
    each = flax_sg.gradient_views({part(k): part(k) for k in range(shape.entries)})

    def loss(params: Any, c: Array, xs: Array) -> Array:
        return total(shape, Net(shape).apply({'params': params}, c, xs, method=each(Net.__call__)))

    return jax.value_and_grad(loss)


def by_hand(shape: Shape) -> Callable:
    def step(params: Any, c: Array, xs: Array) -> tuple[Array, Any]:
        out, pull = jax.vjp(lambda p: Net(shape).apply({'params': p}, c, xs), params)
        value, grads = jnp.float32(0), {}
        for k in range(shape.entries):
            loss, cotangent = jax.value_and_grad(functools.partial(loss_of, k))(out)
            value, grads[f'part_{k}'] = value + loss, pull(cotangent)[0]['scan'][f'part_{k}']
        return value, {'scan': grads}

    return step


def masked(shape: Shape) -> Callable:
    def loss(params: Any, c: Array, xs: Array) -> Array:
        outs = {}
        for k in range(shape.entries):
            with flax_sg.stop_gradient(~flax_sg.path(part(k))):
                outs[part(k)] = Net(shape).apply({'params': params}, c, xs)
        return total(shape, outs)

    return jax.value_and_grad(loss)


def alone(shape: Shape, k: int) -> Callable:
    """Return the gradient of one loss with respect to its own part."""

    def loss(mine: Any, params: Any, c: Array, xs: Array) -> Array:
        params = {'scan': {**params['scan'], f'part_{k}': mine}}
        return loss_of(k, Net(shape).apply({'params': params}, c, xs))

    grad = jax.value_and_grad(loss)
    return lambda params, c, xs: grad(params['scan'][f'part_{k}'], params, c, xs)


WAYS = {'views': views, 'by hand': by_hand, 'masked calls': masked}


def step_of(way: str, shape: Shape, quick: bool = False) -> Any:
    """Compile the step of one way. With `quick`, machine code is not optimised."""
    options = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
    lowered = jax.jit(WAYS[way](shape)).lower(*data_of(shape))
    return lowered.compile(compiler_options=options if quick else None)


def seconds(*steps: Callable) -> Callable[[tuple], float]:
    def run(args: tuple) -> float:
        start = time.perf_counter()
        for step in steps:
            jax.block_until_ready(step(*args))
        return time.perf_counter() - start

    return run


def rows_of(shape: Shape, repeats: int) -> dict[str, list]:
    """Return for each way: flops, products, loops, temporary bytes, and time over the views'."""
    args = data_of(shape)
    steps = {way: [step_of(way, shape)] for way in WAYS}
    steps['gradients alone'] = [
        jax.jit(alone(shape, k)).lower(*args).compile() for k in range(shape.entries)
    ]
    runs = {way: functools.partial(seconds(*found), args) for way, found in steps.items()}
    times = take_turns(runs, repeats + 1)
    rows = {}
    for way, found in steps.items():
        costs = [cost_of(step) for step in found]
        rows[way] = [
            sum(c.flops for c in costs),
            sum(c.products for c in costs),
            sum(c.loops for c in costs),
            max(c.temp_bytes for c in costs),
            ratio_of(times[way][1:], times['views'][1:]),
        ]
    return rows


def show(shapes: list[Shape], over: str, repeats: int) -> list[dict[str, list]]:
    found, lines = [], []
    for shape in shapes:
        rows = rows_of(shape, repeats)
        found.append(rows)
        for way, (flops, products, loops, bytes_, ratio) in rows.items():
            base = rows['views']
            lines.append(
                [
                    getattr(shape, over),
                    way,
                    f'{flops / base[0]:.2f}',
                    products,
                    loops,
                    f'{bytes_ / base[3]:.2f}',
                    ratio,
                ]
            )
            print(f'{over} {getattr(shape, over)}: {way}', flush=True)
    print(
        '\n'
        + table(
            f'Over {over}: {shapes[0]._replace(**{over: "..."})}',
            [over, 'way', 'flops', 'products', 'loops', 'temporary bytes', 'time'],
            lines,
        )
    )
    return found


def save(path: str, series: dict[str, tuple[list[int], list[dict[str, list]]]]) -> None:
    import matplotlib

    matplotlib.use('agg')
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(series), figsize=(5 * len(series), 7), squeeze=False)
    for column, (over, (xs, found)) in enumerate(series.items()):
        for row, (label, value) in enumerate(
            [('time over views', lambda r: r[4].median), ('temporary bytes over views', None)]
        ):
            axis = axes[row][column]
            for way in found[0]:
                ys = [value(r[way]) if value else r[way][3] / r['views'][3] for r in found]
                axis.plot(xs, ys, marker='o', label=way)
            axis.set(
                xlabel={'entries': 'entries (losses)', 'length': 'steps of the scan'}[over],
                ylabel=label,
                ylim=(0, None),
                xscale='log',
                xticks=xs,
                xticklabels=xs,
            )
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print('saved', path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--quick', action='store_true', help='smaller, fewer repetitions')
    parser.add_argument('--remat', action='store_true', help='rematerialise each step')
    parser.add_argument('--save', metavar='FILE', help='save a picture of the ratios')
    args = parser.parse_args()
    print(f'jax {jax.__version__}, {jax.devices()[0].device_kind}\n')
    base = (Shape(batch=8, width=16) if args.quick else Shape())._replace(remat=args.remat)
    entries, lengths = [1, 2, 3, 4, 8], [16, 64, 256] if args.quick else [16, 64, 256, 1024]
    repeats = 5 if args.quick else 11
    series = {
        'entries': (entries, show([base._replace(entries=k) for k in entries], 'entries', repeats)),
        'length': (lengths, show([base._replace(length=n) for n in lengths], 'length', repeats)),
    }
    if args.save:
        save(args.save, series)


if __name__ == '__main__':
    main()
