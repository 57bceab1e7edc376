"""Mirrors of instances: the same fields, parameters and random streams, transformed."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax

from flax_sg._compat import linen as linen_compat
from flax_sg._compat.linen import Module, Scope
from flax_sg.nn._attributes import LIVE
from flax_sg.nn._blocks import attach
from flax_sg.nn._classes import transformed_class

if TYPE_CHECKING:
    from flax_sg._transforms.transform import Transform

__all__ = ['fields_of', 'mirror_of']


def mirror_of(transform: Transform, module: Module) -> Module:
    """Return a mirror of a module: the same fields, parameters and random streams, transformed."""
    cls = transformed_class(transform, type(module))
    if module.scope is None:
        return cls(parent=None, **fields_of(module))
    scope = attach(module.scope.rewound(), (cls, module.name), transform, mirror=True)
    mirror = cls(parent=scope, **fields_of(module))
    for name, value in fields_of(mirror).items():
        object.__setattr__(mirror, name, _rebound(value, module.scope, mirror.scope))
    object.__setattr__(mirror, 'parent', module.parent)
    object.__setattr__(mirror, LIVE, module)
    return mirror


def fields_of(module: Module) -> dict[str, Any]:
    """Return what the module was made with, but for its parent."""
    return {
        f.name: getattr(module, f.name)
        for f in dataclasses.fields(module)
        if f.init and f.name != 'parent'
    }


def _rebound(value: Any, old: Scope, new: Scope) -> Any:
    """Bind modules below one scope to the same paths below another."""
    start = linen_compat.scope_path(old)

    def rebind(leaf: Any) -> Any:
        if not isinstance(leaf, Module) or leaf.scope is None:
            return leaf
        path = linen_compat.scope_path(leaf.scope)
        if (
            linen_compat.root_variables(leaf.scope) is not linen_compat.root_variables(old)
            or path[: len(start)] != start
            or path == start
        ):
            return leaf
        scope = new
        for name in path[len(start) :]:
            scope = scope.push(name, reuse=True)
        fields = {k: _rebound(v, old, new) for k, v in fields_of(leaf).items()}
        copy = type(leaf)(parent=scope, **fields)
        object.__setattr__(copy, LIVE, leaf)
        return copy

    return jax.tree.map(rebind, value)
