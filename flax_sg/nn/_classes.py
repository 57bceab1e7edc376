"""Lifted classes: every method runs in the block, and so does what is read from outside.

A lifted class attaches its transforms to its instances' scopes, so that what is read from outside
any of its methods, an attribute or a submodule, is transformed too.
"""

from __future__ import annotations

import copyreg
import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flax_sg._compat import linen as linen_compat
from flax_sg._compat.linen import Module, Scope
from flax_sg._errors import UsageError
from flax_sg._filters.callables import identity_key, lasting_key
from flax_sg._transforms.thread_state import state, under
from flax_sg.nn._blocks import attach, without
from flax_sg.nn._members import blocks_of, has_members, lift_members
from flax_sg.nn._scope_flags import application_of

if TYPE_CHECKING:
    from flax_sg._transforms.transform import Transform

__all__ = ['subclass_named_alike', 'transformed_class']

# Of a lifted class: its base and transform, all lifted classes among it and its bases, the identity
# of what it was made of, and its key once equal callables share it.
_LAYER, _LIFTED = '_flax_sg_layer', '_flax_sg_lifted'
_MADE_OF, _SHARED = '_flax_sg_made_of', '_flax_sg_shared'
_MADE_IN = '_flax_sg_made_in'  # of a copy: the blocks of the running module that made it
_READS = ('get_variable', 'variables')  # methods of Module itself that read
# Lifted transforms of classes in whose bodies a variable is what it is around them; and none.
_ONE_VALUE = ('checkpoint', 'jit', None)
# A lifted class may hold arrays and tracers, so it is kept only while something else holds it.
_classes: weakref.WeakKeyDictionary[type, weakref.WeakValueDictionary[tuple, type]] = (
    weakref.WeakKeyDictionary()
)


def transformed_class(transform: Transform, base: type[Module]) -> type[Module]:
    """Return a subclass of the same name whose every read goes through the transform.

    Equal transforms of one class give one class, so that caches stay warm.
    """
    made = _classes.setdefault(base, weakref.WeakValueDictionary())
    key, itself = (transform.key(of, of) for of in (lasting_key, identity_key))
    cls = made.get(key)
    if cls is not None and vars(cls)[_MADE_OF] != itself:  # of another callable, that is equal
        setattr(cls, _SHARED, key)
    if cls is None or _changed(cls):
        cls = subclass_named_alike(
            base,
            {
                '__reduce__': _reduce,
                'clone': _clone(base),
                'unbind': _unbind(base),
                _LAYER: (base, transform),
                _MADE_OF: itself,
                _SHARED: None,
            },
            before=_without_hooks(base),
        )
        cls.__init_subclass__ = classmethod(functools.partial(_init_subclass, cls))
        if hasattr(base, '__parameters__'):  # of a generic class
            cls.__parameters__ = base.__parameters__
        _set_lifted(cls)
        lift_members(cls, _opened_by(cls), _READS)
        made[key] = cls
    return cls


def subclass_named_alike(
    base: type[Module], members: dict[str, Any], *, before: tuple[type, ...] = ()
) -> type[Module]:
    """Make a subclass that goes by the name of its base, with more members and other bases."""
    return type(
        base.__name__,
        (*before, base),
        {
            '__init__': base.__init__,
            '__module__': base.__module__,
            '__qualname__': base.__qualname__,
            '__doc__': base.__doc__,
            **members,
        },
    )


def _without_hooks(base: type[Module]) -> tuple[type, ...]:
    """Return what stands before a base whose `__init_subclass__` is not for lifted classes."""
    if not any(
        '__init_subclass__' in vars(of) and _LAYER not in vars(of)
        for of in base.__mro__
        if of not in Module.__mro__
    ):
        return ()

    class Base:
        def __init_subclass__(cls, **kwargs: Any) -> None:
            if _LAYER in vars(cls) and cls.__mro__[1] is Base:
                Module.__init_subclass__.__func__(cls)
            else:
                super().__init_subclass__(**kwargs)

    return (Base,)


def _changed(cls: type[Module]) -> bool:
    """Say whether what a class's callable says has changed since others shared the class."""
    shared, (_, transform) = vars(cls)[_SHARED], vars(cls)[_LAYER]
    return shared is not None and shared != transform.key(lasting_key, lasting_key)


def _lifted(cls: type[Module]) -> tuple[type[Module], ...]:
    """Return the lifted classes among a class and its bases, the innermost first."""
    return getattr(cls, _LIFTED, ())


def _clone(base: type[Module]) -> Callable:
    """Make `clone` of a lifted class, which notes the running blocks in which a copy was made.

    A copy that a running module makes of itself, and applies, gets what the module has read. That
    has gone through its blocks already.
    """

    @functools.wraps(base.clone)
    def clone(self, *args, **kwargs):
        made_in = vars(self).get(_MADE_IN, _Blocks())
        if self.scope is not None:
            running = (e for e in blocks_of(self, _lifted(type(self))) if e in state.stack)
            made_in = _Blocks((*made_in, *map(weakref.ref, running)))
        with under(copied_in=made_in):
            copy = base.clone(self, *args, **kwargs)
        if made_in:
            object.__setattr__(copy, _MADE_IN, made_in)
        return copy

    clone.nowrap = True  # Flax would run setup first
    return clone


class _Blocks(tuple):
    """Weak references to blocks, which a copy of their holder shares and a pickled one has not."""

    def __deepcopy__(self, memo: dict) -> _Blocks:
        return self

    def __reduce__(self) -> tuple:
        return _Blocks, ()


def _unbind(base: type[Module]) -> Callable:
    """Make `unbind` of a lifted class: the copy reads through it, so it gets what is read live."""

    @functools.wraps(base.unbind)
    def unbind(self, *args, **kwargs):
        copy, variables = base.unbind(self, *args, **kwargs)
        if _MADE_IN not in vars(copy):
            own = {(owner, self.name) for owner in _lifted(type(self))}
            variables = without(self.scope, own).variables()
        return copy, variables

    unbind.nowrap = True
    return unbind


def _set_lifted(cls: type[Module]) -> None:
    setattr(cls, _LIFTED, tuple(owner for owner in reversed(cls.__mro__) if _LAYER in vars(owner)))
    cls.scope = _AttachedScope()


class _AttachedScope:
    """The attribute `scope` of a lifted module: a scope, once set, carries the transforms."""

    def __get__(self, module: Module | None, owner: type) -> Scope | None:
        return None if module is None else vars(module).get('scope')

    def __set__(self, module: Module, scope: Scope | None) -> None:
        for owner in reversed(_lifted(type(module))) if scope is not None else ():
            transform = vars(owner)[_LAYER][1]
            if _changed(owner):
                raise UsageError(
                    f'{owner.__name__}, lifted by {transform!r}: a variable that its callable '
                    'closes over was bound anew since, and an equal one shares the class. Lift the '
                    'class again, or let the callable look at an object that changes.'
                )
            if application_of(scope).inner and any(
                block in state.stack and block.owner[0] is owner
                for block in (made_in() for made_in in state.copied_in)
            ):
                continue
            scope = attach(scope, (owner, module.name), transform)
        vars(module)['scope'] = scope


def _init_subclass(lifted: type[Module], cls: type[Module], **kwargs: Any) -> None:
    """Lift a user's subclass of a lifted class; Flax sets `scope` anew on each class."""
    super(lifted, cls).__init_subclass__(**kwargs)
    _set_lifted(cls)
    if not has_members(cls) and _LAYER not in vars(cls):
        lift_members(cls, () if linen_compat.transform_of(cls) else _opened_by(cls))


def _opened_by(cls: type[Module]) -> tuple[type[Module], ...]:
    """Return the lifted classes whose blocks the methods of a class open, the innermost first.

    Where `nn.scan` or its like transforms a class in between, these are opened in its body: one
    layer is what they see.
    """
    repeating = [of for of in cls.__mro__ if linen_compat.transform_of(of) not in _ONE_VALUE]
    return tuple(
        owner
        for owner in reversed(cls.__mro__)
        if _LAYER in vars(owner) and not any(issubclass(of, owner) for of in repeating)
    )


def _reduce(self):
    cls, transforms = type(self), []
    while _LAYER in vars(cls):
        cls, transform = vars(cls)[_LAYER]
        transforms.insert(0, transform)
    if not transforms:  # a user's subclass, which pickle finds by its name
        return copyreg.__newobj__, (cls,), vars(self)
    return _rebuild, (cls, transforms), vars(self)


_reduce.nowrap = True  # Flax would run setup first


def _rebuild(base: type[Module], transforms: list[Transform]) -> Module:
    cls = functools.reduce(
        lambda cls, transform: transformed_class(transform, cls), transforms, base
    )
    return cls.__new__(cls)
