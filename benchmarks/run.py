"""Measure what flax_sg costs, and print it as ratios in tables.

python benchmarks/run.py            # everything, some minutes
python benchmarks/run.py --quick    # smaller models, fewer repetitions
python benchmarks/run.py --only step trace --save costs.png
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp

import encoder as recurrent
import flax_sg
import transformer
from cases import Cases, encoder_cases, example_cases, held, transformer_cases
from flax_sg import stop_gradient
from measure import (
    calls_in,
    compiled_step,
    cost_of,
    ratio_of,
    same_program,
    table,
    take_turns,
    time_traces,
)

HERE = Path(__file__).resolve().parent
LIMIT = 1.15


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the models are and how often they run."""

    depth: int = 12
    width: int = 128
    length: int = 64
    iterations: int = 20
    hidden: int = 128
    batch: int = 64
    traces: int = 7
    runs: int = 9
    processes: int = 4


QUICK = Sizes(
    depth=3, width=32, length=16, iterations=5, hidden=32, batch=8, traces=3, runs=5, processes=1
)


class Report:
    """Prints tables as they come, and keeps what the picture shows."""

    def __init__(self) -> None:
        self.bars: dict[str, dict[str, float]] = {}

    def show(self, title: str, head: list[str], rows: list[list[Any]], note: str = '') -> None:
        print(table(title, head, rows))
        if note:
            print(note + '\n')
        sys.stdout.flush()

    def bar(self, group: str, name: str, value: float) -> None:
        self.bars.setdefault(group, {})[name] = value

    def save(self, file: str) -> None:
        import matplotlib

        matplotlib.use('Agg')
        from matplotlib import pyplot as plt

        fig, axes = plt.subplots(
            len(self.bars),
            1,
            layout='constrained',
            squeeze=False,
            figsize=(9, sum(1.2 + 0.3 * len(bars) for bars in self.bars.values())),
            height_ratios=[1 + len(bars) for bars in self.bars.values()],
        )
        for axis, (group, bars) in zip(axes[:, 0], self.bars.items(), strict=True):
            drawn = axis.barh(list(bars), list(bars.values()), color='#4878a8')
            axis.bar_label(drawn, fmt='%.2f', padding=3)
            axis.axvline(1, color='black', linewidth=1)
            axis.set_xlim(0, 1.2 * max(1.0, *bars.values()))
            axis.set_title(group, loc='left')
            axis.invert_yaxis()
            axis.spines[['top', 'right']].set_visible(False)
        fig.savefig(file, dpi=120)
        print(f'Saved {file}')


def over(a: float, b: float) -> str:
    """Show a ratio of exact figures; 0 over 0 is no difference."""
    return f'{a / b:.2f}' if b else ('1.00' if a == b else 'inf')


def models(sizes: Sizes) -> dict[str, Cases]:
    """Return the cases of all models."""
    big = dict(depth=sizes.depth, width=sizes.width, length=sizes.length)
    return {
        'transformer, loop': transformer_cases(**big),
        'transformer, nn.scan': transformer_cases(**big, scan=True),
        'transformer, nn.scan of nn.remat': transformer_cases(**big, scan=True, remat=True),
        'recurrent encoder': encoder_cases(
            hidden=sizes.hidden, iterations=sizes.iterations, batch=sizes.batch
        ),
        'examples/two_pass_encoding.py': example_cases(
            iterations=4 * sizes.iterations, batch=sizes.batch
        ),
    }


def run_seconds(compiled: Any, params: Any, steps: int) -> float:
    """Return the seconds of some steps, by the wall clock."""
    start = time.perf_counter()
    for _ in range(steps):
        out = compiled(params)
    jax.block_until_ready(out)
    return time.perf_counter() - start


def steps_for(compiled: Any, params: Any, seconds: float = 0.1) -> int:
    """Return how many steps take about so many seconds."""
    run_seconds(compiled, params, 1)
    return max(1, int(seconds / run_seconds(compiled, params, 1)))


def time_steps(programs: dict[str, tuple[Any, Any]], repeats: int) -> dict[str, list[float]]:
    """Time compiled programs, given with their parameters, in turns; return seconds."""
    steps = max(steps_for(*program) for program in programs.values())
    return take_turns(
        {
            name: lambda program=program: run_seconds(*program, steps)
            for name, program in programs.items()
        },
        repeats,
    )


def step(sizes: Sizes, report: Report) -> None:
    """The compiled step: masked over by hand."""
    rows = []
    for model, cases in models(sizes).items():
        by_hand: dict[Callable, Any] = {}
        for name, case in cases.pairs.items():
            masked = compiled_step(case.masked, cases.params)
            if case.by_hand not in by_hand:
                by_hand[case.by_hand] = compiled_step(case.by_hand, cases.params)
            hand = by_hand[case.by_hand]
            a, b = cost_of(masked), cost_of(hand)
            times = time_steps(
                {'masked': (masked, cases.params), 'hand': (hand, cases.params)}, sizes.runs
            )
            speed = ratio_of(times['hand'], times['masked'])
            rows.append(
                [
                    model,
                    name,
                    over(a.flops, b.flops),
                    f'{a.loops}/{b.loops}',
                    over(a.temp_bytes, b.temp_bytes),
                    'yes' if same_program(masked, hand) else 'no',
                    speed,
                ]
            )
            report.bar(
                'Temporary bytes, masked over by hand',
                f'{model}: {name}',
                a.temp_bytes / b.temp_bytes,
            )
    report.show(
        'The compiled training step, masked over by hand',
        ['model', 'mask', 'flops', 'loops', 'temporary bytes', 'same program text', 'steps/s'],
        rows,
        'Steps/s: median of the ratios of neighbouring runs (quartiles). Where the program text is '
        'the same, any difference is noise.',
    )
    inside_scan(sizes, report)


def inside_scan(sizes: Sizes, report: Report) -> None:
    """What it costs to decorate the scanned layer, and so to mask in the body of the scan."""
    big = dict(depth=sizes.depth, width=sizes.width, length=sizes.length)
    rows = []
    for remat in (False, True):
        cases = transformer_cases(**big, scan=True, remat=remat)
        masked = cost_of(compiled_step(cases.pairs[IN_BODY].masked, cases.params))
        model = transformer.Transformer(
            transformer.Encoder(depth=sizes.depth, width=sizes.width, scan=True, remat=remat)
        )
        x = transformer.tokens(4, sizes.length)
        outside = cost_of(
            compiled_step(
                lambda params, model=model, x=x: transformer.loss_of(
                    model.apply(held(params, ('attention',)), x), x
                ),
                cases.params,
            )
        )
        rows.append(
            [
                'nn.scan of nn.remat' if remat else 'nn.scan',
                over(masked.flops, outside.flops),
                f'{masked.loops}/{outside.loops}',
                over(masked.temp_bytes, outside.temp_bytes),
            ]
        )
    report.show(
        'A decorated layer class under nn.scan, over stopping the stacked parameters outside',
        ['model', 'flops', 'loops', 'temporary bytes'],
        rows,
        'A mask in the body of a scan over split parameters stacks zero cotangents, by hand too. '
        'A block around the scan, or a decorated encoder, does not.',
    )


IN_BODY = 'class of the layer, held in the scan by hand too'


def tracing(sizes: Sizes, report: Report) -> None:
    """Tracing: masked and by hand over unmasked."""
    cases_of = {model: cases for model, cases in models(sizes).items() if 'remat' not in model}
    for title, wrap in (
        ('First trace of the training step', jax.value_and_grad),
        ('First trace of the forward pass', lambda fn: fn),
    ):
        rows = []
        for model, cases in cases_of.items():
            makes = _makes(cases, wrap)
            times = time_traces(makes, sizes.traces)
            calls = {name: calls_in(make, cold=True) for name, make in makes.items()}
            base = times[UNMASKED]
            for name, case in cases.pairs.items():
                ratio = ratio_of(times[name], base)
                count = calls[name] / calls[UNMASKED]
                rows.append(
                    [
                        model,
                        name,
                        f'{1e3 * statistics.median(base):.0f} ms',
                        ratio_of(times[case.by_hand], base),
                        ratio,
                        over(calls[case.by_hand], calls[UNMASKED]),
                        f'{count:.2f}',
                        'yes' if count <= LIMIT else 'NO',
                    ]
                )
                report.bar(
                    title + ', Python calls, masked over unmasked', f'{model}: {name}', count
                )
        report.show(
            title,
            [
                'model',
                'mask',
                'unmasked',
                'time, by hand',
                'time, masked',
                'calls, by hand',
                'calls, masked',
                f'calls at most {LIMIT}',
            ],
            rows,
            'All over the unmasked trace, from empty caches. Time: processor time, median of the '
            'ratios of neighbours (quartiles). Calls: Python calls, an exact figure without noise. '
            'A column "by hand" above 1 is what JAX needs for the stopped values themselves.',
        )
    rows = []
    for model, cases in cases_of.items():
        makes = _makes(cases, jax.value_and_grad)
        calls = {name: calls_in(make) for name, make in makes.items()}
        rows += [
            [
                model,
                name,
                over(calls[case.by_hand], calls[UNMASKED]),
                over(calls[name], calls[UNMASKED]),
            ]
            for name, case in cases.pairs.items()
        ]
    report.show(
        'A later trace of the training step, JAX caches warm: Python calls over the unmasked trace',
        ['model', 'mask', 'by hand', 'masked'],
        rows,
    )
    imported(sizes, report)


UNMASKED = 'unmasked'


def _makes(cases: Cases, wrap: Callable) -> dict[Any, Callable[[], tuple]]:
    """Return makers of the unmasked program, of the masked ones, and of those by hand."""
    fns: dict[Any, Callable] = {UNMASKED: cases.unmasked}
    for name, case in cases.pairs.items():
        fns[name], fns[case.by_hand] = case.masked, case.by_hand
    return {name: _fresh(fn, wrap, cases.params) for name, fn in fns.items()}


def _fresh(fn: Callable, wrap: Callable, params: Any) -> Callable[[], tuple]:
    return lambda: (wrap(lambda params: fn(params)), (params,))


def imported(sizes: Sizes, report: Report) -> None:
    """What the import of flax_sg costs a trace when no block is open."""
    rows = []
    for scan in (False, True):

        def run(flax_sg: bool, scan: bool = scan) -> float:
            command = [
                sys.executable,
                str(HERE / 'trace_alone.py'),
                f'--depth={sizes.depth}',
                f'--repeats={sizes.traces}',
                *['--scan'] * scan,
                *['--flax-sg'] * flax_sg,
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            return statistics.median(json.loads(done.stdout))

        times = take_turns(
            {'without': lambda: run(False), 'with': lambda: run(True)}, sizes.processes
        )
        ratio = ratio_of(times['with'], times['without'])
        rows.append(
            [
                'transformer, nn.scan' if scan else 'transformer, loop',
                f'{1e3 * statistics.median(times["without"]):.0f} ms',
                ratio,
            ]
        )
        report.bar(
            'First trace, flax_sg imported over not, no block open', rows[-1][0], ratio.median
        )
    report.show(
        'First trace of the training step with flax_sg imported and no block open, over a process '
        'without it',
        ['model', 'without', 'imported / not'],
        rows,
        f'{sizes.processes} processes each, in turns.',
    )


class FirstHeld(transformer.Transformer):
    """Holds the attention of the first two layers, in a block that reads nothing else."""

    mask: Any = None

    def encode(self, x: jax.Array) -> jax.Array:
        h = self.encoder.embed(x)
        first, rest = self.encoder.layer_list[:2], self.encoder.layer_list[2:]
        if self.mask is None:
            h = self.run(first, h)
        else:
            with self.mask:
                h = self.run(first, h)
        return self.run(rest, h)

    def run(self, layers: list, h: jax.Array) -> jax.Array:
        for layer in layers:
            h, _ = layer(h)
        return h


def flat(sizes: Sizes, report: Report) -> None:
    """What a block adds when the model grows tenfold and the block reads the same part."""
    masks = {
        "stop_gradient('encoder/layer_0')": stop_gradient('encoder/layer_0'),
        "stop_gradient('**/attention')": stop_gradient('**/attention'),
        "stop_gradient(~path('norm')), read outside": stop_gradient(~flax_sg.path('norm')),
    }
    rows = []
    for name, mask in masks.items():
        for depth in (sizes.depth, 10 * sizes.depth):
            x = transformer.tokens(2, 16)

            def make(mask: Any, depth: int = depth, x: Any = x) -> Callable[[], tuple]:
                model = FirstHeld(transformer.Encoder(depth=depth, width=16, heads=2), mask=mask)
                params = jax.eval_shape(model.init, jax.random.key(0), x)
                return _fresh(
                    lambda params: transformer.loss_of(model.apply(params, x), x),
                    lambda fn: fn,
                    params,
                )

            makes = {'unmasked': make(None), 'masked': make(mask)}
            calls = {name: calls_in(make, flax_sg) for name, make in makes.items()}
            times = time_traces(makes, max(3, sizes.traces - 2))
            added = sorted(b - a for a, b in zip(times['unmasked'], times['masked'], strict=True))
            low, median, high = statistics.quantiles(added, n=4, method='inclusive')
            rows.append(
                [
                    name,
                    depth,
                    f'{1e3 * statistics.median(times["unmasked"]):.0f} ms',
                    f'{1e3 * median:.0f} ms ({1e3 * low:.0f} to {1e3 * high:.0f})',
                    calls['masked'] - calls['unmasked'],
                ]
            )
    report.show(
        'What a block over the first two layers adds to a forward trace',
        ['block', 'layers', 'unmasked', 'added time', 'added calls in flax_sg'],
        rows,
        'Added time is the median of paired differences (quartiles); in the large model it is the '
        'small difference of large numbers. The calls are exact: Python calls of functions of '
        'flax_sg, masked minus unmasked.',
    )


def against(sizes: Sizes, report: Report) -> None:
    """The encoder against dm-haiku with four copies, and against a run of the model per loss."""
    import haiku_encoder

    like = recurrent.Encoding(hidden=sizes.hidden, iterations=sizes.iterations)
    seen = recurrent.observations(sizes.batch)
    cases = encoder_cases(hidden=sizes.hidden, iterations=sizes.iterations, batch=sizes.batch)
    params, haiku_params = cases.params, haiku_encoder.from_linen(cases.params)
    haiku_loss = haiku_encoder.loss_of(like, seen)
    pair = cases.pairs['blocks inside']
    programs = {
        'flax_sg, blocks': (jax.value_and_grad(pair.masked), params),
        'Haiku, partition_n and merge': (jax.value_and_grad(haiku_loss), haiku_params),
        'Linen, copies by hand': (jax.value_and_grad(pair.by_hand), params),
        'Linen, one run per loss': (one_run_per_loss(like, seen), params),
    }
    compiled = {name: (jax.jit(fn).lower(p).compile(), p) for name, (fn, p) in programs.items()}
    check_gradients(
        {name: program(p) for name, (program, p) in compiled.items()}, haiku_encoder.to_linen
    )
    costs = {name: cost_of(program) for name, (program, _) in compiled.items()}
    runs = time_steps(compiled, sizes.runs)
    traces = time_traces(
        {name: lambda fn=fn, p=p: (lambda p: fn(p), (p,)) for name, (fn, p) in programs.items()},
        sizes.traces,
    )
    ours, *others = programs
    rows = []
    for name in others:
        a, b = costs[ours], costs[name]
        speed, trace = ratio_of(runs[name], runs[ours]), ratio_of(traces[ours], traces[name])
        rows.append(
            [
                name,
                over(a.flops, b.flops),
                f'{a.loops}/{b.loops}',
                over(a.temp_bytes, b.temp_bytes),
                speed,
                trace,
            ]
        )
        report.bar('Encoder with blocks, steps/s over', name, speed.median)
        report.bar('Encoder with blocks, temporary bytes over', name, a.temp_bytes / b.temp_bytes)
        report.bar('Encoder with blocks, first trace over', name, trace.median)
    report.show(
        'The recurrent encoder with flax_sg blocks, over other ways to write it',
        ['other way', 'flops', 'loops', 'temporary bytes', 'steps/s', 'first trace'],
        rows,
        'All four give the same gradients (checked before timing).',
    )


def one_run_per_loss(like: recurrent.Encoding, seen: jax.Array) -> Callable[[Any], Any]:
    """Return the step that differentiates each loss by all parameters and keeps its own part."""

    def step(params: Any) -> tuple[jax.Array, Any]:
        first = like.apply(held(params), seen, method='code_message')
        total, parts = 0.0, {}
        for name, part in recurrent.PARTS.items():

            def loss(params: Any, name: str = name) -> jax.Array:
                return recurrent.LOSSES[name](
                    like.apply(params, first, seen, method='sample'), seen
                )

            value, grads = jax.value_and_grad(loss)(params)
            total += value
            parts |= {
                key: leaf
                for key, leaf in grads['params']['element'].items()
                if key.startswith(part.rstrip('*'))
            }
        return total, {'params': {'element': parts}}

    return step


def check_gradients(results: dict[str, tuple], to_linen: Callable) -> None:
    """Make sure that the programs that are compared compute the same."""
    results = {
        name: (value, to_linen(grads) if name.startswith('Haiku') else grads)
        for name, (value, grads) in results.items()
    }
    (_, first), *rest = results.items()
    for name, result in rest:
        same = jax.tree.map(
            lambda a, b: bool(jnp.allclose(a, b, rtol=1e-4, atol=1e-6)), first, result
        )
        if not all(jax.tree.leaves(same)):
            raise RuntimeError(f'{name} gives other values or gradients: {same}')


def reads(sizes: Sizes, report: Report) -> None:
    """What one read costs in microseconds, on concrete values."""
    model = transformer.Layer(heads=2)
    params = model.init(jax.random.key(0), jnp.ones((1, 4, 8)))
    bound = model.bind(params)
    number = 2000

    def micros(transforms: tuple) -> float:
        with _all_of(transforms):
            start = time.thread_time()
            for _ in range(number):
                bound.get_variable('params', 'up')
            return (time.thread_time() - start) / number * 1e6

    up = {'kernel': None, 'bias': None}
    runs = {
        'no block': (),
        'a block that selects by True': (stop_gradient(True),),
        'a block that selects by a glob': (stop_gradient('up'),),
        'a block that selects other variables': (stop_gradient('down'),),
        'three nested blocks': (stop_gradient('up'), stop_gradient('down'), stop_gradient('up')),
    }
    times = take_turns(
        {name: lambda ts=ts: micros(ts) for name, ts in runs.items()}, 2 * sizes.traces
    )
    base = statistics.median(times['no block'])
    report.show(
        f'One read of a mapping of {len(up)} concrete variables',
        ['open', 'microseconds', 'more than without, per variable'],
        [
            [name, f'{statistics.median(t):.1f}', f'{(statistics.median(t) - base) / len(up):.1f}']
            for name, t in times.items()
        ],
        'Under a trace, jax.lax.stop_gradient itself comes on top, as by hand.',
    )


def _all_of(transforms: tuple) -> Any:
    import contextlib

    stack = contextlib.ExitStack()
    for transform in transforms:
        stack.enter_context(transform)
    return stack


SECTIONS = {'step': step, 'trace': tracing, 'flat': flat, 'haiku': against, 'reads': reads}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--quick', action='store_true', help='smaller models, fewer repetitions')
    parser.add_argument('--only', nargs='+', choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument('--save', metavar='FILE', help='save a picture of the ratios')
    args = parser.parse_args()
    sizes, report = QUICK if args.quick else Sizes(), Report()
    load = f', load {os.getloadavg()[0]:.1f}' if hasattr(os, 'getloadavg') else ''
    print(
        f'Python {platform.python_version()}, jax {jax.__version__}, flax {flax.__version__}, '
        f'{os.cpu_count()} CPU cores{load}, {sizes}\n'
    )
    for name in args.only:
        start = time.perf_counter()
        SECTIONS[name](sizes, report)
        print(f'({name}: {time.perf_counter() - start:.0f} s)\n')
    if args.save:
        report.save(args.save)


if __name__ == '__main__':
    main()
