"""K losses that train a part each of one model of flax.nnx: ways to say so, and their cost.

One scan of Linear layers feeds K losses; each may train one layer. Beside views and blocks it is
written with what flax.nnx has, `nnx.DiffState`; by hand, with a copy of the model for each loss in
which the other parts are stopped, or with one `jax.vjp` whose pullback runs for each loss; and with
a type of their own for Variables that are held. That is the idea of netket's freezing of parameters
(netket pull request 2241), in NNX: there, the frozen ones of a Linen module move to a collection of
their own, and have no entry in the gradient.

Flops, loops and temporary bytes are those of the compiled step, and exact; the body of a loop is
counted once. Lines are those which the program without routing has not. A typo is the name of a
part that is not there. All ways have to give the gradients of the way by hand.

    python benchmarks/nnx_prior_art.py [--losses K ...] [--quick]
"""

from __future__ import annotations

import argparse
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_sg import nnx
from measure import cost_of, count_loops, table

Array = jax.Array


class Net(nnx.Module):
    """A scan through all parts in turn, of a state [batch, width] and inputs [length, ...]."""

    def __init__(self, parts: int, width: int):
        rngs = nnx.Rngs(0)
        for k in range(parts):
            setattr(self, f'part_{k}', nnx.Linear(width, width, rngs=rngs))
        self.parts = parts

    def run(self, c: Array, xs: Array) -> tuple[Array, Array]:
        def step(c: Array, net: Net, x: Array) -> tuple[Array, Array]:
            for k in range(net.parts):
                c = jnp.tanh(getattr(net, f'part_{k}')(c) + x)
            return c, c.mean(-1)

        scan = nnx.scan(step, in_axes=(nnx.Carry, None, 0), out_axes=(nnx.Carry, 0))
        return scan(c, self, xs)


def loss_of(k: int, out: tuple[Array, Array]) -> Array:
    """Return loss k, which looks at all of the output."""
    return ((out[0] - k) ** 2).sum() + jnp.sin(k + 1 + out[1]).sum()


# Each returns the gradients, by path, of losses that train the parts of these names.


def no_routing(net: Net, names: Sequence[str], c: Array, xs: Array) -> Any:
    def total(net: Net) -> Array:
        out = net.run(c, xs)
        return sum(loss_of(k, out) for k, name in enumerate(names))

    return nnx.grad(total)(net)


def with_views(net: Net, names: Sequence[str], c: Array, xs: Array) -> Any:
    def total(net: Net) -> Array:
        out = nnx.gradient_views({name: name for name in names})(net.run)(c, xs)
        return sum(loss_of(k, out[name]) for k, name in enumerate(names))

    return nnx.grad(total)(net)


def with_blocks(net: Net, names: Sequence[str], c: Array, xs: Array) -> Any:
    def total(net: Net) -> Array:
        found = 0.0
        for k, name in enumerate(names):
            with nnx.stop_gradient(~nnx.path(name)).on(net):
                out = net.run(c, xs)
            found += loss_of(k, out)
        return found

    return nnx.grad(total)(net)


def with_diff_state(net: Net, names: Sequence[str], c: Array, xs: Array) -> Any:
    def loss(net: Net, k: int) -> Array:
        out = net.run(c, xs)
        return loss_of(k, out)

    grads = []
    for k, name in enumerate(names):
        mine = nnx.DiffState(0, nnx.All(nnx.Param, nnx.PathContains(name)))
        grads.append(nnx.grad(functools.partial(loss, k=k), argnums=mine)(net))
    return nnx.merge_state(*grads)


def by_hand(net: Net, names: Sequence[str], c: Array, xs: Array) -> Any:
    def total(net: Net) -> Array:
        found = 0.0
        for k, name in enumerate(names):
            graph, mine, others = nnx.split(net, nnx.PathContains(name), ...)
            held = jax.lax.stop_gradient(others)
            out = nnx.merge(graph, mine, held).run(c, xs)
            found += loss_of(k, out)
        return found

    return nnx.grad(total)(net)


def by_pullbacks(net: Net, names: Sequence[str], c: Array, xs: Array) -> Any:
    graph, state = nnx.split(net)
    out, pull = jax.vjp(lambda state: nnx.merge(graph, state).run(c, xs), state)
    grads = {}
    for k, name in enumerate(names):
        cotangent = jax.grad(functools.partial(loss_of, k))(out)
        grads[name] = pull(cotangent)[0][name]
    return nnx.State(grads)


class Held(nnx.Variable):
    """What is no `nnx.Param`, so that `nnx.grad` does not differentiate it."""


def with_types(net: Net, names: Sequence[str], c: Array, xs: Array) -> Any:
    def loss(net: Net, k: int) -> Array:
        out = net.run(c, xs)
        return loss_of(k, out)

    grads = []
    for k, name in enumerate(names):
        copy = nnx.clone(net)
        for path, part in nnx.iter_graph(copy):
            if isinstance(part, nnx.Linear) and name not in path:
                part.kernel, part.bias = Held(part.kernel[...]), Held(part.bias[...])
        grads.append(nnx.grad(functools.partial(loss, k=k))(copy))
    return nnx.merge_state(*grads)


WAYS: dict[str, tuple[Callable, str]] = {  # and whether one function may say it for each loss
    'gradient_views': (with_views, 'yes'),
    'a block for each loss': (with_blocks, 'yes'),
    'nnx.DiffState': (with_diff_state, 'no: a gradient each'),
    'by hand: split, stop, merge': (by_hand, 'yes'),
    'by hand: vjp, a pullback each': (by_pullbacks, 'no: the losses are outside'),
    'a Variable type': (with_types, 'no: a model and a gradient each'),
}


def data_of(parts: int, width: int = 64, length: int = 64, batch: int = 32) -> tuple:
    """Return a model, the names of its parts, and what it is called with."""
    xs = jax.random.normal(jax.random.key(1), (length, batch, width))
    return Net(parts, width), [f'part_{k}' for k in range(parts)], xs[0], xs


def compiled(way: Callable, net: Net, names: Sequence[str], c: Array, xs: Array) -> Any:
    graph, state = nnx.split(net)

    def step(state: Any, c: Array, xs: Array) -> Any:
        return nnx.to_pure_dict(way(nnx.merge(graph, state), names, c, xs))

    return jax.jit(step).lower(state, c, xs).compile()


def gradients(step: Any, net: Net, names: Sequence[str], c: Array, xs: Array) -> Any:
    """Run a compiled step."""
    return step(nnx.state(net), c, xs)


def lines_of(way: Callable) -> int:
    """Count the lines of a way that the program without routing has not."""
    lines = lambda fn: [line.strip() for line in inspect.getsource(fn).splitlines()[1:]]
    known = lines(no_routing)
    return sum(bool(line) and line not in known for line in lines(way))


def outcome_of_typo(way: Callable, parts: int = 2) -> str:
    """Say what happens if the last name is not there: an error, or how many gradients there are."""
    net, names, c, xs = data_of(parts, 4, 2, 1)
    try:
        grads = nnx.to_pure_dict(way(net, [*names[:-1], 'prat'], c, xs))
    except Exception as error:  # what it is, is the answer
        return type(error).__name__
    live = sum(any(x.any() for x in jax.tree.leaves(grads.get(name, {}))) for name in names)
    return f'silent: trains {live} of {parts}'


def row_of(way: str, data: tuple, first: Any, hand: Any) -> list[Any]:
    """Return the row of a way: lines, loops, flops and bytes over the first, and the rest."""
    fn, in_one = WAYS[way]
    step = compiled(fn, *data)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3),
        gradients(step, *data),
        gradients(hand, *data),
    )
    cost, text = cost_of(step), step.as_text()
    backward = sum(' while(' in line and 'transpose(' in line for line in text.splitlines())
    return [
        way,
        lines_of(fn),
        f'{count_loops(text) - backward} + {backward}',
        f'{cost.flops / cost_of(first).flops:.2f}',
        f'{cost.temp_bytes / cost_of(first).temp_bytes:.2f}',
        in_one,
        outcome_of_typo(fn),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--losses', type=int, nargs='+', default=[3, 8], metavar='K')
    parser.add_argument('--quick', action='store_true', help='a small scan')
    args = parser.parse_args()
    head = ['way', 'lines', 'loops', 'flops', 'bytes', 'each loss in one function', 'a typo']
    print(f'jax {jax.__version__}\n')
    for count in args.losses:
        data = data_of(count, *((8, 4, 2) if args.quick else ()))
        first, hand = (compiled(fn, *data) for fn in (with_views, by_hand))
        rows = [row_of(way, data, first, hand) for way in WAYS]
        print(table(f'{count} losses, over gradient_views', head, rows), flush=True)


if __name__ == '__main__':
    main()
