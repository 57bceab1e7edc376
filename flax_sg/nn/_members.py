"""The methods and descriptors of lifted classes, which run in the block of the module.

A class opens the block and goes on to what `super()` finds, so that overrides, mixins and
cooperative methods are found as Python finds them. What a subclass defines itself is wrapped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flax_sg._compat import linen as linen_compat
from flax_sg._compat.linen import Module
from flax_sg._transforms.block import OpenBlock
from flax_sg._transforms.open_blocks import opened
from flax_sg._transforms.run_inside import run_inside
from flax_sg._transforms.thread_state import state
from flax_sg.nn._blocks import may_create, module_block
from flax_sg.nn._cached_properties import CachedProperty

__all__ = ['ROOTS', 'blocks_of', 'has_members', 'lift_members']

# Methods of Module that make another root of the module's, or a module for one.
ROOTS = (
    'apply',
    'bind',
    'clone',
    'copy',
    'init',
    'init_with_output',
    'lazy_init',
    'tabulate',
    'unbind',
)
_MEMBERS = '_flax_sg_members'  # of a class: names of what is lifted in it, and who defined it
_OPENS = '_flax_sg_opens'  # of a class: the lifted classes whose blocks these open
_GENERATED = frozenset({'__post_init__', '__replace__', '__annotate__', '__annotate_func__'})
_OVERRIDDEN = frozenset({'__call__', '__getattr__'})
_NOT_OF_INSTANCES = (
    staticmethod,
    classmethod,
    types.MemberDescriptorType,
    types.GetSetDescriptorType,
)


def has_members(cls: type[Module]) -> bool:
    """Say whether the members of a class are lifted already."""
    return _MEMBERS in vars(cls)


def lift_members(
    cls: type[Module], owners: Sequence[type[Module]], more: Sequence[str] = ()
) -> None:
    """Let what instances of a class have that may read run in their block.

    Args:
      owners: the lifted classes whose blocks it opens, the innermost first.
      more: names of methods of Module itself.
    """
    members: dict[str, type] = {}
    setattr(cls, _MEMBERS, members)
    setattr(cls, _OPENS, frozenset(owners))
    fields = {field.name for field in dataclasses.fields(cls)}  # a default may be a function
    for name, definer in _defined(cls).items() if owners else ():
        member = vars(definer)[name]
        if name in fields or not (name in more or _may_read(name, member)):
            continue
        opens = _opens(cls, name, definer, owners)
        lifted = (
            _lift(cls, name, definer, functools.partial(_own_block, opens, name != 'setup'))
            if opens
            else None
        )
        if lifted is not None:
            setattr(cls, name, lifted)
            members[name] = definer


def _defined(cls: type[Module]) -> dict[str, type]:
    """Return the names that a class has, and for each the class that defines it."""
    found: dict[str, type] = {}
    for of in cls.__mro__:
        copies = vars(of).get(_MEMBERS, {})
        for name in vars(of):
            if copies.get(name, of) is of:
                found.setdefault(name, of)
    return found


def _may_read(name: str, member: Any) -> bool:
    if not hasattr(Module, name):
        return name not in _GENERATED
    if vars(Module).get(name) is member or getattr(Module, name) is member:
        return False
    return (
        name in _OVERRIDDEN
        or inspect.isfunction(member)
        and not (name.startswith('_') or name in ROOTS)
    )


def _opens(
    cls: type[Module], name: str, definer: type, owners: Sequence[type[Module]]
) -> list[type[Module]]:
    """Return the lifted classes whose blocks a member has to open in a class."""
    holder = next(of for of in cls.__mro__ if name in vars(of))
    if vars(holder).get(_MEMBERS, {}).get(name) is definer and (
        vars(holder)[_OPENS] >= vars(cls)[_OPENS]
    ):
        return []
    transformed = linen_compat.transform_of(definer)  # its body opens those of lifted classes in it
    return [owner for owner in owners if not (transformed and issubclass(definer, owner))]


def _lift(cls: type[Module], name: str, definer: type, block: Callable) -> Any:
    """Return what stands for a member in a class; None for what is not asked with an instance."""
    member = vars(definer)[name]
    inner = linen_compat.unwrapped(member)
    while isinstance(inner, CachedProperty):
        inner = inner.wrapped
    if type(inner) is functools.cached_property and inner.attrname == name:
        lifted = functools.cached_property(run_inside(inner.func, block))
        lifted.__set_name__(cls, name)
        return lifted
    if (
        isinstance(inner, _NOT_OF_INSTANCES)
        or not hasattr(type(inner), '__get__')
        or (type(inner).__module__.startswith('flax_sg.') and not isinstance(inner, _Member))
    ):
        return None

    def find(module: Module | None, owner: type) -> Any:
        if definer is cls or module is not None and not isinstance(module, cls):
            return member.__get__(module, owner)
        return getattr(super(cls, owner if module is None else module), name)

    if not inspect.isfunction(member):
        kind = _Member if not hasattr(type(inner), '__set__') else _DataMember
        return kind(member, find, block)
    if definer is cls:
        return run_inside(member, block)

    @functools.wraps(member)
    def method(module: Module, /, *args: Any, **kwargs: Any) -> Any:
        return find(module, type(module))(*args, **kwargs)

    return run_inside(method, block)


class _Member:
    """Stands for a descriptor, and asks it inside the block. Methods that it gives run there."""

    def __init__(self, member: Any, find: Callable, block: Callable):
        self._member, self._find, self._block = member, find, block
        self.__doc__ = getattr(member, '__doc__', None)

    def __get__(self, module: Module | None, owner: type) -> Any:
        if module is None:
            return self._find(None, owner)
        with self._block(module):
            found = self._find(module, owner)
        if isinstance(found, types.MethodType) and found.__self__ is module:
            return types.MethodType(run_inside(found.__func__, self._block), module)
        if isinstance(found, (types.FunctionType, functools.partial)):

            @functools.wraps(found)
            def method(*args: Any, **kwargs: Any) -> Any:
                return inside(module, *args, **kwargs)

            inside = run_inside(lambda _, /, *args, **kwargs: found(*args, **kwargs), self._block)
            return method
        return found


class _DataMember(_Member):
    def __set__(self, module: Module, value: Any) -> None:
        self._member.__set__(module, value)

    def __delete__(self, module: Module) -> None:
        self._member.__delete__(module)


@contextlib.contextmanager
def _own_block(owners: Sequence[type[Module]], is_done: bool, module: Module) -> Iterator[None]:
    """Open a lifted module's own blocks, unless one of its methods is running already.

    After its setup it is not done: what is selected may be made by a method.
    """
    own = () if module.scope is None else blocks_of(module, owners)
    new = [block for block in own if block not in state.stack]
    with contextlib.ExitStack() as stack:
        for block in new:
            stack.enter_context(opened(block))
        yield
    for block in new:
        if is_done or not may_create(module.scope, block.transform):
            block.matches.check()


def blocks_of(module: Module, owners: Sequence[type[Module]]) -> list[OpenBlock]:
    """Return the blocks that a bound module has of lifted classes, the outermost first."""
    return [
        block
        for owner in reversed(owners)
        if (block := module_block(module.scope, (owner, module.name))) is not None
    ]
