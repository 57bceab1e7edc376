"""The transform object and its five uses: block, class, instance, method and tree.

What one transform does to a value is in its `read`; where reads are met is the other files' part.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core.scope import DenyList, in_filter

from flax_sg._errors import PredicateError, UsageError
from flax_sg._filters.callables import callable_key, describe_callable, value_key
from flax_sg._filters.filters import Filter, Predicate, as_filter, written
from flax_sg._filters.slips import arguments_of, kind_of, swapped, tree_of
from flax_sg._filters.unmatched import check_matched
from flax_sg._filters.variables import VariableInfo, map_tree, walk
from flax_sg._jax.block_names import named
from flax_sg._jax.lines import here
from flax_sg._transforms import front_ends
from flax_sg._transforms.open_blocks import close, enter, opening_of
from flax_sg._transforms.run_inside import caller, check_frame

__all__ = [
    'Mapped',
    'Transform',
    'check_collections',
    'make',
    'make_mapped',
    'map_arrays',
    'map_traced',
]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Transform:
    """A change to the reads of selected variables; see :func:`stop_gradient` for its five uses.

    Transforms are frozen, compare and hash by value, and can be entered again and again, nested in
    themselves and from several threads.
    """

    filter: Filter
    collections: Hashable
    allow_unmatched: bool
    name = 'transform'
    freezes = False  # a write to a selected variable is an error
    changes_values = False  # a read gives something else than what is stored
    uses_names = False  # what it makes of a value depends on the variable's name
    idempotent = False  # a read of what was read is the same
    needs_names = False  # variables without names have nothing that it could read
    at_init = True  # it applies while variables are created

    def read(self, info: VariableInfo, value: Any, other: Callable[[str], Any]) -> Any:
        """Return what a read of a selected variable gives instead of its stored value.

        Args:
          info: the variable's names, shape and dtype.
          value: the stored value: an array, a box, or any pytree.
          other: what the variable of the same path in another collection reads as here; raises
            KeyError if there is none.
        """
        raise NotImplementedError

    def in_collections(self, collection: str) -> bool:
        """Say whether variables of a collection can be selected."""
        return in_filter(self.collections, collection)

    def named_collections(self) -> tuple[str, ...]:
        """Return the collections that have to exist: those named, but for 'params'."""
        names = (self.collections,) if isinstance(self.collections, str) else self.collections
        named = names if isinstance(names, (tuple, frozenset)) else ()
        return tuple(sorted(set(named) - {'params'}))

    def says(self, info: VariableInfo) -> Hashable:
        """Return what the predicate says of a variable."""
        return self.filter.selects(info)

    def asks(self) -> bool:
        """Say whether the predicate has callables, which are known by what they say."""
        return self.filter.asks

    def read_from(self) -> tuple[str, ...]:
        """Return the other collections that `read` asks for."""
        return ()

    def key(
        self,
        of_predicate: Callable[[Callable], Hashable] = callable_key,
        of_function: Callable[[Any], Hashable] = value_key,
    ) -> Hashable:
        """Return what the transform says now, as a value.

        Args:
          of_predicate: makes a value of a callable in the predicate.
          of_function: makes one of what else the user gave.
        """
        return (
            type(self),
            self.filter.key(of_predicate),
            self.collections,
            self.allow_unmatched,
            *self.arguments(of_predicate, of_function),
        )

    def arguments(self, of_predicate: Callable, of_function: Callable) -> tuple[Hashable, ...]:
        """Return what else the transform says, as values."""
        return ()

    def shown_arguments(self) -> tuple[str, ...]:
        """Return what else the transform says, for people."""
        return ()

    def __call__(self, target: Any) -> Any:
        """Transform a Module class or instance, a method, or a tree of parameters."""
        if isinstance(target, Mapping):
            made = front_ends.transformed(self, target)
            return self._map(target) if made is NotImplemented else made
        front_ends.check_once()
        if inspect.ismethod(target):
            return types.MethodType(self(target.__func__), target.__self__)
        if inspect.isfunction(target):
            return front_ends.method(self, target)
        made = front_ends.transformed(self, target)
        if made is not NotImplemented:
            return made
        if callable(target) and hasattr(target, '__wrapped__'):  # as `nnx.jit` makes of one
            return front_ends.method(self, target)
        tree = {
            'state': 'nnx.state(module)',
            'params': f'{type(target).__name__.lower()}.params',
        }.get(tree_of(target))
        way_out = (
            f'For its parameters write {self!r}({tree}).'
            if tree
            else (
                'For a single array use jax.lax.stop_gradient; for model code open a block with '
                '`with`.'
            )
        )
        raise UsageError(
            f'{self!r} was given {kind_of(target)}; expected a {front_ends.modules()} class or '
            f'instance, a method, or a nested dict of parameters. {way_out}'
        )

    def _map(self, tree: Any) -> Any:
        if not self.allow_unmatched:
            infos = (info for info, _ in walk(tree))
            check_matched(self.filter.patterns(), infos, where=repr(self), of='the tree')

        def read(info: VariableInfo, value: Any) -> Any:
            if self.filter.selects(info):
                return self.read(info, value, {}.__getitem__)
            return jax.tree.map(lambda leaf: leaf, value)  # a variable of flax.nnx may be written

        with named(self, here()):
            return map_tree(read, tree)

    def on(self, module: Any) -> OnModule:
        """Return a block at a module of one's choice: names in the predicate are those below it.

        >>> import jax.numpy as jnp
        >>> from flax_sg import nnx
        >>> model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.relu)
        >>> def loss(model, x):
        ...     with nnx.stop_gradient('layers/0/kernel').on(model):
        ...         return model(x).sum()
        >>> bool(nnx.grad(loss)(model, jnp.ones((1, 2)))['layers'][0]['kernel'][...].any())
        False

        Args:
          module: a module of flax.nnx.

        Returns:
          An object for ``with``, which can be entered again and again.

        Raises:
          UnmatchedPathError: at the end of the block, when a pattern selects nothing in the module.
          UsageError: at the ``with``, for what is no such module.

        Source: google/flax issue 1857.
        """
        return OnModule(self, module)

    def __enter__(self) -> None:
        front_ends.check_once()
        frame = caller()
        check_frame(frame, self)
        enter(front_ends.block_of(self, frame), self, frame)

    def __exit__(self, *error: Any) -> None:
        close(opening_of(self, caller()), failed=error[0] is not None)

    def __eq__(self, other: object) -> bool:
        return self.key() == other.key() if isinstance(other, Transform) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.key())

    def __repr__(self) -> str:
        parts = [written(self.filter), *self.shown_arguments()]
        if self.collections != 'params':
            parts.append(f'collections={self.collections!r}')
        if self.allow_unmatched:
            parts.append('allow_unmatched=True')
        return f'{self.name}({", ".join(parts)})'


class OnModule:
    """A transform whose block opens at a module."""

    def __init__(self, transform: Transform, module: Any):
        self.transform, self.module = transform, module

    def __enter__(self) -> None:
        front_ends.check_once()
        frame = caller()
        check_frame(frame, self)
        enter(front_ends.block_at(self.transform, self.module), self, frame)

    def __exit__(self, *error: Any) -> None:
        close(opening_of(self, caller()), failed=error[0] is not None)

    def __repr__(self) -> str:
        return f'{self.transform!r}.on(...)'


def check_collections(collections: Any, name: str) -> Hashable:
    """Return a Flax collection filter in hashable form, or raise PredicateError."""
    if isinstance(collections, (bool, str)):
        return collections
    if isinstance(collections, DenyList):
        return DenyList(check_collections(collections.deny, name))
    if isinstance(collections, (list, tuple, set, frozenset)) and all(
        isinstance(c, str) for c in collections
    ):
        return tuple(sorted(set(collections)))
    raise PredicateError(
        f'{name}: collections={collections!r}; expected a collection name, a list of names, a bool '
        'or a flax.core.DenyList.'
    )


def make(
    kind: type[Transform], predicate: Predicate, collections: Any, allow_unmatched: bool, *more: Any
) -> Transform:
    """Make a transform of what a user wrote, or raise PredicateError."""
    return kind(
        as_filter(predicate, name=kind.name),
        check_collections(collections, kind.name),
        bool(allow_unmatched),
        *more,
    )


def map_arrays(fn: Callable[[Any], Any], value: Any) -> Any:
    """Apply ``fn`` to each floating-point or complex array of a variable; boxes stay."""

    def apply(leaf: Any) -> Any:
        dtype = getattr(leaf, 'dtype', None)
        return fn(leaf) if dtype is not None and jnp.issubdtype(dtype, jnp.inexact) else leaf

    return jax.tree.map(apply, value)


def map_traced(fn: Callable[[Any], Any], value: Any) -> Any:
    """Do so for the arrays that may be differentiated: what is no tracer is a constant already."""

    def of_leaf(leaf: Any) -> Any:
        return jnp.asarray(fn(leaf)) if isinstance(leaf, jax.core.Tracer) else leaf

    return map_arrays(of_leaf, value)  # of a Python number JAX makes no array


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Mapped(Transform):
    """A transform with a function ``fn(info, array) -> array``, which is compared by value."""

    fn: Callable[[VariableInfo, jax.Array], jax.Array]
    uses_names = True

    def arguments(self, of_predicate: Callable, of_function: Callable) -> tuple[Hashable, ...]:
        return (of_function(self.fn),)

    def shown_arguments(self) -> tuple[str, ...]:
        return (describe_callable(self.fn),)


def make_mapped(
    kind: type[Mapped],
    predicate: Predicate,
    collections: Any,
    allow_unmatched: bool,
    fn: Any,
    argument: str,
) -> Transform:
    """Make such a transform of what a user wrote, or raise PredicateError or UsageError."""
    if not callable(fn) or isinstance(fn, type):
        raise UsageError(
            f'{kind.name}: got {kind_of(fn)} for fn; expected a callable '
            f'fn(info, {argument}) that returns an array.{swapped(kind.name, predicate, fn)}'
        )
    made = make(kind, predicate, collections, allow_unmatched, fn)
    names, fits = arguments_of(fn, ('info', argument))
    if not fits:
        raise UsageError(
            f'{kind.name}: got {describe_callable(fn)} for fn, a callable of ({", ".join(names)}); '
            f'expected one of (info, {argument}) that returns an array.'
        )
    return made
