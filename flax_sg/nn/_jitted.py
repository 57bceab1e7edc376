"""Functions under `nn.jit`, of which JAX shares one trace among modules at different paths."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from flax_sg._filters.variables import Path
from flax_sg._transforms.cache_keys import context, set_context
from flax_sg._transforms.jitted_bodies import Body, Question
from flax_sg._transforms.thread_state import state, under

__all__ = ['Jitted']


class Jitted:
    """A function under nn.jit, of which JAX shares a trace among modules at different paths."""

    def run(self, call: Callable[[], Any], paths: tuple[Path, ...]) -> Any:
        """Call it in a context in which JAX finds no trace that is wrong at these paths."""
        around, body = state.bodies, Body(paths)
        asked = context().asked.setdefault(self, {})  # by the number of scopes
        known: Body | None = asked.get(len(paths))
        serves = known is None or known.serves(paths, _ask)
        try:
            set_context(*() if serves else (paths,))
            with under(bodies=(*around, body)):
                return call()
        finally:
            set_context()
            if not serves:
                Body(paths, named=paths).used_in(around, paths)
            elif known is not None:
                known.add(body)
                known.used_in(around, paths)
            elif body.questions or body.named is not None:
                asked[len(paths)] = body


def _ask(question: Question) -> Hashable:
    """Ask the block that is open now, or the one that was open in the body."""
    for block in state.stack:
        if block.key == question.key:
            return block.says(question.info)
    return question.says(question.info)
