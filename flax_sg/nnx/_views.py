"""Views of modules: what `gradient_views` makes of a class, an instance and a method of flax.nnx.

The target runs on a copy of its module that is made in its trace, and what it has written is
written to the live one once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from flax_sg._compat.nnx import Variable, stored
from flax_sg._errors import UsageError
from flax_sg._filters import of_nnx
from flax_sg._transforms.open_blocks import opened
from flax_sg._views.gradient_views import GradientViews
from flax_sg.nnx._blocks import ModuleBlock, also_of
from flax_sg.nnx._marks import NOTHING, is_same, kept
from flax_sg.nnx._modules import bound_by_nnx, subclass_named_alike

__all__ = ['views_of', 'views_of_call']


def views_of(views: GradientViews, target: Any) -> Any:
    """Return a class, an instance or a method of modules with views; NotImplemented for others."""
    if inspect.isclass(target) and issubclass(target, nnx.Pytree):
        return subclass_named_alike(target, __call__=views.of_function(target.__call__))
    if isinstance(target, nnx.Pytree):
        return functools.partial(views.of_function(type(target).__call__), target)
    if inspect.ismethod(target) and isinstance(target.__self__, nnx.Pytree):
        return functools.partial(views.of_function(target.__func__), target.__self__)
    if bound_by_nnx(target):
        return functools.partial(views.of_function(target.func), *target.args, **target.keywords)
    return NotImplemented


def views_of_call(views: GradientViews, fn: Callable, args: tuple, kwargs: dict) -> Any:
    """Return the views of what a function of a module returns; NotImplemented for others."""
    module = args[0] if args else None
    if not isinstance(module, nnx.Pytree):
        return NotImplemented
    graph, state = nnx.split(module)
    live = dict(nnx.to_flat_state(state))
    made: list[tuple[Any, Variable]] = []

    def call() -> tuple[Any, list[Any]]:
        inner = nnx.merge(graph, state, copy=True)
        copies = dict(nnx.to_flat_state(nnx.state(inner)))
        before = {path: kept(stored(copy)) for path, copy in copies.items()}
        block = ModuleBlock(views.marked(), module)
        also_of(block, [(live[path], copy) for path, copy in copies.items()])
        with opened(block):
            out = fn(inner, *args[1:], **kwargs)
        changed = next(_changes(inner, module), None)
        if changed is not None:
            raise UsageError(
                f'{views!r}: its target changes {"/".join(changed)!r}, and views write Variables '
                'of modules that are there before. Keep it in a Variable, or change it outside of '
                'the target.'
            )
        after = nnx.to_flat_state(nnx.state(inner))
        made[:] = [
            (path, v) for path, v in after if not is_same(before.get(path, NOTHING), stored(v))
        ]
        return out, [stored(variable) for _, variable in made]

    outs, written = views.in_views(call)
    for (path, variable), value in zip(made, written, strict=True):
        if path in live:
            live[path].set_raw_value(value)
        else:
            new = type(variable).from_metadata(value, variable.get_metadata())
            nnx.update(module, nnx.from_flat_state([(path, new)]))
    return outs


def _changes(
    inner: Any, live: Any, path: tuple[str, ...] = (), above: tuple[int, ...] = ()
) -> Iterator[tuple[str, ...]]:
    """Yield what a target has changed in a copy of its module, but for values and new Variables."""
    kinds = (nnx.Variable, jax.Array, np.ndarray)
    if id(inner) in above or isinstance(inner, kinds) and isinstance(live, kinds):
        return
    if type(inner) is not type(live):
        yield path
        return
    new, old = (dict(of_nnx.children_of(node)) for node in (inner, live))
    if not new and not old and not _is_equal(inner, live):
        yield path
    for name in old.keys() - new.keys():
        yield (*path, str(name))
    for name, child in new.items():
        if name in old:
            yield from _changes(child, old[name], (*path, str(name)), (*above, id(inner)))
        elif not isinstance(child, nnx.Variable):
            yield (*path, str(name))


def _is_equal(value: Any, other: Any) -> bool:
    if value is other or isinstance(value, nnx.Pytree):
        return True
    try:
        return bool(value == other)
    except Exception:  # it cannot say
        return True
