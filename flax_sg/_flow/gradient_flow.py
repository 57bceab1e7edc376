"""Why is a gradient zero: a verdict, the operation and the line for each parameter and loss.

The loss is traced, its jaxpr laid open as a graph (`graph`), and three questions are asked of all
its paths at once: which tangents get where, which values get where, and where a value goes on
without its tangent (`tangents`, `obstacles`). JAX's own pullback of the whole loss has to agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from flax_sg._errors import UsageError
from flax_sg._filters.slips import kind_of
from flax_sg._filters.variables import VariableInfo, names_of
from flax_sg._flow.analysis import Analysis
from flax_sg._flow.backward import Gradient
from flax_sg._flow.losses import Program, is_array
from flax_sg._flow.records import FlowRecord, Verdict
from flax_sg._flow.report import Flow

__all__ = ['arrays_of', 'gradient_flow']


def gradient_flow(losses: Any, *, norms: bool = False) -> Callable[..., Flow]:
    """Say for each parameter and loss whether a gradient gets there, and if not, which line did it.

    Use it when a parameter does not train, or trains when it should not. It works on any JAX
    function, and looks at the program: the losses are traced, twice, and not run.

    >>> import jax.numpy as jnp
    >>> def loss(params, x):
    ...     order = jnp.argsort(params['scores'])
    ...     return (params['w'] * x[order]).sum()
    >>> params = {'scores': jnp.ones(3), 'w': jnp.ones(3), 'old': jnp.ones(3)}
    >>> flow = gradient_flow(loss)(params, jnp.arange(3.0))
    >>> flow['loss', 'w'].verdict, flow['loss', 'old'].verdict
    (<Verdict.REACHED: 'REACHED'>, <Verdict.UNUSED: 'UNUSED'>)
    >>> record = flow['loss', 'scores']
    >>> str(record.verdict), record.operation
    ('PIECEWISE_CONSTANT', 'argsort (sort)')

    Args:
      losses: a dict of functions that return a scalar, a function that returns a dict of scalars,
        or one that returns a scalar, which is called ``'loss'``.
      norms: run the losses too, forward once and back for each, one operation at a time, and give
        each record the norm of its gradient; finds gradients that are zero or not finite on this
        input, and the operation at which they become so.

    Returns:
      A function of ``(params, *args, **kwargs)`` as the losses take them, that returns a
      :class:`Flow` of records. ``params`` is any pytree, a module or State of flax.nnx too, of
      which ``nnx.Param`` counts; its arrays, and those of the arguments, may be
      ``jax.ShapeDtypeStruct`` unless ``norms``.

    Raises:
      UsageError: ``losses`` are none, one does not return a real scalar, there are no arrays among
        the parameters, or two have one name, as 'a/b' and b in a; with norms, an array is abstract.

    Source: jax issue 10867, google/flax issue 1857.
    """
    if not callable(losses) and not (
        isinstance(losses, Mapping) and losses and all(map(callable, losses.values()))
    ):
        raise UsageError(
            f'gradient_flow was given {kind_of(losses)}; expected a '
            'function of (params, *args), or a dict of such functions by name.'
        )

    def flow(params: Any, /, *args: Any, **kwargs: Any) -> Flow:
        infos, leaves = map(list, zip(*arrays_of(params), strict=True))
        # Of a module of flax.nnx, whose other Variables are state.
        ours = {info.name for info in infos if info.collection == 'params'}
        shown = [info for info in infos if info.name in ours or not ours]
        twice = [name for name, n in Counter(info.name for info in infos).items() if n > 1]
        if twice:
            raise UsageError(f'gradient_flow: params has two leaves named {twice[0]!r}.')
        abstract = [i.name for i, x in zip(infos, leaves, strict=True) if _is_abstract(x)]
        if norms and (abstract or any(map(_is_abstract, jax.tree.leaves((args, kwargs))))):
            what = f'the parameter {abstract[0]!r}' if abstract else 'an argument'
            raise UsageError(
                f'gradient_flow: norms=True runs the losses, and {what} is a ShapeDtypeStruct; '
                'expected arrays. Pass arrays, or leave norms out.'
            )
        program = Program.trace(losses, params, args, kwargs)
        found = _records(program, infos, leaves if norms else None)
        return Flow(tuple(r for r in found if r.name in ours or not ours), shown)

    return flow


def _is_abstract(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def arrays_of(params: Any) -> list[tuple[VariableInfo, Any]]:
    """Return the arrays of a tree with their names; one that is no tree is called 'params'.

    Raises:
      UsageError: there are none.
    """
    infos, leaves, _ = names_of(params)
    found = [
        (info if info.path else VariableInfo.of(('params',), ('params',), 'params', leaf), leaf)
        for info, leaf in zip(infos, leaves, strict=True)
        if is_array(leaf)
    ]
    if not found:
        raise UsageError(
            f'gradient_flow: got {kind_of(params)} as parameters, in which there is no array; '
            'expected the parameters that the losses take first.'
        )
    return found


def _records(
    program: Program, infos: list[VariableInfo], values: list[Any] | None
) -> Iterator[FlowRecord]:
    findings = Analysis(program)
    found_at: dict[tuple[int, int], Gradient | str] = {}
    if values is not None:
        params = [findings.differentiable(k) for k in range(len(program.losses))]
        found_at = program.gradients(findings.graph, values, params)
    for k, loss in enumerate(program.losses):
        for p, info in enumerate(infos):
            found = findings.of(p, k)
            gradient = found_at.get((p, k))
            if isinstance(gradient, Gradient):
                if gradient.is_zero and _is_reached(found):  # a rule that passes on nothing
                    found = findings.ended_inside(p, k) or found
                found = _with_gradient(found, gradient, findings)
            elif gradient is not None and _is_reached(found):
                found = {**found, 'reason': found['reason'] or gradient}
            yield FlowRecord(loss=loss, name=info.name, **found)


def _is_reached(found: dict[str, Any]) -> bool:
    return found['verdict'] in (Verdict.REACHED, Verdict.REACHED_PARTLY)


def _with_gradient(found: dict[str, Any], gradient: Gradient, findings: Analysis) -> dict[str, Any]:
    verdict, norm = found['verdict'], gradient.norm
    found = {**found, 'norm': norm}
    if not _is_reached(found):
        if not gradient.is_zero and verdict is not Verdict.UNKNOWN:
            reason = f'the program says {verdict}, and the gradient has the norm {norm}'
            found |= {'verdict': Verdict.UNKNOWN, 'reason': reason}
        return found
    spoiled = gradient.infinite()
    if spoiled is not None or not gradient.is_finite:
        reason = 'the gradient is not finite'
        if gradient.is_finite:
            reason = 'a cotangent on its way is infinite, and is not chosen on this input'
        found |= {'verdict': Verdict.NOT_FINITE, 'reason': reason}
        return found | findings.located(spoiled)
    if gradient.is_zero:
        return found | findings.located(gradient.zero()) | {'verdict': Verdict.NUMERIC_ZERO}
    return found
