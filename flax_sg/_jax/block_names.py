"""The name by which an equation of a jaxpr tells which block made it, and where."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
from jax.extend.core import JaxprEqn

from flax_sg._compat import jax as jax_compat
from flax_sg._jax.lines import Frame

__all__ = ['AT', 'NAME', 'block_of', 'named']

# By this name an equation of a jaxpr tells which block made it, and where.
NAME, AT = 'flax_sg: ', ' @@ '


def named(transform: Any, line: Frame | None) -> contextlib.AbstractContextManager:
    """Run a read by a transform, opened at a line, so that its equations tell of it."""
    return jax.named_scope(f'{NAME}{transform!r}{AT}{line or ""}')


def block_of(eqn: JaxprEqn) -> tuple[str, str] | None:
    """Return which transform of this library made an equation, and the line of its block."""
    names = [name for name in jax_compat.scope_names(eqn) if name.startswith(NAME)]
    if not names:
        return None
    transform, line = names[-1].removeprefix(NAME).rsplit(AT, 1)
    return transform, line
