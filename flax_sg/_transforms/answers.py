"""What predicates say, by which JAX's caches know those that are callables.

A callable has no value that tells what it will say: it may look at an object that has changed
since, or at a new object that says the same. So a trace depends on a callable by its answers:

    with sg.stop_gradient(lambda v: v.name in self.frozen): step(params)

The first block notes what the callable said of each variable. A later block of the same line asks
it about these variables again. Where it says the same, the block is the same for JAX's caches;
where it does not, `self.frozen` has changed, and what was traced before is not used.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any

from flax_sg._errors import UsageError
from flax_sg._filters.variables import VariableInfo

__all__ = ['Answers', 'answers_of', 'note']


class Answers:
    """What was said of variables; a value for JAX's caches, equal only to itself."""

    __slots__ = ('__weakref__', 'said', 'users')

    def __init__(self) -> None:
        self.said: dict[VariableInfo, Hashable] = {}
        self.users: weakref.WeakSet = weakref.WeakSet()  # blocks that are open

    def _agree(self, says: Callable[[VariableInfo], Hashable]) -> bool:
        try:
            return all(says(info) == answer for info, answer in list(self.said.items()))
        except Exception:  # it may not know of variables that others were asked about
            return False


def note(
    said: dict[VariableInfo, Hashable], info: VariableInfo, answer: Hashable, who: Any
) -> None:
    """Note an answer; one that differs from an earlier one would belong to other traces."""
    if said.setdefault(info, answer) != answer:
        raise UsageError(
            f'{who!r}: its predicate said {said[info]} of {info.name!r} before, and now {answer}, '
            'in one block. A predicate may change between blocks, not inside one.'
        )


_known: dict[Hashable, weakref.WeakSet[Answers]] = {}
_lock = threading.RLock()


def answers_of(source: Hashable, block: Any) -> Answers:
    """Return the answers that a block's transform gives, and note that it is open.

    Args:
      source: what all blocks have in common that may share answers: code and not closures.
      block: its ``transform`` says what it says of a variable in its method ``says``.
    """
    transform = block.transform
    with _lock:
        if source not in _known:
            _prune()
        known = _known.setdefault(source, weakref.WeakSet())
        for answers in list(known):
            # Another predicate, in a block that is still open, may yet say something else.
            alone = all(user.transform == transform for user in list(answers.users))
            if alone and answers._agree(transform.says):
                break
        else:
            answers = Answers()
            known.add(answers)
        answers.users.add(block)
        return answers


def _prune() -> None:
    """Forget the sources of which no answers are left, now and then."""
    global _full
    if len(_known) >= _full:
        for source in [source for source, known in _known.items() if not known]:
            del _known[source]
        _full = max(256, 2 * len(_known))


_full = 256  # when to look next
