"""The meaning of a block as a pure function of two copies, and one function that compares with it.

A program P with blocks means P̂(φ, φ̄): reads inside blocks take selected variables from φ̄, all
other reads take φ. It is differentiated with respect to φ alone, at φ̄ = φ, at every order and in
both modes. A test writes P̂ by hand, without the library, and calls `compare`. Nothing here imports
flax or the library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ORDERS = ('grad', 'jvp', 'hessian', 'vmap')


def one_copy(two_copy_fn: Callable) -> Callable:
    """Return the hand-written program: P̂ with its second copy made by `jax.lax.stop_gradient`.

    It has the derivatives of P̂ with respect to φ at every order, and it is the program whose
    compiled arithmetic a masked one should have, so that bits can be compared under jit.
    """
    return lambda params, *args: two_copy_fn(params, jax.lax.stop_gradient(params), *args)


def scalar(fn: Callable) -> Callable:
    """Make a function's output one number, with a different weight for each element of it."""

    def loss(*args: Any) -> jax.Array:
        total = jnp.float32(0)
        for i, leaf in enumerate(jax.tree.leaves(fn(*args))):
            if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
                weights = np.cos(np.arange(leaf.size) + i).reshape(leaf.shape)
                total = total + jnp.sum(leaf * weights.astype(leaf.dtype))
        return total

    return loss


def is_float(tree: Any) -> bool:
    """Say whether a tree has leaves, all of them floating-point arrays."""
    leaves = jax.tree.leaves(tree)
    return bool(leaves) and all(jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in leaves)


def assert_same(actual: Any, expected: Any, what: str, *, rtol: float = 0.0) -> None:
    """Compare trees of arrays: bit for bit, or within ``rtol`` of each leaf's largest entry.

    Where a whole leaf of ``expected`` is zero the actual one must be exactly zero, whatever
    ``rtol`` says: a gradient that is absent is not a small one.
    """
    got, want = (jax.tree_util.tree_flatten_with_path(t) for t in (actual, expected))
    assert got[1] == want[1], f'{what}: {got[1]} is not {want[1]}'
    for (path, a), (_, b) in zip(got[0], want[0], strict=True):
        a, b = _plain(a), _plain(b)
        name = f'{what}{jax.tree_util.keystr(path)}'
        assert a.dtype == b.dtype and a.shape == b.shape, f'{name}: {a.dtype}{a.shape}'
        if rtol and np.any(b != 0) and np.issubdtype(b.dtype, np.inexact):
            ok = np.allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max(), equal_nan=True)
        else:
            ok = np.array_equal(a, b, equal_nan=np.issubdtype(b.dtype, np.inexact))
        assert ok, f'{name}: got\n{a}\nexpected\n{b}'


def _plain(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def tangents_of(tree: Any) -> Any:
    """Return a fixed direction in a tree's space, different for each leaf and element."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten(
        [
            jnp.asarray(np.sin(np.arange(x.size) + 1.0 + 2 * i).reshape(x.shape), x.dtype)
            for i, x in enumerate(map(jnp.asarray, leaves))
        ]
    )


def derivatives(
    fn: Callable, two_copies: bool, params: Any, args: Sequence[Any], order: str
) -> Callable[[], Any]:
    """Return a function of no argument that computes one kind of derivative of ``fn``.

    Derivatives are with respect to the parameters and every argument that is a tree of floats. With
    ``two_copies`` the parameters are given twice, and the second copy is not differentiated.
    """
    bar = (params,) if two_copies else ()
    wrt = (0, *(i + 1 + len(bar) for i, a in enumerate(args) if is_float(a)))
    every = (params, *bar, *args)
    loss = scalar(fn)
    if order == 'grad':
        return lambda *xs: jax.grad(loss, wrt)(*xs)
    if order == 'hessian':
        return lambda *xs: jax.hessian(loss, wrt)(*xs)
    if order == 'jvp':

        def push(*xs):
            def moved(*ys):
                rest = dict(zip(wrt, ys, strict=True))
                return fn(*(rest.get(i, x) for i, x in enumerate(xs)))

            primals = tuple(xs[i] for i in wrt)
            return jax.jvp(moved, primals, tuple(map(tangents_of, primals)))

        return push
    if order == 'vmap':
        axes = tuple(0 if i in wrt[1:] else None for i in range(len(every)))
        batch = lambda x: jnp.stack([x, 0.5 * x + 0.25, -x])  # noqa: E731

        def per_example(*xs):
            xs = [jax.tree.map(batch, x) if a == 0 else x for x, a in zip(xs, axes, strict=True)]
            return jax.vmap(jax.grad(loss, wrt), axes)(*xs)

        return per_example if len(wrt) > 1 else lambda *xs: ()
    raise ValueError(f'order={order!r}; expected one of {ORDERS}')


def compare(
    masked_fn: Callable,
    two_copy_fn: Callable,
    params: Any,
    *args: Any,
    orders: Sequence[str] = ORDERS,
    modes: Sequence[str] = ('eager', 'jit'),
    exact: bool = True,
    rtol: float = 2e-5,
) -> Any:
    """Compare a masked program with its two-copy meaning, in value and derivatives.

    Args:
      masked_fn: ``f(params, *args)``, with blocks.
      two_copy_fn: ``f(φ, φ̄, *args)`` written by hand; its output has the same structure.
      params: the parameters, a tree of float arrays.
      *args: further arguments; those that are trees of floats are differentiated too.
      orders: which derivatives to compare, of 'grad', 'jvp', 'hessian' and 'vmap' (of grad).
      modes: 'eager' and 'jit'. Values and gradients are compared in each, all orders in the last.
      exact: compare values and gradients bit for bit. Pass False where the two programs do the
        same sums in another order (an unrolled loop for a scan). Higher orders are always within
        ``rtol``, zeros always exact.
      rtol: relative to the largest entry of a leaf.

    Returns:
      The masked program's gradients with respect to the parameters, for further checks.
    """
    hand, grads = one_copy(two_copy_fn), None
    for mode in modes:
        run = jax.jit if mode == 'jit' else lambda f: f
        value = run(lambda *xs: masked_fn(*xs))(params, *args)
        by_hand = run(lambda *xs: hand(*xs))(params, *args)
        assert_same(value, by_hand, f'{mode} value', rtol=0.0 if exact else rtol)
        for order in orders if mode == modes[-1] else set(orders) & {'grad'}:
            actual = run(derivatives(masked_fn, False, params, args, order))(params, *args)
            if order == 'grad':
                by_hand = run(derivatives(hand, False, params, args, order))(params, *args)
                assert_same(actual, by_hand, f'{mode} {order}', rtol=0.0 if exact else rtol)
                grads = actual[0]
            if mode == modes[-1]:
                # Within rtol: two inputs of equal value may compile otherwise than one used twice.
                formal = run(derivatives(two_copy_fn, True, params, args, order))
                assert_same(actual, formal(params, params, *args), f'{mode} {order}', rtol=rtol)
    return grads
