"""Models of netket: log amplitudes, and an energy by its rule for expectation values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .comparison import Program

SPINS = np.array([[1.0, -1.0, 1.0, 1.0], [-1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, 1.0]])


def amplitude_of(module: Any, parts: tuple[str, ...]) -> Program:
    """Make a loss of a model's log amplitudes."""
    from .comparison import remade

    def loss(lift: Callable, params: Any) -> jax.Array:
        values = remade(module, lift).apply({'params': params}, SPINS)
        return (jnp.abs(values) ** 2).mean() + jnp.imag(values).sum()

    params = module.init(jax.random.key(0), SPINS)['params']
    return Program(loss, jax.tree.map(lambda leaf: leaf + 0.1, params), parts)


def rbm_with_phase() -> Program:
    import netket as nk

    return amplitude_of(nk.models.RBMModPhase(alpha=2), ('Dense_0', '*/bias'))


def deep_set() -> Program:
    import netket as nk

    return amplitude_of(
        nk.models.DeepSetMLP(features_phi=4, features_rho=4), ('**/ds_phi', '**/bias')
    )


def autoregressive() -> Program:
    import netket as nk

    hilbert = nk.hilbert.Spin(0.5, 4)
    return amplitude_of(
        nk.models.ARNNDense(hilbert=hilbert, layers=2, features=4), ('_layers_0', '**/bias')
    )


def energy() -> Program:
    """The energy of an Ising chain, by the custom rule of nk.jax.expect."""
    import netket as nk

    hilbert = nk.hilbert.Spin(0.5, 4)
    ising = nk.operator.IsingJax(hilbert, nk.graph.Chain(4), h=1.0)

    def loss(lift: Callable, params: Any) -> jax.Array:
        module = lift(nk.models.RBM)(alpha=2)

        def log_probability(params: Any, spins: jax.Array) -> jax.Array:
            return 2 * module.apply({'params': params}, spins).real

        def local_energy(params: Any, spins: jax.Array) -> jax.Array:
            connected, elements = ising.get_conn_padded(spins)
            here = module.apply({'params': params}, spins)
            there = module.apply({'params': params}, connected)
            return (elements * jnp.exp(there - here[:, None])).sum(axis=1)

        return nk.jax.expect(log_probability, local_energy, params, SPINS)[0]

    params = nk.models.RBM(alpha=2).init(jax.random.key(0), SPINS)['params']
    return Program(
        loss, jax.tree.map(lambda leaf: leaf + 0.1, params), ('Dense', 'visible_bias'), eager=True
    )
