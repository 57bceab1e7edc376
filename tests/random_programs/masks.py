"""Transforms of random programs: their source, and by hand what they make of a value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax

from random_programs.filters import Bool, Combine, Glob, Lambda, Path, Regex

# Each transform: its name in the library (and which value map, two of which do not commute), its
# arguments, and by hand what it makes of a value at a path. What stops takes the second copy
# instead.
KINDS: dict[str, tuple[str, Callable | None]] = {
    'stop_gradient': ('', None),
    'constant': ('', None),
    'scale_gradient': (', -0.5', lambda v, path: _rescaled(v, -0.5)),
    'map_gradient': (', double', lambda v, path: _rescaled(v, 2.0)),
    'map_values, bend': (', bend', lambda v, path: bend(None, v)),
    'map_values, shift': (', shift', lambda v, path: shift(None, v)),
    'map_values, named': (', named', lambda v, path: _scaled_by(v, len(path))),
}
# One that looks at a variable as a whole, for blocks around a program: inside, a scan has taken it
# apart.
WHOLE = {'map_values, centre': (', centre', lambda v, path: centre(None, v))}
ALL_KINDS = {**KINDS, **WHOLE}


def _rescaled(v: jax.Array, factor: float) -> jax.Array:
    return v + (factor - 1) * (v - lax.stop_gradient(v))


def bend(info: Any, v: jax.Array) -> jax.Array:
    return lax.add(lax.mul(v, np.full(v.shape, 1.5, np.float32)), lax.sin(v))


def shift(info: Any, v: jax.Array) -> jax.Array:
    return lax.sub(v, np.full(v.shape, 0.25, np.float32))


def named(info: Any, v: jax.Array) -> jax.Array:
    """Depends on where the variable is, which equal layers under nn.jit do not share."""
    return _scaled_by(v, len(info.absolute_path))


def _scaled_by(v: jax.Array, depth: int) -> jax.Array:
    return lax.mul(v, np.full(v.shape, 1 + 0.25 * depth, np.float32))


def centre(info: Any, v: jax.Array) -> jax.Array:
    mean = lax.mul(lax.reduce_sum(v, tuple(range(v.ndim))), np.float32(0.5 / v.size))
    return lax.sub(v, lax.broadcast_in_dim(mean, v.shape, ()))


@dataclasses.dataclass(frozen=True)
class Mask:
    """A transform: a filter and the collections that it looks at."""

    filter: Any
    collections: str = 'params'
    kind: str = 'stop_gradient'

    def source(self) -> str:
        more = '' if self.collections == 'params' else f', collections={self.collections!r}'
        arguments = ALL_KINDS[self.kind][0]
        name = self.kind.partition(',')[0]
        return f'sg.{name}({self.predicate()}{arguments}{more}, allow_unmatched=True)'

    def predicate(self) -> str:
        """Write the filter; one that stands alone as a plain Python value."""
        f = self.filter
        if isinstance(f, Glob):
            return repr(f.pattern)
        if isinstance(f, Regex):
            return f're.compile({f.pattern!r})'
        if isinstance(f, Bool):
            return repr(f.value)
        if isinstance(f, Lambda):
            return f'lambda c: {f.body}'
        if isinstance(f, Combine) and f.symbol == '|':
            return f'[{", ".join(p.source() for p in f.parts)}]'
        return f.source()

    def selects(self, opener: Path, absolute: Path, collection: str) -> bool:
        if self.collections not in (True, collection):
            return False
        path = absolute
        for i, name in enumerate(opener):
            if absolute[i : i + 1] != (name,):
                path = ('..',) * (len(opener) - i) + absolute[i:]
                break
        else:
            path = absolute[len(opener) :]
        return self.filter.selects(path, absolute)
