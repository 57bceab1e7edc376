"""Flax Linen as a front end: what transforms and views make of modules, and where blocks open."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FrameType
from typing import Any

from flax_sg._compat.linen import Module, Scope, current_module
from flax_sg._filters import slips
from flax_sg._transforms import front_ends
from flax_sg._transforms.block import OpenBlock
from flax_sg._transforms.stop_gradient import stop_gradient
from flax_sg._transforms.transform import Transform
from flax_sg.nn import _self_check
from flax_sg.nn._blocks import block_at, open_at
from flax_sg.nn._classes import transformed_class
from flax_sg.nn._methods import transformed_function
from flax_sg.nn._mirrors import mirror_of
from flax_sg.nn._running_code import module_of
from flax_sg.nn._views import views_of, views_of_call

__all__: list[str] = []  # it enters itself


class _Linen:
    module = 'flax.linen.Module'

    def check(self) -> None:
        _self_check.check(lambda: open_at(stop_gradient('**/held'), None))

    def is_running(self) -> bool:
        return current_module() is not None

    def block(self, transform: Transform, frame: FrameType) -> OpenBlock:
        module = module_of(frame) or current_module()
        if module is None:
            return NotImplemented
        return block_at(transform, module.scope, by=module.scope)

    def block_at(self, transform: Transform, module: Any) -> OpenBlock:
        return NotImplemented

    def transformed(self, transform: Transform, target: Any) -> Any:
        if inspect.isclass(target) and issubclass(target, Module):
            return transformed_class(transform, target)
        if isinstance(target, Module):
            return mirror_of(transform, target)
        return NotImplemented

    def is_module(self, value: Any) -> bool:
        return isinstance(value, Module)

    def method(self, transform: Transform, fn: Callable) -> Callable:
        return transformed_function(transform, fn)

    def viewed(self, views: Any, target: Any) -> Any:
        return views_of(views, target)

    def viewed_call(self, views: Any, fn: Callable, args: tuple, kwargs: dict) -> Any:
        return views_of_call(views, fn, args, kwargs)


def _refused(predicate: Any) -> str:
    if isinstance(predicate, Module):
        return "(module). To select a submodule name its path, such as 'encoder'."
    if isinstance(predicate, Scope):
        return (
            '(module). A scope is no module: open a block in the method that has it, or name '
            "its variables by path, such as 'encoder'."
        )
    return ''


front_ends.enter(_Linen())
slips.also_refused.append(_refused)
