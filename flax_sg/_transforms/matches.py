"""What a block has met, and what it says at its end if that is nothing.

A block around whole programs may find JAX's caches warm: then a model is run and nothing is read.
So what equal blocks met before counts too.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import warnings
import weakref
from collections.abc import Hashable, Mapping
from typing import Any

import jax

from flax_sg._errors import UnmatchedPathError, UnreadBlockWarning
from flax_sg._filters.modules import Within
from flax_sg._filters.unmatched import may_select, unmatched, unmatched_collection
from flax_sg._filters.variables import Path, VariableInfo, relative, walk
from flax_sg._jax.lines import Frame
from flax_sg._transforms.change import Change

__all__ = ['Matches']


class Matches:
    """What one block has met.

    Attributes:
      patterns: those that have selected nothing so far.
      models: the structures of the variables of the models that were read in it.
      there: the collections that they have.
    """

    __slots__ = (
        'root_id',
        'key',
        'line',
        'models',
        'seen',
        'opener',
        'patterns',
        'may_be_unmatched',
        'roots_seen',
        'there',
        'transform',
    )

    def __init__(
        self,
        transform: Change,
        opener: Path,
        root_id: dict | None,
        key: Hashable,
        line: Frame | None,
        *,
        may_be_unmatched: bool,
    ):
        self.transform, self.opener, self.root_id, self.key = transform, opener, root_id, key
        self.line, self.may_be_unmatched = line, may_be_unmatched
        self.patterns = (
            () if may_be_unmatched else tuple(dict.fromkeys(transform.filter.patterns()))
        )
        self.seen: dict[VariableInfo, None] = {}
        self.models: set[Any] = set()
        self.there: set[str] = set()
        self.roots_seen: weakref.WeakSet = weakref.WeakSet()

    def note_variable(self, info: VariableInfo) -> None:
        """Cross off the patterns that a variable meets."""
        if self.patterns:
            self.seen[info] = None
            self.patterns = tuple(p for p in self.patterns if not may_select(p, info))

    def note_model(self, life: Any, variables: dict[str, Any]) -> None:
        """Note that a model is read, and what there is in it.

        Nothing of it is kept, as it may hold values of a trace that ends before the block does.
        """
        if self.root_id is not None or self.may_be_unmatched:
            return
        self.there.update(variables)
        if life not in self.roots_seen:
            self.roots_seen.add(life)
            _memory.note(self.key, None)  # another thread may run the traces that come of it
            self.models.add(jax.tree.structure(variables))
            self._note_matches(variables)

    def note_other(self, info: VariableInfo) -> None:
        """Note that a variable is read of a model that is no nested dict of them."""
        self.models.add(None)
        self.there.add(info.collection)
        self.note_variable(info)

    def _note_matches(self, variables: dict[str, Any]) -> None:
        """Cross off what stored variables meet, read or not; look first where patterns point."""
        starts = [pattern.start(self.opener) for pattern in self.patterns]
        for start in dict.fromkeys((*starts, ())):
            for collection in variables:
                if not self.patterns:
                    return
                if self.transform.in_collections(collection):
                    self._note_matches_below(start, variables[collection], collection)

    def _note_matches_below(self, start: Path, tree: Any, collection: str) -> None:
        for name in start:
            if not isinstance(tree, Mapping) or name not in tree:
                return
            tree = tree[name]
        for info, value in walk(tree, collection, start):
            path = info.absolute_path
            self.note_variable(
                VariableInfo.of(relative(path, self.opener), path, collection, value)
            )
            if not self.patterns:
                return

    def check(self) -> None:
        """Raise UnmatchedPathError if a pattern selects nothing, or warn if nothing was read."""
        if self.may_be_unmatched:
            return
        if self.root_id is not None:
            self.there.update(self.root_id)
            self._note_matches(self.root_id)
            error = self._error()
        else:
            error = self._error() if self.models else None
            past, error = _memory.judge(self.key, frozenset(self.models), error)
            if not self.models and past is None:
                self._warn()
        if error is not None:
            raise error

    def failed(self) -> None:
        """Remember a block that an exception has left: what it ran may be in JAX's caches."""
        if not self.may_be_unmatched and self.root_id is None and self.models:
            right = self._error() is None
            _memory.note(self.key, frozenset(self.models) if right else None)

    def _error(self) -> UnmatchedPathError | None:
        where, of = repr(self.transform), f"'/{'/'.join(self.opener)}'"
        for name in self.transform.named_collections():
            if name not in self.there:
                return unmatched_collection(name, sorted(self.there), where=where, of=of)
        self.patterns = tuple(
            p
            for p in self.patterns
            if not isinstance(p, Within) or not p.exists(self.transform.in_collections)
        )
        if self.patterns:
            return unmatched(self.patterns[0], self.seen, where=where, of=of)
        return None

    def _warn(self) -> None:
        message = (
            f'{self.transform!r}: no variable of a Flax model was read in this block, so '
            "that it did nothing. It has no effect on plain functions, on other libraries' models "
            'and on a step that was compiled before; hand a tree of parameters to the transform, '
            'open the block where the model is applied, or pass allow_unmatched=True.'
        )
        line = self.line or Frame('<unknown>', 1, '')
        warnings.warn_explicit(message, UnreadBlockWarning, line.file, line.line, registry=_warned)


_warned: dict = {}


@dataclasses.dataclass(slots=True)
class _Past:
    """What equal blocks met before.

    Attributes:
      right: the structures of the models in each block in which all was met.
      wrong: the message of a block in which something was not.
    """

    right: set[frozenset] = dataclasses.field(default_factory=set)
    wrong: str | None = None


class _Memory:
    """What blocks around whole programs met, for the latest of them."""

    size = 2048

    def __init__(self) -> None:
        self.past: collections.OrderedDict[Hashable, _Past] = collections.OrderedDict()
        self.lock = threading.Lock()

    def judge(
        self, key: Hashable, models: frozenset, error: UnmatchedPathError | None
    ) -> tuple[_Past | None, UnmatchedPathError | None]:
        """Return what is known of equal blocks, and the error of one that met some models."""
        with self.lock:
            past = self.past.get(key)
            if past is not None:
                self.past.move_to_end(key)
            if not models:
                # What it ran was in JAX's caches: the block met what it met when that was traced.
                wrong = past.wrong if past is not None and not past.right else None
                return past, wrong and UnmatchedPathError(wrong)
            past = self._past(key)
            if error is None:
                past.right.add(models)
            elif any(models <= earlier for earlier in past.right):
                error = None  # the others were read before, and are in JAX's caches
            else:
                past.wrong = str(error)
            return past, error

    def note(self, key: Hashable, models: frozenset | None) -> None:
        """Note an equal block, and the models in it if all was met."""
        with self.lock:
            past = self._past(key)
            if models is not None:
                past.right.add(models)

    def _past(self, key: Hashable) -> _Past:
        past = self.past.setdefault(key, _Past())
        self.past.move_to_end(key)
        if len(self.past) > self.size:
            self.past.popitem(last=False)
        return past


_memory = _Memory()
