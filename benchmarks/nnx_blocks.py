"""Blocks on modules of flax.nnx: the compiled step, its first trace, and reads outside of blocks.

The model is a stack of Linear layers with a norm, in a loop; the first half of it is held. By hand
that is a split of the model, `jax.lax.stop_gradient` of half of the State, and a merge. Figures of
compiled steps and Python calls are exact; traces are processor time from empty caches, in turns.

    python benchmarks/nnx_blocks.py [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import timeit
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import flax_sg
import flax_sg.nnx
from flax_sg._compat import nnx as nnx_compat
from measure import calls_in, compiled_step, cost_of, ratio_of, same_program, table, time_traces

STOP = flax_sg.stop_gradient


class Layer(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.linear = nnx.Linear(width, width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + jnp.tanh(self.linear(self.norm(x)))


HeldLayer = STOP(True)(Layer)


class Net(nnx.Module):
    def __init__(self, depth: int, width: int, held: type[Layer] = Layer):
        rngs = nnx.Rngs(0)
        self.lower = nnx.List([held(width, rngs) for _ in range(depth // 2)])
        self.upper = nnx.List([Layer(width, rngs) for _ in range(depth - depth // 2)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in (*self.lower, *self.upper):
            x = layer(x)
        return jnp.sin(x).sum()


def in_block(block: Callable[[Net], Any]) -> Callable:
    def run(model: Net, x: jax.Array) -> jax.Array:
        with block(model):
            return model(x)

    return run


def by_hand(model: Net, x: jax.Array) -> jax.Array:
    graph, held, rest = nnx.split(model, nnx.PathContains('lower'), ...)
    return nnx.merge(graph, jax.lax.stop_gradient(held), rest)(x)


WAYS: dict[str, Callable] = {
    'block, by name': in_block(lambda model: STOP('lower').on(model)),
    'block, by module': in_block(lambda model: STOP(model.lower)),
    'block, all but a module': in_block(lambda model: STOP(~flax_sg.within(model.upper))),
    'mirror': lambda model, x: STOP('lower')(model)(x),
    'decorated layers': lambda model, x: model(x),
}


def step_of(run: Callable, depth: int, width: int, held: type[Layer] = Layer) -> tuple:
    graph, state = nnx.split(Net(depth, width, held))

    def loss(state: Any, x: jax.Array) -> jax.Array:
        return run(nnx.merge(graph, state), x)

    return loss, (state, jnp.ones((2, width)))


def made(way: str, depth: int, width: int) -> tuple:
    return step_of(WAYS[way], depth, width, HeldLayer if way == 'decorated layers' else Layer)


def steps(depth: int, width: int) -> str:
    hand, args = step_of(by_hand, depth, width)
    hand_step = compiled_step(hand, *args)
    rows = []
    for way in WAYS:
        loss, args = made(way, depth, width)
        step = compiled_step(loss, *args)
        ours, theirs = cost_of(step), cost_of(hand_step)
        ratio = lambda name, ours=ours, theirs=theirs: (
            f'{getattr(ours, name) / getattr(theirs, name):.2f}'
        )
        same = 'yes' if same_program(step, hand_step) else 'no'
        rows.append([way, ratio('flops'), ratio('temp_bytes'), ours.loops - theirs.loops, same])
    return table(
        'Compiled steps over that by hand', ['way', 'flops', 'bytes', 'loops', 'same text'], rows
    )


def traces(depth: int, width: int, repeats: int) -> str:
    derived = lambda loss, args: (jax.grad(loss), args)
    makes = {way: (lambda way=way: derived(*made(way, depth, width))) for way in WAYS}
    makes['by hand'] = lambda: derived(*step_of(by_hand, depth, width))
    makes['unmasked'] = lambda: derived(*step_of(lambda model, x: model(x), depth, width))
    times = time_traces(makes, repeats)
    calls = {name: calls_in(make, cold=True) for name, make in makes.items()}
    rows = [
        [name, ratio_of(times[name], times['by hand']), f'{calls[name] / calls["by hand"]:.2f}']
        for name in makes
    ]
    return table('First traces over that by hand', ['way', 'time', 'Python calls'], rows)


def reads(repeats: int, when: str) -> str:
    """Compare reads outside of blocks with those of flax.nnx as it is."""
    variable, model = nnx.Param(jnp.ones(3)), Net(4, 4)
    tapped, plain = vars(nnx.Variable)['_raw_value'], nnx_compat.slot
    what = {
        'variable[...]': lambda: variable[...],
        'variable.get_value()': lambda: variable.get_value(),
        'variable + 1': lambda: variable + 1.0,
        'jax.tree.leaves(model)': lambda: jax.tree.leaves(model),
        'nnx.split(model)': lambda: nnx.split(model),
    }
    rows = []
    for name, read in what.items():
        times: dict[str, list[float]] = {'tapped': [], 'plain': []}
        for i in range(2 * repeats):
            for way, slot in (('tapped', tapped), ('plain', plain))[:: 1 if i % 2 else -1]:
                nnx.Variable._raw_value = slot
                times[way].append(min(timeit.repeat(read, number=1000, repeat=3)) * 1e3)
        nnx.Variable._raw_value = tapped
        ratio = ratio_of(times['tapped'], times['plain'])
        rows.append([name, f'{statistics.median(times["plain"]):.2f}', ratio, f'{ratio.least:.2f}'])
    return table(
        f'Reads outside of blocks, {when}',
        ['read', 'plain, µs', 'tapped / plain', 'of the least'],
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--quick', action='store_true', help='fewer layers and repetitions')
    args = parser.parse_args()
    depth, repeats = (4, 3) if args.quick else (12, 5)
    print(f'jax {jax.__version__}\n')
    print(reads(repeats, 'before there is a mirror'), flush=True)
    print(steps(depth, 16), flush=True)
    print(traces(depth, 16, repeats), flush=True)
    print(reads(repeats, 'once there is one'))


if __name__ == '__main__':
    main()
