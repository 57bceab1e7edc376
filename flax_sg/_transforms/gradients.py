"""Transforms of cotangents: scaled, or given to a function. `stop_gradient` has the one that stops.

Values do not change. Where nothing is differentiated nothing is done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Primitive
from jax.interpreters import ad, batching

from flax_sg._compat.jax import varying
from flax_sg._errors import UsageError
from flax_sg._filters.callables import value_key
from flax_sg._filters.filters import Predicate
from flax_sg._filters.of_nnx import is_variable
from flax_sg._filters.slips import kind_of, swapped
from flax_sg._filters.variables import VariableInfo
from flax_sg._jax.jaxprs import closed_over, evaluate, varied
from flax_sg._jax.primitives import at_front, define
from flax_sg._transforms.jitted_bodies import plain
from flax_sg._transforms.transform import Mapped, Transform, make, make_mapped, map_traced

__all__ = ['map_gradient', 'scale_gradient']


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ScaleGradient(Transform):
    """The transform that :func:`scale_gradient` makes."""

    factor: Any
    name = 'scale_gradient'

    def read(self, info: VariableInfo, value: Any, other: Callable[[str], Any]) -> Any:
        if isinstance(self.factor, float) and self.factor == 0:  # exactly zero, of infinity too
            return map_traced(jax.lax.stop_gradient, value)
        return map_traced(lambda leaf: _scaled(leaf, self.factor), value)

    def arguments(self, of_predicate: Callable, of_function: Callable) -> tuple[Hashable, ...]:
        return (value_key(self.factor),)

    def shown_arguments(self) -> tuple[str, ...]:
        return (repr(self.factor),)


# A primitive, not jax.custom_jvp: jax 0.10 forgets such a rule where it splits the body of a scan,
# so that a second derivative lost the factor. The factor is a parameter if it is a float, otherwise
# an operand.
_scaled_p = define('flax_sg_scale_gradient')


def _scaled(x: jax.Array, factor: Any) -> jax.Array:
    if isinstance(factor, float):
        return _scaled_p.bind(x, factor=factor)
    factor = jnp.broadcast_to(jnp.asarray(factor, x.dtype), x.shape)
    return _scaled_p.bind(varied(x, jax.typeof(factor)), factor, factor=None)


def _scaled_jvp(primals: tuple, tangents: tuple, *, factor: float | None) -> tuple:
    out = _scaled_p.bind(*primals, factor=factor)  # not x: a derivative of this one passes here too
    t = tangents[0]
    if type(t) is ad.Zero:
        return out, t
    return out, jax.lax.mul(t, jax.lax.full_like(t, factor) if factor is not None else primals[1])


ad.primitive_jvps[_scaled_p] = _scaled_jvp


def scale_gradient(
    predicate: Predicate, factor: Any, *, collections: Any = 'params', allow_unmatched: bool = False
) -> Transform:
    """Multiply the cotangents of selected variables: in a block, module, method or tree.

    Use it to slow down a part for one loss, or with a negative factor to reverse its gradient, as
    domain-adversarial training does. At every order of derivative, in both modes. It has the five
    uses of :func:`flax_sg.stop_gradient`.

    >>> import jax
    >>> from flax_sg import scale_gradient
    >>> def loss(params):
    ...     params = scale_gradient('encoder', -0.5)(params)
    ...     return params['encoder']['w'] * params['head']['w']
    >>> grads = jax.grad(loss)({'encoder': {'w': 2.0}, 'head': {'w': 3.0}})
    >>> float(grads['encoder']['w']), float(grads['head']['w'])
    (-1.5, 2.0)

    Args:
      predicate: what is scaled; see :func:`flax_sg.stop_gradient`.
      factor: a real number, of shape (): a Python or numpy scalar, an array or a traced value. It
        is itself a constant of first derivatives. A number 0 stops the gradient; an array that
        holds 0 multiplies by it.
      collections: a Flax collection filter, the collections in which it selects.
      allow_unmatched: accept a glob, regex or callable that selects nothing.

    Returns:
      A transform.

    Raises:
      PredicateError: the predicate or ``collections`` is none.
      UnmatchedPathError: at the end of a block, when a glob, regex or callable selects no variable.
      UsageError: the factor is no real number.

    Source: google/flax issue 1857; Ganin et al., arXiv 1505.07818.
    """
    if is_variable(factor):
        factor = factor.get_value()  # as it is now
    real = (
        isinstance(factor, (int, float))
        or getattr(factor, 'shape', None) == ()
        and (
            jnp.issubdtype(factor.dtype, jnp.floating) or jnp.issubdtype(factor.dtype, jnp.integer)
        )
    )
    if real and not isinstance(factor, jax.Array):
        with contextlib.suppress(OverflowError):
            factor = float(factor)
    if not real or isinstance(factor, int) or isinstance(factor, float) and math.isnan(factor):
        raise UsageError(
            f'scale_gradient: factor={factor!r}; expected a real number: a Python or numpy scalar, '
            'or an array of shape (). For another factor for each variable, nest blocks.'
            f'{swapped("scale_gradient", predicate, factor)}'
        )
    return make(ScaleGradient, predicate, collections, allow_unmatched, factor)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MapGradient(Mapped):
    """The transform that :func:`map_gradient` makes."""

    name = 'map_gradient'

    def read(self, info: VariableInfo, value: Any, other: Callable[[str], Any]) -> Any:
        def read(leaf: jax.Array) -> jax.Array:
            pull, consts = closed_over(functools.partial(self._call, info), leaf)
            (made,) = pull.out_avals
            if varying(made) - varying(jax.typeof(leaf)):
                return read(varied(leaf, made))
            return _mapped_p.bind(leaf, *consts, pull=pull, name=plain(info).absolute_name)

        return map_traced(read, value)

    def _call(self, info: VariableInfo, cotangent: jax.Array) -> list[jax.Array]:
        out = self.fn(info, cotangent)
        want, got = (_kind(x) for x in (cotangent, out))
        if got != want:
            raise UsageError(
                f'{self!r}: the function returned {got} for the cotangent of '
                f"'/{info.absolute_name}'; expected {want}, the variable's shape and dtype."
            )
        return [varied(out, jax.typeof(cotangent))]


def _mapped_jvp(primals: tuple, tangents: tuple, **params: Any) -> tuple:
    out = _mapped_p.bind(*primals, **params)  # not x: as for _scaled_p
    if type(tangents[0]) is ad.Zero:
        return out, tangents[0]
    return out, _pull_p.bind(tangents[0], *primals[1:], **params)


def _pulled(cotangent: Any, t: Any, *consts: Any, pull: ClosedJaxpr, **_: Any) -> list:
    if type(cotangent) is not ad.Zero:
        (cotangent,) = evaluate(pull, *consts, cotangent)
    return [cotangent, *(None for _ in consts)]


def _no_forward_mode(*_: Any, name: str, **__: Any) -> Any:
    raise UsageError(
        f"map_gradient of '/{name}': it says what becomes of a cotangent, and cannot be used in "
        'forward-mode differentiation, as with jax.jvp, jax.jacfwd and jax.hessian. Use reverse '
        'mode, or scale_gradient.'
    )


def _mapped_batched(
    primitive: Primitive, axis: Any, args: tuple, dims: tuple, *, pull: ClosedJaxpr, **params: Any
) -> tuple:
    if all(d is None for d in dims):
        return primitive.bind(*args, pull=pull, **params), None
    x, *consts = at_front(axis, args, dims)
    run = jax.vmap(
        functools.partial(evaluate, pull),
        axis_name=axis.name,
        axis_size=axis.size,
        spmd_axis_name=axis.spmd_name,
    )
    return primitive.bind(x, *consts, pull=jax.make_jaxpr(run)(*consts, x), **params), 0


# The value, and a linear map of its tangent that can be transposed and nothing else. Operands are
# the value or tangent and what the function closes over.
_mapped_p = define('flax_sg_map_gradient')
_pull_p = define('flax_sg_map_gradient_tangent', _no_forward_mode)
ad.primitive_jvps[_mapped_p] = _mapped_jvp
ad.primitive_jvps[_pull_p] = _no_forward_mode
ad.primitive_transposes[_pull_p] = _pulled
for primitive in (_mapped_p, _pull_p):
    batching.fancy_primitive_batchers[primitive] = functools.partial(_mapped_batched, primitive)


def _kind(x: Any) -> str:
    if not hasattr(x, 'shape') or not hasattr(x, 'dtype'):
        return kind_of(x)
    return f'{x.dtype}[{",".join(map(str, x.shape))}]'


def map_gradient(
    predicate: Predicate,
    fn: Callable[[VariableInfo, jax.Array], jax.Array],
    *,
    collections: Any = 'params',
    allow_unmatched: bool = False,
) -> Transform:
    """Replace the cotangents of selected variables by a function of them.

    Use it to clip, normalise or add noise to what one loss sends to a part, or to put a stored
    cotangent in its place. It has the five uses of :func:`flax_sg.stop_gradient`, in reverse mode
    alone; forward mode is an error. A gradient of the gradient goes through ``fn``.

    ``fn`` gets the cotangent of the sum over a block's reads of the variable, as if the block read
    it once, in each application of a model; what a lifted transform hands to its body is such a
    read, outside its loop. Two things are read by themselves: a variable in a lifted body that may
    write it (``mutable=['params']``), and one that a function traced in the block, such as the body
    of a `jax.lax.scan`, reads of a module that it captured. Where ``fn`` is linear that does not
    matter. It has no effect on a variable that the result does not depend on.

    >>> import jax, jax.numpy as jnp
    >>> from flax_sg import map_gradient
    >>> clip = map_gradient(True, lambda info, cotangent: jnp.clip(cotangent, -1, 1))
    >>> float(jax.grad(lambda params: 5 * clip(params)['w'])({'w': jnp.ones(())})['w'])
    1.0

    Args:
      predicate: whose cotangents; see :func:`flax_sg.stop_gradient`.
      fn: ``fn(info, cotangent) -> cotangent``, both arrays of the variable's shape and dtype. It is
        traced, once for each read. It may close over arrays, traced ones too.
      collections: a Flax collection filter, the collections in which it selects.
      allow_unmatched: accept a glob, regex or callable that selects nothing.

    Returns:
      A transform.

    Raises:
      PredicateError: the predicate or ``collections`` is none.
      UnmatchedPathError: at the end of a block, when a glob, regex or callable selects no variable.
      UsageError: ``fn`` is no callable of two arguments; at a read, it returns another shape or
        dtype; or it is met by forward-mode differentiation.

    Source: google/flax issue 1857.
    """
    return make_mapped(MapGradient, predicate, collections, allow_unmatched, fn, 'cotangent')
