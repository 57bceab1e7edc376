"""examples/adjoint_gradient.py: by hand, against plain loops, its blocks, its cost, and a run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_sg import nn
from loading import load

example = load('adjoint_gradient')
benchmark = load('adjoint', 'benchmarks')

EXACT = example.WAYS | {'matrices': benchmark.PROGRAMS['matrices']}
WAYS = EXACT | {'differences': functools.partial(example.differences, size=1e-3)}


class Times(nn.Module):
    """h(x; θ) = θ x."""

    @nn.compact
    def __call__(self, x, u):
        return self.param('theta', nn.initializers.constant(2.0), (1,)) * x, None


class Ramp(nn.Module):
    """β_i(φ) = φ u_i."""

    @nn.compact
    def __call__(self, inputs):
        return self.param('phi', nn.initializers.constant(3.0), (1,)) * inputs[:, 0]


def small():
    """x_0 = 1 and targets 0, so that x_i = θ^i and p_i = θ^2i / 2; u = (5, 1, 2), f = 1/2."""
    data = example.Data(jnp.ones(1), jnp.array([[5.0], [1.0], [2.0]]), jnp.zeros((3, 1)))
    params = {'cell': {'theta': jnp.array([2.0])}, 'beta': {'phi': jnp.array([3.0])}}
    return example.Model(Times(), Ramp()), params, {'theta': jnp.array([0.5])}, data


def test_objective_by_hand():
    model, params, f, data = small()
    # L = φ (5 + 1 θ² + 2 θ⁴) / 2 = 3 (5 + 4 + 32) / 2.
    assert model.apply({'params': params}, f, data, method='objective') == 61.5


@pytest.mark.parametrize('name', EXACT)
def test_small_numbers_by_hand(name):
    # F = f φ (1 θ + 4 θ³) = 3 (2 + 32) / 2, and ∇_φ F is a third of that. β_0 = 15 has no part.
    value, grads = EXACT[name](*small())
    assert (value, grads) == (51.0, {'phi': jnp.array([17.0])})


def by_loops(model, params, f, data):
    """L, F and ∇_φ F of a loop in Python, with no scan, no recursion and no block."""

    def objective(theta, phi):
        weights = model.beta.apply({'params': phi}, data.inputs)
        x, total = data.start, 0.0
        for weight, u, target in zip(weights, data.inputs, data.targets, strict=True):
            total += weight * 0.5 * ((x - target) ** 2).sum()
            x = model.cell.apply({'params': theta}, x, u)[0]
        return total

    def along_f(phi):
        return jax.jvp(lambda theta: objective(theta, phi), (params['cell'],), (f,))[1]

    of_theta = jax.grad(objective)(params['cell'], params['beta'])
    value, of_phi = jax.value_and_grad(along_f)(params['beta'])
    return of_theta, value, of_phi


@functools.cache
def solved():
    """A problem with k = 5 and n = 6, and what loops say of it, in float64."""
    with jax.enable_x64(True):
        model = example.Model(nn.GRUCell(5), example.Beta())
        inputs = example.problem(model, 5, 6)
        return model, inputs, jax.jit(functools.partial(by_loops, model))(*inputs)


@pytest.mark.parametrize('name', WAYS)
def test_ways_agree_with_loops(name):
    model, inputs, (_, want, want_grads) = solved()
    with jax.enable_x64(True):
        value, grads = jax.jit(functools.partial(WAYS[name], model))(*inputs)
        assert value.dtype == np.float64
        np.testing.assert_allclose(value, want, rtol=1e-12)
        assert jax.tree.structure(grads) == jax.tree.structure(want_grads)
        tolerance = 1e-9 if name == 'differences' else 1e-12
        assert example.difference(grads, want_grads) < tolerance


@pytest.mark.parametrize('name', EXACT)
def test_first_state_alone_gives_nothing(name):
    # n = 0: λ_0 = 0.
    model, params, f, data = small()
    data = example.Data(data.start, data.inputs[:1], data.targets[:1])
    value, grads = EXACT[name](model, params, f, data)
    assert (value, grads) == (0.0, {'phi': jnp.zeros(1)})


def largest(tree):
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def test_blocks_keep_the_parts_apart():
    model, inputs, (of_theta, _, of_phi) = solved()
    with jax.enable_x64(True):
        gradient = jax.jit(functools.partial(example.of_losses, model, '__call__'))
        theta_loss, phi_loss, both = (
            gradient(*inputs, weights) for weights in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0))
        )
        assert largest(theta_loss['beta']) == 0 == largest(phi_loss['cell'])
        for grads in (theta_loss, both):
            assert example.difference(grads['cell'], of_theta) < 1e-12
        for grads in (phi_loss, both):
            assert example.difference(grads['beta'], of_phi) < 1e-12


def test_losses_in_blocks_by_hand():
    model, params, f, data = small()
    assert model.apply({'params': params}, f, data) == (61.5, 51.0)


def test_cost_stays_bounded_without_matrices():
    flops, temp_bytes = {}, {}
    for size in (16, 64):
        cost = benchmark.costs(size, ['F', 'adjoint', 'forward', 'matrices'])
        # F has a loop of states and one of λ; its reverse mode adds one of ξ.
        assert [found.loops for found in cost.values()] == [2, 3, 1, 1]
        flops[size] = {name: c.flops / cost['F'].flops for name, c in cost.items()}
        temp_bytes[size] = {name: c.temp_bytes / cost['F'].temp_bytes for name, c in cost.items()}
    for name, bound in {'adjoint': 1.6, 'forward': 0.8}.items():
        assert flops[64][name] <= flops[16][name] < bound
        assert temp_bytes[64][name] < temp_bytes[16][name] < 4
    # k pullbacks of a step, each a product with k×k weights: four times k, four times the ratio.
    assert flops[64]['matrices'] > 12
    assert 3.5 < flops[64]['matrices'] / flops[16]['matrices'] < 4.5


@pytest.mark.long
def test_main_prints_and_draws(tmp_path, capsys):
    picture = tmp_path / 'picture.png'
    result = example.main(['--quick', '--output', str(picture)])
    assert picture.read_bytes().startswith(b'\x89PNG') and picture.stat().st_size > 20_000
    assert [path.name for path in tmp_path.iterdir()] == ['picture.png']
    assert not jax.config.jax_enable_x64 and jnp.ones(1).dtype == np.float32
    printed = capsys.readouterr().out
    assert list(result['found']) == ['adjoint', 'nested', 'forward', 'differences']
    for name, (value, _) in result['found'].items():
        assert f'\n{name:12}{value:22.14f}' in printed
    assert result['parts']['L, in its block'][1] == 0 == result['parts']['F, in its block'][0]
    assert min(result['parts']['L, no block'] + result['parts']['F, no block']) > 0.1
    for name, part in (('L', 0), ('F', 1)):
        alone, in_sum, mixed = (
            result['parts'][key][part]
            for key in (f'{name}, no block', 'L + F, in its block', 'L + F, no block')
        )
        np.testing.assert_allclose(alone, in_sum, rtol=1e-12)
        assert abs(mixed / alone - 1) > 0.01
    assert str(picture) in printed
