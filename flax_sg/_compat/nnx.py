"""Private names of flax.nnx, and the taps on it.

NNX has no hook for reads of a Variable. All of them end at one slot, in which the value lies; here
it is looked at, and the few places where a Variable becomes another one in a function that is
traced, which knows the first no more.

Checked with flax 0.12.8 and 0.12.12.
"""

from __future__ import annotations

import copy
import functools
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

from flax.nnx import graphlib as _graphlib
from flax.nnx import tracers as _tracers
from flax.nnx import variablelib as _variablelib
from flax.nnx.bridge import wrappers as _wrappers
from flax.nnx.pytreelib import Pytree
from flax.nnx.transforms import autodiff as _autodiff
from flax.nnx.variablelib import Variable

from flax_sg._compat import jax as jax_compat

__all__ = [
    'Pytree',
    'TraceState',
    'Variable',
    'alike',
    'given_back',
    'gives_back',
    'handed_on',
    'is_cached',
    'is_hijax',
    'is_pytree',
    'is_ref',
    'memory_of',
    'set_trace_state',
    'slot',
    'store',
    'stored',
    'takes_back',
    'tap_bridges',
    'tap_custom_vjp',
    'tap_flattening',
    'tap_handing_on',
    'tap_hijax',
    'tap_in_place',
    'tap_new',
    'tap_shallow_copies',
    'tap_values',
    'trace_state_of',
]

TraceState = _tracers.TraceState

slot = vars(Variable)['_raw_value']
slot = getattr(slot, '_flax_sg_original', slot)  # importing twice taps once

stored: Callable[[Variable], Any] = slot.__get__
store: Callable[[Variable, Any], None] = slot.__set__


def tap_values(tap: Any) -> None:
    """Let every read and write of a Variable's value pass a data descriptor."""
    tap._flax_sg_original = slot
    Variable._raw_value = tap


def alike(variable: Variable) -> Variable:
    """Return another Variable with the same value as it lies, and the same metadata."""
    return type(variable)._new(stored(variable), variable.get_metadata())


# The object by which NNX knows in which trace a Variable was made.
trace_state_of: Callable[[Variable], Any] = vars(Variable)['_trace_state'].__get__


def set_trace_state(variable: Variable, state: Any) -> None:
    object.__setattr__(variable, '_trace_state', state)


class HandedOn(NamedTuple):
    """How JAX takes a Variable apart.

    Attributes:
      on: to put it together again in a function that it traces, or NNX to have another one like it.
      rule: that function has a rule of the user's for its derivative.
      differentiated: what is put together again may be a derivative with respect to it.
    """

    on: bool
    rule: bool
    differentiated: bool


def handed_on() -> HandedOn:
    """Say how the Variable is taken apart whose flattening is tapped by the caller."""
    module, leaves = jax_compat.flattening(sys._getframe(3))  # past the two taps
    own = module.startswith(_TRANSFORMS)
    rule = module == 'jax._src.custom_derivatives'
    return HandedOn(own or not leaves, rule, module == 'jax._src.api')


_TRANSFORMS = ('flax.nnx.extract', 'flax.nnx.transforms')


def takes_back() -> bool:
    """Say whether it is for a function that it traced that NNX calls what a tap stands for."""
    return sys._getframe(3).f_globals.get('__name__', '').startswith(_TRANSFORMS)


def tap_flattening(tap: Callable[[Callable, Variable], tuple]) -> None:
    """Let ``tap(original, variable)`` say what JAX sees of a Variable.

    JAX holds the functions that flatten a Variable, so that their code is replaced.
    """
    for name in ('_variable_flatten', '_variable_flatten_with_keys'):
        fn = getattr(_variablelib, name)
        if fn.__defaults__ is None:
            original = types.FunctionType(fn.__code__, fn.__globals__, name)
            fn.__code__ = _call.__code__
        else:
            original = fn.__defaults__[0].args[0]
        fn.__defaults__ = (functools.partial(tap, original),)


def _call(x, call=None):
    return call(x)


def tap_handing_on(split: Callable, merge: Callable) -> None:
    """Let ``split(original, *args)`` run where NNX takes modules apart, ``merge`` where it joins.

    It does so for the functions that it hands to JAX, and for what they return.
    """
    for owner, tap, names in (
        (_graphlib.SplitContext, split, ('split', 'flatten')),
        (_graphlib.MergeContext, merge, ('merge', 'unflatten')),
    ):
        for name in names:
            jax_compat.tap(owner, name)(tap)


def given_back(context: Any, graphdef: Any) -> list[tuple[Variable, Any]]:
    """Return the Variables that NNX updates with what a function gives back, and their metadata."""
    tag = context.ctxtag
    outer = None if tag is None else _graphlib.current_update_context(tag).outer_index_outer_ref
    if not outer:
        return []
    kinds = (node for node in graphdef.nodes if isinstance(node, _graphlib.VariableDef))
    found = ((outer.get(node.outer_index), node.metadata) for node in kinds)
    return [(variable, dict(metadata)) for variable, metadata in found if variable is not None]


def memory_of(context: Any) -> dict:
    """Return a dict that lasts as long as NNX puts together what one function gives back."""
    return vars(context).setdefault('_flax_sg', {})


def is_ref(value: Any) -> bool:
    """Say whether a value lies in a Ref, or is one that is traced."""
    return _variablelib.is_array_ref(value)


def is_pytree(cls: type) -> bool:
    """Say whether JAX takes the modules of a class apart."""
    return cls._pytree__is_pytree


def is_cached(context: Any) -> bool:
    """Say whether what NNX takes apart there is known since `nnx.cached_partial`."""
    tag = context.ctxtag
    known = None if tag is None else _graphlib.current_update_context(tag).static_cache
    return known is not None


def gives_back(context: Any) -> bool | None:
    """Say whether NNX takes apart what a function gives back, rather than what it is given.

    None says that it does so for neither, as for the rule of a custom_vjp.
    """
    return context.is_inner


def tap_hijax(tap: Callable) -> None:
    """Let ``tap(original, variable)`` read a hijax Variable."""
    jax_compat.tap(_variablelib, '_get_hijax_state')(tap)


def is_hijax(variable: Any) -> bool:
    return not issubclass(type(variable), Variable)  # it is an instance, as NNX has it


def tap_bridges(to_nnx: Callable, to_linen: Callable) -> None:
    """Tap the calls of a model of Linen as a module of NNX, and of one of NNX as one of Linen."""
    jax_compat.tap(_wrappers.ToNNX, '__call__')(to_nnx)
    jax_compat.tap(_wrappers.ToLinen, '__call__')(to_linen)


def tap_in_place(fn: Any, tap: Callable) -> None:
    """Let a function, which others may have imported by name, be ``tap(original, *args)``."""
    if '_tap' not in (fn.__kwdefaults__ or {}):
        original = types.FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__)
        fn.__code__, fn.__defaults__ = _call_any.__code__, None
    else:
        original = fn.__kwdefaults__['_tap'].args[0]
    fn.__kwdefaults__ = {'_tap': functools.partial(tap, original)}


def _call_any(*args, _tap=None):
    return _tap(*args)


def tap_shallow_copies(tap: Callable[[Callable, Variable], Variable]) -> None:
    """Let ``tap(original, variable)`` be what `copy.copy` makes of a Variable."""
    as_ever = lambda variable: copy._reconstruct(variable, None, *variable.__reduce_ex__(4))
    Variable.__copy__ = lambda variable: tap(as_ever, variable)


def tap_custom_vjp(tap: Callable) -> None:
    """Tap the calls of functions with a rule of the user's that hand back what they write."""
    jax_compat.tap(_autodiff.CustomVjp, '__call__')(tap)


def tap_new(tap: Callable) -> None:
    """Let ``tap(original, cls, value, metadata)`` put Variables together again."""
    original = vars(Variable)['_new'].__func__
    original = getattr(original, '_flax_sg_original', original)

    @functools.wraps(original)
    def new(cls, value, metadata):
        return tap(original, cls, value, metadata)

    new._flax_sg_original = original
    Variable._new = classmethod(new)
