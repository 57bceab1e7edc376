"""Common slips with predicates: what was handed over instead of one, and the way out.

Nothing here selects anything; `filters` asks before it makes a filter, and when one was asked.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from flax_sg._errors import PredicateError, UsageError
from flax_sg._filters.callables import describe_callable
from flax_sg._filters.of_nnx import is_module

__all__ = [
    'arguments_of',
    'as_bool',
    'check_arity',
    'check_tree',
    'kind_of',
    'order',
    'refuse',
    'swapped',
]

_ARGUMENTS = {
    'scale_gradient': 'predicate, factor',
    'map_gradient': 'predicate, fn',
    'map_values': 'predicate, fn',
    'replace_values': 'predicate, source',
}
_TRANSFORMS = {*_ARGUMENTS, 'stop_gradient', 'constant'}

# Of front ends: what the transform is to be applied to instead, for objects of theirs, or ''.
also_refused: list[Callable[[Any], str]] = []


def kind_of(value: Any) -> str:
    """Name the type of a value."""
    return f'an object of type {type(value).__name__}'


def _call_of(name: str) -> str:
    """Return how a transform is made, as code."""
    name = name if name in _TRANSFORMS else 'stop_gradient'
    return f'{name}({_ARGUMENTS.get(name, "predicate")})'


def order(value: Any, name: str) -> str:
    """Return a sentence if a number may have been meant as the second argument, otherwise ''."""
    misplaced = name in _ARGUMENTS and isinstance(value, (int, float))
    return f' The predicate comes first: {_call_of(name)}.' if misplaced else ''


def swapped(name: str, first: Any, second: Any) -> str:
    """Return a sentence if the arguments of a maker of transforms look exchanged, otherwise ''."""

    def is_predicate(value: Any) -> bool:
        return isinstance(value, (str, re.Pattern, bool)) or hasattr(type(value), 'selects')

    exchanged = is_predicate(second) and not is_predicate(first)
    return f' The predicate comes first: {_call_of(name)}.' if exchanged else ''


def refuse(predicate: Any, name: str) -> None:
    """Raise PredicateError for what is often handed over in place of a predicate."""
    why = _refusal(predicate, name)
    if why:
        shown = (
            f'the class {predicate.__name__}'
            if isinstance(predicate, type)
            else (kind_of(predicate))
        )
        raise PredicateError(f'{name}: got {shown}. {why}')


def _refusal(predicate: Any, name: str) -> str:
    make = _call_of(name)
    apply_to = f'A predicate says which variables; make the transform first: {make}'
    if isinstance(predicate, type):
        return (
            'A predicate selects by name; for an NNX filter such as a variable type use '
            f'flax_sg.from_nnx. To transform a Module class, make the transform first: {make}'
            '(ModuleClass).'
        )
    if hasattr(type(predicate), 'in_collections'):  # a Transform, which this file does not know
        return (
            f'{predicate!r} is a transform, no predicate. Pass what it selects, its .filter; '
            'to have both, nest their blocks: `with a, b:`.'
        )
    if isinstance(predicate, (jax.Array, np.ndarray, np.generic)):
        return f'{apply_to}(tree). For a single array use jax.lax.stop_gradient(array).'
    for refused in also_refused:
        if why := refused(predicate):
            return f'{apply_to}{why}'
    if isinstance(predicate, Mapping):
        return f'{apply_to}(tree).'
    if not callable(predicate) and not _is_leaf(predicate):
        return f'{apply_to}(tree), with a nested dict as tree.'
    return ''


def _is_leaf(value: Any) -> bool:
    return value is None or jax.tree_util.all_leaves([value])


def check_arity(fn: Callable, wanted: tuple[str, ...], name: str) -> None:
    """Raise PredicateError if a callable cannot be called with so many arguments."""
    names, fits = arguments_of(fn, wanted)
    if names[:1] == ['self']:
        raise PredicateError(
            f'{name}: got the method {describe_callable(fn)}; expected a predicate. To decorate a '
            f'method, write @nn.{_decorator(name)}.'
        )
    if not fits:
        raise PredicateError(
            f'{name}: got {describe_callable(fn)}, a callable of ({", ".join(names)}); expected '
            f'one of ({", ".join(wanted)}).{_other_callables(names, wanted, name)}'
        )


def arguments_of(fn: Callable, wanted: tuple[str, ...]) -> tuple[list[str], bool]:
    """Return the names of a callable's arguments, and whether it can be called with some."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # as of some that are not written in Python
        return [], True
    try:
        signature.bind(*wanted)
    except TypeError:
        return list(signature.parameters), False
    return list(signature.parameters), True


def _decorator(name: str) -> str:
    return _call_of(name).replace('predicate', 'True')


def _other_callables(names: list[str], wanted: tuple[str, ...], name: str) -> str:
    if len(wanted) > 1:
        return ' Fix its arguments.'
    way_out = {
        2: ' For a callable of (path, value), as NNX has it, use flax_sg.from_nnx(fn).',
        3: ' For a callable of (module_name, name, value), as Haiku has it, use '
        'flax_sg.from_haiku(fn).',
    }.get(len(names), ' Fix its arguments.')
    first = f' The predicate comes first: {_call_of(name)}.' if name in _ARGUMENTS else ''
    return f' A predicate sees names, shapes and dtypes, and no value.{way_out}{first}'


def as_bool(answer: Any, predicate: Any, variable: str) -> bool:
    """Return the answer of a user's callable as a bool, or raise PredicateError."""
    if isinstance(answer, (bool, np.bool_, re.Match)) or answer is None:
        return bool(answer)
    shown = repr(answer) if isinstance(answer, (str, int, float)) else kind_of(answer)
    raise PredicateError(
        f'{predicate!r} returned {shown} for {variable!r}; expected a bool. {_bool_of(answer)}'
    )


def _bool_of(answer: Any) -> str:
    if isinstance(answer, str):
        return (
            'For labels, as optax takes them, use flax_sg.labels({label: predicate}, params); '
            "for a predicate compare: fn(info) == 'frozen'."
        )
    if isinstance(answer, (int, np.integer)):
        return (
            'For class numbers, as of partition_n, use flax_sg.data_structures.partition_n; '
            'for a predicate compare: fn(...) == 1.'
        )
    if isinstance(answer, (jax.Array, np.ndarray)):
        return (
            'A predicate sees names, shapes and dtypes; it cannot depend on a traced value or '
            'an array.'
        )
    if hasattr(type(answer), 'selects'):
        return 'Use that filter itself as the predicate, or return its .selects(info).'
    return 'Return a comparison, or bool(...) of it if its truth is meant.'


def check_tree(tree: Any, name: str) -> None:
    """Raise UsageError for what is no nested mapping of variables."""
    if isinstance(tree, Mapping):
        return
    found = tree_of(tree)
    way_out = {
        'state': 'Pass nnx.state(module, nnx.Param).',
        'params': f"Pass the {type(tree).__name__}'s .params.",
    }.get(found, 'Pass the parameters themselves.')
    raise UsageError(
        f'{name}: got {kind_of(tree)} as tree; expected a nested mapping of variables. {way_out}'
    )


def tree_of(value: Any) -> str:
    """Say where an object has a tree of parameters: 'state', 'params', or ''."""
    if is_module(value):
        return 'state'
    return 'params' if isinstance(getattr(value, 'params', None), Mapping) else ''
