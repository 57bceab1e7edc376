"""Private names of JAX, and the taps on it.

A *tap* wraps one function for good, at import. While no block is open it does what the function
does; it keeps no state, and nothing is patched or restored when a block opens or closes.

Checked with jax 0.10.2 and 0.12.0.1.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
import jax.custom_batching
import jax.custom_derivatives
from flax.core import tracers
from jax._src import checkify as _checkify
from jax._src import config as _config
from jax._src import core as _core
from jax._src import linear_util as _linear_util
from jax._src.interpreters import ad as _ad
from jax._src.interpreters import batching as _batching
from jax._src.interpreters import partial_eval as _partial_eval
from jax._src.state import discharge as _discharge
from jax.extend.core import ClosedJaxpr, DebugInfo, Jaxpr, Primitive
from jax.interpreters import ad

__all__ = [
    'batched',
    'checked',
    'current_trace',
    'derivative_trace',
    'flattening',
    'is_around',
    'is_as_good',
    'is_of_trace',
    'is_ref',
    'operation_of',
    'pruned',
    'pulled_back',
    'scan_counts',
    'scope_names',
    'set_cache_key',
    'split',
    'staging_trace',
    'tap',
    'tap_linear_call',
    'tap_rules',
    'trace_context',
    'trace_state',
    'traced',
    'varying',
    'without_refs',
    'written_at',
]


# jax.make_user_context (public since 0.7.2): a thread-local value that is part of the key of every
# cache of traces, so that one function traced in different blocks is never mistaken for another.
_cache_keys = jax.make_user_context(())


def trace_state() -> Any:
    """Return a value that is equal as long as the same JAX trace is the current one, or None.

    There is none while JAX goes from one to the next.
    """
    if _core.trace_ctx.trace is None:
        return None
    return tracers.current_trace()  # wraps jax's get_opaque_trace_state, which moved in 0.10


def trace_context() -> tuple:
    """Return the settings that a trace depends on, such as precision and the current mesh."""
    return _config.trace_context()


def staging_trace() -> Any:
    """Return a value that is equal as long as the same function is being traced to a jaxpr.

    Traces of derivatives and batches inside it do not count: JAX keeps nothing of these. It is None
    while JAX goes from one trace to the next.
    """
    trace = _core.trace_ctx.trace  # no public name as of 0.12
    while not isinstance(trace, _partial_eval.DynamicJaxprTrace) and hasattr(trace, 'parent_trace'):
        trace = trace.parent_trace
    return None if trace is None else trace._weakref


def derivative_trace() -> Any:
    """Return the current trace if it is that of a derivative, otherwise None."""
    trace = _core.trace_ctx.trace
    return trace if isinstance(trace, (_ad.JVPTrace, _ad.LinearizeTrace)) else None


def current_trace() -> Any:
    """Return a weak reference to the current trace, or None while JAX goes from one to the next."""
    trace = _core.trace_ctx.trace
    return None if trace is None else weakref.ref(trace)


def is_around(trace: Any) -> bool:
    """Say whether the current trace began, at some remove, in another; see `current_trace`."""
    wanted, now = trace and trace(), _core.trace_ctx.trace
    while wanted is not None and hasattr(now, 'parent_trace'):
        now = now.parent_trace
        if now is wanted:
            return True
    return False


def is_as_good(before: Any, after: Any) -> bool:
    """Say whether an array can stand for an equal one that a function has made of it.

    It cannot if it was donated to the function, or lies on other devices.
    """
    if isinstance(before, _core.Tracer) or isinstance(after, _core.Tracer):
        return True
    if type(before) is not type(after) or before.is_deleted():
        return False
    return before.sharding == after.sharding


def is_of_trace(value: Any, trace: Any) -> bool:
    """Say whether a value is a tracer of a trace."""
    return isinstance(value, _core.Tracer) and value._trace is trace


_TREES = {'jax._src.tree', 'jax._src.flattree', 'jax._src.tree_util', 'jax._src.flatten_util'}
# What JAX traces functions with; all else of it takes a tree for its leaves, or to compute.
_TRACING = tuple(
    f'jax._src.{name}'
    for name in (
        *(
            'ad_checkpoint',
            'api',
            'checkify',
            'config',
            'core',
            'custom_',
            'export',
            'interpreters',
        ),
        *('lax.control_flow', 'linear_util', 'pjit', 'pmap', 'profiler', 'shard_map', 'stages'),
        *('traceback_util', 'util'),
    )
)
# And functions there that do not trace.
_READERS = ('block_until', 'device_', '_device_', 'with_sharding_constraint', 'reshard')


def flattening(frame: FrameType | None) -> tuple[str, bool]:
    """Say for whom JAX takes a pytree apart: the module's name, and whether it is for the leaves.

    ``frame`` is that which called the function that does so, or the function of JAX that does.

    It is for a function that is traced, and will be put together again there, where the code is
    JAX's own, or calls a jitted function. It is for the leaves where anybody else's code calls one
    of JAX's functions of trees.
    """
    called = False
    while frame is not None and frame.f_globals.get('__name__') in _TREES:
        frame, called = frame.f_back, True
    if frame is None:
        return '', True
    module, code = frame.f_globals.get('__name__', ''), frame.f_code
    if module.startswith('jax._src.'):
        return module, not module.startswith(_TRACING) or code.co_name.startswith(_READERS)
    return module, called or 'flatten_up_to' in code.co_names


def tap(owner: Any, name: str) -> Callable[[Callable], Callable]:
    """Replace ``owner.name`` by the decorated function, which gets the original one first."""
    original = getattr(owner, name)
    original = getattr(original, '_flax_sg_original', original)  # importing twice taps once

    def install(fn: Callable) -> Callable:
        @functools.wraps(original)
        def tapped(*args, **kwargs):
            return fn(original, *args, **kwargs)

        tapped._flax_sg_original = original
        setattr(owner, name, tapped)
        return fn

    return install


_RULES = (  # classes of functions with rules of the user's own, and the attributes that have them
    (jax.custom_vjp, ('fwd', 'bwd')),
    (jax.custom_jvp, ('jvp',)),
    (jax.custom_batching.custom_vmap, ('vmap_rule',)),
)


def tap_rules(fn: Callable) -> Callable:
    """Tap calls of functions with rules of the user's own; ``fn`` gets the rules' names too."""
    for cls, names in _RULES:
        tap(cls, '__call__')(functools.partial(_call_with_rules, fn, names))
    return fn


def _call_with_rules(
    fn: Callable, names: tuple, original: Callable, self: Any, /, *args: Any, **kwargs: Any
) -> Any:
    rules = [getattr(self, name, None) for name in names]
    if not any(map(callable, args)) and all(map(_is_of_jax, (self.fun, *rules))):
        return original(self, *args, **kwargs)
    return fn(original, self, names, *args, **kwargs)


def tap_linear_call(fn: Callable) -> Callable:
    """Tap `jax.custom_derivatives.linear_call`, which gets a transpose of the user's own."""
    tap(jax.custom_derivatives, 'linear_call')(fn)
    return fn


def _is_of_jax(fn: Any) -> bool:
    """Say whether a function and what its closure holds is JAX's own, such as relu and its rule."""
    if isinstance(fn, (tuple, list)):
        return all(map(_is_of_jax, fn))
    if not callable(fn):
        return True
    fn = inspect.unwrap(fn)  # a jitted function
    if not isinstance(fn, types.FunctionType) or not (fn.__module__ or '').startswith('jax.'):
        return False
    try:
        return all(_is_of_jax(cell.cell_contents) for cell in fn.__closure__ or ())
    except ValueError:  # an empty cell
        return False


def set_cache_key(value: Any) -> None:
    """Make a value part of the keys of this thread's trace caches, until another one is set."""
    _cache_keys(value).__enter__()


def traced(fn: Callable, *args: Any) -> ClosedJaxpr:
    """Trace a function of arrays that returns a list; jax.make_jaxpr costs four times as much.

    `map_gradient` traces one for each variable that a block reads. The constants are what the
    function closes over, tracers included; nothing is kept in JAX's caches.
    """
    found = _partial_eval.trace_to_jaxpr_dynamic(  # no public name as of 0.12
        _linear_util.wrap_init(fn, debug_info=_TRACED), [jax.typeof(x) for x in args]
    )
    return ClosedJaxpr(found[0], found[2])


_TRACED = DebugInfo('flax_sg', 'flax_sg', None, None)


def split(jaxpr: Any, unknown: list[bool], late: Any = True) -> tuple[ClosedJaxpr, ClosedJaxpr]:
    """Split a jaxpr without constants by what depends on some of its inputs.

    ``late`` says which results come out of the second part in any case; they are the last ones.

    Returns:
      What does not: a function of the other inputs; and what does: one of some results of the
      first, and of these inputs.
    """
    closed = ClosedJaxpr(getattr(jaxpr, 'jaxpr', jaxpr), [])
    known, rest, *_ = _partial_eval.partial_eval_jaxpr_nounits(  # public since 0.12
        closed, unknown, late
    )
    if rest.consts:  # these are results of the first part, too
        consts, inputs = rest.jaxpr.constvars, rest.jaxpr.invars
        done = 0 if late is True else late.count(False)
        outvars, info = known.jaxpr.outvars, known.jaxpr.debug_info.with_unknown_names()
        known = ClosedJaxpr(
            known.jaxpr.replace(
                constvars=[*known.jaxpr.constvars, *consts],
                debug_info=info,
                outvars=[*outvars[:done], *consts, *outvars[done:]],
            ),
            [*known.consts, *rest.consts],
        )
        info = rest.jaxpr.debug_info.with_unknown_names()
        rest = ClosedJaxpr(
            rest.jaxpr.replace(constvars=[], invars=[*consts, *inputs], debug_info=info), []
        )
    return known, rest


def pruned(jaxpr: Jaxpr, outputs: list[bool], inputs: list[bool]) -> tuple[Jaxpr, list[bool]]:
    """Leave out what some results do not need, and inputs but for some; return which are left."""
    return _partial_eval.dce_jaxpr(jaxpr, outputs, inputs)


def pulled_back(jaxpr: ClosedJaxpr, inputs: tuple, cotangents: list) -> list:
    """Return the cotangents of those inputs of a jaxpr that are `ad.UndefinedPrimal`.

    It is linear in these, and None stands for the others.
    """
    wanted = [type(ct) is not ad.Zero for ct in cotangents]
    part, used = pruned(jaxpr.jaxpr, wanted, [False] * len(inputs))  # a scan wants all its own
    found = iter(
        _ad.backward_pass(
            part,
            False,
            jaxpr.consts,
            [x for x, u in zip(inputs, used, strict=True) if u],
            [ct for ct, w in zip(cotangents, wanted, strict=True) if w],
        )
    )
    each = [next(found) if u else None for u in used]
    return [ct if ad.is_undefined_primal(x) else None for x, ct in zip(inputs, each, strict=True)]


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """Return how many operands of a scan are constants, and how many its carry has."""
    if 'num_consts' in params:
        return params['num_consts'], params['num_carry']
    consts, carry, _ = params['ft_in'].unpack()  # since jax 0.12
    return len(list(consts)), len(list(carry))


def is_ref(aval: Any) -> bool:
    """Say whether a value is a reference to a mutable array."""
    return hasattr(aval, 'inner_aval')


def without_refs(jaxpr: Any) -> tuple[Any, list[int]]:
    """Return a jaxpr without constants, in which references to mutable arrays are values.

    Returns:
      It, with the last values of those among its inputs after its results; and which these are. The
      one that was given where there are no references.
    """
    refs = [i for i, var in enumerate(jaxpr.invars) if is_ref(var.aval)]
    made = any(type(e).__name__ == 'InternalMutableArrayEffect' for e in jaxpr.effects)
    if not refs and not made:
        return jaxpr, refs
    closed = _discharge.discharge_state(ClosedJaxpr(jaxpr, []), lower=False)
    return getattr(closed, 'jaxpr', closed), refs


def varying(aval: Any) -> frozenset[str]:
    """Return the mesh axes over which a value in the body of a `shard_map` varies."""
    return aval.mat.varying if hasattr(aval, 'mat') else frozenset()


def written_at(jaxpr: Any) -> tuple[str, str]:
    """Return the name of the function that a jaxpr was made of, and its file."""
    info = getattr(jaxpr, 'jaxpr', jaxpr).debug_info
    name, _, place = (getattr(info, 'func_src_info', '') or '').partition(' at ')
    return name, place.rpartition(':')[0]


def operation_of(eqn: Any) -> tuple[str, bool]:
    """Return an equation's name, and whether it has rules for derivatives of its own.

    Since 0.12 that may be an object with such rules, in place of a primitive.
    """
    if eqn.primitive.name == 'call_hi_primitive':
        return type(eqn.params['_prim']).__name__, True
    return eqn.primitive.name, eqn.primitive.name in ('custom_jvp_call', 'custom_vjp_call')


def scope_names(eqn: Any) -> list[str]:
    """Return the names of `jax.named_scope` around an equation, the outermost first."""
    return [scope.name for scope in eqn.source_info.name_stack.stack]


def batched(jaxpr: ClosedJaxpr, axis: Any, dims: list) -> tuple[ClosedJaxpr, list[bool]]:
    """Return a jaxpr over a batch, and which of its results vary over it; these have it in front.

    Only JAX's own rules know which do: a sum over the axis does not, though its operand does.
    """
    free = [_batching.zero_if_mapped] * len(jaxpr.out_avals)
    return _batching.batch_jaxpr_axes(jaxpr, axis, dims, free)  # public since 0.12


def checked(primitive: Primitive, inputs_of: Callable, bind: Callable) -> None:
    """Let `checkify` look into the jaxpr of a primitive; it has no public way to say that.

    ``inputs_of(*operands, **params)`` returns the inputs of its jaxpr. ``bind(jaxpr, errors,
    *operands, **params)`` binds it to another jaxpr, which has the errors as inputs before the
    others, and more results, at the end; so has then the primitive, and `bind` returns these.
    """

    def rule(*args: Any, jaxpr: ClosedJaxpr, **params: Any) -> tuple[Any, list]:
        context = args[: not isinstance(args[0], _checkify.Error)]  # there is one since 0.12
        error, enabled, *operands = args[len(context) :]
        errors, tree = jax.tree.flatten(error)
        inputs = [*errors, *inputs_of(*operands, **params)]
        made, tree, _ = _checkify.jaxpr_to_checkify_jaxpr(
            *context, jaxpr, enabled, tree, *map(jax.typeof, inputs)
        )
        count = tree.num_leaves - len(jaxpr.out_avals)

        def errors_last(*inputs: Any) -> list:
            results = jax.core.eval_jaxpr(made.jaxpr, made.consts, *inputs)
            return [*results[count:], *results[:count]]

        results = bind(traced(errors_last, *inputs), errors, *operands, **params)
        end = len(results) - count
        return tree.children()[0].unflatten(results[end:]), results[:end]

    _checkify.error_checks[primitive] = rule
