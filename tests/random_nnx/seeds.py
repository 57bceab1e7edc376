"""From a seed to a random program of flax.nnx and how to check it."""

from __future__ import annotations

import random
from typing import Any

from random_nnx.generator import Generator
from random_nnx.syntax import Program


def draw(seed: int) -> tuple[Program, dict[str, Any]]:
    rng = random.Random(seed)
    program = Generator(rng).program()
    return program, {'mode': rng.choice(['traced'] * 18 + ['eager', 'jit'])}
