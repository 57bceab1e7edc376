"""Private names of Flax Linen, and the taps on it.

Flax has no public hook for reads of variables. Haiku has one, the custom getter; here are the
points of Flax at which one has to stand, each with its reason.

Checked with flax 0.12.8 and 0.12.12.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from flax.core import lift
from flax.core.scope import Scope, Variable
from flax.linen import Module
from flax.linen import module as _module
from flax.linen import transforms as _transforms

from flax_sg._compat.jax import tap

__all__ = [
    'CALL',
    'Module',
    'Scope',
    'Variable',
    'child',
    'counts',
    'current_module',
    'draws',
    'in_scratch_root',
    'in_setup',
    'lifted_call',
    'packed_scopes',
    'root_variables',
    'run_setup',
    'scope_path',
    'setup_pending',
    'stored',
    'tap_map_variables',
    'tap_pack',
    'tap_value',
    'transform_of',
    'unwrapped',
    'wrapped',
]


CALL = inspect.unwrap(Module._call_wrapped_method).__code__  # that runs each method of a module


def current_module() -> Module | None:
    """Return the bound module whose method is running in this thread, or None outside of all."""
    module = _module._context.module_stack[-1]  # no public name as of 0.12
    return module if module is not None and module.scope is not None else None


def transform_of(cls: type) -> str | None:
    """Return the name of the lifted transform, such as `scan`, that made a class of another one."""
    for member in vars(cls).values():
        while hasattr(member, '__wrapped__'):
            code = getattr(member, '__code__', None)
            if (
                code is not None
                and member.__globals__ is vars(_transforms)
                and code.co_qualname.startswith('module_class_lift_transform')
            ):
                cells = dict(zip(code.co_freevars, member.__closure__, strict=True))
                if cells['module_class'].cell_contents is cls.__base__:
                    return cells['transform'].cell_contents.__name__
            member = member.__wrapped__
    return None


def unwrapped(member: Any) -> Any:
    """Return the descriptor that Flax has wrapped, to give better messages."""
    return member.wrapped if isinstance(member, _module.DescriptorWrapper) else member


def root_variables(scope: Scope) -> dict[str, Any]:
    """Return the dict that all scopes under one root read; its identity is that of the root.

    The root Scope object itself will not do: a compact call replaces it by a rewound copy.
    """
    return scope.root._variables


def in_scratch_root(scope: Scope) -> bool:
    """Say whether Flax is only checking a module's names, in a throw-away scope."""
    return isinstance(scope.root, _module.TestScope)


def scope_path(scope: Scope) -> tuple[str, ...]:
    """Return the path in the variables, which `Scope.path` is not after `nn.share_scope`."""
    names: list[str] = []
    while scope.parent is not None:
        names.append(scope.name)
        scope = scope.parent
    return (*scope.path, *reversed(names))


def stored(scope: Scope, collection: str, path: tuple[str, ...]) -> Any:
    """Return what the scope's root stores at an absolute path; KeyError if there is nothing."""
    value = root_variables(scope)[collection]
    for name in path[len(scope.root.path) :]:  # in a lifted body the root is a module's scope
        value = value[name]
    return value


def packed_scopes(scopes: list[Scope]) -> tuple[tuple[Scope, ...], list[int]]:
    """Return the scopes whose variables `lift.pack` hands on: those not below another one.

    And for each scope, the index of the one that it is or is below.
    """
    packed, places = lift._dedup_scopes(scopes)
    return packed, [packed.index(root) for root, _ in places]  # scopes compare by what they show


def lifted_call(body: Callable, fn: Callable, module: Module, /, *args: Any, **kwargs: Any) -> Any:
    """Call ``fn(module, *args, **kwargs)`` as the body of a transform that Flax lifts.

    ``body`` gets a function of no argument, which may be called in a trace of JAX and returns what
    ``fn`` does and the variables that it may have written; ``body`` returns both.
    """

    def transform(core: Callable, scopes: Any, /, *args: Any, **kwargs: Any) -> Any:
        def inner(scope_fn: Callable, repack_fn: Callable, groups: Any, rngs: Any) -> Any:
            def call() -> tuple[Any, Any]:
                inside = scope_fn(groups, rngs)
                out = core(inside, *args, **kwargs)
                return out, repack_fn(inside)

            return body(call)

        return lift.pack(inner, (True,), (True,), (True,), name='gradient_views')(scopes)

    return _transforms.lift_direct_transform(transform, (fn,), module, *args, **kwargs)


def setup_pending(module: Module) -> bool:
    """Say whether the next use of the module will run its ``setup``."""
    state = module._state
    return (
        module.scope is not None
        and not state.in_setup
        and state.setup_called != _module.SetupState.DONE
    )


def run_setup(module: Module) -> None:
    """Run the module's ``setup`` if it has not run."""
    module._try_setup()


def in_setup(module: Module) -> bool:
    """Say whether the module's ``setup`` is running."""
    return module._state.in_setup


def child(module: Module, name: str) -> Module | None:
    """Return the submodule of a name, if there is one."""
    found = module._state.children.get(name)
    return found if isinstance(found, Module) else None


def wrapped(descriptor: Any) -> Any:
    """Wrap a descriptor of a module class as Flax does, which tells of an AttributeError in it."""
    return _module.create_descriptor_wrapper(descriptor)


def counts(counters: dict) -> dict:
    """Return how many keys a scope has drawn from each random stream, those below it left out."""
    return {name: count for name, count in counters.items() if not isinstance(count, dict)}


def draws(scope: Scope) -> list[dict]:
    """Return how many keys the scope and those below it have drawn from each random stream."""
    return list(map(counts, _counters_below(scope.rng_counters)))


def _counters_below(counters: dict) -> Iterator[dict]:
    yield counters
    for value in counters.values():
        if isinstance(value, dict):
            yield from _counters_below(value)


def tap_value(fn: Callable) -> Callable:
    """Tap assignments to `Variable.value`, which look at what is stored for a box around it."""
    getter = Variable.value.fget
    original = getattr(Variable.value.fset, '_flax_sg_original', Variable.value.fset)

    def setter(self: Variable, value: Any) -> None:
        fn(original, self, value)

    setter._flax_sg_original = original
    Variable.value = property(getter, setter, doc=Variable.value.__doc__)
    return fn


def tap_pack(fn: Callable) -> Callable:
    """Tap `flax.core.lift.pack`, through which every lifted transform hands variables on."""
    return tap(lift, 'pack')(fn)


def tap_map_variables(fn: Callable) -> Callable:
    """Tap `flax.core.lift.map_variables`, which gives variables to a function of the user's."""
    return tap(lift, 'map_variables')(fn)
