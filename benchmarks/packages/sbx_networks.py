"""The networks of PPO and SAC in sbx, without the environments around them."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .comparison import Program

OBSERVATIONS = jax.random.normal(jax.random.key(1), (4, 5))
ACTIONS = jax.random.normal(jax.random.key(2), (4, 2))
PARTS = ('**/Dense_0', '**/bias')


class Hollow(types.ModuleType):
    """A module in which every name is an empty class."""

    __path__ = ()

    def __getattr__(self, name: str) -> type:
        if name.startswith('__'):
            raise AttributeError(name)
        setattr(self, name, type(name, (), {}))
        return getattr(self, name)


class HollowFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torch and the environments' loops of sbx, which its networks do not use, hollow."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition('.')[0] in ('torch', 'stable_baselines3'):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Hollow:
        return Hollow(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def shifted(variables: Any) -> Any:
    """Return parameters whose biases are not zero."""
    return jax.tree.map(lambda leaf: leaf + 0.1, variables['params'])


def each_model(fn: Callable, params: Any) -> Any:
    return {name: fn(tree) for name, tree in params.items()}


def sac() -> Program:
    """The loss of SAC's actor through the minimum of its vmapped critics, and the critics'."""
    sys.meta_path.insert(0, HollowFinder())
    from sbx.sac.policies import SquashedGaussianActor, VectorCritic

    actor_fields, critic_fields = dict(net_arch=(8, 8), action_dim=2), dict(net_arch=(8, 8))

    def loss(lift: Callable, params: Any) -> jax.Array:
        actor = lift(SquashedGaussianActor)(**actor_fields)
        critic = lift(VectorCritic)(**critic_fields)
        seen = actor.apply({'params': params['actor']}, OBSERVATIONS)
        actions = seen.sample(seed=jax.random.key(0))
        values = critic.apply({'params': params['critic']}, OBSERVATIONS, actions)
        old = critic.apply({'params': params['critic']}, OBSERVATIONS, ACTIONS)
        return (seen.log_prob(actions) - values.min(axis=0)[:, 0]).mean() + (old**2).mean()

    key = jax.random.key(0)
    params = {
        'actor': SquashedGaussianActor(**actor_fields).init(key, OBSERVATIONS),
        'critic': VectorCritic(**critic_fields).init(key, OBSERVATIONS, ACTIONS),
    }
    return Program(loss, {name: shifted(tree) for name, tree in params.items()}, PARTS, each_model)


def ppo() -> Program:
    """The log probability of PPO's actor, whose spread is a parameter, and the value."""
    sys.meta_path.insert(0, HollowFinder())
    from sbx.ppo.policies import Actor, Critic

    fields = dict(net_arch=(8, 8))

    def loss(lift: Callable, params: Any) -> jax.Array:
        actor, critic = lift(Actor)(action_dim=2, **fields), lift(Critic)(**fields)
        seen = actor.apply({'params': params['actor']}, OBSERVATIONS)
        value = critic.apply({'params': params['critic']}, OBSERVATIONS)
        advantage = jnp.tanh(value[:, 0])
        return -(seen.log_prob(ACTIONS) * advantage).mean() + (value**2).mean()

    key = jax.random.key(0)
    params = {
        'actor': Actor(action_dim=2, **fields).init(key, OBSERVATIONS),
        'critic': Critic(**fields).init(key, OBSERVATIONS),
    }
    return Program(loss, {name: shifted(tree) for name, tree in params.items()}, PARTS, each_model)
