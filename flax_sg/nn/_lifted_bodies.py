"""What Flax's lifted transforms hand to their bodies while blocks are open.

A lifted transform is a read of all that it hands in, outside its loop or checkpoint. The values of
collections that the body cannot write are transformed there. What it may write goes in as it is, or
the body would hand transformed values back; what a read of it gives goes in beside it, under a name
that the body does not see, and is sliced by a scan as it is. So a predicate and a function see the
stored variable, whatever the body may write.

What the body could have written and has not stays what it was. Flax would store the body's result
in its place: another value, of which a block does not know that it was read before.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core.scope import DenyList, in_filter

from flax_sg._compat import jax as jax_compat
from flax_sg._compat import linen as linen_compat
from flax_sg._compat.linen import Scope
from flax_sg._filters.mappings import children_of, rebuilt
from flax_sg._filters.variables import Path, walk
from flax_sg._transforms.thread_state import state, under
from flax_sg.nn._beside import BESIDE, LEFT, changed_part, value_at, without_beside
from flax_sg.nn._jitted import Jitted
from flax_sg.nn._reads import Reads, identical
from flax_sg.nn._scope_flags import (
    APPLICATION,
    FLAG,
    Place,
    ScopeFlags,
    application_of,
    flags_of,
    new_application,
    set_flags,
)

__all__ = []

_CARRY = {'scan': 1, 'while_loop': 0}  # the group of variables that change from step to step
_DERIVES = ('vjp', 'jvp', 'custom_vjp')
_SPLITS = ('scan', 'vmap')


@linen_compat.tap_pack
def _pack(original, fn, in_filters, out_filters, rng_filters, name=None, enable_kwargs=False):
    jitted = Jitted() if name == 'jit' else None  # JAX keeps traces of fn for all its calls

    def packed(scope_tree, /, *args, **kwargs):
        def body(scope_fn, repack_fn, groups, rngs, /, *args, **kwargs):
            lift = _Lifted(scope_tree, in_filters, out_filters, name)
            groups = lift.read(groups)
            call = functools.partial(
                fn,
                lift.bind(scope_fn),
                lift.repack(repack_fn, jitted),
                groups,
                rngs,
                *args,
                **kwargs,
            )
            out, written = jitted.run(call, lift.paths()) if jitted else call()
            if jitted:
                written, lift.same = written[0], written[1].names
            state.publishing = lift.publish
            return out, without_beside(written)

        run = original(body, in_filters, out_filters, rng_filters, name, enable_kwargs)
        with under(publishing=state.publishing):
            return run(scope_tree, *args, **kwargs)

    return packed


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Same:
    """Names of variables, in a result of a jitted function: JAX keeps them with the trace."""

    names: frozenset


class _Lifted:
    """One call of a lifted transform: what it hands to its body, and in what state."""

    def __init__(self, scope_tree: Any, in_filters: Any, out_filters: Any, name: str | None):
        self.scopes, self.treedef = jax.tree.flatten(scope_tree)
        self.packed, self.places = linen_compat.packed_scopes(self.scopes)
        self.out_filters = out_filters
        self.carry = _CARRY.get(name)
        self.split = name in _SPLITS
        self.open = [self._open_about(scope) for scope in self.packed]
        self.given = self._given(in_filters[0]) if name in _DERIVES else frozenset()
        self.transformed_collections: list[frozenset[str]] = [frozenset() for _ in self.packed]
        # What is transformed at each read inside, as a step of a loop, or the body, writes it.
        self.left: list[frozenset[str]] = [frozenset() for _ in self.packed]
        # Of what it may write: the values, and in what reads of them differ.
        self.beside: list[dict[str, tuple]] = [{} for _ in self.packed]
        # What comes out of these differs though the body leaves it as it was: it is mapped, or goes
        # out with another axis than it came in.
        self.mapped = in_filters[0] if name == 'map_variables' else False
        self.in_filters = in_filters
        # What the body got, by the identity of the variables of its scope; and the names of what it
        # has left as it was: the number of the scope, collection, and path from there.
        self.got: dict[int, tuple[dict, dict]] = {}
        self.same: frozenset | None = None

    def _given(self, differentiated: Any) -> frozenset[str]:
        """Return the collections that a derivative is taken of, and that open blocks look into."""
        return frozenset(
            collection
            for scope, blocks in zip(self.packed, self.open, strict=True)
            if not scope.get_flag('initializing', False)
            for collection in linen_compat.root_variables(scope)
            if in_filter(differentiated, collection)
            and any(block.transform.in_collections(collection) for block in blocks)
        )

    def _open_about(self, scope: Scope) -> tuple:
        reads = Reads(Place(scope), '', idle=False)
        return (*reads.flags.applied_blocks, *reads.inside)

    def _writable(self, scope: Scope, collection: str) -> bool:
        # A derivative in a block is one with respect to what the block hands in, and that cannot be
        # handed back (test_an_explicit_derivative_in_a_block).
        return (
            collection not in self.given
            and scope.is_mutable_collection(collection)
            and any(in_filter(f, collection) for f in self.out_filters)
        )

    def read(self, groups: tuple) -> tuple:
        """Transform the values that the body cannot write, and lay what reads give beside others.

        Args:
          groups: for each filter of the transform, for each scope, variables by collection.
        """
        return tuple(
            tuple(
                self._read_group(i, variables, carried=number == self.carry)
                for i, variables in enumerate(group)
            )
            for number, group in enumerate(groups)
        )

    def _read_group(self, i: int, variables: Mapping[str, Any], *, carried: bool) -> dict:
        scope, out = self.packed[i], dict(variables)
        place = Place(scope)
        for run in state.setups:
            out = run.hand_in(scope, place.path, out)
        for collection, tree in list(out.items()):
            writable = self._writable(scope, collection)
            if writable and carried or self._follows(i, collection):
                self.left[i] |= {collection}
                continue
            if not writable:
                self.transformed_collections[i] |= {collection}
            reads = Reads(place, collection, idle=False)
            if reads.idle:
                continue
            seen = reads.of(place.path, tree)
            if not writable:
                out[collection] = seen
            elif (changed := changed_part(tree, seen)) is not None:
                out[BESIDE + collection] = changed
                self.beside[i][collection] = tree, changed
        return out

    def _follows(self, i: int, collection: str) -> bool:
        """Say whether reads of a collection give what the body may write elsewhere meanwhile."""
        return any(
            block.transform.in_collections(collection) and self._writable(self.packed[i], source)
            for block in self.open[i]
            for source in block.transform.read_from()
        )

    def bind(self, scope_fn: Callable) -> Callable:
        """Make ``scope_fn`` mark the body's scopes with what was done and what is left to do."""
        if self.given:
            scope_fn = functools.partial(scope_fn, mutable_filter=DenyList(tuple(self.given)))

        def bind(*args, **kwargs):
            inner = self.treedef.flatten_up_to(scope_fn(*args, **kwargs))
            for i, root in dict(zip(self.places, map(_root, inner), strict=True)).items():
                self._mark(i, root)
                if self.open[i]:
                    variables = linen_compat.root_variables(root)
                    self.got[id(variables)] = variables, self._values(i, root)
            bound = list(map(self._bind, self.scopes, inner))
            _lay_in(self.scopes, bound)
            return self.treedef.unflatten(bound)

        return bind

    def _mark(self, i: int, root: Scope) -> None:
        """Set the flags of a scope that was handed in, and all below it."""
        outer = flags_of(self.packed[i])
        flags = ScopeFlags(
            outer.root_id,
            outer.variables,
            self.transformed_collections[i],
            self._copies(i, root),
            self.open[i],
            trace=jax_compat.staging_trace(),
            split=outer.split or self.split,
        )
        inner = application_of(self.packed[i]).inner
        root.flags = root.flags.copy({FLAG: flags, APPLICATION: new_application(inner)})

    def _copies(self, i: int, root: Scope) -> dict[tuple, tuple]:
        """Take what lies beside the stored variables out of a body's scope."""
        variables = linen_compat.root_variables(root)
        copies: dict[tuple, tuple] = {}
        if not self.open[i]:
            return copies
        start = linen_compat.scope_path(root)
        for collection in [name for name in variables if not name.startswith(BESIDE)]:
            beside = variables.pop(BESIDE + collection, {})
            if beside == LEFT or collection in self.transformed_collections[i] | self.left[i]:
                continue
            for info, stored in walk(variables[collection], collection, start):
                path = info.absolute_path
                copies[collection, path] = stored, value_at(beside, path[len(start) :], stored)
        return copies

    def _bind(self, outer: Scope, inner: Scope) -> Scope:
        root, scope = _root(inner), inner
        while scope is not root:
            scope.flags = scope.flags.copy({name: root.flags[name] for name in (FLAG, APPLICATION)})
            scope = scope.parent
        own = flags_of(outer).module_blocks
        if own:
            # The same scope may be handed in twice, as a live module's and as its mirror's.
            inner = inner.rewound()
            set_flags(inner, flags_of(root).with_module_blocks(own))
        return inner

    def _values(self, i: int, root: Scope) -> dict[tuple, Any]:
        """Return what is stored in a scope of the body, of what it may write, by name."""
        start = len(linen_compat.scope_path(root))
        return {
            (i, collection, info.path[start:]): stored
            for collection, tree in linen_compat.root_variables(root).items()
            if root.is_mutable_collection(collection) and self._comes_out(collection)
            for info, stored in walk(tree, collection, linen_compat.scope_path(root))
        }

    def _comes_out(self, collection: str) -> bool:
        filters = [
            next((f for f in of if in_filter(f, collection)), None)
            for of in (self.in_filters, self.out_filters)
        ]
        return filters[0] == filters[1] and not in_filter(self.mapped, collection)

    def repack(self, repack_fn: Callable, jitted: Jitted | None) -> Callable:
        """Make ``repack_fn`` note which variables the body has left as they were."""

        def repacked(scope_tree: Any) -> Any:
            inner = self.treedef.flatten_up_to(scope_tree)
            same = set()
            for i, root in dict(zip(self.places, map(_root, inner), strict=True)).items():
                if not self.open[i]:
                    continue
                _, got = self.got.pop(id(linen_compat.root_variables(root)), (None, {}))
                same |= {
                    name
                    for name, value in self._values(i, root).items()
                    if name in got and identical(got[name], value)
                }
            # A body may be traced several times, as are the branches of a cond.
            self.same = frozenset(same if self.same is None else self.same & same)
            written = repack_fn(scope_tree)
            if self.mapped:
                written = (tuple(map(self._with_beside, self.beside, written[0])), *written[1:])
            return (written, _Same(self.same)) if jitted else written

        return repacked

    def _with_beside(self, beside: dict[str, tuple], variables: Mapping[str, Any]) -> dict:
        """Lay what reads give beside variables that `map_variables` maps after the body has run."""
        out = dict(variables)
        for collection, (tree, changed) in beside.items():
            if collection in out:
                out[BESIDE + collection] = changed if identical(out[collection], tree) else LEFT
        return out

    def publish(self, scope: Scope, collection: str, name: str, value: Any) -> Any:
        """Return what to store of what the body has returned."""
        i = next((i for i, packed in enumerate(self.packed) if packed is scope), None)
        if i is None or not self.same:
            return value
        try:
            stored = linen_compat.stored(scope, collection, (*linen_compat.scope_path(scope), name))
        except KeyError:
            return value
        return self._published((i, collection, (name,)), value, stored)

    def _published(self, name: tuple, value: Any, stored: Any) -> Any:
        if isinstance(value, Mapping):
            below = stored if isinstance(stored, Mapping) else {}
            return rebuilt(
                value,
                {
                    key: self._published((*name[:2], (*name[2], key)), child, below.get(key))
                    for key, child in children_of(value).items()
                },
            )
        return stored if name in self.same and _alike(value, stored) else value

    def paths(self) -> tuple[Path, ...]:
        """Return where the scopes are."""
        return tuple(map(linen_compat.scope_path, self.scopes))


def _lay_in(outer: list[Scope], inner: list[Scope]) -> None:
    """Let a body's scopes lie in one another, as objects, as those that they stand for do.

    `nn.share_scope` asks for that, and moves the one or the other module.
    """
    views = {id(scope): view for scope, view in zip(outer, inner, strict=True)}
    for scope, view in zip(outer, inner, strict=True):
        while scope.parent is not None and view.parent is not None:
            if id(scope.parent) in views:
                view.parent = views[id(scope.parent)]
                break
            scope, view = scope.parent, view.parent


def _root(scope: Scope) -> Scope:
    while scope.parent is not None:
        scope = scope.parent
    return scope


def _alike(a: Any, b: Any) -> bool:
    (a, kind_a), (b, kind_b) = jax.tree.flatten(a), jax.tree.flatten(b)
    return kind_a == kind_b and all(map(_same_type, a, b))


def _same_type(a: Any, b: Any) -> bool:
    return a is b or (
        isinstance(b, jax.Array)
        and jnp.shape(a) == b.shape
        and getattr(a, 'dtype', None) == b.dtype
    )
