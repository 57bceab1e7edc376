"""Random Flax programs with blocks, and what they mean.

A program is a small syntax tree. `Emitter` writes it as Flax source with the library's blocks (or
without them); `Machine` says what it means, as a pure function of two copies of the parameters: it
uses neither flax nor the library, keeps its own stack of open blocks, and has its own idea of what
a filter selects. `check` compares the two. The tests run some hundreds; for many thousands, from
the folder `tests`:

    python -m random_programs --count 5000 --seed 0
"""

from random_programs.checks import IllConditioned, check
from random_programs.evaluation import evaluate, traced
from random_programs.generator import Generator
from random_programs.machine import Machine, flatten, meaning, unflatten
from random_programs.operations import OPS, build
from random_programs.seeds import deterministic, draw, draw_views, seeds
from random_programs.shrinking import same_failure, shrink
from random_programs.source import Emitter, report
from random_programs.views import check_views

__all__ = [
    'OPS',
    'Emitter',
    'Generator',
    'IllConditioned',
    'Machine',
    'build',
    'check',
    'check_views',
    'deterministic',
    'draw',
    'draw_views',
    'evaluate',
    'flatten',
    'meaning',
    'report',
    'same_failure',
    'seeds',
    'shrink',
    'traced',
    'unflatten',
]
