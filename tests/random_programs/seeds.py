"""From a seed to a random program and how to check it."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from random_programs.generator import Generator
from random_programs.syntax import Program

# A program is drawn from a seed, and a failing one is shrunk by its syntax, not by its seed.
deterministic = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
seeds = st.integers(0, 2**32 - 1)


def draw(seed: int) -> tuple[Program, dict[str, Any]]:
    """Return the program of a seed, and how to check it."""
    rng = random.Random(seed)
    program = Generator(rng).program()
    modes = ['traced']
    modes += ['eager'] * (rng.random() < 0.05) + ['jit'] * (rng.random() < 0.03)
    return program, {'modes': tuple(modes), 'second': rng.random() < 0.06}


def draw_views(seed: int) -> tuple[Program, dict[str, Any]]:
    """Return the program of a seed, and the views of it to check."""
    generator = Generator(random.Random(seed))
    program = generator.program()
    collections = generator.rng.choice(['params', 'params', 'params', True])
    names = 'uvw'[: generator.rng.randint(1, 3)]
    filters = {name: generator.selection(program.root, collections) for name in names}
    return program, {'filters': filters, 'second': generator.chance(0.1)}
