"""A model of flax.nnx, what a transform makes of it by hand, and the ways to name its parts."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import flax_sg as sg
from flax_sg import nnx

stop = jax.lax.stop_gradient
X, XS = jnp.float32(0.4), jnp.array([0.4, -0.3, 1.1], jnp.float32)
SOURCE = {'a': {'w': jnp.float32(0.2)}, 'b': {'w': jnp.float32(-0.5)}}
PARAMS = (jnp.float32(0.7), jnp.float32(1.3))
MODES = {
    'graph with updates': {'graph': True, 'graph_updates': True},
    'graph': {'graph': True, 'graph_updates': False},
    'tree': {'graph': False, 'graph_updates': False},
}


class Part(nnx.Module):
    def __init__(self, w):
        self.w = nnx.Param(w)


class Net(nnx.Module):
    """The model; `f` is what it computes."""

    def __init__(self, a=PARAMS[0], b=PARAMS[1]):
        self.a, self.b = Part(a), Part(b)

    def __call__(self, x):
        return jnp.tanh(self.a.w[...] * x) * self.b.w[...] + self.a.w[...] ** 2


def f(a, b, x):
    return jnp.tanh(a * x) * b + a**2


# By name: a transform of a predicate, and what it makes of a value by hand.
KINDS = {
    'stop': (sg.stop_gradient, stop),
    'scale': (lambda p: sg.scale_gradient(p, 0.5), lambda v: 0.5 * v + stop(v - 0.5 * v)),
    'map_gradient': (
        lambda p: sg.map_gradient(p, lambda info, ct: 3 * ct),
        lambda v: 3 * v + stop(v - 3 * v),
    ),
    'map': (lambda p: sg.map_values(p, lambda info, v: jnp.sin(3 * v)), lambda v: jnp.sin(3 * v)),
    'replace': (lambda p: sg.replace_values(p, SOURCE), None),
}


@dataclasses.dataclass(frozen=True)
class Naming:
    """Attributes: use: run a function of a model with a transform; selects: which of a and b."""

    use: Callable
    selects: tuple[bool, bool]


def _on(predicate):
    def use(make, model, run):
        with make(predicate(model) if callable(predicate) else predicate).on(model):
            return run(model)

    return use


def _block(predicate):
    def use(make, model, run):
        with make(predicate(model)):
            return run(model)

    return use


def _mirror(predicate):
    return lambda make, model, run: run(make(predicate)(model))


A, B, BOTH = (True, False), (False, True), (True, True)
NAMINGS = {
    'path': Naming(_on('a'), A),
    'complement of a path': Naming(_on(lambda m: ~sg.path('a')), B),
    'all of a module': Naming(_on(True), BOTH),
    'module': Naming(_block(lambda m: m.a), A),
    'variable': Naming(_block(lambda m: m.b.w), B),
    'list': Naming(_block(lambda m: [m.a, m.b.w]), BOTH),
    'complement of a module': Naming(_block(lambda m: ~sg.within(m.a)), B),
    'everything': Naming(_block(lambda m: True), BOTH),
    'mirror': Naming(_mirror('b'), B),
    'mirror of all': Naming(_mirror(True), BOTH),
}


def read(kind, naming):
    """Return what a and b are read as by hand."""
    by_hand = KINDS[kind][1]

    def change(values):
        sources = (SOURCE['a']['w'], SOURCE['b']['w'])
        return tuple(
            (by_hand(v) if by_hand else source) if selected else v
            for v, source, selected in zip(values, sources, NAMINGS[naming].selects, strict=True)
        )

    return change


# Kinds and namings; a source has names, so that its block needs a module to have them.
_NAMELESS = ('module', 'variable', 'list', 'complement of a module', 'everything')
SIBLINGS = [
    (kind, naming)
    for kind in KINDS
    for naming in NAMINGS
    if kind != 'stop' and not (kind == 'replace' and naming in _NAMELESS)
]


# Those of one naming of each sort, for long tables.
FEW = [each for each in SIBLINGS if each[1] in ('path', 'complement of a module', 'mirror')]


def compare(program, oracle, *, orders=1):
    """Compare a function of a model with one of a and b: the value, and derivatives."""

    def of_values(params):
        return program(Net(*params))

    close = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    close(of_values(PARAMS), oracle(PARAMS))
    got, want = of_values, oracle
    for order in range(orders):
        got, want = ((jax.grad, jax.jacrev)[bool(order)](fn) for fn in (got, want))
        jax.tree.map(close, got(PARAMS), want(PARAMS))


def around_and_live(kind, naming, run, by_hand, **how):
    """Compare a program that reads live, in the block, live again, and in an equal block again."""
    make, use = KINDS[kind][0], NAMINGS[naming].use
    change = read(kind, naming)

    def program(model):
        first = model(X) + use(make, model, run)
        return first + 2 * model(X) + use(make, model, run)

    def oracle(params):
        return 3 * f(*params, X) + 2 * by_hand(*change(params))

    compare(program, oracle, **how)
