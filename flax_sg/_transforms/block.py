"""One opening of a transform: where it was opened, and which variables it covers.

It knows names, not modules; a front end asks it about each read.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Hashable
from typing import Any

from flax_sg._compat import jax as jax_compat
from flax_sg._filters.callables import callable_source
from flax_sg._filters.variables import Path, VariableInfo, relative
from flax_sg._jax.block_names import named
from flax_sg._jax.lines import here
from flax_sg._transforms.answers import Answers, answers_of, note
from flax_sg._transforms.change import Change
from flax_sg._transforms.jitted_bodies import Question, WatchedInfo
from flax_sg._transforms.matches import Matches
from flax_sg._transforms.thread_state import state

__all__ = ['Application', 'OpenBlock']


class _Life:
    """An identity that is gone when what holds it is gone."""


class Application:
    """One application of a model, or one run of the body of a lifted transform.

    Attributes:
      trace: the JAX trace in which it began.
      life: its identity.
      reads_closed: it began while the target of views was differentiated, in a rule of the user's.
      inner: a running module applies the model by itself, so that it is that module's own affair.
    """

    __slots__ = ('inner', 'life', 'reads_closed', 'trace')

    def __init__(self, *, inner: bool = False, reads_closed: bool = False) -> None:
        self.trace, self.life = jax_compat.trace_state(), _Life()
        self.inner, self.reads_closed = inner, reads_closed

    def __eq__(self, other: object) -> bool:  # it is in the flags of scopes, a key of nn.jit
        return isinstance(other, Application) and self.inner == other.inner

    def __hash__(self) -> int:
        return hash((Application, self.inner))


class OpenBlock:
    """One opening of a transform.

    Attributes:
      transform: what is applied.
      opener: the absolute path of the module that opened it; paths are relative to it.
      root_id: the identity of the root it covers, or None to cover every root that is applied from
        outside all modules.
      line: where in the user's code that was.
      of_module: it belongs to the lifted class `owner`, and is open whenever its module is used.
      around: the blocks of the lifted modules that its opener lies in.
      key: what the opening means, as a value, for JAX's caches. It holds no array.
      trace: the JAX trace in which it was opened.
      staging: the trace to a jaxpr in which that was, which JAX may keep.
      bodies: the bodies of nn.jit in which it was opened.
      said: what a predicate with callables has said.
      reads: what variables were read as, for each application of a model.
      matches: what it has met, for patterns that select nothing, until it is closed.
      kept: what the front end that it is about keeps of it.
      settled: the patterns of a module's block were looked at, as it need never end.
    """

    __slots__ = (
        '__weakref__',
        'answers',
        'around',
        'of_module',
        'bodies',
        'root_id',
        'setup_replays',
        'kept',
        'key',
        'line',
        'matches',
        'opener',
        'owner',
        'reads',
        'said',
        'settled',
        'staging',
        'trace',
        'transform',
    )

    def __init__(
        self,
        transform: Change,
        opener: Path,
        root_id: Any = None,
        *,
        variables: dict | None = None,
        around: tuple[OpenBlock, ...] = (),
        owner: Any = None,
        initializing: bool = False,
    ):
        self.transform = transform
        self.opener = opener
        self.root_id = root_id
        self.owner = owner
        self.of_module = owner is not None
        self.around = around
        self.line = here()
        self.trace, self.staging = jax_compat.trace_state(), jax_compat.staging_trace()
        self.bodies = state.bodies
        self.said: dict[VariableInfo, Hashable] = {}
        self.answers: Answers | None = None
        source = (
            transform.key(callable_source),
            opener,
            root_id is None,
            *(block.key for block in around),
        )
        if transform.asks():
            self.answers = answers_of(source, self)
            source = (*source, self.answers)
        self.key = source
        self.setup_replays: dict[int, tuple] = {}  # of attributes of setup
        # A module may create a variable after its block, so blocks inside do not check at init.
        may_be_unmatched = transform.allow_unmatched or (initializing and root_id is not None)
        self.matches: Matches | None = Matches(
            transform, opener, variables, self.key, self.line, may_be_unmatched=may_be_unmatched
        )
        self.reads: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self.settled = False
        self.kept: Any = None

    def read(
        self, application: Application, info: VariableInfo, value: Any, other: Callable
    ) -> Any:
        """Return what a read of a selected variable gives.

        All reads in one application give one value, so that its cotangent is that of their sum. A
        value made in another trace, in a function that JAX traces meanwhile, must stay in there.
        """
        reads = self.reads.setdefault(application.life, {})
        name = (info.collection, info.absolute_path)
        if jax_compat.trace_state() != application.trace:
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

    def covers(self, root_id: Any, inner: bool) -> bool:
        """Say whether the block is about a root."""
        return not inner if self.root_id is None else self.root_id is root_id

    def info(self, path: Path, collection: str, value: Any) -> VariableInfo:
        return VariableInfo.of(relative(path, self.opener), path, collection, value)

    def selects(self, info: VariableInfo) -> bool:
        """Say whether the transform applies, and cross off the patterns it meets."""
        if not self.transform.in_collections(info.collection):
            return False
        if self.matches is not None:
            self.matches.note_variable(info)
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
            self.note_answer(info, answer)
        return answer

    def note_answer(self, info: VariableInfo, answer: Hashable) -> None:
        """Note what the transform said of a variable, for JAX's caches."""
        for said in (self.said, self.answers.said):
            note(said, info, answer, self.transform)

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
        self.setup_replays.clear()
        if self.of_module:  # it is opened again by each method
            return
        self.reads.clear()
        self.kept = None
        self.matches = None
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
