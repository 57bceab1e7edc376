"""Functions run as their jaxpr says, one operation at a time, mostly in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def _broadcast(x: Any, *, shape: tuple, broadcast_dimensions: tuple, **_: Any) -> np.ndarray:
    new = [1] * len(shape)
    for size, axis in zip(np.shape(x), broadcast_dimensions, strict=True):
        new[axis] = size
    xp = jnp if isinstance(x, jax.Array) else np  # numpy knows no random keys
    return xp.broadcast_to(xp.reshape(x, new), shape)


def _dot(x: Any, y: Any, *, dimension_numbers: Any, **_: Any) -> np.ndarray:
    contract, (batch, _) = dimension_numbers
    return np.asarray(_bind_dot(x, y, dimension_numbers) if batch else np.tensordot(x, y, contract))


def _bind_dot(x: Any, y: Any, dimension_numbers: Any) -> Any:
    return lax.dot_general(jnp.asarray(x), jnp.asarray(y), dimension_numbers)


# The operations that programs consist of, in numpy, so that nothing has to be compiled.
_NUMPY: dict[str, Callable] = {
    'add': lambda x, y, **_: np.add(x, y),
    'add_any': lambda x, y, **_: np.add(x, y),
    'sub': lambda x, y, **_: np.subtract(x, y),
    'mul': lambda x, y, **_: np.multiply(x, y),
    'neg': lambda x, **_: np.negative(x),
    'gt': lambda x, y, **_: np.greater(x, y),
    'sin': lambda x, **_: np.sin(x),
    'cos': lambda x, **_: np.cos(x),
    'exp': lambda x, **_: np.exp(x),
    'broadcast_in_dim': _broadcast,
    'reduce_sum': lambda x, *, axes, **_: np.sum(x, axis=axes, dtype=x.dtype),
    'squeeze': lambda x, *, dimensions, **_: np.squeeze(x, dimensions),
    'transpose': lambda x, *, permutation, **_: np.transpose(x, permutation),
    'copy': lambda x, **_: x,
    'stop_gradient': lambda x, **_: x,
    'dot_general': _dot,
    'stack': lambda *xs, axis, **_: np.stack(xs, axis),
    'convert_element_type': lambda x, *, new_dtype, **_: np.asarray(x).astype(new_dtype),
    'slice': lambda x, *, start_indices, limit_indices, **_: x[
        tuple(map(slice, start_indices, limit_indices))
    ],
    'reshape': lambda x, *, new_sizes, **_: np.reshape(x, new_sizes),
}


def evaluate(closed: Any, *args: Any) -> list:
    """Run a jaxpr one operation at a time, loops and calls unrolled.

    It compiles nothing but single operations, and equal operations give equal bits.
    """
    jaxpr, env = getattr(closed, 'jaxpr', closed), {}
    env.update(zip(jaxpr.constvars, getattr(closed, 'consts', ()), strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        vals = [v.val if hasattr(v, 'val') else env[v] for v in eqn.invars]
        name, params = eqn.primitive.name, eqn.params
        if name == 'scan':
            outs = _evaluate_scan(eqn, vals)
        elif name == 'cond':
            outs = evaluate(params['branches'][int(vals[0])], *vals[1:])
        elif name == 'flax_sg_views':
            body, count = params['jaxpr'], params['count']  # the inputs of the first view
            outs = evaluate(body, *vals[: len(getattr(body, 'jaxpr', body).invars)])
            outs = outs[:count] * len(params['views']) + outs[count:]
        elif 'jaxpr' in params or 'call_jaxpr' in params:
            outs = evaluate(params.get('jaxpr', params.get('call_jaxpr')), *vals)
        elif name in _NUMPY:
            outs = [_NUMPY[name](*vals, **params)]
        else:
            outs = eqn.primitive.bind(*map(jnp.asarray, vals), **params)
            outs = outs if eqn.primitive.multiple_results else [outs]
        env.update(zip(eqn.outvars, outs, strict=True))
    return [v.val if hasattr(v, 'val') else env[v] for v in jaxpr.outvars]


def _evaluate_scan(eqn: Any, vals: list) -> list:
    # How a scan says what is carried differs between versions; the ranks tell too.
    body, length, reverse = (eqn.params[k] for k in ('jaxpr', 'length', 'reverse'))
    inner = getattr(body, 'jaxpr', body)
    stacked = [a.aval.ndim != b.aval.ndim for a, b in zip(eqn.invars, inner.invars, strict=True)]
    collected = [
        a.aval.ndim != b.aval.ndim for a, b in zip(eqn.outvars, inner.outvars, strict=True)
    ]
    carries = collected.count(False)
    start = stacked.index(True) - carries if True in stacked else len(vals) - carries
    ys: list = []
    for i in reversed(range(length)) if reverse else range(length):
        outs = evaluate(body, *(v[i] if s else v for v, s in zip(vals, stacked, strict=True)))
        vals[start : start + carries] = outs[:carries]
        ys.append(outs[carries:])
    ys = ys[::-1] if reverse else ys
    return [*vals[start : start + carries], *(jnp.stack(y) for y in zip(*ys, strict=True))]


def traced(fn: Callable) -> Callable:
    """Return ``fn`` run as its jaxpr says, one operation at a time."""

    def run(*args):
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        return jax.tree.unflatten(
            jax.tree.structure(shape), evaluate(closed, *jax.tree.leaves(args))
        )

    return run
