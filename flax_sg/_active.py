"""Which blocks are open: one stack a thread, mirrored into the keys of JAX's trace caches.

An `Entry` is one opening of a transform: where it was opened and which variables it covers. It
knows names, not modules; `_scope` asks it about each read.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax

from flax_sg import _compat
from flax_sg._compat import Scope
from flax_sg._info import Path, VariableInfo, walk
from flax_sg._lines import Frame, here
from flax_sg._marks import tracing
from flax_sg._unmatched import unmatched

if TYPE_CHECKING:
    from flax_sg._transform import Transform

__all__ = [
    'AT', 'NAME', 'Application', 'Entry', 'claim_key', 'lifted', 'named', 'opened', 'read_from',
    'relative', 'state',
]


class _SharedKey:
    """A key of JAX's caches that one thread at a time uses, and whose it is; see `_key`."""

    free: list[_SharedKey] = []

    def __init__(self) -> None:
        self.owners: dict[Any, Any] = {}

    @classmethod
    def lend(cls, borrower: Any) -> _SharedKey:
        """Return a key until the borrower is gone: so there are never more keys than threads."""
        try:
            key = cls.free.pop()
        except IndexError:
            key = cls()
        weakref.finalize(borrower, cls.free.append, key).atexit = False
        return key


class _Life:
    """An identity that is gone when what holds it is gone."""


class _State(threading.local):
    """What is open in this thread."""

    def __init__(self) -> None:
        self.stack: tuple[Entry, ...] = ()
        self.blocks: list[tuple[Transform, Any]] = []  # `with` blocks, to be left in order
        self.setups: list[Any] = []  # runs of `setup` in progress, see _setup
        self.lifted: tuple[Any, ...] = ()  # what lifted transforms add to the keys of caches
        self.publishing = False  # Flax writes back what the body of a lifted transform returned
        self.thread = _Life()
        self.shared = _SharedKey.lend(self.thread)


state = _State()


class Application:
    """One application of a model, or one run of the body of a lifted transform.

    Attributes:
      trace: the JAX trace in which it began.
      life: its identity.
      linearizing: it began while the target of views was differentiated, in a rule of the user's.
    """

    __slots__ = ('life', 'linearizing', 'trace')

    def __init__(self) -> None:
        self.trace, self.life = _compat.trace_state(), _Life()
        self.linearizing = tracing.linearizing

    def __eq__(self, other: object) -> bool:  # it is in the flags of scopes, a key of nn.jit
        return isinstance(other, Application)

    def __hash__(self) -> int:
        return hash(Application)


class Entry:
    """One opening of a transform.

    Attributes:
      transform: what is applied.
      opener: the absolute path of the module that opened it; paths are relative to it.
      family: the identity of the root variables it covers, or None to cover every root.
      line: where in the user's code that was.
      attached: it belongs to a lifted module, and is open whenever that module is used.
      key: what the opening means, as a value, for JAX's caches. It holds no array.
      trace: the JAX trace in which it was opened.
      sharing: it may share a key of JAX's caches with other blocks, see `_key`.
      reads: what variables were read as, for each application of a model.
    """

    __slots__ = (
        'attached', 'family', 'kept', 'key', 'line', 'met', 'missing', 'names', 'opener', 'quiet',
        'reads', 'roots', 'sharing', 'trace', 'transform')

    def __init__(self, transform: Transform, opener: Path, family: dict | None, *,
                 attached: bool = False, initializing: bool = False):
        self.transform = transform
        self.opener = opener
        self.family = family
        self.attached = attached
        self.line = here()
        self.key = (transform.key(), opener, family is None)
        self.trace = _compat.trace_state()
        self.sharing = family is not None or not _compat.outside_traces()
        self.kept: dict[int, tuple] = {}  # see _setup
        # A module may create a variable after its block, so blocks inside do not check at init.
        self.quiet = transform.allow_unmatched or (initializing and family is not None)
        self.missing = () if self.quiet else tuple(dict.fromkeys(transform.filter.patterns()))
        self.names: dict[VariableInfo, None] = {}
        self.roots: weakref.WeakSet = weakref.WeakSet()
        self.met = family is not None
        self.reads: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def read(self, application: Application, info: VariableInfo, value: Any, other: Callable
             ) -> Any:
        """Return what a read of a selected variable gives.

        All reads in one application give one value, so that its cotangent is that of their sum. A
        value made in another trace, in a function that JAX traces meanwhile, must stay in there.
        """
        if _compat.trace_state() != application.trace:
            return self._read(info, value, other)
        reads = self.reads.setdefault(application.life, {})
        name = (info.collection, info.absolute_path)
        if name not in reads or reads[name][0] is not value:
            reads[name] = (value, self._read(info, value, other))
        return reads[name][1]

    def _read(self, info: VariableInfo, value: Any, other: Callable) -> Any:
        with named(self.transform, self.line):
            return self.transform.read(info, value, other)

    def covers(self, family: dict) -> bool:
        return self.family is None or self.family is family

    def info(self, path: Path, collection: str, value: Any) -> VariableInfo:
        return VariableInfo.of(relative(path, self.opener), path, collection, value)

    def selects(self, info: VariableInfo) -> bool:
        """Say whether the transform applies, and cross off the patterns it meets."""
        if not self.transform.in_collections(info.collection):
            return False
        if self.missing:
            self.cross_off(info)
        return self.transform.filter.selects(info)

    def cross_off(self, info: VariableInfo) -> None:
        self.names[info] = None
        self.missing = tuple(p for p in self.missing if not p.selects(info))

    def meet(self, root: Scope, variables: dict[str, Any]) -> None:
        """Let a block around whole programs see the variables of a root that it has come to."""
        if self.missing and self.family is None and root not in self.roots:
            self.roots.add(root)
            self.met = True
            self.cross_off_tree(variables)

    def cross_off_tree(self, variables: dict[str, Any]) -> None:
        """Cross off what stored variables meet, read or not; look first where patterns point."""
        starts = [pattern.start(self.opener) for pattern in self.missing]
        for start in dict.fromkeys((*starts, ())):
            for collection in variables:
                if not self.missing:
                    return
                if self.transform.in_collections(collection):
                    self._cross_off_below(start, variables[collection], collection)

    def _cross_off_below(self, start: Path, tree: Any, collection: str) -> None:
        for name in start:
            if not isinstance(tree, Mapping) or name not in tree:
                return
            tree = tree[name]
        for info, value in walk(tree, collection, start):
            self.cross_off(self.info(info.absolute_path, collection, value))
            if not self.missing:
                return

    def check(self) -> None:
        """Raise UnmatchedPathError if a pattern selects nothing."""
        if self.missing and self.family is not None:
            self.cross_off_tree(self.family)
        if self.missing and self.met:
            opener = f"'/{'/'.join(self.opener)}'"
            raise unmatched(self.missing[0], self.names, where=repr(self.transform), of=opener)


# By this name an equation of a jaxpr tells which block made it, and where; see _obstacles.
NAME, AT = 'flax_sg: ', ' @@ '


def named(transform: Transform, line: Frame | None) -> contextlib.AbstractContextManager:
    """Run a read by a transform, opened at a line, so that its equations tell of it."""
    return jax.named_scope(f'{NAME}{transform!r}{AT}{line or ""}')


def relative(path: Path, start: Path) -> Path:
    """Return ``path`` as seen from ``start``, with '..' parts for what lies outside."""
    common = 0
    for a, b in zip(path, start, strict=False):
        if a != b:
            break
        common += 1
    return ('..',) * (len(start) - common) + path[common:]


@contextlib.contextmanager
def opened(entry: Entry) -> Iterator[None]:
    """Run a block inside the entry; an UnmatchedPathError gives way to the block's own error."""
    with _with(stack=(*state.stack, entry)):
        yield
    if not entry.attached:
        entry.check()


def lifted(key: Any) -> contextlib.AbstractContextManager[None]:
    """Run the body of a lifted transform with more in the keys of JAX's caches."""
    return _with(lifted=(*state.lifted, key))


@contextlib.contextmanager
def _with(**changes: Any) -> Iterator[None]:
    before = {name: getattr(state, name) for name in changes}
    vars(state).update(changes)
    try:
        with _compat.cache_keys(_key()):
            yield
    finally:
        vars(state).update(before)
        if state.stack:  # whose key may have been claimed meanwhile, by a block inside it
            _compat.cache_keys(_key()).__enter__()


# JAX traces its own jitted helpers anew for every key, and many of its functions are such helpers.
# So blocks of modules, and those opened in a function that is being traced, share one key, as long
# as no trace under it depends on which block is open. The first stack of blocks that has such a
# trace, made by a read in another trace than that of the block, keeps the key as its own; all
# others have keys of their own from then on.


def _key() -> Any:
    """Return the key of the open blocks: equal only where traces may be shared."""
    keys = tuple(entry.key for entry in state.stack)
    start, end = _sharing()
    if start < end == len(keys) and state.shared.owners.get(keys[:start], keys) == keys:
        keys = (state.shared, *keys[:start])
    return (keys, state.lifted) if keys or state.lifted else ()


def _sharing() -> tuple[int, int]:
    """Return where in the stack the blocks are that may share a key.

    They begin with the first that a module or a function being traced opened, and were all opened
    in its trace. Blocks opened inside a function that JAX traces meanwhile have keys of their own.
    """
    stack = state.stack
    start = end = next((i for i, entry in enumerate(stack) if entry.sharing), len(stack))
    while end < len(stack) and stack[end].trace == stack[start].trace:
        end += 1
    return start, end


def claim_key() -> None:
    """Say that a trace in progress, or about to begin, depends on the open blocks."""
    start, end = _sharing()
    if start < end:
        keys = tuple(entry.key for entry in state.stack[:end])
        state.shared.owners.setdefault(keys[:start], keys)


def read_from(trace: Any) -> None:
    """Say that a variable is read in the current trace.

    Args:
      trace: the trace of the lifted body that the variable's scope was made for, or None.
    """
    now = _compat.trace_state()
    start, end = _sharing()
    if trace != now and start < end and state.stack[start].trace != now:
        claim_key()
