"""What a program costs: exact figures of its compiled step, and times measured side by side.

Times on a busy machine drift. So programs that are compared run in turns, A B B A, and what is
reported is the median of the ratios of neighbours, with the quartiles of these ratios. Tracing is
Python in one thread; its time is that thread's processor time, which does not count the time that
other processes take.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import re
import statistics
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

__all__ = [
    'Cost',
    'Ratio',
    'calls_in',
    'compiled_step',
    'cost_of',
    'count_loops',
    'ratio_of',
    'same_program',
    'table',
    'take_turns',
    'time_traces',
    'trace_seconds',
]


@dataclasses.dataclass(frozen=True)
class Cost:
    """Exact figures of a compiled program."""

    flops: float
    loops: int
    temp_bytes: int
    products: int


def compiled_step(fn: Callable, *args: Any, quick: bool = False) -> Any:
    """Compile the value and the gradient of `fn` with respect to its first argument.

    With `quick`, machine code is not optimised: it compiles in half the time, to the same figures.
    """
    options = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
    lowered = jax.jit(jax.value_and_grad(fn)).lower(*args)
    return lowered.compile(compiler_options=options if quick else None)


def cost_of(compiled: Any) -> Cost:
    """Read the figures of a compiled program."""
    analysis = compiled.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, Sequence) else analysis
    return Cost(
        flops=analysis['flops'],
        loops=count_loops(compiled.as_text()),
        temp_bytes=compiled.memory_analysis().temp_size_in_bytes,
        products=count_products(compiled.as_text()),
    )


def count_loops(text: str) -> int:
    """Count the loops in the text of a compiled program."""
    return len(re.findall(r'\swhile\(', text))


def count_products(text: str) -> int:
    """Count the matrix products in the text of a compiled program."""
    return len(re.findall(r'\sdot\(|custom_call_target="[^"]*(?:matmul|gemm)', text))


def same_program(a: Any, b: Any) -> bool:
    """Say whether two compiled programs are the same text, apart from names and source lines."""
    return _normal(a.as_text()) == _normal(b.as_text())


def _normal(text: str) -> str:
    # The tables of files and stack frames, where a version prints them, end the text.
    text = re.split(r'\n(?:FileNames|FunctionNames|FileLocations|StackFrames)\b', text)[0]
    text = re.sub(r', metadata=\{(?:[^{}"]|"[^"]*")*\}', '', text)
    text = re.sub(r'HloModule [^,]*,', 'HloModule,', text)
    names: dict[str, str] = {}
    return re.sub(r'%[\w.\-]+', lambda m: names.setdefault(m[0], f'%{len(names)}'), text)


def take_turns(runs: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Call each of `runs` once a round, in alternating order; return what they returned."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(repeats):
        for name in names if i % 2 == 0 else reversed(names):
            found[name].append(runs[name]())
    return found


@dataclasses.dataclass(frozen=True)
class Ratio:
    """The median of ratios of neighbours, their quartiles, and the ratio of the least values."""

    median: float
    low: float
    high: float
    least: float

    def __str__(self) -> str:
        return f'{self.median:.2f} ({self.low:.2f}-{self.high:.2f})'


def ratio_of(over: Sequence[float], under: Sequence[float]) -> Ratio:
    """Compare two series of one run, value by value."""
    ratios = sorted(a / b for a, b in zip(over, under, strict=True))
    if len(ratios) == 1:
        return Ratio(*ratios * 4)
    low, median, high = statistics.quantiles(ratios, n=4, method='inclusive')
    return Ratio(median, low, high, min(over) / min(under))


def trace_seconds(
    make: Callable[[], tuple[Callable, tuple]], *, cold: bool = True, frames: int = 0
) -> float:
    """Return the seconds that one trace of `fn(*args)` takes, where `make` returns both.

    Args:
      make: makes a new function object, so that JAX has no trace of it.
      cold: start from empty caches, as the first trace of a process does. Otherwise the traces of
        the functions that `fn` calls (of `jax.numpy`, say) may be there.
      frames: call it below so many frames of Python, see `time_traces`.
    """
    if frames:
        return trace_seconds(make, cold=cold, frames=frames - 1)
    fn, args = make()
    if cold:
        jax.clear_caches()
    gc.collect()
    gc.disable()
    try:
        start = time.thread_time()
        jax.jit(fn).trace(*args)
        return time.thread_time() - start
    finally:
        gc.enable()


def time_traces(
    makes: Mapping[str, Callable], repeats: int, *, cold: bool = True
) -> dict[str, list[float]]:
    """Time traces in turns, after one round that does not count.

    Each round runs below a different number of frames. Python keeps its frames in blocks of memory,
    and a call that crosses from one to the next costs more, so that one program at one depth may
    take a fifth longer, again and again, for no other reason than where its calls fall.
    """
    found: dict[str, list[float]] = {name: [] for name in makes}
    for i in range(-1, repeats):
        for name in list(makes)[:: 1 if i % 2 else -1]:
            seconds = trace_seconds(makes[name], cold=cold, frames=FRAMES * max(i, 0) // repeats)
            found[name] += [seconds] * (i >= 0)
    return found


FRAMES = 120  # more than one block holds


def calls_in(
    make: Callable[[], tuple], package: types.ModuleType | None = None, *, cold: bool = False
) -> int:
    """Count the Python calls of one trace, or those of a package's functions: an exact figure.

    Args:
      make: as for `trace_seconds`.
      package: count the calls of its functions only.
      cold: start from empty caches.
    """
    folder = os.path.dirname(package.__file__) + os.sep if package else ''
    calls = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == 'call' and frame.f_code.co_filename.startswith(folder)

    trace_seconds(make, cold=cold)  # fills what is kept for good, such as compiled patterns
    fn, args = make()
    if cold:
        jax.clear_caches()
    gc.collect()
    gc.disable()
    sys.setprofile(note)
    try:
        jax.jit(fn).trace(*args)
    finally:
        sys.setprofile(None)
        gc.enable()
    return calls


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Lay out a Markdown table under a title."""
    cells = [list(map(str, head)), *(list(map(str, row)) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        '| ' + ' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + ' |'
        for row in cells
    ]
    rule = '|' + '|'.join('-' * (w + 2) for w in widths) + '|'
    return '\n'.join([f'### {title}', '', lines[0], rule, *lines[1:], ''])
