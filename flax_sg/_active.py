"""Which blocks are open: one stack a thread, mirrored into the keys of JAX's trace caches.

An `Entry` is one opening of a transform: where it was opened and which variables it covers. It
knows names, not modules; `_scope` asks it about each read.
"""

from __future__ import annotations

import contextlib
import operator
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import jax

from flax_sg import _compat
from flax_sg._answers import Answers, answers_of, note
from flax_sg._bodies import Body, Question, WatchedInfo, relative
from flax_sg._callables import callable_source
from flax_sg._contexts import Context, Contexts, no_blocks
from flax_sg._errors import UsageError
from flax_sg._info import Path, VariableInfo
from flax_sg._lines import Frame, here
from flax_sg._marks import tracing
from flax_sg._met import Met

if TYPE_CHECKING:
    from flax_sg._transform import Transform

__all__ = [
    'AT', 'NAME', 'Application', 'Entry', 'claim', 'close', 'context', 'enter', 'in_body',
    'named', 'opened',
    'opening_of', 'read_from', 'reopened', 'set_context', 'state', 'under',
]


class _State(threading.local):
    """What is open in this thread."""

    def __init__(self) -> None:
        self.around: tuple[Entry, ...] = ()  # of a rule: what was open at the call
        self.openings: list[Opening] = []
        self.left: list[Opening] = []  # with a block around them; their own `with` is still to end
        self.stack: tuple[Entry, ...] = ()  # the entries of both, the outermost first
        self.inside = False  # in a rule: its function was called by a running module
        self.setups: list[Any] = []  # runs of `setup` in progress, see _setup
        self.bodies: tuple[Body, ...] = ()  # of nn.jit, which JAX is tracing
        self.writes = 0  # how many, ever
        self.storing: tuple | None = None  # a variable that is read in order to be stored
        # While Flax stores what the body of a lifted transform returned: says what to store.
        self.publishing: Callable | None = None
        self.copied_in: tuple[weakref.ref[Entry], ...] = ()  # of a lifted module that is cloned
        self.contexts = Contexts()


state = _State()


class _Life:
    """An identity that is gone when what holds it is gone."""


class Application:
    """One application of a model, or one run of the body of a lifted transform.

    Attributes:
      trace: the JAX trace in which it began.
      life: its identity.
      linearizing: it began while the target of views was differentiated, in a rule of the user's.
      inner: a running module applies the model by itself, so that it is that module's own affair.
    """

    __slots__ = ('inner', 'life', 'linearizing', 'trace')

    def __init__(self, *, inner: bool = False) -> None:
        self.trace, self.life = _compat.trace_state(), _Life()
        self.linearizing = tracing.linearizing
        self.inner = inner

    def __eq__(self, other: object) -> bool:  # it is in the flags of scopes, a key of nn.jit
        return isinstance(other, Application) and self.inner == other.inner

    def __hash__(self) -> int:
        return hash((Application, self.inner))


class Entry:
    """One opening of a transform.

    Attributes:
      transform: what is applied.
      opener: the absolute path of the module that opened it; paths are relative to it.
      family: the identity of the root it covers, or None to cover every root that is applied from
        outside all modules.
      line: where in the user's code that was.
      attached: it belongs to the lifted class `owner`, and is open whenever its module is used.
      around: the attached entries of the lifted modules that its opener lies in.
      key: what the opening means, as a value, for JAX's caches. It holds no array.
      trace: the JAX trace in which it was opened.
      staging: the trace to a jaxpr in which that was, which JAX may keep.
      bodies: the bodies of nn.jit in which it was opened.
      said: what a predicate with callables has said.
      reads: what variables were read as, for each application of a model.
      met: what it has met, for patterns that select nothing, until it is closed.
      settled: an attached one's patterns were looked at, as no block of it need ever end.
    """

    __slots__ = (
        '__weakref__', 'answers', 'around', 'attached', 'bodies', 'family', 'kept', 'key', 'line',
        'met', 'opener', 'owner', 'reads', 'said', 'settled', 'staging', 'trace', 'transform')

    def __init__(self, transform: Transform, opener: Path, family: Any = None, *,
                 variables: dict | None = None, around: tuple[Entry, ...] = (),
                 owner: Any = None, initializing: bool = False):
        self.transform = transform
        self.opener = opener
        self.family = family
        self.owner = owner
        self.attached = owner is not None
        self.around = around
        self.line = here()
        self.trace, self.staging = _compat.trace_state(), _compat.staging_trace()
        self.bodies = state.bodies
        self.said: dict[VariableInfo, Hashable] = {}
        self.answers: Answers | None = None
        source = (transform.key(callable_source), opener, family is None,
                  *(entry.key for entry in around))
        if transform.asks():
            self.answers = answers_of(source, self)
            source = (*source, self.answers)
        self.key = source
        self.kept: dict[int, tuple] = {}  # see _setup
        # A module may create a variable after its block, so blocks inside do not check at init.
        quiet = transform.allow_unmatched or (initializing and family is not None)
        self.met: Met | None = Met(
            transform, opener, variables, self.key, self.line, quiet=quiet)
        self.reads: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self.settled = False

    def read(self, application: Application, info: VariableInfo, value: Any, other: Callable
             ) -> Any:
        """Return what a read of a selected variable gives.

        All reads in one application give one value, so that its cotangent is that of their sum. A
        value made in another trace, in a function that JAX traces meanwhile, must stay in there.
        """
        reads = self.reads.setdefault(application.life, {})
        name = (info.collection, info.absolute_path)
        if _compat.trace_state() != application.trace:
            reads.setdefault(name, _ELSEWHERE)
            return self._read(info, value, other)
        depends = (value, *(_or_none(other, col) for col in self.transform.read_from()))
        found = reads.get(name, _ELSEWHERE)
        if len(found[0]) != len(depends) or not all(map(operator.is_, found[0], depends)):
            found = reads[name] = depends, self._read(info, value, other)
        return found[1]

    def _read(self, info: VariableInfo, value: Any, other: Callable) -> Any:
        with named(self.transform, self.line):
            return self.transform.read(self._watched(info), value, other)

    def has_read(self, application: Application, collection: str, path: Path) -> Any:
        """Return what a variable was last read as in this application's trace, or None."""
        return self.reads.get(application.life, {}).get((collection, path), _ELSEWHERE)[1]

    def was_read(self, application: Application, collection: str, path: Path) -> bool:
        """Say whether a variable was read in this application."""
        return (collection, path) in self.reads.get(application.life, {})

    def _watched(self, info: VariableInfo) -> VariableInfo:
        """Return the info, which tells the bodies that are being traced when a name is used."""
        if not state.bodies:
            return info
        inside = tuple(body for body in state.bodies if body not in self.bodies)
        around = tuple(body for body in state.bodies if body in self.bodies)
        return WatchedInfo.of(info, inside, around)

    def covers(self, family: Any, inner: bool) -> bool:
        """Say whether the block is about a root."""
        return not inner if self.family is None else self.family is family

    def info(self, path: Path, collection: str, value: Any) -> VariableInfo:
        return VariableInfo.of(relative(path, self.opener), path, collection, value)

    def selects(self, info: VariableInfo) -> bool:
        """Say whether the transform applies, and cross off the patterns it meets."""
        if not self.transform.in_collections(info.collection):
            return False
        if self.met is not None:
            self.met.variable(info)
        if self.answers is not None or state.bodies:
            answer = self.says(info)
            for body in state.bodies:
                question = Question(self.key, self.transform.says, self.opener, info, answer)
                body.questions[question] = None
        return self.transform.filter.selects(info)

    def says(self, info: VariableInfo) -> Hashable:
        """Return what the transform says of a variable, and note it for JAX's caches."""
        answer = self.transform.says(info)
        if self.answers is not None:
            for said in (self.said, self.answers.said):
                note(said, info, answer, self.transform)
        return answer

    def resume(self) -> bool:
        """Return whether it takes up its answers again: a rule of the user's opens it once more.

        Another block may have given these answers meanwhile, and more: then it has its own.
        """
        if self.answers is None or self in self.answers.users:
            return False
        source = self.key[:-1]
        self.answers = answers_of(source, self)
        self.key = (*source, self.answers)
        return True

    def closed(self) -> None:
        """Forget what was only of use while the block was open."""
        self.kept.clear()
        if self.attached:  # it is opened again by each method
            return
        self.reads.clear()
        self.met = None
        self.release()

    def release(self) -> None:
        """Let other predicates share its answers: it is not open any more."""
        if self.answers is not None:
            self.answers.users.discard(self)


_ELSEWHERE = ((), None)  # for a read in another trace, whose value must stay in there


def _or_none(other: Callable[[str], Any], collection: str) -> Any:
    try:
        return other(collection)
    except KeyError:
        return None


# By this name an equation of a jaxpr tells which block made it, and where; see _obstacles.
NAME, AT = 'flax_sg: ', ' @@ '


def named(transform: Transform, line: Frame | None) -> contextlib.AbstractContextManager:
    """Run a read by a transform, opened at a line, so that its equations tell of it."""
    return jax.named_scope(f'{NAME}{transform!r}{AT}{line or ""}')


_STACK = object()  # stands for the frames of an ExitStack, which enters and leaves from two


class Opening:
    """An entry on the stack of a thread, until it is left.

    Attributes:
      entry: the entry.
      left: it is not on the stack any more.
      by: the transform whose `with` opened it, or None.
      place: the frame of the `with`, or _STACK.
      staging: the trace to a jaxpr in which it was opened; a lifted module's entry is older.
      context: the context in force while it is the innermost one, see _contexts, as far as traces
        that begin in its own trace can tell; and the key of that context.
    """

    __slots__ = ('by', 'context', 'entry', 'left', 'place', 'staging')

    def __init__(self, entry: Entry, by: Transform | None, place: Any):
        self.entry, self.by, self.place, self.left = entry, by, place, False
        self.staging = _compat.staging_trace() if entry.attached else entry.staging
        self.context: tuple[Context | None, Hashable] = (None, None)


def enter(entry: Entry, by: Transform | None = None, frame: FrameType | None = None) -> Opening:
    """Open a block; it has to be left with `close`."""
    opening = Opening(entry, by, frame and _place(frame))
    state.openings.append(opening)
    _restack()
    return opening


def opening_of(transform: Transform, frame: FrameType) -> Opening:
    """Return which opening of a transform a `with` is about to leave: that of its own frame.

    Several may be open at once, as in generators.
    """
    place = _place(frame)
    mine = [o for o in (*state.left, *state.openings) if o.by is transform]
    here = [o for o in mine if o.place is place]
    found = here or [o for o in mine if not o.left]
    if not found:
        raise UsageError(
            f'{transform!r} was left without being open in this thread. Leave a block once, where '
            'it was entered.')
    if found[-1].left:
        state.left.remove(found[-1])
    return found[-1]


def _place(frame: FrameType) -> Any:
    return _STACK if frame.f_code.co_filename == contextlib.__file__ else frame


def close(opening: Opening, *, failed: bool) -> None:
    """Leave a block, and what is still open inside of it.

    Args:
      opening: what `enter` returned.
      failed: an exception leaves the block; there is no other one about the block then.

    Raises:
      UnmatchedPathError: a pattern of the block selected nothing.
      UsageError: a block inside of it was still open, as a generator's that waits in it.
    """
    if opening.left:
        if not failed:
            raise UsageError(
                f'{opening.entry.transform!r} was closed before its end, with a block around it '
                'that was left first. Leave blocks in the reverse order of entry: a generator that '
                'yields inside a block must be finished before the block around it ends.')
        return
    if opening not in state.openings:
        raise UsageError(
            f'{opening.entry.transform!r} was left in another thread than it was opened in. Leave '
            'it where it was entered.')
    start = state.openings.index(opening)
    gone, state.openings[start:] = state.openings[start:], []
    for each in gone:
        each.left = True
    state.left.extend(each for each in gone[1:] if each.by is not None)
    _restack()
    try:
        if failed:
            for each in gone:
                _note_failed(each.entry)
        else:
            _check_closed(gone)
    finally:
        for each in gone:
            each.entry.closed()


def _check_closed(gone: list[Opening]) -> None:
    opening = gone[0]
    if len(gone) > 1:
        raise UsageError(
            f'{opening.entry.transform!r} was left while {gone[-1].entry.transform!r} was still '
            'open inside of it; both are closed now. Leave blocks in the reverse order of entry: '
            'a generator that yields inside a block must be finished before the block around it '
            'ends.')
    if not opening.entry.attached:
        opening.entry.met.check()


def _note_failed(entry: Entry) -> None:
    if not entry.attached:
        entry.met.failed()


@contextlib.contextmanager
def opened(entry: Entry) -> Iterator[None]:
    """Run a block inside the entry; an UnmatchedPathError gives way to the block's own error."""
    opening = enter(entry)
    try:
        yield
    except BaseException:
        close(opening, failed=True)
        raise
    close(opening, failed=False)


@contextlib.contextmanager
def reopened(stack: tuple[Entry, ...], *, inside: bool) -> Iterator[None]:
    """Run a rule in the blocks in which its function was called, and in no others."""
    resumed = [entry for entry in stack if entry.resume()]
    try:
        with under(around=stack, openings=[], inside=inside, setups=[], publishing=None):
            _restack()
            try:
                yield
            finally:
                for opening in state.openings:
                    opening.left = True
    finally:
        for entry in resumed:
            entry.release()
        _restack()


@contextlib.contextmanager
def under(**changes: Any) -> Iterator[None]:
    """Run a part with some of the thread's state changed."""
    before = {name: getattr(state, name) for name in changes}
    vars(state).update(changes)
    try:
        yield
    finally:
        vars(state).update(before)


def _restack() -> None:
    """Set what follows from what is open: the stack, and the key of JAX's caches."""
    state.stack = (*state.around, *(opening.entry for opening in state.openings))
    set_context()


def context() -> Context:
    """Return what JAX's caches know the open blocks by."""
    return _context(_key(state.stack)) if state.stack else no_blocks


def _context(key: tuple) -> Context:
    share = not state.around and len(_first_group()) == len(state.stack) and (
        _at_opening() or state.openings[-1].context[1] == key)
    return state.contexts.of(key, share=share)


def set_context(*more: Any, inside: bool | None = None) -> None:
    """Set the key of JAX's caches to the open blocks, and to what else a trace depends on.

    Args:
      more: what else that is.
      inside: whether a module is running, and a model that is applied its own affair; as it is.
    """
    if not state.stack:
        return _compat.set_cache_key((no_blocks, *more) if more else ())
    key = _key(state.stack, inside)
    now = _context(key)
    if state.openings and _at_opening():
        state.openings[-1].context = (now, key)
    _compat.set_cache_key((now, *more))


def _at_opening() -> bool:
    """Say whether the current trace to a jaxpr is that in which the innermost block was opened."""
    return bool(state.openings) and state.openings[-1].staging == _compat.staging_trace()


def _key(stack: tuple[Entry, ...], inside: bool | None = None) -> tuple:
    if inside is None:
        inside = state.inside or _compat.current_module() is not None
    return (inside, *(entry.key for entry in stack))


def _first_group() -> tuple[Entry, ...]:
    """Return the outermost entries, those that were opened in one trace to a jaxpr."""
    stagings = _stagings()
    end = next((i for i, s in enumerate(stagings) if s != stagings[0]), len(stagings))
    return state.stack[:end]


def _stagings() -> list[Any]:
    """Return the traces to a jaxpr in which the entries of the stack were opened."""
    return [each.staging for each in (*state.around, *state.openings)]


def claim() -> None:
    """Say that traces in progress, other than that of the blocks, depend on the open blocks."""
    if state.around:  # a rule has contexts of its own, and its call has claimed what is around it
        return
    group = _first_group()
    if group:
        in_force, key = state.openings[len(group) - 1].context
        if in_force is not None:  # a lifted module's, opened in another trace, has one of its own
            state.contexts.claim(in_force, key)


def in_body() -> bool:
    """Say whether a body of nn.jit is being traced, inside of the outermost open block."""
    return bool(state.stack) and state.stack[0].bodies != state.bodies


def read_from(trace: Any) -> None:
    """Say that a variable is read in the current trace.

    Args:
      trace: the trace of the lifted body that the variable's scope was made for, or None.
    """
    now = _compat.staging_trace()
    if trace != now and _stagings()[0] != now:
        claim()
