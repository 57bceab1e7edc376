"""A test of what a loss trains: it reaches what a predicate selects, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax_sg._errors import UsageError
from flax_sg._filters.filters import Filter, Predicate, as_filter, written
from flax_sg._filters.slips import kind_of
from flax_sg._filters.unmatched import check_matched
from flax_sg._flow.gradient_flow import arrays_of, gradient_flow
from flax_sg._flow.records import FlowRecord, Verdict, shortened
from flax_sg._flow.report import Flow

__all__ = ['assert_flow']


_MISSING = object()


def assert_flow(
    losses: Any,
    spec: Mapping[str, Predicate],
    params: Any = _MISSING,
    /,
    *args: Any,
    norms: bool = False,
    **kwargs: Any,
) -> Flow:
    """Assert that each loss reaches the parameters its predicate selects, and nothing else.

    Use it in tests and before a long training. It needs no run of the losses.

    >>> import jax, jax.numpy as jnp
    >>> import flax_sg as sg
    >>> def losses(params, x):
    ...     code = x * jax.lax.stop_gradient(params['gln']) * params['code']
    ...     return {'gln': (x * params['gln']).sum(), 'code': code.sum()}
    >>> params = {'gln': jnp.ones(3), 'code': jnp.ones(3)}
    >>> flow = sg.assert_flow(losses, {'gln': 'gln', 'code': 'code'}, params, jnp.ones(3))
    >>> sg.assert_flow(losses, {'code': ('gln', 'code')}, params, jnp.ones(3))
    Traceback (most recent call last):
    ...
    AssertionError: assert_flow: 1 gradient is not as expected.
      loss 'code': gln is MASKED, stop_gradient at <doctest ... (losses).

    Args:
      losses: as for :func:`gradient_flow`.
      spec: for each loss a predicate, as of :func:`stop_gradient`, of what it should reach. Losses
        that it does not name are not checked. Paths count from the root of ``params``.
      params, args, kwargs: what the losses take, as for :func:`gradient_flow`.
      norms: run the losses too, and count a gradient that is zero or not finite on this input as
        not reached.

    Returns:
      The :class:`Flow`.

    Raises:
      AssertionError: lists each LEAK, a parameter that is reached and should not be, each that is
        not reached and should be, and each of which it is not known, with the lines.
      UnmatchedPathError: a glob or a regex of the spec selects no parameter.
      PredicateError, UsageError: the spec holds no predicates, or names no loss; or there are no
        parameters.

    Source: google/flax issue 1857; ray pull request 65125, a freeze that was forgotten.
    """
    if not isinstance(spec, Mapping) or not spec:
        raise UsageError(
            f'assert_flow: spec is {kind_of(spec)}; expected a dict '
            '{loss: predicate} that is not empty.'
        )
    filters = {
        loss: as_filter(predicate, name=f'assert_flow[{loss!r}]')
        for loss, predicate in spec.items()
    }
    flow_of = gradient_flow(losses, norms=norms)
    if params is _MISSING:
        raise UsageError(
            'assert_flow was given no parameters, and has asserted nothing; expected '
            'assert_flow(losses, spec, params, *args), with what the losses take.'
        )
    infos = [info for info, _ in arrays_of(params) if info.collection == 'params']
    for loss, filter in filters.items():
        check_matched(filter.patterns(), infos, where=f'assert_flow[{loss!r}]', of='params')
    flow = flow_of(params, *args, **kwargs)
    for loss in filters:
        if loss not in flow.losses:
            raise UsageError(
                f'assert_flow: there is no loss {loss!r}; there is '
                f'{", ".join(map(repr, flow.losses))}.'
            )
    wrong = [
        line
        for loss, filter in filters.items()
        for info in infos
        for line in _wrong(flow[loss, info.name], filter, filter.selects(info), norms)
    ]
    if wrong:
        count = '1 gradient is' if len(wrong) == 1 else f'{len(wrong)} gradients are'
        raise AssertionError('\n  '.join([f'assert_flow: {count} not as expected.', *wrong]))
    return flow


def _wrong(record: FlowRecord, filter: Filter, expected: bool, norms: bool) -> list[str]:
    start, why = f'loss {record.loss!r}: {record.name}', record.explain()
    if record.verdict in (Verdict.UNKNOWN, Verdict.NOT_FINITE):
        return [f'{start} is {record.verdict}, {why}.']
    if expected and not record.reached:
        return [f'{start} is {record.verdict}{", " + why if why else ""}.']
    if record.reached and expected and norms and record.norm is None:
        return [f'{start} has no norm, {why}.']
    if record.reached and not expected:
        line = f', reached at {shortened(record.used_at)}' if record.used_at else ''
        return [f'{start} is a LEAK{line}; the spec has {written(filter)}.']
    return []
