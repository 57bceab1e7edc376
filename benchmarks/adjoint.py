"""Measure what the gradient of a gradient costs as the state grows: examples/adjoint_gradient.py.

    python benchmarks/adjoint.py            # k from 8 to 1024, a few minutes
    python benchmarks/adjoint.py --quick    # smaller states, fewer repetitions
    python benchmarks/adjoint.py --save adjoint.png

L is the objective, F = fᵀ ∇_θ L by the recursion of λ. The other programs return F and ∇_φ F: by
reverse mode through that recursion, by nested VJPs, by the recursion of ξ, and by the recursion of
ξ with the k×k matrix ∂h_i/∂x_i formed in each step.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from flax_sg import nn
from measure import Cost, cost_of, ratio_of, table, take_turns
from run import run_seconds, steps_for

sys.path.append(str(Path(__file__).resolve().parents[1] / 'examples'))

import adjoint_gradient as example  # noqa: E402

__all__ = ['PROGRAMS', 'by_matrix', 'compiled', 'costs']

STEPS = 8
SIZES = [8, 16, 32, 64, 128, 256, 512, 1024]
NOTES = """All over F of the same k, whose own figures are in the second column. XLA counts the body
of a loop once. Every loop here runs n + 1 times, in F as in the others, so that ratios of flops are
those of all steps, up to what is outside the loops: β, and a few operations per number in a state.

Griewank and Walther's bounds of 4 for a VJP and 5/2 for a JVP count moves in memory as well. In
flops alone a JVP of a product in both factors is three products, so forward / L tends to 3.

Time: median of the ratios of neighbouring runs (quartiles). It has what flops leave out: in the
compiled reverse ways, transposed copies of the k×k cotangents of θ in each step."""


def by_matrix(
    cell: nn.Module, x: jax.Array, u: jax.Array, f: Any, xi: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return what `example.tangent` returns, by way of the matrix ∂h/∂x."""
    step = lambda cell, x: cell(x, u)[0]
    value, of_theta = nn.jvp(step, cell, (x,), (jnp.zeros_like(x),), {'params': f})
    _, pull = nn.vjp(step, cell, x, vjp_variables=False)
    matrix = jax.vmap(lambda row: pull(row)[-1])(jnp.eye(x.size, dtype=x.dtype))
    return value, of_theta + matrix @ xi


def method(name: str) -> Callable:
    return lambda model, params, f, data: model.apply({'params': params}, f, data, method=name)


PROGRAMS = {
    'L': method('objective'),
    'F': method('adjoint'),
    'adjoint': example.adjoint,
    'nested': example.nested,
    'forward': example.forward,
    'matrices': lambda model, *args: example.forward(model.clone(tangent=by_matrix), *args),
}
WAYS = list(PROGRAMS)[2:]


def compiled(
    size: int, names: Iterable[str] = PROGRAMS, quick: bool = False
) -> tuple[dict[str, Any], tuple]:
    """Compile the programs for a state of `size`; return them and their arguments.

    With `quick`, machine code is not optimised, which leaves the figures as they are.
    """
    options = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
    model = example.Model(nn.GRUCell(size), example.Beta())
    args = jax.device_put(example.problem(model, size, STEPS, dtype=np.float32))
    return {
        name: jax.jit(functools.partial(PROGRAMS[name], model))
        .lower(*args)
        .compile(compiler_options=options if quick else None)
        for name in names
    }, args


def costs(size: int, names: Iterable[str] = PROGRAMS) -> dict[str, Cost]:
    """Return the exact figures of programs."""
    programs, _ = compiled(size, names, quick=True)
    return {name: cost_of(program) for name, program in programs.items()}


def check(programs: dict[str, Any], args: tuple) -> None:
    """Make sure that the programs that are compared compute the same."""
    value, results = programs['F'](*args), {name: programs[name](*args) for name in WAYS}
    for name, (found, grads) in results.items():
        off = max(abs(float(found / value) - 1), example.difference(grads, results['nested'][1]))
        if not off < 1e-3:
            raise RuntimeError(f'{name} gives another value or gradient, by {off:.1e} of it')


def seconds(programs: dict[str, Any], args: tuple, repeats: int) -> dict[str, list[float]]:
    """Time the programs in turns; return seconds for one run of each."""

    def runs_of(program: Any) -> Callable[[], float]:
        run = lambda args: program(*args)
        steps = steps_for(run, args, 0.05)
        return lambda: run_seconds(run, args, steps) / steps

    return take_turns({name: runs_of(program) for name, program in programs.items()}, repeats)


def draw(drawn: dict[str, dict[str, dict[int, float]]], file: str) -> None:
    """Save the picture: what each way costs over F, over k."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(drawn), figsize=(15, 4.8), layout='constrained')
    styles = dict(
        zip(WAYS, ('#0072b2 o -', '#009e73 ^ --', '#d55e00 s -', 'black x :'), strict=True)
    )
    for axis, (title, lines) in zip(axes, drawn.items(), strict=True):
        for name, line in lines.items():
            colour, marker, style = styles[name].split()
            axis.plot(
                line.keys(),
                line.values(),
                style,
                marker=marker,
                mfc='none',
                color=colour,
                label='forward, with k×k matrices' if name == 'matrices' else name,
            )
        axis.axhline(4, color='#999999', lw=1, label='4')
        axis.set_xscale('log', base=2)
        axis.set_yscale('log')
        axis.yaxis.set_major_formatter('{x:g}')
        axis.yaxis.set_minor_formatter('')
        axis.set_xticks(list(line), [str(size) for size in line])
        axis.set(
            title=f'{title}: F and ∇_φ F, over F',
            xlabel='k, the dimension of the state',
            ylabel='ratio',
        )
        axis.spines[['top', 'right']].set_visible(False)
    axes[0].legend()
    figure.savefig(file, dpi=110)
    print(f'Saved {file}')


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--quick', action='store_true', help='smaller states, fewer repetitions')
    parser.add_argument('--save', metavar='FILE', help='save a picture of the ratios')
    args = parser.parse_args(argv)
    sizes, repeats = (SIZES[:5:2], 3) if args.quick else (SIZES, 7)
    load = f', load {os.getloadavg()[0]:.1f}' if hasattr(os, 'getloadavg') else ''
    print(
        f'Python {platform.python_version()}, jax {jax.__version__}, flax {flax.__version__}, '
        f'{os.cpu_count()} CPU cores{load}, GRU cell, n = {STEPS}, float32\n'
    )
    drawn = {title: {way: {} for way in WAYS} for title in ('flops', 'temporary bytes', 'time')}
    rows = {title: [] for title in drawn}
    for size in sizes:
        programs, inputs = compiled(size)
        check(programs, inputs)
        cost = {name: cost_of(program) for name, program in programs.items()}
        times = seconds(programs, inputs, repeats)
        ratios = {name: ratio_of(times[name], times['F']) for name in WAYS}
        for name in WAYS:
            drawn['flops'][name][size] = cost[name].flops / cost['F'].flops
            drawn['temporary bytes'][name][size] = cost[name].temp_bytes / cost['F'].temp_bytes
            drawn['time'][name][size] = ratios[name].median
        for title, own in (
            ('flops', f'{cost["F"].flops:.0f}'),
            ('temporary bytes', cost['F'].temp_bytes),
        ):
            rows[title].append([size, own, *(f'{drawn[title][way][size]:.2f}' for way in WAYS)])
        rows['flops'][-1].append(f'{cost["forward"].flops / cost["L"].flops:.2f}')
        rows['time'].append(
            [size, f'{1e3 * statistics.median(times["F"]):.2f} ms', *ratios.values()]
        )
        loops = ', '.join(f'{name} {found.loops}' for name, found in cost.items())
        print(f'k = {size}, loops: {loops}', flush=True)
    print()
    for title, found in rows.items():
        head = ['k', 'F', *WAYS, *['forward / L'] * (title == 'flops')]
        print(table(f'F and ∇_φ F over F: {title}', head, found))
    print(NOTES)
    if args.save:
        draw(drawn, args.save)


if __name__ == '__main__':
    main()
