"""The networks and losses of PPO and SAC in brax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from .comparison import Program

BATCH, STEPS, SEEN, ACTIONS = 4, 3, 5, 2
PARTS = ('**/hidden_0', '**/bias')


def noise(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def transitions(*leading: int) -> Any:
    """Make what an agent has seen, whatever the environment."""
    from brax.training.types import Transition

    return Transition(
        observation=noise(1, *leading, SEEN),
        action=noise(2, *leading, ACTIONS),
        reward=noise(3, *leading),
        discount=jnp.ones(leading),
        next_observation=noise(4, *leading, SEEN),
        extras={
            'state_extras': {'truncation': jnp.zeros(leading)},
            'policy_extras': {
                'raw_action': noise(5, *leading, ACTIONS),
                'log_prob': noise(6, *leading),
                'distribution_params': noise(7, *leading, 2 * ACTIONS),
            },
        },
    )


def lifted_mlp(lift: Callable) -> Any:
    """Put the lifted class in the place of the one class that all of brax's networks use."""
    from brax.training import networks

    return mock.patch.object(networks, 'MLP', lift(networks.MLP))


def of_variables(fn: Callable, variables: Any) -> Any:
    return variables | {'params': fn(variables['params'])}


def shifted(tree: Any) -> Any:
    """Return a tree whose biases are not zero."""
    return jax.tree.map(lambda leaf: leaf + 0.1, tree)


def ppo() -> Program:
    from brax.training.agents.ppo import losses, networks

    def make() -> Any:
        return networks.make_ppo_networks(
            SEEN, ACTIONS, policy_hidden_layer_sizes=(8, 8), value_hidden_layer_sizes=(8, 8)
        )

    def loss(lift: Callable, params: Any) -> jax.Array:
        with lifted_mlp(lift):
            return losses.compute_ppo_loss(
                params, None, transitions(BATCH, STEPS), jax.random.key(0), make()
            )[0]

    def each_model(fn: Callable, params: Any) -> Any:
        return params.replace(
            policy=of_variables(fn, params.policy), value=of_variables(fn, params.value)
        )

    made = make()
    params = losses.PPONetworkParams(
        policy=made.policy_network.init(jax.random.key(0)),
        value=made.value_network.init(jax.random.key(1)),
    )
    return Program(loss, shifted(params), PARTS, each_model)


def sac() -> Program:
    from brax.training.agents.sac import losses, networks

    def make() -> Any:
        return networks.make_sac_networks(SEEN, ACTIONS, hidden_layer_sizes=(8, 8))

    def loss(lift: Callable, params: Any) -> jax.Array:
        with lifted_mlp(lift):
            _, critic, actor = losses.make_losses(make(), 1.0, 0.9, ACTIONS)
            seen, key = transitions(BATCH), jax.random.key(0)
            return critic(
                params['q'], params['policy'], None, params['target'], 0.5, seen, key
            ) + actor(params['policy'], None, params['q'], 0.5, seen, key)

    def each_model(fn: Callable, params: Any) -> Any:
        return {name: of_variables(fn, variables) for name, variables in params.items()}

    made = make()
    params = {
        'policy': made.policy_network.init(jax.random.key(0)),
        'q': made.q_network.init(jax.random.key(1)),
        'target': made.q_network.init(jax.random.key(2)),
    }
    return Program(loss, shifted(params), PARTS, each_model)
