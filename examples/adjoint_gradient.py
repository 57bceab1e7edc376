"""The gradient of a gradient: an adjoint recursion with learned weights, differentiated by them.

A recurrent cell with parameters θ makes states x_{i+1} = h_i(x_i; θ) from a fixed x_0, a scalar
p_i(x_i) judges each of them, and a network with parameters φ weighs these, in

    L(θ, φ) = Σ_{i=0..n} β_i(φ) p_i(x_i).

Backpropagation of L has the cotangent λ_i = ∂L/∂x_{i+1} of the state that h_i makes: λ_n = 0, as
nothing looks at x_{n+1}, and λ_{i-1} = (∂h_i/∂x_i)ᵀ λ_i + (∂p_i/∂x_i)ᵀ β_i. What θ gets along a
direction f is

    F(θ, φ) = fᵀ ∇_θ L = Σ_{i=0..n} fᵀ (∂h_i/∂θ)ᵀ λ_i.

∇_φ F asks which weights would make training by L move θ along f. (With f the gradient of another
loss J, a step of size η along -∇_θ L changes J by -η F, to first order.) It is found four ways.

- adjoint: reverse mode through the recursion of λ, a scan in which each step calls nn.vjp.
- nested: a VJP of a VJP, φ of ⟨f, ∇_θ L⟩, by pure functions of parameter trees with no block.
- forward: let ξ_i be the derivative of x_{i+1} along f, so ξ_{-1} = 0 and
      ξ_i = (∂h_i/∂θ) f + (∂h_i/∂x_i) ξ_{i-1}.
  Put (∂h_i/∂θ) f = ξ_i - (∂h_i/∂x_i) ξ_{i-1} into F, and move the Jacobian over to λ_i:
      F = Σ_{i=0..n} ⟨ξ_i, λ_i⟩ - Σ_{i=0..n} ⟨ξ_{i-1}, λ_{i-1} - (∂p_i/∂x_i)ᵀ β_i⟩.
  The sums of ⟨ξ, λ⟩ telescope, and both ends are 0. What is left is linear in β:
      ∇_φ F = Σ_{i=0..n-1} ⟨vjp(1, p_{i+1}, x_{i+1}), ξ_i⟩ vjp(1, β_{i+1}, φ).
  One scan of nn.jvp makes ξ and the brackets, which are JVPs of p, and one VJP of β with all
  brackets as its cotangent makes the sum. (Reverse mode of the recursion of λ does the same: the
  cotangent of λ_i is ξ_i.)
- differences: central differences of F, of fourth order, in float64.

None of them forms the k×k matrix ∂h_i/∂x_i. Griewank and Walther (Evaluating Derivatives, 2008)
bound the cost of a VJP by 4 times that of the function, and of a JVP by 5/2 times. So ∇_φ F costs a
few times what F costs, however large the state; benchmarks/adjoint.py measures it.

One model holds both networks, and one scalar trains both: in `Model.__call__`, L trains the cell
in a block that holds β, and F trains β in a block that holds the cell. F is made of VJPs with
respect to θ that are taken inside that block: there θ is a constant for φ's gradient, and still
what F's own derivatives are with respect to.

Run it: python examples/adjoint_gradient.py [--quick] [--output PATH]
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from flax_sg import nn

Array = jax.Array
Tree = dict[str, Any]


class Data(NamedTuple):
    """The first state, and inputs and targets of the steps 0 to n."""

    start: Array  # [k]
    inputs: Array  # [n + 1, d]
    targets: Array  # [n + 1, k]


def p(x: Array, target: Array) -> Array:
    """Return p_i(x), which depends on i through its target."""
    return 0.5 * jnp.sum((x - target) ** 2)


def tangent(cell: nn.Module, x: Array, u: Array, f: Tree, xi: Array) -> tuple[Array, Array]:
    """Return h(x; θ), and its derivative along f in θ and xi in x."""
    return nn.jvp(lambda cell, x: cell(x, u)[0], cell, (x,), (xi,), {'params': f})


def scan(step: Callable, reverse: bool = False) -> Callable:
    return nn.scan(step, variable_broadcast='params', split_rngs={'params': False}, reverse=reverse)


class Beta(nn.Module):
    """The weights β_i(φ) of all steps, from their inputs."""

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        return nn.Dense(1)(jnp.tanh(nn.Dense(8)(inputs)))[:, 0]


class Model(nn.Module):
    """The cell h with θ, β with φ, and what is made of the two.

    Attributes:
      cell: called with a state and an input, it returns the next state first, as nn.GRUCell does.
      beta: called with the inputs of all steps, it returns a weight for each.
      tangent: how `forward` finds the derivative of a step.
    """

    cell: nn.Module
    beta: nn.Module
    tangent: Callable = tangent

    def __call__(self, f: Tree, data: Data) -> tuple[Array, Array]:
        """Return the losses of θ and of φ. Their sum trains both, each with its own loss."""
        with nn.stop_gradient('beta'):
            theta_loss = self.objective(f, data)
        with nn.stop_gradient('cell'):
            phi_loss = self.adjoint(f, data)
        return theta_loss, phi_loss

    def without_blocks(self, f: Tree, data: Data) -> tuple[Array, Array]:
        return self.objective(f, data), self.adjoint(f, data)

    def states(self, data: Data) -> Array:
        """Return x_0 to x_n."""
        return scan(lambda cell, x, u: (cell(x, u)[0], x))(self.cell, data.start, data.inputs)[1]

    def objective(self, f: Tree, data: Data) -> Array:
        """Return L, of which f is no part."""
        return jnp.vdot(self.beta(data.inputs), jax.vmap(p)(self.states(data), data.targets))

    def adjoint(self, f: Tree, data: Data) -> Array:
        """Return F, by the recursion of λ from step n down to step 0."""

        def step(cell, lam, at):
            x, u, target, beta = at
            _, pull = nn.vjp(lambda cell, x: cell(x, u)[0], cell, x)
            of_theta, of_x = pull(lam)
            _, pull_p = jax.vjp(lambda x: p(x, target), x)
            return of_x + pull_p(beta)[0], optax.tree.vdot(f, of_theta['params'])

        along = self.states(data), data.inputs, data.targets, self.beta(data.inputs)
        _, terms = scan(step, reverse=True)(self.cell, jnp.zeros_like(data.start), along)
        return terms.sum()

    def forward(self, f: Tree, data: Data) -> tuple[Array, Tree]:
        """Return F and ∇_φ F, by the recursion of ξ from step 0 up to step n."""

        def step(cell, state, at):
            (x, xi), (u, target) = state, at  # x_i and ξ_{i-1}, which is its derivative
            _, along_xi = jax.jvp(lambda x: p(x, target), (x,), (xi,))
            return self.tangent(cell, x, u, f, xi), along_xi

        first = data.start, jnp.zeros_like(data.start)
        _, brackets = scan(step)(self.cell, first, (data.inputs, data.targets))
        beta, pull = nn.vjp(lambda beta: beta(data.inputs), self.beta)
        return jnp.vdot(beta, brackets), pull(brackets)[0]['params']


def adjoint(model: Model, params: Tree, f: Tree, data: Data) -> tuple[Array, Tree]:
    """Return F and ∇_φ F by reverse mode through the adjoint recursion, in the block."""
    phi_loss = lambda params: model.apply({'params': params}, f, data)[1]
    value, grads = jax.value_and_grad(phi_loss)(params)
    return value, grads['beta']


def nested(model: Model, params: Tree, f: Tree, data: Data) -> tuple[Array, Tree]:
    """Return them by a VJP of a VJP, with no block."""

    def along_f(phi):
        objective = lambda theta: model.apply(
            {'params': {'cell': theta, 'beta': phi}}, f, data, method='objective'
        )
        value, pull = jax.vjp(objective, params['cell'])
        return optax.tree.vdot(f, pull(jnp.ones_like(value))[0])

    value, pull = jax.vjp(along_f, params['beta'])
    return value, pull(jnp.ones_like(value))[0]


def forward(model: Model, params: Tree, f: Tree, data: Data) -> tuple[Array, Tree]:
    return model.apply({'params': params}, f, data, method='forward')


def differences(model: Model, params: Tree, f: Tree, data: Data, size: float) -> tuple[Array, Tree]:
    """Return them by central differences, with φ moved by `size` and by twice that."""
    phi, tree = ravel_pytree(params['beta'])
    value = lambda phi: model.apply(
        {'params': {'cell': params['cell'], 'beta': tree(phi)}}, f, data, method='adjoint'
    )

    def along(direction):
        near, far = (
            value(phi + s * direction) - value(phi - s * direction) for s in (size, 2 * size)
        )
        return (8 * near - far) / (12 * size)

    return value(phi), tree(jax.lax.map(along, jnp.eye(phi.size, dtype=phi.dtype)))


def of_losses(
    model: Model, method: str, params: Tree, f: Tree, data: Data, weights: tuple[float, float]
) -> Tree:
    """Return the gradient of the weighted sum of L and F by all parameters."""
    losses = lambda params: model.apply({'params': params}, f, data, method=method)
    return jax.vjp(losses, params)[1](weights)[0]


WAYS = {'adjoint': adjoint, 'nested': nested, 'forward': forward}


def problem(
    model: Model, size: int, steps: int, seed: int = 0, dtype: Any = np.float64
) -> tuple[Tree, Tree, Data]:
    """Return parameters, a direction f and data at which no derivative vanishes."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(dtype)
    data = Data(normal(size), normal(steps + 1, 3), normal(steps + 1, size))
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), None, data, method='objective'))[
        'params'
    ]
    params = jax.tree.map(lambda x: normal(*x.shape) / np.sqrt(x.shape[0]).astype(dtype), like)
    return params, jax.tree.map(lambda x: normal(*x.shape), params['cell']), data


def difference(a: Tree, b: Tree) -> float:
    """Return the norm of the difference of two trees over that of the second."""
    a, b = ravel_pytree(a)[0], ravel_pytree(b)[0]
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def print_blocks(model: Model, params: Tree, f: Tree, data: Data) -> dict[str, list[float]]:
    """Print the norms of θ's and φ's parts of the gradients, with and without the blocks."""
    print(f'\n{"gradient of":24}{"θ part":>10}{"φ part":>10}')
    found = {}
    for method, text in (('__call__', 'in its block'), ('without_blocks', 'no block')):
        gradient = jax.jit(functools.partial(of_losses, model, method))
        for name, weights in (('L', (1.0, 0.0)), ('F', (0.0, 1.0)), ('L + F', (1.0, 1.0))):
            grads = gradient(params, f, data, weights)
            parts = [float(optax.tree.norm(grads[part])) for part in ('cell', 'beta')]
            found[f'{name}, {text}'] = parts
            print(f'{name + ", " + text:24}' + ''.join(f'{part:10.4g}' for part in parts))
    return found


def draw(grads: dict[str, Tree], sizes: np.ndarray, errors: list[float], path: str) -> None:
    """Save the picture: the gradient, and the error of differences over their step."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    figure, (parts, error) = plt.subplots(
        1, 2, figsize=(12, 4.4), layout='constrained', width_ratios=(3, 2)
    )
    flat = {name: ravel_pytree(grad)[0] for name, grad in grads.items()}
    number = np.arange(1, flat['nested'].size + 1)
    parts.bar(number, flat['nested'], color='#c9d8e8', label='nested')
    styles = {
        'adjoint': ('o', 9, '#0072b2'),
        'forward': ('s', 5, '#d55e00'),
        'differences': ('.', 4, 'black'),
    }
    for name, (marker, width, colour) in styles.items():
        parts.plot(number, flat[name], marker, ms=width, mfc='none', color=colour, label=name)
    parts.set(title='∇_φ F, four ways', xlabel='number of the parameter in φ', ylabel='∂F/∂φ')
    parts.legend()
    error.loglog(sizes, errors, 'k.-', label='differences')
    for name, style in (('adjoint', '-'), ('forward', '--')):
        error.axhline(
            max(difference(grads[name], grads['nested']), 1e-17),
            ls=style,
            color=styles[name][2],
            label=name,
        )
    error.set(
        title='relative difference to "nested", float64',
        xlabel='step of the differences',
        ylabel='‖difference‖ / ‖∇_φ F‖',
    )
    error.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description='The gradient of a gradient, four ways.')
    parser.add_argument('--quick', action='store_true', help='a short run, for the tests')
    parser.add_argument('--output', default='adjoint_gradient.png', help='the picture')
    args = parser.parse_args(argv)
    began = time.perf_counter()
    size, steps = (4, 3) if args.quick else (32, 20)
    model = Model(nn.GRUCell(size), Beta())
    with jax.enable_x64(True):
        params, f, data = problem(model, size, steps)
        found = {
            name: jax.jit(functools.partial(way, model))(params, f, data)
            for name, way in WAYS.items()
        }
        by_size = jax.jit(functools.partial(differences, model))
        found['differences'] = by_size(params, f, data, 1e-3)
        print(
            f'k = {size}, n = {steps}, {ravel_pytree(params["cell"])[0].size} parameters in θ, '
            f'{ravel_pytree(params["beta"])[0].size} in φ, float64\n\n'
            f'{"way":12}{"F":>22}   relative difference of ∇_φ F to that of each way'
        )
        for name, (value, grad) in found.items():
            print(
                f'{name:12}{value:22.14f}   '
                + '  '.join(f'{difference(grad, other):.1e}' for _, other in found.values())
            )
        parts = print_blocks(model, params, f, data)
        sizes = np.logspace(-6, 0, 5 if args.quick else 13)
        errors = [difference(by_size(params, f, data, s)[1], found['nested'][1]) for s in sizes]
        draw({name: grad for name, (_, grad) in found.items()}, sizes, errors, args.output)
    print(f'\nPicture: {args.output}. {time.perf_counter() - began:.1f} s.')
    return {'found': found, 'parts': parts}


if __name__ == '__main__':
    main()
