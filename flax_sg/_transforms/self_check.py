"""A check that what stands in the way of a library's reads is in their way, with the one at hand.

A Flax that reads past the taps would disable every mask without a word. So a tiny module runs once
in a process, before its first block: what is held must have no gradient, and what is not must have
one. It is only traced; nothing is compiled, and no device is touched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import flax
import jax

from flax_sg._errors import UnsupportedVersionError
from flax_sg._jax.jaxprs import moves_out

__all__ = ['check', 'wrong_gradient']


def check(checked: Callable[[], str | None]) -> None:
    """Raise UnsupportedVersionError if a function that runs a tiny module says what is wrong.

    It runs in a thread of its own, in which no module is running and no block is open.
    """
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(checked()))
    thread.start()
    thread.join()
    if found != [None]:
        what = found[0] if found else 'the check failed'
        raise UnsupportedVersionError(
            f'A tiny model was run in a block to see whether masks work here, and {what}. flax '
            f'{flax.__version__} with jax {jax.__version__} reads variables in a way that this '
            'flax_sg does not know, so that nothing it says about gradients would be true. Install '
            'a newer flax_sg, or an older flax.'
        )


def wrong_gradient(loss: Callable[[Any], Any], params: Any) -> str | None:
    """Say which gradient of a loss is wrong: those that have 'held' in their names are to be zero.

    Args:
      loss: a function of parameters.
      params: a tree of them, with shapes and dtypes for arrays.
    """
    try:
        made = jax.make_jaxpr(jax.grad(loss))(params).jaxpr
    except Exception as error:
        return f'it raised {type(error).__name__}: {error}'
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for name, moves in zip(names, moves_out(made, [True] * len(made.invars)), strict=True):
        if moves == ('held' in name):
            state = 'held, and has a gradient' if moves else 'not held, and has no gradient'
            return f'its variable {name} is {state}'
    return None
