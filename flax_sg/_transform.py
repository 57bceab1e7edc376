"""The transform object and its five uses: block, class, instance, method and tree.

What one transform does to a value is in its `read`; where reads are met is the other files' part.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from flax.core.scope import DenyList, in_filter

from flax_sg import _linen, _self_check
from flax_sg._active import close, enter, named, opening_of
from flax_sg._callables import callable_key, value_key
from flax_sg._errors import PredicateError, UsageError
from flax_sg._filters import Filter, Predicate, as_filter, written
from flax_sg._info import VariableInfo, map_tree, walk
from flax_sg._inside import caller, check_frame
from flax_sg._lines import here
from flax_sg._scope import open_at
from flax_sg._unmatched import check_matched

__all__ = ['StopGradient', 'Transform', 'check_once', 'make', 'map_arrays', 'map_traced',
           'stop_gradient']


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

    def key(self, of_predicate: Callable[[Callable], Hashable] = callable_key,
            of_function: Callable[[Any], Hashable] = value_key) -> Hashable:
        """Return what the transform says now, as a value.

        Args:
          of_predicate: makes a value of a callable in the predicate.
          of_function: makes one of what else the user gave.
        """
        return (type(self), self.filter.key(of_predicate), self.collections, self.allow_unmatched,
                *self.more(of_predicate, of_function))

    def more(self, of_predicate: Callable, of_function: Callable) -> tuple[Hashable, ...]:
        """Return what else the transform says, as values."""
        return ()

    def shown(self) -> tuple[str, ...]:
        """Return what else the transform says, for people."""
        return ()

    def __call__(self, target: Any) -> Any:
        """Transform a Module class or instance, a method, or a tree of parameters."""
        if isinstance(target, Mapping):
            return self._map(target)
        check_once()
        if inspect.isclass(target) and issubclass(target, linen.Module):
            return _linen.lift_class(self, target)
        if isinstance(target, linen.Module):
            return _linen.lift_instance(self, target)
        if inspect.isfunction(target) or inspect.ismethod(target):
            return _linen.lift_function(self, target)
        way_out = ('For a single array use jax.lax.stop_gradient; for model code open a block with '
                   '`with`.')
        if isinstance(target, nnx.Module):
            way_out = f'For its parameters write {self!r}(nnx.state(module)).'
        elif isinstance(getattr(target, 'params', None), Mapping):
            way_out = f"For its parameters write {self!r}({type(target).__name__.lower()}.params)."
        raise UsageError(
            f'{self!r} was given an object of type {type(target).__name__}; expected a '
            'flax.linen.Module class or instance, a method, or a nested dict of parameters. '
            f'{way_out}')

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

    def __enter__(self) -> None:
        check_once()
        frame = caller()
        check_frame(frame, self)
        enter(_linen.block_entry(self, frame), self, frame)

    def __exit__(self, *error: Any) -> None:
        close(opening_of(self, caller()), failed=error[0] is not None)

    def __eq__(self, other: object) -> bool:
        return self.key() == other.key() if isinstance(other, Transform) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.key())

    def __repr__(self) -> str:
        parts = [written(self.filter), *self.shown()]
        if self.collections != 'params':
            parts.append(f'collections={self.collections!r}')
        if self.allow_unmatched:
            parts.append('allow_unmatched=True')
        return f'{self.name}({", ".join(parts)})'


@functools.cache
def check_once() -> None:
    """Raise UnsupportedVersionError if blocks do not work with the Flax and JAX at hand."""
    _self_check.check(lambda: open_at(stop_gradient('**/held'), None))


def check_collections(collections: Any, name: str) -> Hashable:
    """Return a Flax collection filter in hashable form, or raise PredicateError."""
    if isinstance(collections, (bool, str)):
        return collections
    if isinstance(collections, DenyList):
        return DenyList(check_collections(collections.deny, name))
    if isinstance(collections, (list, tuple, set, frozenset)) and all(
            isinstance(c, str) for c in collections):
        return tuple(sorted(set(collections)))
    raise PredicateError(
        f'{name}: collections={collections!r}; expected a collection name, a list of names, a bool '
        'or a flax.core.DenyList.')


def make(kind: type[Transform], predicate: Predicate, collections: Any, allow_unmatched: bool,
         *more: Any) -> Transform:
    """Make a transform of what a user wrote, or raise PredicateError."""
    return kind(as_filter(predicate, name=kind.name), check_collections(collections, kind.name),
                bool(allow_unmatched), *more)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class StopGradient(Transform):
    """The transform that :func:`stop_gradient` makes."""

    name = 'stop_gradient'

    def read(self, info: VariableInfo, value: Any, other: Callable[[str], Any]) -> Any:
        return map_traced(jax.lax.stop_gradient, value)


def map_arrays(fn: Callable[[Any], Any], value: Any) -> Any:
    """Apply ``fn`` to each floating-point or complex array of a variable; boxes stay."""
    def apply(leaf: Any) -> Any:
        dtype = getattr(leaf, 'dtype', None)
        return fn(leaf) if dtype is not None and jnp.issubdtype(dtype, jnp.inexact) else leaf
    return jax.tree.map(apply, value)


def map_traced(fn: Callable[[Any], Any], value: Any) -> Any:
    """Do so for the arrays that may be differentiated: what is no tracer is a constant already."""
    return map_arrays(lambda leaf: fn(leaf) if isinstance(leaf, jax.core.Tracer) else leaf, value)


def stop_gradient(predicate: Predicate = True, *, collections: Any = 'params',
                  allow_unmatched: bool = False) -> Transform:
    """Make selected variables constants of differentiation: in a block, module, method or tree.

    Use it when a loss must train some parameters and not others. Every read of a selected variable
    inside gives a copy with the variable's value that is not differentiated; activations and inputs
    stay differentiable, forward values do not change, and reads outside stay live. A block covers
    the module that opens it and every module bound under the same root; opened outside all modules,
    it covers every module applied inside it.

    >>> import jax, jax.numpy as jnp
    >>> from flax_sg import nn
    >>> class Net(nn.Module):
    ...     def setup(self):
    ...         self.encoder, self.head = nn.Dense(4), nn.Dense(1)
    ...     def __call__(self, x):
    ...         with nn.stop_gradient('encoder'):
    ...             h = self.encoder(x)
    ...         return self.head(h).sum()
    >>> params = Net().init(jax.random.key(0), jnp.ones((1, 3)))
    >>> grads = jax.grad(Net().apply)(params, jnp.ones((1, 3)))['params']
    >>> bool((grads['encoder']['kernel'] == 0).all()), bool((grads['head']['kernel'] == 0).all())
    (True, False)

    The same object decorates a Module class, an instance (the result mirrors the live one's
    parameters), a method, and a nested dict of parameters:

    >>> Frozen = stop_gradient('Dense_0/kernel')(Net)
    >>> held = stop_gradient('encoder')(params['params'])

    Args:
      predicate: what is stopped: a filter, a glob over '/'-joined paths, a compiled regex, a
        callable of a :class:`flax_sg.VariableInfo`, a bool, or a list or tuple of these (any).
        "Only gln trains here" is ``~flax_sg.path('gln')``.
      collections: a Flax collection filter, the collections in which it selects.
      allow_unmatched: accept a glob, regex or callable that selects nothing.

    Returns:
      A transform, for ``with`` or to be called on a class, an instance, a method or a tree. Trees
      keep their structure, shapes and dtypes.

    Raises:
      PredicateError: the predicate or ``collections`` is none.
      UnmatchedPathError: at the end of a block, when a glob, regex or callable selects no variable.
      UsageError: the transform is called on something else.

    Source: google/flax issue 1857.
    """
    return make(StopGradient, predicate, collections, allow_unmatched)
