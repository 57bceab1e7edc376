"""flax.nnx as a front end: what transforms make of its modules, and where blocks open."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FrameType
from typing import Any

from flax import nnx

from flax_sg._filters import modules, of_nnx
from flax_sg._transforms import front_ends
from flax_sg._transforms.open_blocks import opened
from flax_sg._transforms.stop_gradient import stop_gradient
from flax_sg._transforms.transform import Transform
from flax_sg.nnx import _self_check
from flax_sg.nnx._blocks import ModuleBlock, info_of, paths_below
from flax_sg.nnx._modules import (
    bound_by_nnx,
    in_block,
    mirror_of,
    transformed_class,
    transformed_tree,
)
from flax_sg.nnx._views import views_of, views_of_call

__all__: list[str] = []  # it enters itself


class _NNX:
    module = 'flax.nnx.Module'

    def check(self) -> None:
        _self_check.check(lambda module: opened(ModuleBlock(stop_gradient('held'), module)))

    def is_running(self) -> bool:
        return False

    def block(self, transform: Transform, frame: FrameType) -> Any:
        return NotImplemented

    def block_at(self, transform: Transform, module: Any) -> Any:
        return ModuleBlock(transform, module) if _is_node(module) else NotImplemented

    def transformed(self, transform: Transform, target: Any) -> Any:
        if inspect.isclass(target) and issubclass(target, nnx.Pytree):
            return transformed_class(transform, target)
        if isinstance(target, nnx.Pytree):
            return mirror_of(transform, target)
        if bound_by_nnx(target):
            return functools.partial(transform(target.func), *target.args, **target.keywords)
        if _has_variables(target):
            return transformed_tree(transform, target)
        return NotImplemented

    def is_module(self, value: Any) -> bool:
        return isinstance(value, nnx.Pytree)

    def method(self, transform: Transform, fn: Callable) -> Callable:
        return in_block(transform, fn, object())

    def viewed(self, views: Any, target: Any) -> Any:
        return views_of(views, target)

    def viewed_call(self, views: Any, fn: Callable, args: tuple, kwargs: dict) -> Any:
        return views_of_call(views, fn, args, kwargs)


def _is_node(value: Any) -> bool:
    return isinstance(value, (nnx.Pytree, nnx.Variable))


def _has_variables(tree: Any) -> bool:
    return next(of_nnx.paths_below(tree), None) is not None


def _infos_below(node: Any) -> Any:
    return (
        (info_of(path, variable) for path, variable in paths_below(node)) if _is_node(node) else ()
    )


modules.infos_below.append(_infos_below)
front_ends.enter(_NNX())
