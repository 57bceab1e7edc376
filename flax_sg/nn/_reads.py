"""Reads of `flax.core` scopes under open transforms. It knows Scope, not nn.Module.

Nothing is swapped or written: each read takes the stored value and returns what the transforms
that cover it make of it. A lifted transform is a read too, of all that it hands to its body
(`_lifted_bodies`); what it did and what is left to do in the body stands in the scopes' flags.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Mapping
from typing import Any

import jax
from flax.core import meta

from flax_sg._compat import jax as jax_compat
from flax_sg._compat import linen as linen_compat
from flax_sg._compat.linen import Module, Scope
from flax_sg._errors import UsageError
from flax_sg._filters.mappings import children_of, rebuilt
from flax_sg._filters.variables import Path
from flax_sg._transforms.block import OpenBlock
from flax_sg._transforms.cache_keys import in_body, note_read, own_cache_key, set_context
from flax_sg._transforms.thread_state import state, under
from flax_sg._views.masks import tracing
from flax_sg.nn._blocks import may_create
from flax_sg.nn._scope_flags import FLAG, Place, application_of

__all__ = ['identical', 'Reads', 'effective']


_MISSING = object()


def _inside(place: Place, idle: bool) -> tuple[OpenBlock, ...]:
    """Return the blocks about a place that no lifted transform has seen to.

    A block that a module below a lifted one opens is inside the lifted one, whether that is running
    or not; ``idle=False`` leaves out those that are neither running nor around a block.
    """
    flags, inner, found = place.flags, place.application.inner, state.stack
    if flags.module_blocks:
        found = [
            e
            for block in found
            for e in (*(o for o in block.around if o in flags.module_blocks), block)
        ]
        found += flags.module_blocks * idle
    return tuple(
        dict.fromkeys(
            e for e in found if e not in flags.applied_blocks and e.covers(flags.root_id, inner)
        )
    )


def effective(scope: Scope) -> tuple[OpenBlock, ...]:
    """Return the blocks that apply to reads through the scope, outermost first."""
    if linen_compat.in_scratch_root(scope):
        return ()
    place = Place(scope)
    if state.stack:
        note_read(place.flags.trace)
    return (*place.flags.applied_blocks, *_inside(place, idle=True))


class Reads:
    """Reads of a collection through a scope: what the open blocks make of its variables.

    Attributes:
      idle: nothing is open that concerns them.
    """

    def __init__(self, place: Place, collection: str, *, idle: bool = True):
        """Ask what is open; ``idle=False`` leaves out lifted modules that are not running."""
        self.place, self.collection = place, collection
        self.flags = place.flags
        self.inside: tuple[OpenBlock, ...] = ()
        self.idle = True
        if linen_compat.in_scratch_root(place.scope):
            return
        if state.stack:
            note_read(self.flags.trace)
        self.inside = _inside(place, idle)
        done = collection in self.flags.transformed_collections
        self.applied_blocks = () if done else self.flags.applied_blocks
        self.idle = not self.applied_blocks and not self.inside
        if self.flags.trace is None:  # in a lifted body it was met on the way in
            for block in [e for e in self.inside if e.matches is not None]:
                block.matches.note_model(self.flags.root_id, self.flags.variables)

    def of(self, path: Path, value: Any) -> Any:
        """Return what a read gives of a stored variable, or of the variables below a name."""
        if self.idle:
            if self.collection not in self.flags.transformed_collections and in_body():
                own_cache_key()
            return value
        if isinstance(value, Mapping):
            return rebuilt(
                value,
                {name: self.of((*path, name), child) for name, child in children_of(value).items()},
            )
        return self._of_variable(path, value)

    def settle(self) -> None:
        """Raise UnmatchedPathError for a lifted module that is read from outside its methods."""
        for block in self.flags.module_blocks:
            if (
                not block.settled
                and block in self.inside
                and block not in state.stack
                and not may_create(self.place.scope, block.transform)
            ):
                block.settled = True
                block.matches.check()

    def handed_in(self, path: Path, value: Any) -> tuple[Any, tuple[OpenBlock, ...]]:
        """Return what a lifted transform made of a stored value, and what it left to do."""
        stored, copy = self.flags.copies.get((self.collection, path), (_MISSING, None))
        if stored is not _MISSING and identical(stored, value):  # boxes are made anew
            return copy, self.inside
        if self.collection not in self.flags.transformed_collections and in_body():
            own_cache_key()  # a trace under nn.jit depends on the blocks around it
        return value, (*self.applied_blocks, *self.inside)

    def _of_variable(self, path: Path, value: Any) -> Any:
        value, left = self.handed_in(path, value)
        return self._apply(left, path, value)

    def _apply(self, blocks: tuple[OpenBlock, ...], path: Path, value: Any) -> Any:
        initializing = self.place.scope.get_flag('initializing', False)
        application = self.place.application
        for block in blocks:
            info = block.info(path, self.collection, value)
            if not block.selects(info) or initializing and not block.transform.at_init:
                continue
            other = functools.partial(self._other, block, path)
            read = functools.partial(block.read, application, info, value, other)
            part = initializing and self.flags.split and block in self.flags.applied_blocks
            value = _read_part(read, value) if part else read()
        return value

    def _other(self, block: OpenBlock, path: Path, collection: str) -> Any:
        """Read the variable at the same path in another collection, in the blocks around one.

        Raises KeyError if there is none.
        """
        value = linen_compat.stored(self.place.scope, collection, path)
        if isinstance(value, Mapping):
            return value
        order = (*self.flags.applied_blocks, *self.inside)
        reads = Reads(self.place, collection)
        value, left = reads.handed_in(path, value)
        around = order[: order.index(block)]
        return reads._apply(tuple(e for e in left if e in around), path, value)

    def given(self, path: Path, stored: Any) -> Any:
        """Return what a stored variable was last read as in this application."""
        value, left = self.handed_in(path, stored)
        for block in left:
            was = block.has_read(self.place.application, self.collection, path)
            value = value if was is None else was
        return value


def identical(a: Any, b: Any) -> bool:
    """Say whether the arrays of two variables are the same objects; boxes are made anew."""
    (a, kind_a), (b, kind_b) = jax.tree.flatten(a), jax.tree.flatten(b)
    return kind_a == kind_b and all(map(operator.is_, a, b))


def _read_part(read: Any, value: Any) -> Any:
    """Read a part of a variable that is being created: there is no whole yet for a function."""
    try:
        out = read()
    except Exception:  # of a function that needs the whole, as at each later read
        return value
    shapes = lambda tree: [jax.numpy.shape(leaf) for leaf in jax.tree.leaves(tree)]
    return out if shapes(out) == shapes(value) else value


def _check_open(scope: Scope, collection: str, name: str) -> None:
    """Raise UsageError if the target of some views is read where none of its blocks is open."""
    if tracing.reads_closed and not application_of(scope).reads_closed:
        path = '/'.join((*linen_compat.scope_path(scope), name))
        raise UsageError(
            f'gradient_views: a rule of jax.custom_jvp or jax.custom_vjp reads {collection} '
            f"'/{path}' while the target of views is differentiated, after the target has run. "
            'Read the variable in the target, and give its value to the function as an argument.'
        )


@jax_compat.tap(Scope, 'get_variable')
def _get_variable(original, self, col, name, default=None):
    _check_open(self, col, name)
    if not state.stack and not state.setups and FLAG not in self.flags:
        return original(self, col, name, default)
    value = original(self, col, name, _MISSING)
    place = Place(self)
    path = (*place.path, name)
    for run in state.setups:
        value = run.saw(self, col, path, value, _MISSING)
    if value is _MISSING:
        return default
    if state.storing == (col, path):
        return value
    reads = Reads(place, col)
    value = reads.of(path, value)
    reads.settle()
    return value


@jax_compat.tap(Scope, 'param')
def _param(original, self, /, name, *args, unbox=True, **kwargs):
    created = not self.has_variable('params', name)
    value = original(self, name, *args, unbox=unbox, **kwargs)
    if created:  # Flax returns what it has just stored without reading it
        value = self.get_variable('params', name)
        value = meta.unbox(value) if unbox else value
    return value


@jax_compat.tap(Scope, 'variables')
def _variables(original, self):
    _check_open(self, 'variables of', '')
    variables = original(self)
    if not state.stack and not state.setups and FLAG not in self.flags:
        return variables
    place, out, changed = Place(self), {}, False
    for col, tree in variables.items():
        for run in state.setups:
            tree = run.saw(self, col, place.path, tree, {})
        reads = Reads(place, col)
        out[col] = reads.of(place.path, tree)
        reads.settle()
        changed |= out[col] is not variables[col]
    return type(variables)(out) if changed else variables


# From here on a model that is applied is the module's own affair: traces depend on that.


@jax_compat.tap(Scope, 'temporary')
@contextlib.contextmanager
def _applied(original, self):
    around = state.stack
    try:
        with original(self) as root, under(inside=True):
            if around:
                set_context()
            yield root
    finally:
        if around:
            set_context()


@jax_compat.tap(Module, '_call_wrapped_method')
def _call(original, self, *args):
    running = state.inside or linen_compat.current_module() is not None
    if not state.stack or running or self.scope is None:
        return original(self, *args)
    set_context(inside=True)
    try:
        return original(self, *args)
    finally:
        set_context()


# Both read a variable in order to store it: that read gives what is stored.


@jax_compat.tap(Module, 'sow')
def _sow(original, self, /, col, name, *args, **kwargs):
    with _storing(self.scope, col, name):
        return original(self, col, name, *args, **kwargs)


@linen_compat.tap_value
def _set_value(original, self, value):
    with _storing(self.scope, self.collection, self.name):
        original(self, value)


def _storing(scope: Scope | None, collection: str, name: str) -> contextlib.AbstractContextManager:
    if scope is None or not state.stack and FLAG not in scope.flags:
        return contextlib.nullcontext()
    return under(storing=(collection, (*linen_compat.scope_path(scope), name)))
