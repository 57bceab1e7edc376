"""Blocks at a module of flax.nnx, and what an open block says of a Variable."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax

from flax_sg._compat import nnx as nnx_compat
from flax_sg._compat.nnx import Variable, stored
from flax_sg._errors import UsageError
from flax_sg._filters import of_nnx
from flax_sg._filters.callables import value_key
from flax_sg._filters.modules import Within
from flax_sg._filters.unmatched import check_matched, unmatched_collection
from flax_sg._filters.variables import IdentifiedInfo, Path, VariableInfo
from flax_sg._transforms.block import OpenBlock
from flax_sg._transforms.thread_state import state
from flax_sg.nnx._marks import Said, live_of

__all__ = [
    'ModuleBlock',
    'also_of',
    'answer',
    'asking',
    'blocks_about',
    'info_of',
    'leaves_of',
    'met',
    'paths_below',
    'refuse_hijax',
    'selects_others',
    'thread',
]

OUTSIDE = ('..', '...')  # the path of a Variable that does not lie in the module


def refuse_hijax(variable: Any) -> None:
    """Raise UsageError for a Variable whose reads do not pass by here."""
    if nnx_compat.is_hijax(variable):
        raise UsageError(
            'a hijax Variable of flax.nnx was met in a block, a mirror or a tree. JAX reads it, '
            'and nothing of it can be held. Make the model without nnx.var_defaults(hijax=True).'
        )


def leaves_of(tree: Any) -> list[tuple[Path, Any]]:
    """Return what lies in a pytree, with its path; a Variable is a leaf."""
    found, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda leaf: isinstance(leaf, Variable)
    )
    return [(tuple(map(of_nnx.key_name, keys)), leaf) for keys, leaf in found]


def paths_below(node: Any) -> Iterator[tuple[Path, Variable]]:
    """Yield the Variables below a module, or in a list or dict, each at all of its paths."""
    for path, variable in of_nnx.paths_below(node):
        refuse_hijax(variable)
        yield path, variable


def info_of(path: Path, variable: Variable, is_below: Callable | None = None) -> VariableInfo:
    """Describe a Variable, as which a mirror's counts for the live one."""
    live = live_of(variable)
    within = lambda objects: (is_below or _is_below)(live, objects)
    return IdentifiedInfo.of_variable(path, live, stored(live), within)


def _is_below(variable: Variable, objects: tuple[Any, ...]) -> bool:
    return any(live_of(each) is variable for node in objects for _, each in paths_below(node))


class ModuleBlock(OpenBlock):
    """One opening of a transform at a module of flax.nnx.

    Attributes:
      module: that; the same in the body of a function that is traced may be another object.
    """

    __slots__ = ('module',)

    def __init__(self, transform: Any, module: Any, owner: Any = None):
        self.module = module
        super().__init__(transform, (), module)
        self.owner = owner
        self.key = (*self.key, *((path, id(live_of(v))) for path, v in paths_below(module)))
        self.matches = _Matches(transform, module)


class _Matches:
    """What a block at a module has met: all that is in the module."""

    def __init__(self, transform: Any, module: Any):
        self.transform, self.module = transform, module

    def note_variable(self, info: VariableInfo) -> None:
        pass

    def failed(self) -> None:
        pass

    def check(self) -> None:
        """Raise UnmatchedPathError if a pattern selects nothing in the module."""
        transform = self.transform
        if transform.allow_unmatched:
            return
        where = f'{transform!r}.on({type(self.module).__name__})'
        for name in transform.named_collections():
            if not of_nnx.is_collection(name):
                there = {info_of(*found).collection for found in paths_below(self.module)}
                raise unmatched_collection(name, sorted(there), where=where, of='the module')
        infos = (info_of(path, variable) for path, variable in paths_below(self.module))
        check_matched(
            transform.filter.patterns(),
            (info for info in infos if transform.in_collections(info.collection)),
            where=where,
            of='the module',
        )


class _Met:
    """What an open block knows of Variables.

    Attributes:
      said: its answers, by the Variable's id; it holds the Variable, so that ids last.
      reads: what each was read as, and of which value.
      key: what it does to what it selects, as a value.
      others: whether it selects Variables of a type that it does not know.
      named: whether it has a module, so that Variables have names.
    """

    def __init__(self, block: OpenBlock):
        transform = block.transform
        self.others: dict[type, bool] = {}
        self.said: dict[int, tuple[Variable, Said]] = {}
        self.reads: dict[int, tuple[Variable, Any, Any]] = {}
        self.key: Hashable = (type(transform), *transform.arguments(value_key, value_key))
        self.named = isinstance(block, ModuleBlock)
        self._module = block.module if self.named else None
        self._below: dict[tuple[int, ...], _Below] = {}

    def paths(self, variable: Variable) -> list[Path]:
        """Return the names of a Variable in the block's module."""
        found = self._found(variable, (self._module,)) if self.named else None
        return found or [OUTSIDE]

    def is_below(self, variable: Variable, objects: tuple[Any, ...]) -> bool:
        return self._found(variable, objects) is not None

    def _found(self, variable: Variable, objects: tuple[Any, ...]) -> list[Path] | None:
        key = tuple(map(id, objects))
        if key not in self._below:
            self._below[key] = _Below(objects)
        return self._below[key].paths(variable)


class _Below:
    """The Variables below some modules, by paths; looked for again when modules have changed."""

    def __init__(self, objects: tuple[Any, ...]):
        self._objects = objects
        # By id, with the Variable, so that the id is not used again.
        self._found: dict[int, tuple[Variable, list[Path]]] = {}
        self._look()

    def _look(self) -> None:
        found: dict[int, tuple[Variable, list[Path]]] = {}
        for node in self._objects:
            for path, variable in paths_below(node):
                live = live_of(variable)
                found.setdefault(id(live), (live, []))[1].append(path)
        self._found = found | self._found
        self._holders = [h for node in self._objects for h in of_nnx.holders_below(node)]
        self._held = self._now()

    def _now(self) -> list[tuple[Any, ...]]:
        return [tuple(h.values() if isinstance(h, dict) else h) for h in self._holders]

    def paths(self, variable: Variable) -> list[Path] | None:
        if id(variable) not in self._found and not all(map(_are_same, self._now(), self._held)):
            self._look()
        return self._found.get(id(variable), (None, None))[1]


def _are_same(now: tuple[Any, ...], before: tuple[Any, ...]) -> bool:
    return len(now) == len(before) and all(map(operator.is_, now, before))


def met(block: OpenBlock) -> _Met:
    if block.kept is None:
        with asking(block):
            block.kept = _Met(block)
    return block.kept


class _Thread(threading.local):
    of_linen: tuple[OpenBlock, ...] = ()  # blocks that Linen has seen to, of a model that it runs
    asked: tuple[OpenBlock, ...] = ()  # blocks whose functions and sources are looked at


thread = _Thread()


@contextlib.contextmanager
def asking(block: OpenBlock) -> Iterator[None]:
    """Look at a block's function or source: what is read for it is not read in the block."""
    before, thread.asked = thread.asked, (*thread.asked, block)
    try:
        yield
    finally:
        thread.asked = before


def blocks_about() -> list[OpenBlock]:
    """Return the open blocks that are about Variables, outermost first."""
    return [
        block
        for block in state.stack
        if (
            isinstance(block, ModuleBlock) or block.root_id is None and block not in thread.of_linen
        )
        and block not in thread.asked
    ]


def answer(block: OpenBlock, variable: Variable) -> Said:
    """Return what a block says of a Variable of which it has said nothing yet."""
    known = met(block)
    found = known.said.get(id(variable))
    if found is None:
        with asking(block):
            said = _ask(block, known, live_of(variable))
        found = known.said[id(variable)] = variable, said
    return found[1]


def also_of(block: OpenBlock, pairs: list[tuple[Variable, Variable]]) -> None:
    """Let a block say of some Variables what it says of others, of which they are copies."""
    known = met(block)
    for variable, copy in pairs:
        known.said[id(copy)] = copy, answer(block, variable)


def _ask(block: OpenBlock, known: _Met, variable: Variable) -> Said:
    transform = block.transform
    paths = known.paths(variable)
    first, *others = (info_of(path, variable, known.is_below) for path in paths)
    say = functools.partial(Said, block, known.key, paths[0], keep=block.of_module)
    if not transform.in_collections(first.collection):
        return say(None)
    info = dataclasses.replace(first, others=tuple(others))
    if not known.named:
        _check_named(block, variable)
        if block.matches is not None:
            block.matches.note_other(info)
    selected = transform.filter.selects_any(info.names)
    if block.answers is not None:
        for name in (first, *others):
            known_as = name.plain
            if name.path == OUTSIDE:  # which is not one Variable's name
                known_as = dataclasses.replace(known_as, path=(*OUTSIDE, str(id(variable))))
            block.note_answer(known_as, transform.says(name))
    return say(info if selected else None)


def selects_others(block: OpenBlock, variable: Variable) -> bool:
    """Say whether a block selects a Variable like one, of which it knows nothing."""
    known, kind = met(block), type(variable)
    if kind not in known.others:
        info = info_of(OUTSIDE, variable, lambda variable, objects: False)
        known.others[kind] = block.transform.in_collections(
            info.collection
        ) and block.transform.filter.selects(info)
    return known.others[kind]


def _check_named(block: OpenBlock, variable: Variable) -> None:
    transform = block.transform
    named = any(not isinstance(pattern, Within) for pattern in transform.filter.patterns())
    if named or transform.needs_names:
        raise UsageError(
            f'{transform!r} asks for names, and a {type(variable).__name__} of flax.nnx was read '
            'in its block: a Variable has no name of its own. Say of which module the names are: '
            f'with {transform!r}.on(module)'
            + (', or select by module: stop_gradient(model.encoder).' if named else '.')
        )
