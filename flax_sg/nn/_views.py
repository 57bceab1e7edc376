"""Views of modules: what `gradient_views` makes of a class, an instance and a method.

A module is lifted as any transform of Flax lifts it, so that state is updated, random numbers are
drawn and values are sown once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from flax_sg._compat.linen import Module, lifted_call
from flax_sg._errors import UsageError
from flax_sg._views.gradient_views import GradientViews
from flax_sg.nn._blocks import open_at
from flax_sg.nn._classes import subclass_named_alike
from flax_sg.nn._methods import makes_root
from flax_sg.nn._mirrors import fields_of

__all__ = ['views_of', 'views_of_call']


def views_of(views: GradientViews, target: Any) -> Any:
    """Return a class, an instance or a method of modules with views; NotImplemented for others."""
    if inspect.isclass(target) and issubclass(target, Module):
        return _of_class(views, target)
    if isinstance(target, Module):
        if target.scope is None:
            return _of_class(views, type(target))(parent=None, **fields_of(target))
        return functools.partial(views.of_function(type(target).__call__), target)
    if inspect.ismethod(target) and isinstance(target.__self__, Module):
        if target.__self__.scope is None:
            raise UsageError(
                f'{views!r}: {target.__name__!r} is a method of a module that is not bound. '
                'Pass method= to apply: model.apply(variables, x, '
                f'method=views({type(target.__self__).__name__}.__call__)).'
            )
        return functools.partial(views.of_function(target.__func__), target.__self__)
    return NotImplemented


def _of_class(views: GradientViews, cls: type[Module]) -> type[Module]:
    return subclass_named_alike(cls, {'__call__': views.of_function(cls.__call__)})


def views_of_call(views: GradientViews, fn: Callable, args: tuple, kwargs: dict) -> Any:
    """Return the views of what a function of a bound module returns; NotImplemented for others."""
    module = args[0] if args else None
    if not isinstance(module, Module):
        return NotImplemented
    if module.scope is None:
        raise UsageError(views.wrong_argument(fn, 'a module that is not bound'))
    if makes_root(fn):
        raise UsageError(
            f'{views!r}: what {fn.__name__!r} reads is of another root than the module that it is '
            'a method of. Pass method= to apply: model.apply(variables, x, '
            f'method=views({type(module).__name__}.__call__)).'
        )
    if module.is_initializing():
        return views.named([fn(*args, **kwargs)] * len(views.entries))

    @functools.wraps(fn)
    def in_block(module: Module, /, *args: Any, **kwargs: Any) -> Any:
        with open_at(views.marked(), module.scope):
            return fn(module, *args, **kwargs)

    return lifted_call(views.in_views, in_block, *args, **kwargs)
