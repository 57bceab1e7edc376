"""The only importer of private names of flax and jax.

Flax has no public hook for reads of variables. Haiku has one, the custom getter; here are the
points of Flax at which one has to stand, each with its reason. A *tap* wraps one function of Flax
for good, at import. While no block is open it does what Flax does; it keeps no state, and nothing
is patched or restored when a block opens or closes.

Checked with flax 0.12.8 and 0.12.12, jax 0.10.2 and 0.12.0.1.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.custom_batching
import jax.custom_derivatives
from flax.core import lift, tracers
from flax.core.scope import Scope, Variable
from flax.linen import Module
from flax.linen import module as _module
from flax.linen import transforms as _transforms
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
    'CALL', 'Module', 'Scope', 'Variable', 'batched', 'checked', 'child', 'counts',
    'current_module', 'draws', 'in_scratch_root', 'in_setup', 'is_ref', 'lifted_call',
    'operation_of', 'packed_scopes', 'pruned', 'pulled_back', 'root_variables', 'run_setup',
    'scan_counts', 'scope_names', 'scope_path', 'set_cache_key', 'setup_pending', 'split',
    'staging_trace', 'stored', 'tap', 'tap_linear_call', 'tap_map_variables', 'tap_pack',
    'tap_rules', 'tap_value', 'trace_context', 'trace_state', 'traced', 'transform_of', 'unwrapped',
    'varying', 'without_refs', 'wrapped', 'written_at',
]

# jax.make_user_context (public since 0.7.2): a thread-local value that is part of the key of every
# cache of traces, so that one function traced in different blocks is never mistaken for another.
_cache_keys = jax.make_user_context(())


def trace_state() -> Any:
    """Return a value that is equal as long as the same JAX trace is the current one."""
    return tracers.current_trace()  # wraps jax's get_opaque_trace_state, which moved in 0.10


def trace_context() -> tuple:
    """Return the settings that a trace depends on, such as precision and the current mesh."""
    return _config.trace_context()


def staging_trace() -> Any:
    """Return a value that is equal as long as the same function is being traced to a jaxpr.

    Traces of derivatives and batches inside it do not count: JAX keeps nothing of these.
    """
    trace = _core.trace_ctx.trace  # no public name as of 0.12
    while not isinstance(trace, _partial_eval.DynamicJaxprTrace) and hasattr(trace, 'parent_trace'):
        trace = trace.parent_trace
    return trace._weakref


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
            if (code is not None and member.__globals__ is vars(_transforms)
                    and code.co_qualname.startswith('module_class_lift_transform')):
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
    for name in path[len(scope.root.path):]:  # in a lifted body the root is a module's scope
        value = value[name]
    return value


def packed_scopes(scopes: list[Scope]) -> tuple[tuple[Scope, ...], list[int]]:
    """Return the scopes whose variables `lift.pack` hands on: those not below another one.

    And for each scope, the index of the one that it is or is below.
    """
    packed, places = lift._dedup_scopes(scopes)
    return packed, [packed.index(root) for root, _ in places]  # scopes compare by what they show


def lifted_call(body: Callable, fn: Callable, module: Module, /, *args: Any, **kwargs: Any
                ) -> Any:
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
    return (module.scope is not None and not state.in_setup
            and state.setup_called != _module.SetupState.DONE)


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


def _call_with_rules(fn: Callable, names: tuple, original: Callable, self: Any, /, *args: Any,
                     **kwargs: Any) -> Any:
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
    if not isinstance(fn, types.FunctionType) or not (
            fn.__module__ or '').startswith('jax.'):
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
        _linear_util.wrap_init(fn, debug_info=_TRACED), [jax.typeof(x) for x in args])
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
        closed, unknown, late)
    if rest.consts:  # these are results of the first part, too
        consts, inputs = rest.jaxpr.constvars, rest.jaxpr.invars
        done = 0 if late is True else late.count(False)
        outvars, info = known.jaxpr.outvars, known.jaxpr.debug_info.with_unknown_names()
        known = ClosedJaxpr(known.jaxpr.replace(
            constvars=[*known.jaxpr.constvars, *consts], debug_info=info,
            outvars=[*outvars[:done], *consts, *outvars[done:]]), [*known.consts, *rest.consts])
        info = rest.jaxpr.debug_info.with_unknown_names()
        rest = ClosedJaxpr(rest.jaxpr.replace(
            constvars=[], invars=[*consts, *inputs], debug_info=info), [])
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
    found = iter(_ad.backward_pass(
        part, False, jaxpr.consts, [x for x, u in zip(inputs, used, strict=True) if u],
        [ct for ct, w in zip(cotangents, wanted, strict=True) if w]))
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
        context = args[:not isinstance(args[0], _checkify.Error)]  # there is one since 0.12
        error, enabled, *operands = args[len(context):]
        errors, tree = jax.tree.flatten(error)
        inputs = [*errors, *inputs_of(*operands, **params)]
        made, tree, _ = _checkify.jaxpr_to_checkify_jaxpr(
            *context, jaxpr, enabled, tree, *map(jax.typeof, inputs))
        count = tree.num_leaves - len(jaxpr.out_avals)

        def errors_last(*inputs: Any) -> list:
            results = jax.core.eval_jaxpr(made.jaxpr, made.consts, *inputs)
            return [*results[count:], *results[:count]]

        results = bind(traced(errors_last, *inputs), errors, *operands, **params)
        end = len(results) - count
        return tree.children()[0].unflatten(results[end:]), results[:end]

    _checkify.error_checks[primitive] = rule
