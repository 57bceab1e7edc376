"""flax_sg in models of real packages, against masks by hand: bit for bit where XLA allows.

    python benchmarks/real_packages.py
    python benchmarks/real_packages.py --only 'T5' 'jaxopt'      # some of the programs
    python benchmarks/real_packages.py --quick                   # three masks of each program
    python benchmarks/real_packages.py --details                 # every comparison

The packages live in an environment of their own with this interpreter's jax and flax, in
`.venv-packages/`, which git ignores; pip fills it the first time, one package after the other.
Configurations are tiny, weights random, and nothing else is downloaded. Each program runs in its
own process.

For each program: stop_gradient of each of its parts, of their complements and of everything;
scale_gradient of a complement; map_values of everything. In each use: a block in the loss, a block
around the gradient, the class, the tree. The value and the gradient are compared, under jit (and
for some programs without), with a mask by hand on the tree of parameters. The table counts

- same: the same text of the lowered program as by hand;
- bits: another text, equal bits;
- close: at most 1e-5 of the largest value apart, and zero where it is zero by hand;
- WRONG, ERROR: any other result; these are listed, and make the exit status 1.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
USES = ('block', 'around grad', 'class', 'tree', 'block, eager')
RANKS = ('same', 'bits', 'close', 'WRONG', 'ERROR')
PINNED = ('jax', 'jaxlib', 'flax', 'optax')
# What pip installs for each file in packages/. sbx-rl wants torch, which its networks do not use.
REQUIREMENTS = {
    'hugging_face': [['transformers<5']],
    'diffusers_models': [['diffusers<0.37']],
    'brax_networks': [['brax']],
    'netket_models': [['netket']],
    'sbx_networks': [['--no-deps', 'sbx-rl'], ['gymnasium', 'tfp-nightly', 'tqdm']],
    'numpyro_module': [['numpyro']],
    'jaxopt_solvers': [['jaxopt']],
    'diffrax_adjoints': [['diffrax']],
}
PROGRAMS = {
    'Hugging Face T5': 'hugging_face.t5',
    'Hugging Face T5, nn.remat': 'hugging_face.t5_checkpointed',
    'Hugging Face BART': 'hugging_face.bart',
    'Hugging Face Whisper': 'hugging_face.whisper',
    'Hugging Face CLIP': 'hugging_face.clip',
    'Hugging Face ViT': 'hugging_face.vit',
    'Hugging Face Llama': 'hugging_face.llama',
    'Hugging Face GPT-2': 'hugging_face.gpt2',
    'diffusers UNet': 'diffusers_models.unet',
    'diffusers VAE': 'diffusers_models.vae',
    'brax PPO': 'brax_networks.ppo',
    'brax SAC': 'brax_networks.sac',
    'sbx PPO': 'sbx_networks.ppo',
    'sbx SAC': 'sbx_networks.sac',
    'netket RBM with phase': 'netket_models.rbm_with_phase',
    'netket deep set': 'netket_models.deep_set',
    'netket autoregressive': 'netket_models.autoregressive',
    'netket nk.jax.expect': 'netket_models.energy',
    'numpyro flax_module': 'numpyro_module.elbo',
    'jaxopt fixed point': 'jaxopt_solvers.fixed_point',
    'jaxopt Anderson': 'jaxopt_solvers.anderson',
    'jaxopt unrolled': 'jaxopt_solvers.unrolled',
    'jaxopt inner optimisation': 'jaxopt_solvers.inner_optimisation',
    'diffrax RecursiveCheckpointAdjoint': 'diffrax_adjoints.recursive',
    'diffrax DirectAdjoint': 'diffrax_adjoints.direct',
    'diffrax BacksolveAdjoint': 'diffrax_adjoints.backsolve',
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--only', nargs='+', metavar='TEXT', help='programs that contain one')
    parser.add_argument('--details', action='store_true', help='list every comparison')
    parser.add_argument('--quick', action='store_true', help='three masks of each program')
    parser.add_argument('--timeout', type=float, default=1200, help='seconds for each program')
    parser.add_argument('--run', metavar='FILE.FUNCTION', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run_here(args.run, args.quick)
        return
    chosen = {
        name: where
        for name, where in PROGRAMS.items()
        if not args.only or any(text.lower() in name.lower() for text in args.only)
    }
    python, missing = make_environment(
        list(dict.fromkeys(where.partition('.')[0] for where in chosen.values()))
    )
    rows = {}
    for name, where in chosen.items():
        print(name, flush=True)
        reason = missing.get(where.partition('.')[0])
        rows[name] = (
            [['', '', 'import', 'ERROR', f'not installable: {reason}']]
            if reason
            else (run_apart(where, python, args))
        )
        print(f'  {counts(rows[name])}', *differences(rows[name]), sep='\n  ', flush=True)
    sys.exit(1 if report_on(rows, args.details) else 0)


def run_here(where: str, quick: bool) -> None:
    """Compare one program, and print progress and each verdict as lines of JSON."""
    from packages.comparison import compare, masks

    file, _, function = where.partition('.')
    program = getattr(importlib.import_module(f'packages.{file}'), function)()
    chosen = [mask for i, mask in enumerate(masks(program.parts)) if not quick or i in (0, 1, 6)]
    for verdict in compare(program, chosen, lambda line: print(json.dumps(line), flush=True)):
        print(json.dumps(verdict), flush=True)


def run_apart(where: str, python: Path, args: argparse.Namespace) -> list[list[str]]:
    """Compare one program in a process of its own, show progress, return the verdicts."""
    environment = os.environ | {
        'PYTHONPATH': str(ROOT),
        'JAX_PLATFORMS': 'cpu',
        'HF_HUB_OFFLINE': '1',
        'USE_TORCH': '0',
        'TRANSFORMERS_VERBOSITY': 'error',
        'DIFFUSERS_VERBOSITY': 'error',
    }
    command = [python, __file__, '--run', where, *(['--quick'] if args.quick else [])]
    rows = []
    with (
        tempfile.TemporaryFile('w+') as errors,
        subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=errors
        ) as process,
    ):
        timer = threading.Timer(args.timeout, process.kill)
        timer.start()
        for line in process.stdout:
            found = parsed(line)
            if isinstance(found, list):
                rows.append(found)
            elif found:
                print(f'  {found}', flush=True)
        timer.cancel()
        if process.wait():
            errors.seek(0)
            rows.append(
                [
                    '',
                    '',
                    'process',
                    'ERROR',
                    f'status {process.returncode}: {last_error(errors.read())}',
                ]
            )
    return rows


def last_error(text: str) -> str:
    """Find the line that names an exception, in what a process has written before it ended."""
    named = [line for line in text.splitlines() if re.match(r'[\w.]+(Error|Exception)\b', line)]
    return (named or text.strip().splitlines() or ['no message'])[-1][:300]


def parsed(line: str) -> list[str] | str:
    """Read a line of JSON; whatever else a package prints is nothing."""
    try:
        return json.loads(line)
    except ValueError:
        return ''


def make_environment(files: list[str]) -> tuple[Path, dict[str, str]]:
    """Make an environment with what these files need; return its Python, and what failed."""
    version = importlib.metadata.version
    name = '-'.join(['.'.join(map(str, sys.version_info[:3])), version('jax'), version('flax')])
    folder = ROOT / '.venv-packages' / name
    python = folder / 'bin' / 'python'
    pins = folder / 'pins.txt'
    if not pins.exists():
        print(f'Making {folder.relative_to(ROOT)}', flush=True)
        subprocess.run([sys.executable, '-m', 'venv', '--clear', folder], check=True)
        pins.write_text(''.join(f'{each}=={version(each)}\n' for each in PINNED))
        reason = install(python, folder, [list(PINNED)])
        if reason:
            pins.unlink()
            sys.exit(reason)
    missing = {}
    for file in files:
        done = folder / f'{file}.installed'
        reason = '' if done.exists() else install(python, folder, REQUIREMENTS[file])
        if reason:
            missing[file] = reason
        else:
            done.touch()
    return python, missing


def install(python: Path, folder: Path, requirements: list[list[str]]) -> str:
    """Install with pip, beside the pinned jax and flax; return why it failed."""
    for words in requirements:
        print('pip install', *words, flush=True)
        done = subprocess.run(
            [python, '-m', 'pip', 'install', '-qq', '--constraint', folder / 'pins.txt', *words],
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            return done.stderr.strip().replace('\n', ' ')[-300:]
    return ''


def counts(rows: list[list[str]]) -> str:
    """Count the verdicts of one cell of the table."""
    found = Counter(row[3] for row in rows)
    return ', '.join(f'{found[rank]} {rank}' for rank in RANKS if found[rank]) or '-'


def differences(rows: list[list[str]], *, every_one: bool = False) -> list[str]:
    """Say what is wrong, a line for each comparison."""
    return [
        f'{verdict}: {transform}({predicate}), {use}: {detail}'
        for transform, predicate, use, verdict, detail in rows
        if every_one or verdict in ('WRONG', 'ERROR')
    ]


def report_on(every: dict[str, list[list[str]]], details: bool) -> int:
    """Print the table, then each difference; return how many there are."""
    head = ['program', *USES, 'other']
    cells = [head] + [
        [
            name,
            *(counts([row for row in rows if row[2] == use]) for use in USES),
            counts([row for row in rows if row[2] not in USES]),
        ]
        for name, rows in every.items()
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ['| ' + ' | '.join(map(str.ljust, row, widths)) + ' |' for row in cells]
    print(
        '',
        lines[0],
        '|' + '|'.join('-' * (width + 2) for width in widths) + '|',
        *lines[1:],
        sep='\n',
    )
    print()
    for name, rows in every.items():
        for line in differences(rows, every_one=details):
            print(f'{name}: {line}')
    bad = sum(len(differences(rows)) for rows in every.values())
    print(f'\n{sum(map(len, every.values()))} comparisons, {bad} differ.')
    return bad


if __name__ == '__main__':
    main()
