"""Random programs of flax.nnx with blocks, and what they mean.

As for Linen in `random_programs`: a program is a small syntax tree, `Emitter` writes it as source
with the library's transforms, `Machine` says what it means without flax or the library, and
`check` compares. The tests run some dozens; for many thousands, from the folder `tests`:

    python -m random_nnx --count 1000 --seed 0
"""

from random_nnx.checks import IllConditioned, Refused, check
from random_nnx.seeds import draw
from random_nnx.source import report

__all__ = ['IllConditioned', 'Refused', 'check', 'draw', 'report']
