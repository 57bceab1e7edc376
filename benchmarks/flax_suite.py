"""Flax's own tests of Linen and of NNX, with flax_sg imported and inside its blocks.

    python benchmarks/flax_suite.py
    python benchmarks/flax_suite.py --suites nnx               # of NNX alone
    python benchmarks/flax_suite.py --select 'scan or jit'     # some of the tests (pytest -k)
    python benchmarks/flax_suite.py --runs plain nothing       # some of the runs

The tests are those of the source distribution of the flax that runs this script. They run in an
environment of their own with the same versions, in `.venv-flax-suite/`, which git ignores; pip
fills it the first time. They run four times:

- plain: flax_sg is not importable;
- imported: flax_sg and its front end for NNX are imported first;
- nothing, everything: each test stands in `with stop_gradient(nothing)`, or `(everything)`.

A failure that the plain run has not is listed, and makes the exit status 1. Three sorts do not
count, and are listed with a word:

- derivative: in the run inside `everything` gradients are zero on purpose, so that assertions fail
  in tests whose source takes a derivative;
- refused: all blocks refuse hijax Variables and functions of nnx.cached_partial, with an error that
  says so;
- read: a test of `READ` looks at how a value is read that is selected.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
RUNS = ('plain', 'imported', 'nothing', 'everything')
SUITES = {'linen': ('tests/linen', 'tests/core'), 'nnx': ('tests/nnx',)}
REFUSED = re.compile(
    r'flax_sg\._errors\.UsageError: ('
    r'a (hijax Variable of flax\.nnx was met|function of nnx\.cached_partial was called) in a block'
    r'|.*a function of nnx\.custom_vjp was called with)'
)
ASSERTION = re.compile(r'AssertionError\b|assert\b')
# They count the Refs that `nnx.graphlib.flatten` meets: a selected one is read as an array.
READ = re.compile(
    r'tests\.nnx\.mutable_array_test\.TestVariableRefMode'
    r'\.test_mutable_array_split_merge_in_variable(_shared_array)?'
)
NEEDS = (
    'jax',
    'jaxlib',
    'flax',
    'optax',
    'absl-py',
    'cloudpickle',
    'einops',
    'treescope',
    'pytest',
    'pytest-xdist',
)

PLUGIN = '''
"""Runs each test in the block that FLAX_SUITE_RUN names."""
import contextlib
import inspect
import os
import re

import pytest

RUN = os.environ['FLAX_SUITE_RUN']
DERIVATIVE = re.compile(r'grad|vjp|jvp|linearize|custom_')


def block():
    if RUN not in ('nothing', 'everything'):
        return contextlib.nullcontext()
    return flax_sg.stop_gradient(getattr(flax_sg, RUN), allow_unmatched=True)


if RUN != 'plain':
    import flax_sg
    import flax_sg.nnx


def pytest_configure(config):
    if hasattr(globals().get('flax_sg'), 'UnreadBlockWarning'):
        config.addinivalue_line('filterwarnings', 'ignore::flax_sg.UnreadBlockWarning')


def pytest_collection_modifyitems(items):
    for item in items:
        source = inspect.getsource(inspect.unwrap(item.function))
        item.user_properties.append(('derivative', bool(DERIVATIVE.search(source))))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item):
    with block():
        return (yield)
'''


class Result(NamedTuple):
    """How a test ended: passed, failed, error, skipped or missing; whether it differentiates."""

    outcome: str
    message: str = ''
    derivative: bool = False

    @property
    def fails(self) -> bool:
        return self.outcome in ('failed', 'error', 'missing')


def call(*command: object, **options: object) -> int:
    """Run a command that is shown, and return its status."""
    print('+', *(str(word).replace(f'{ROOT}/', '') for word in command), flush=True)
    return subprocess.run([str(word) for word in command], check=False, **options).returncode


def need(status: int) -> None:
    if status:
        sys.exit(f'That command failed with status {status}.')


def make_environment(folder: Path) -> Path:
    """Make an environment with the versions of this interpreter; return its interpreter."""
    python = folder / 'venv' / 'bin' / 'python'
    ready = folder / 'installed'
    if not ready.exists():
        need(call(sys.executable, '-m', 'venv', '--clear', folder / 'venv'))
        versions = folder / 'versions.txt'
        versions.write_text(
            ''.join(
                f'{found.name}=={found.version}\n'
                for found in importlib.metadata.distributions()
                if found.name.lower() != 'flax_sg'
            )
        )
        need(call(python, '-m', 'pip', 'install', '-qq', '--constraint', versions, *NEEDS))
        ready.touch()
    return python


def fetch_tests(python: Path, folder: Path) -> Path:
    """Unpack the tests of the installed flax, without its code; return their folder."""
    version = importlib.metadata.version('flax')
    tests = folder / f'flax-{version}'
    if not tests.exists():
        need(
            call(
                python,
                '-m',
                'pip',
                'download',
                '-qq',
                '--no-deps',
                '--no-binary',
                'flax',
                '--dest',
                folder,
                f'flax=={version}',
            )
        )
        with tarfile.open(folder / f'flax-{version}.tar.gz') as archive:
            wanted = [
                each
                for each in archive.getmembers()
                if each.name.partition('/')[2].startswith(('tests/', 'pyproject.toml'))
            ]
            archive.extractall(folder, members=wanted, filter='data')
    return tests


def run_suite(suite: str, run: str, python: Path, tests: Path, args: argparse.Namespace) -> Path:
    """Run a suite once; return the report that pytest wrote."""
    (tests.parent / 'block_around_tests.py').write_text(PLUGIN)
    report = tests.parent / f'{suite}-{run}.xml'
    report.unlink(missing_ok=True)
    paths = [tests.parent] if run == 'plain' else [tests.parent, ROOT]
    environment = os.environ | {
        'PYTHONPATH': os.pathsep.join(map(str, paths)),
        'FLAX_SUITE_RUN': run,
    }
    command = [
        python,
        '-m',
        'pytest',
        '-p',
        'block_around_tests',
        '-p',
        'no:cacheprovider',
        '-q',
        '--no-header',
        '--tb=short',
        '--show-capture=no',
        '-rN',
        f'--junitxml={report}',
        f'--numprocesses={args.workers}',
        *SUITES[suite],
    ]
    if args.select:
        command += ['-k', args.select]
    # Python puts the working directory first on its path for -m: it holds no package flax.
    try:
        call(
            *command,
            cwd=tests,
            env=environment,
            timeout=args.timeout,
            stdout=None if args.verbose else subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        print(f'{suite} {run}: not done after {args.timeout} s; its tests are missing.')
    return report


def results_in(report: Path) -> dict[str, Result]:
    """Read a report: the result of each test, by its name."""
    if not report.exists():
        return {}
    return dict(map(result_of, ElementTree.parse(report).iter('testcase')))


def result_of(case: ElementTree.Element) -> tuple[str, Result]:
    derivative = any(
        each.get('name') == 'derivative' and each.get('value') == 'True'
        for each in case.iter('property')
    )
    name = f'{case.get("classname")}.{case.get("name")}'
    for tag, outcome in (('error', 'error'), ('failure', 'failed'), ('skipped', 'skipped')):
        found = case.find(tag)
        if found is not None:
            message = (found.get('message') or '').partition('\n')[0]
            return name, Result(outcome, message, derivative)
    return name, Result('passed', '', derivative)


def new_failures(
    results: dict[str, Result], plain: dict[str, Result]
) -> Iterator[tuple[str, Result]]:
    """Yield the tests that fail, or are missing, and do not in the plain run."""
    for name, before in plain.items():
        result = results.get(name, Result('missing', derivative=before.derivative))
        if result.fails and not before.fails:
            yield name, result
    for name in results.keys() - plain.keys():
        yield name, results[name]._replace(message='not a test of the plain run')


def excuse_for(run: str, name: str, result: Result) -> str | None:
    """Return why a new failure does not count."""
    if run in ('nothing', 'everything') and REFUSED.match(result.message):
        return 'refused'
    if run == 'everything' and ASSERTION.match(result.message):
        if result.derivative:
            return 'derivative'
        if READ.fullmatch(name):
            return 'read'
    return None


def report_on(suite: str, every: dict[str, dict[str, Result]], seconds: dict[str, float]) -> int:
    """Print a suite's table and its new failures; return how many count."""
    print(
        f'\n{suite:<12}{"passed":>8}{"failed":>8}{"errors":>8}{"skipped":>8}{"new":>6}'
        f'{"seconds":>9}'
    )
    listed = []
    for run, results in every.items():
        counts = Counter(result.outcome for result in results.values())
        new = [(run, *each) for each in new_failures(results, every['plain'])]
        listed += new
        print(
            f'{run:<12}{counts["passed"]:>8}{counts["failed"]:>8}{counts["error"]:>8}'
            f'{counts["skipped"]:>8}{len(new):>6}{seconds[run]:>9.0f}'
        )
    counted = 0
    for run, name, result in listed:
        excuse = excuse_for(run, name, result)
        counted += excuse is None
        print(f'\n{run}: {excuse or "COUNTS"}: {result.outcome} {name}\n    {result.message[:200]}')
    print(f'\n{len(listed)} failures that the plain run has not; {counted} count.')
    return counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--suites', nargs='+', choices=SUITES, default=tuple(SUITES))
    parser.add_argument('--runs', nargs='+', choices=RUNS, default=RUNS)
    parser.add_argument('--select', help='run the tests that match (pytest -k)')
    parser.add_argument('--workers', type=int, default=2, help='processes at a time')
    parser.add_argument('--timeout', type=float, default=1800, help='seconds for each run')
    parser.add_argument(
        '--quiet', dest='verbose', action='store_false', help="do not show pytest's progress"
    )
    args = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in ('jax', 'flax')}
    python_version = '.'.join(map(str, sys.version_info[:3]))
    folder = ROOT / '.venv-flax-suite' / '-'.join([python_version, *versions.values()])
    folder.mkdir(parents=True, exist_ok=True)
    python = make_environment(folder)
    tests = fetch_tests(python, folder)
    counted = 0
    for suite in args.suites:
        every, seconds = {}, {}
        for run in ['plain', *(run for run in args.runs if run != 'plain')]:
            start = time.monotonic()
            every[run] = results_in(run_suite(suite, run, python, tests, args))
            seconds[run] = time.monotonic() - start
        if not every['plain']:
            print(f'The plain run of {suite} has no result.')
            counted += not args.select  # which may select tests of the other suite alone
            continue
        print(f'\nPython {python_version}, jax {versions["jax"]}, flax {versions["flax"]}')
        counted += report_on(suite, every, seconds)
    sys.exit(1 if counted else 0)


if __name__ == '__main__':
    main()
