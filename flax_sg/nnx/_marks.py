"""What is known of a Variable that was made of another one: in a block, or of a mirror.

In the body of a function that is traced NNX, or JAX, makes other Variables of those that it is
given. So in a block the metadata with which a Variable is handed on says what the open blocks have
said of it. When the other Variable is put together that is taken out again, and kept beside it.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Hashable
from typing import Any

import jax

from flax_sg._compat import jax as jax_compat
from flax_sg._compat.nnx import TraceState, Variable, set_trace_state, stored, trace_state_of
from flax_sg._filters.variables import Path, VariableInfo
from flax_sg._transforms.block import OpenBlock
from flax_sg._transforms.thread_state import anywhere

__all__ = [
    'MARK',
    'NOTHING',
    'Back',
    'Copied',
    'Mark',
    'Said',
    'Seen',
    'concerns',
    'is_among',
    'is_same',
    'kept',
    'known_of_another',
    'live_of',
    'mirrors',
    'see',
    'seen_of',
]

MARK = 'flax_sg'  # its name in the metadata


class Said:
    """What a block has said of a Variable; equal to what an equal block said of an equal one.

    Attributes:
      block: it; only a mirror's is kept by this.
      means: what the block does to what it selects, as a value.
      path: the Variable's, in the block's module.
      info: the Variable's names, or None if the block does not select it.
    """

    __slots__ = ('_block', 'info', 'key', 'means', 'path')

    def __init__(
        self,
        block: OpenBlock,
        means: Hashable,
        path: Path,
        info: VariableInfo | None,
        *,
        keep: bool,
    ):
        self._block: Any = (lambda: block) if keep else weakref.ref(block)
        self.path, self.info, self.means = path, info, means
        # A function may look at names; that of an equal Variable elsewhere is as good otherwise.
        named = block.transform.uses_names
        self.key = means if info is None else (means, info if named else True)

    @property
    def block(self) -> OpenBlock | None:
        return self._block()

    def by(self, block: OpenBlock) -> Said:
        """Return the same, said by an equal block."""
        return Said(block, self.means, self.path, self.info, keep=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Said) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


class Mark:
    """What goes along with a Variable that is handed on; part of the keys of JAX's caches.

    Attributes:
      said: what the open blocks have said of it, outermost first.
      held: what the mirrors say that it belongs to.
      read: for each of these, whether the value is what it makes of it: a copy that was made there.
      differentiated: what comes back with this mark may be a derivative.
      is_derivative: the Variable is one.
      trace, began: the trace in which it was handed on, as a value and a weak reference.
    """

    __slots__ = ('began', 'differentiated', 'held', 'is_derivative', 'read', 'said', 'trace')

    def __init__(
        self,
        said: tuple[Said, ...],
        held: tuple[Said, ...],
        *,
        read: tuple[bool, ...],
        differentiated: bool = False,
        is_derivative: bool = False,
    ):
        self.said, self.held, self.read, self.differentiated = said, held, read, differentiated
        self.is_derivative = is_derivative
        self.trace, self.began = jax_compat.trace_state(), jax_compat.current_trace()

    def read_by(self, said: tuple[Said, ...]) -> tuple[Said, ...]:
        """Return which of some have made the value, where these and `held` stand for its own."""
        return tuple(
            each for each, read in zip((*said, *self.held), self.read, strict=True) if read
        )

    def _key(self) -> Hashable:
        # JAX caches nothing of what is differentiated, and takes a derivative for an argument.
        return self.said, self.held, self.read, self.is_derivative and not self.differentiated

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mark) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


class Copied:
    """What goes along with a Variable that somebody else takes apart, as by `jax.tree.map`.

    All are equal, so that two trees can be mapped in a block to which their Variables are not.

    Attributes:
      said: what the open blocks have said of it.
      held: nothing, as the value is what mirrors make of it.
      began: the trace in which it was taken apart.
    """

    __slots__ = ('_value', 'began', 'said')
    held = ()

    def __init__(self, said: tuple[Said, ...], value: Any):
        self.said, self.began = said, jax_compat.current_trace()
        try:
            self._value: Any = weakref.ref(value)
        except TypeError:
            self._value = None

    def is_of(self, value: Any) -> bool:
        """Say whether a value is the one that was taken."""
        return self._value is not None and self._value() is value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Copied)

    def __hash__(self) -> int:
        return hash(Copied)


class Back:
    """What goes along with a Variable that a function gives back which NNX traces.

    All are equal. JAX compares what the branches of a condition give, and takes the first: so one
    that compares those of one Variable notes that it was written if any has written it.

    Attributes:
      written: it has another value than the one with which it came in.
      mark: what went along with it into the function, or into all branches.
    """

    __slots__ = ('mark', 'written')

    def __init__(self, written: bool, mark: Mark):
        self.written, self.mark = written, mark

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Back):
            return NotImplemented
        if self.mark is other.mark:
            self.written = other.written = self.written or other.written
        return True

    def __hash__(self) -> int:
        return hash(Back)


NOTHING = object()


class Seen(TraceState):
    """What blocks said of a Variable before; it lies where NNX keeps the Variable's trace.

    Attributes:
      said: what blocks said.
      held: what mirrors say, for good.
      done: a value that is what some of these make of it, or was computed from that.
      by: which.
      computed: it was computed, so that a block about whatever is read is about it too.
      is_derivative: it is a gradient or tangent, which goes by the names of the Variable.
      live: the Variable whose value it has, of a mirror's.
      came: the value with which it came into a function that is traced; and ``mark``, with what.
    """

    __slots__ = (
        *('by', 'came', 'computed', 'done', 'held', 'is_derivative', 'live', 'mark', 'said'),
    )

    def __init__(
        self,
        state: TraceState,
        said: tuple[Said, ...] = (),
        held: tuple[Said, ...] = (),
        done: Any = NOTHING,
        by: tuple[Said, ...] = (),
        live: Variable | None = None,
        computed: bool = False,
        is_derivative: bool = False,
        came: Any = NOTHING,
        mark: Mark | None = None,
    ):
        self._jax_trace = state._jax_trace
        self.came, self.mark = came, mark
        self.said, self.held, self.done, self.live = said, held, kept(done), live
        self.by, self.computed, self.is_derivative = by, computed, is_derivative

    def is_done(self, said: Said, value: Any) -> bool:
        """Say whether a value is already what a block makes of it."""
        if self.is_derivative:
            return is_among(said, (*self.said, *self.held))
        return self.is_of(value) and is_among(said, self.by)

    def is_of(self, value: Any) -> bool:
        """Say whether it is about a value."""
        return is_same(self.done, value)

    def of(self, block: OpenBlock) -> Said | None:
        """Return what a block said."""
        return next((said for said in self.said if said.block is block), None)

    def gives_back(self, value: Any) -> Back | None:
        """Return what goes along with the Variable out of the function, if it came into one."""
        if self.mark is None:
            return None
        return Back(self.came is not value or not isinstance(value, jax.Array), self.mark)

    def __reduce__(self) -> Any:
        return TraceState, ()

    def __deepcopy__(self, memo: dict) -> Seen:
        return self


def kept(value: Any) -> Any:
    """Return what to compare a value with later: a dict may be changed in place meanwhile."""
    if isinstance(value, jax.Array) or value is NOTHING:
        return value
    return jax.tree.map(lambda leaf: leaf, value, is_leaf=lambda leaf: isinstance(leaf, Variable))


def is_same(before: Any, value: Any) -> bool:
    """Say whether a value that was kept is one as it is now."""
    if before is value:
        return True
    if before is NOTHING or isinstance(value, jax.Array):
        return False
    is_leaf = lambda leaf: isinstance(leaf, Variable)
    (a, kind_a), (b, kind_b) = (jax.tree.flatten(x, is_leaf=is_leaf) for x in (before, value))
    return kind_a == kind_b and all(map(operator.is_, a, b))


def is_among(said: Said, others: tuple[Said, ...]) -> bool:
    """Say whether it is one of some; equal ones may be another block's."""
    return any(each is said for each in others)


def see(variable: Variable, *args: Any, **kwargs: Any) -> None:
    """Keep beside a Variable what `Seen` holds."""
    set_trace_state(variable, Seen(trace_state_of(variable), *args, **kwargs))


def seen_of(variable: Variable) -> Seen | None:
    state = trace_state_of(variable)
    return state if type(state) is Seen else None


def known_of_another(variable: Variable, value: Any) -> None:
    """Let what is known of a value be known of the one that has taken its place."""
    seen = seen_of(variable)
    if seen is not None:
        now = kept(stored(variable))
        seen.done = now if seen.is_of(value) else seen.done
        seen.came = now if seen.came is value else seen.came


def live_of(variable: Variable) -> Variable:
    """Return the Variable whose value one has: itself, but for a mirror's."""
    seen = seen_of(variable)
    return live_of(seen.live) if seen is not None and seen.live is not None else variable


class _Mirrors:
    """Attributes: made: there is one, so that Variables have to be asked whether they are of it."""

    def __init__(self) -> None:
        self.made = False


mirrors = _Mirrors()


def concerns(variable: Variable) -> bool:
    """Say whether anything is to be said of a Variable: a block is open, or it is a mirror's."""
    return bool(anywhere.threads) or mirrors.made and type(trace_state_of(variable)) is Seen
