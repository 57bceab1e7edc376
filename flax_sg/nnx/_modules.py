"""What a transform makes of a module of flax.nnx, of a class, of a method and of trees."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from flax_sg._compat import nnx as nnx_compat
from flax_sg._compat.nnx import Variable, alike
from flax_sg._errors import UsageError
from flax_sg._filters.unmatched import check_matched
from flax_sg._jax.block_names import named
from flax_sg._jax.lines import here
from flax_sg._transforms.open_blocks import opened
from flax_sg._transforms.run_inside import run_inside
from flax_sg._transforms.thread_state import state
from flax_sg.nnx._blocks import ModuleBlock, answer, info_of, leaves_of, paths_below
from flax_sg.nnx._marks import mirrors, see, seen_of

__all__ = [
    'bound_by_nnx',
    'in_block',
    'mirror_of',
    'subclass_named_alike',
    'transformed_class',
    'transformed_tree',
]


def mirror_of(transform: Any, module: nnx.Module) -> nnx.Module:
    """Return a module like another one, whose selected Variables are the live ones, held."""
    block = ModuleBlock(transform, module)
    block.of_module = True
    block.matches.check()
    graphdef, variables = nnx.split(module)

    def held(variable: Any) -> Any:
        said = answer(block, variable) if isinstance(variable, Variable) else None
        if said is None or said.info is None:
            return variable
        mirror, before = alike(variable), seen_of(variable)
        if before is None:
            # A function that is given both says then which of them it has written.
            see(variable)
        see(mirror, held=(*(before.held if before else ()), said), live=variable)
        return mirror

    out = nnx.merge(
        graphdef, jax.tree.map(held, variables, is_leaf=lambda x: isinstance(x, Variable))
    )
    mirrors.made = True
    return out


def bound_by_nnx(target: Any) -> bool:
    """Say whether it is a method of a module as `nnx.jit` binds it."""
    return (
        isinstance(target, functools.partial)
        and bool(target.args)
        and isinstance(target.args[0], nnx.Pytree)
    )


def in_block(transform: Any, fn: Callable, owner: Any) -> Callable:
    """Wrap a method to run in a block at its module, but for one that its own module calls."""

    def block(module: Any) -> contextlib.AbstractContextManager[None]:
        if any(_is_open(each, owner, module) for each in state.stack):
            return contextlib.nullcontext()
        return opened(ModuleBlock(transform, module, owner))

    return run_inside(fn, block)


def _is_open(block: Any, owner: Any, module: Any) -> bool:
    """Say whether a block is an owner's at a module, or at what it was in another trace."""
    if not isinstance(block, ModuleBlock) or block.owner is not owner:
        return False
    if block.module is module:
        return True
    named: dict[int, tuple[Any, set]] = {}  # by each Variable, what it was called, and is called
    for path, variable in paths_below(module):
        seen = seen_of(variable)
        said = seen.of(block) if seen is not None else None
        if said is not None:
            named.setdefault(id(variable), (said.path, set()))[1].add(path)
    return bool(named) and all(before in now for before, now in named.values())


def subclass_named_alike(base: type, **members: Any) -> type:
    """Make a subclass that goes by the name of its base, with more members."""
    names = ('__module__', '__qualname__', '__doc__')
    members = {**{name: getattr(base, name) for name in names}, **members}
    try:
        return type(base)(base.__name__, (base,), members, pytree=nnx_compat.is_pytree(base))
    except TypeError as error:
        raise UsageError(
            f'{base.__name__} cannot be transformed as a class: to subclass it says {error}. '
            'Transform an instance of it, or decorate its methods.'
        ) from error


def _binds(member: Any) -> bool:
    kind = type(member)
    return hasattr(kind, '__get__') and (
        kind is not functools.partial or sys.version_info >= (3, 14)
    )


class _Bound:
    """A method that makes a function of its module anew whenever it is looked up."""

    def __init__(self, transform: Any, member: Any, owner: type):
        self.transform, self.member, self.owner = transform, member, owner

    def __get__(self, module: Any, cls: type | None = None) -> Any:
        bound = self.member.__get__(module, cls)
        if module is None:
            return bound
        run = in_block(
            self.transform, lambda _, *args, **kwargs: bound(*args, **kwargs), self.owner
        )
        return functools.wraps(bound)(functools.partial(run, module))


def transformed_class(transform: Any, base: type) -> type:
    """Return a subclass of the same name whose methods run in a block at their module."""
    cls = subclass_named_alike(base)
    own = {name for of in nnx.Module.__mro__ for name in vars(of)} - {'__call__'}
    for of in reversed(base.__mro__):
        for name, member in vars(of).items() if of not in nnx.Module.__mro__ else ():
            if name in own or not _binds(member):
                continue  # it is no method, though it can be called
            if isinstance(member, (functools.partialmethod, functools.singledispatchmethod)):
                setattr(cls, name, _Bound(transform, member, cls))
            elif isinstance(member, functools.cached_property):
                made = functools.cached_property(in_block(transform, member.func, cls))
                made.__set_name__(cls, name)
                setattr(cls, name, made)
            elif isinstance(member, property) and member.fget is not None:
                setattr(cls, name, member.getter(in_block(transform, member.fget, cls)))
            elif not isinstance(member, (type, staticmethod, classmethod)) and callable(member):
                setattr(cls, name, in_block(transform, member, cls))
    return cls


def transformed_tree(transform: Any, tree: Any) -> Any:
    """Return a pytree whose Variables have what a transform makes of their values."""
    leaves = leaves_of(tree)
    infos = [info_of(path, leaf) if isinstance(leaf, Variable) else None for path, leaf in leaves]
    if not transform.allow_unmatched:
        known = [info for info in infos if info is not None]
        check_matched(transform.filter.patterns(), known, where=repr(transform), of='the tree')

    def read(info: Any, leaf: Any) -> Any:
        if info is None:
            return leaf
        value = leaf.get_raw_value()
        if transform.in_collections(info.collection) and transform.filter.selects(info):
            value = transform.read(info, value, {}.__getitem__)
        return leaf.copy(value)

    structure = jax.tree.structure(tree, is_leaf=lambda leaf: isinstance(leaf, Variable))
    with named(transform, here()):
        return structure.unflatten(map(read, infos, (leaf for _, leaf in leaves)))
