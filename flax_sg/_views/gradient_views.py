"""gradient_views: one forward pass, and one output for each of several losses.

The target runs once, in a block whose transform marks what each entry differentiates;
`shared_primal` does the rest. A front end says how a module is run for that.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax

from flax_sg._errors import UsageError
from flax_sg._filters.filters import Filter, Predicate, as_filter, everything, written
from flax_sg._filters.slips import kind_of
from flax_sg._filters.variables import VariableInfo
from flax_sg._transforms import front_ends
from flax_sg._transforms.transform import Transform, check_collections, map_traced
from flax_sg._views.masks import nesting, view_mask
from flax_sg._views.shared_primal import in_views

__all__ = ['GradientViews', 'gradient_views']


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Marked(Transform):
    """Marks what each entry of some views differentiates, while their target is traced."""

    views: GradientViews
    nesting: int
    name = 'gradient_views'
    uses_names = True

    def read(self, info: VariableInfo, value: Any, other: Callable[[str], Any]) -> Any:
        views = self.says(info)
        if not any(views):
            return map_traced(jax.lax.stop_gradient, value)
        return map_traced(lambda leaf: view_mask(leaf, views, self.nesting), value)

    def says(self, info: VariableInfo) -> Hashable:
        return tuple(filter.selects_any(info.names) for _, filter in self.views.entries)

    def asks(self) -> bool:
        return any(filter.asks for _, filter in self.views.entries)

    def arguments(self, of_predicate: Callable, of_function: Callable) -> tuple[Hashable, ...]:
        return (self.nesting, *(filter.key(of_predicate) for _, filter in self.views.entries))

    def __repr__(self) -> str:
        return repr(self.views)


@dataclasses.dataclass(frozen=True, repr=False)
class GradientViews:
    """What :func:`gradient_views` makes: call it on a target."""

    entries: tuple[tuple[str, Filter], ...]
    collections: Hashable
    allow_unmatched: bool

    def __call__(self, target: Any) -> Any:
        """Return the target with a dict of outputs, one for each entry, in place of its output."""
        front_ends.check_once()
        made = front_ends.viewed(self, target)
        if made is not NotImplemented:
            return made
        if callable(target) and not inspect.isclass(target):
            return self.of_function(target)
        raise UsageError(
            f'{self!r} was given {kind_of(target)}; expected a {front_ends.modules()} class or '
            'instance, a method, or a function that takes a module or a nested dict of parameters '
            'first.'
        )

    def of_function(self, fn: Callable) -> Callable:
        """Return a function of a module, or of a tree of parameters, with views for its output."""

        @functools.wraps(fn)
        def viewed(*args: Any, **kwargs: Any) -> dict[str, Any]:
            made = front_ends.viewed_call(self, fn, args, kwargs)
            if made is not NotImplemented:
                return made
            if args and isinstance(args[0], Mapping):
                return self._of_tree(fn, *args, **kwargs)
            got = kind_of(args[0]) if args else 'no argument'
            raise UsageError(self.wrong_argument(fn, got))

        return viewed

    def wrong_argument(self, fn: Callable, got: str) -> str:
        """Return what to say of a function whose first argument is of no use."""
        return (
            f'{self!r} is around {getattr(fn, "__name__", fn)!r}, whose first argument should '
            f'be a bound {front_ends.modules()} or a nested dict of parameters; got {got}.'
        )

    def marked(self) -> Marked:
        """Return the transform in whose block the target is to run."""
        # It selects everything, as what is no entry's is held; each pattern has to select.
        selected = functools.reduce(operator.or_, (f for _, f in self.entries), everything)
        return Marked(selected, self.collections, self.allow_unmatched, self, nesting())

    def in_views(self, call: Callable[[], tuple[Any, Any]]) -> tuple[dict[str, Any], Any]:
        """Run a function of no argument in views; it returns the output and what it has written."""
        outs, written = in_views(call, tuple(name for name, _ in self.entries))
        return self.named(outs), written

    def named(self, outs: list[Any]) -> dict[str, Any]:
        """Return the outputs of all entries by name."""
        return {name: out for (name, _), out in zip(self.entries, outs, strict=True)}

    def _of_tree(self, fn: Callable, params: Any, /, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.in_views(lambda: (fn(self.marked()(params), *args, **kwargs), None))[0]

    def __repr__(self) -> str:
        entries = ', '.join(f'{name!r}: {written(filter)}' for name, filter in self.entries)
        return f'gradient_views({{{entries}}})'


def gradient_views(
    predicates: Mapping[str, Predicate],
    *,
    collections: Any = 'params',
    allow_unmatched: bool = False,
) -> GradientViews:
    """Run a part of a model once, and get one output for each of several losses.

    Use it when several losses look at the same expensive computation and each may train its own
    parameters. All entries have the same value. The gradient of an entry reaches the parameters
    that its predicate selects, and whatever else the target depends on: its arguments and what it
    closes over. Entry k is ``with stop_gradient(~predicate_k): target(...)``, at every order of
    derivative and in both modes; but the target runs once, its residuals are stored once, and each
    entry adds one pullback. State is updated, random numbers are drawn and values are sown once.

    >>> import jax, jax.numpy as jnp
    >>> from flax_sg import gradient_views, nn
    >>> views = gradient_views({'encoder': 'encoder', 'head': 'head'})
    >>> class Net(nn.Module):
    ...     def setup(self):
    ...         self.encoder, self.head = nn.Dense(4), nn.Dense(1)
    ...     def run(self, x):
    ...         return self.head(self.encoder(x))
    ...     def __call__(self, x):
    ...         out = views(self.run)(x)
    ...         return (out['encoder'] ** 2).sum() + abs(out['head']).sum()
    >>> model, x = Net(), jnp.ones((1, 3))
    >>> params = model.init(jax.random.key(0), x)
    >>> grads = jax.grad(model.apply)(params, x)

    A target is a bound module or a method of one; a function that takes a bound module first; a
    method, to decorate; a Module class, whose ``__call__`` then returns the entries; or a function
    of a nested dict of parameters:

    >>> out = gradient_views({'a': 'a', 'b': 'b'})(lambda p: p['a'] * p['b'])
    >>> jax.grad(lambda p: out(p)['a'] ** 2 + out(p)['b'])({'a': 2.0, 'b': 3.0})
    {'a': Array(36., dtype=float32, weak_type=True), 'b': Array(2., dtype=float32, weak_type=True)}

    Args:
      predicates: what each entry differentiates, by the entry's name; see
        :func:`flax_sg.stop_gradient` for predicates. Paths are relative to the target's module.
        Predicates may overlap. A parameter that none selects gets no gradient.
      collections: a Flax collection filter, the collections in which they select. Variables of
        other collections are differentiated in every entry.
      allow_unmatched: accept a glob, regex or callable that selects nothing.

    Returns:
      A callable of a target. The target's result becomes a dict with an output for each name. The
      target is traced, as by `jax.jit`. What it writes, sown values too, belongs to no entry, and
      is a constant as far as the selected collections go: return what a loss needs.

    Raises:
      PredicateError: a predicate or ``collections`` is none.
      UnmatchedPathError: when a glob, regex or callable selects no variable of the target.
      UsageError: there are no predicates; it is called on something else; or the target takes a
        derivative of its own with respect to a variable that it reads inside of it.

    Source: google/flax issue 1857, jax issue 3666.
    """
    if not isinstance(predicates, Mapping) or not predicates:
        got = 'an empty one' if isinstance(predicates, Mapping) else type(predicates).__name__
        raise UsageError(
            'gradient_views: expected a dict of predicates, such as '
            f"{{'gln': 'gln', 'code': 'code_*'}}; got {got}."
        )
    entries = tuple((name, as_filter(p, name='gradient_views')) for name, p in predicates.items())
    return GradientViews(
        entries, check_collections(collections, 'gradient_views'), bool(allow_unmatched)
    )
