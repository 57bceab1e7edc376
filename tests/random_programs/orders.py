"""Derivatives of random programs beyond the first, compared with those of their meaning."""

from __future__ import annotations

from collections.abc import Callable

import jax

from oracle import assert_same, tangents_of
from random_programs.evaluation import traced


def gradients(fn: Callable) -> Callable:
    return lambda *args: jax.grad(fn, (0, 1, 2), has_aux=True)(*args)


def check_second_order(fn: Callable, two_copies: Callable, args: tuple, inside: Callable) -> None:
    """Compare a derivative forward over reverse and one forward, both in a fixed direction."""
    step = tangents_of(args)
    meant = lambda *xs: two_copies(*xs, args[0])  # noqa: E731
    first = lambda f: lambda *xs: jax.jvp(lambda *ys: f(*ys)[1][0], xs, step)[1]  # noqa: E731
    again = lambda f: (
        lambda *xs: jax.jvp(  # noqa: E731
            lambda *ys: gradients(f)(*ys)[0], xs, step
        )[1]
    )
    for name, order in (('jvp', first), ('jvp of grad', again)):
        got = inside(lambda order=order: traced(order(fn))(*args))
        assert_same(got, traced(order(meant))(*args), name, rtol=1e-3)


def check_other_orders(fn: Callable, two_copies: Callable, args: tuple, inside: Callable) -> None:
    """Compare reverse over reverse, reverse over forward, and a third derivative."""
    step = tangents_of(args)
    meant = lambda *xs: two_copies(*xs, args[0])  # noqa: E731

    def along(f: Callable) -> Callable:  # the derivative of a function in a fixed direction
        return lambda *xs: jax.jvp(f, xs, step)[1]

    def slope(f: Callable) -> Callable:  # the same in reverse mode
        return lambda *xs: sum(
            jax.tree.leaves(
                jax.tree.map(lambda g, s: (g * s).sum(), jax.grad(f, (0, 1, 2))(*xs), step)
            )
        )

    orders = {
        'grad of grad': lambda f: jax.grad(slope(f), (0, 1, 2)),
        'grad of jvp': lambda f: jax.grad(along(f), (0, 1, 2)),
        'third': lambda f: jax.grad(slope(along(f)), (0, 1, 2)),
    }
    for name, order in orders.items():
        got, want = (
            lambda f=f, order=order: traced(order(lambda *xs: f(*xs)[0]))(*args)
            for f in (fn, meant)
        )
        assert_same(inside(got), want(), name, rtol=1e-3)
