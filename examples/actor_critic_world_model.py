"""Three losses, one imagined rollout: actor and critic learn inside a learned model of the world.

A pendulum has to be swung up and held by a motor that is too weak to lift it. As in Dreamer (Hafner
et al., arXiv 1912.01603) an agent learns a model of its world and practises in it, with three
losses, each of which may train one part only:

- world: under recorded actions the model should predict what really happened;
- actor: imagined returns should be high. Its gradient goes through the critic and, step by step,
  through the model, and may move neither, or they would learn to promise high returns;
- critic: its values should be the imagined returns, which are given as targets.

All three look at the same rollout, an `nn.scan` of the model from real states, where half of the
batch repeats the recorded actions and the other half asks the actor. With a block for each loss, as
in google/flax issue 1857, it would run three times. Here it runs once, see `Agent.views`:

    nn.gradient_views({'world': 'world', 'actor': 'actor', 'critic': 'critic'})(self.rollout)(...)

For comparison, the same agents are trained without views, where each loss moves all parts. The real
pendulum is written out below; the agents see what it does, and not its equations.

    python actor_critic_world_model.py [--steps N] [--seeds N] [--output FILE]

It prints returns on the real pendulum while it trains, which loss moves which parameters, and what
a step costs with views and with three masked calls. The returns go to FILE, a picture.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import flax_sg as sg
from flax_sg import nn

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)

TRAINS = {'world': 'world', 'actor': 'actor', 'critic': 'critic'}  # what each loss may move
RATES = {'world': 2e-3, 'actor': 1e-3, 'critic': 2e-3}
DT, TORQUE, GRAVITY = 0.1, 5.0, 9.81  # s, N m, m/s²: a mass of 1 kg on a rod of 1 m
EPISODE = 120  # steps of DT
HORIZON, BATCH, PENDULUMS = 15, 64, 4  # a rollout's steps; pendulums run HORIZON steps a step
DISCOUNT, LAMBDA, NOISE = 0.97, 0.95, 0.4
POINTS = 20  # of a curve

Array = jax.Array
Params = dict[str, Any]

# --- The real pendulum ----------------------------------------------------------------------------


def move(body: Array, action: Array) -> Array:
    """Return the pendulum's body after DT seconds of a constant torque.

    Args:
      body: angle from upright in rad, and angular velocity in rad/s, shape (..., 2).
      action: the torque over TORQUE, from -1 to 1, shape (..., 1).
    """

    def rate(body: Array) -> Array:
        angle, velocity = body[..., :1], body[..., 1:]
        return jnp.concatenate([velocity, GRAVITY * jnp.sin(angle) + TORQUE * action], -1)

    a = rate(body)  # the classical Runge-Kutta method
    b = rate(body + DT / 2 * a)
    c = rate(body + DT / 2 * b)
    d = rate(body + DT * c)
    return body + DT / 6 * (a + 2 * b + 2 * c + d)


def reward(body: Array, action: Array) -> Array:
    """Return rewards (...): 1 for upright and at rest, less for angle, speed and effort."""
    angle, velocity = body[..., 0], body[..., 1]
    return jnp.cos(angle) - 0.01 * velocity**2 - 0.02 * action[..., 0] ** 2


def at_rest(key: Array, count: int, spread: float) -> Array:
    """Return bodies (count, 2) at rest, at angles of up to `spread` rad from hanging down."""
    angles = jnp.pi + jax.random.uniform(key, (count, 1), minval=-spread, maxval=spread)
    return jnp.concatenate([angles, jnp.zeros_like(angles)], -1)


# --- The agent: this is what the example is about -------------------------------------------------


class Record(NamedTuple):
    """What really happened: bodies (T + 1, B, 2), actions (T, B, 1) and rewards (T, B)."""

    bodies: Array
    actions: Array
    rewards: Array


class Rollout(NamedTuple):
    """What the model says will happen: bodies (T + 1, 2, B, 2), rewards (T, 2, B), values.

    The second axis has 0 for the recorded actions and 1 for the actor's. The values, (T + 1, B),
    are the critic's of the bodies under the actor's actions.
    """

    bodies: Array
    rewards: Array
    values: Array


class Perceptron(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for _ in range(2):
            x = nn.silu(nn.Dense(64)(x))
        return nn.Dense(self.features)(x)


def seen(body: Array) -> Array:
    """Return what the networks see of a body, shape (..., 3)."""
    angle, velocity = body[..., 0], body[..., 1]
    return jnp.stack([jnp.cos(angle), jnp.sin(angle), velocity / 8], -1)


class Agent(nn.Module):
    """A world model, an actor and a critic. `way` says how the losses share a rollout."""

    way: str = 'views'

    def setup(self) -> None:
        self.world, self.actor, self.critic = Perceptron(3), Perceptron(1), Perceptron(1)

    def act(self, body: Array) -> Array:
        """Return actions, (..., 1)."""
        # A sine has no flat ends. With tanh, six of six agents end at full torque.
        return jnp.sin(self.actor(seen(body)))

    def rollout(self, start: Array, recorded: Array) -> Rollout:
        """Imagine both futures of bodies (B, 2), under recorded actions (T, B, 1) and its own."""

        def step(self: Agent, bodies: Array, recorded: Array) -> tuple[Array, tuple[Array, Array]]:
            actions = jnp.stack([recorded, self.act(bodies[1])])
            told = self.world(jnp.concatenate([seen(bodies), actions], -1))
            bodies = bodies + told[..., :2]
            return bodies, (bodies, told[..., 2])

        scan = nn.scan(step, variable_broadcast='params', split_rngs={'params': False})
        starts = jnp.stack([start, start])
        _, (bodies, rewards) = scan(self, starts, recorded)
        bodies = jnp.concatenate([starts[None], bodies])
        return Rollout(bodies, rewards, self.critic(seen(bodies[:, 1]))[..., 0])

    def views(self, *args: Array) -> dict[str, Rollout]:
        """Return the rollout for each loss. It trains what TRAINS says, unless without views."""
        if self.way == 'views':
            return nn.gradient_views(TRAINS)(self.rollout)(*args)
        if self.way == 'without views':
            return dict.fromkeys(TRAINS, self.rollout(*args))
        out = {}
        for loss, part in TRAINS.items():
            with nn.stop_gradient(~nn.path(part)):
                out[loss] = self.rollout(*args)
        return out

    def __call__(self, record: Record) -> dict[str, Array]:
        """Return the losses."""
        out = self.views(record.bodies[0], record.actions)
        error = jnp.square(out['world'].bodies[1:, 0] - record.bodies[1:]).sum(-1)
        error += jnp.square(out['world'].rewards[:, 0] - record.rewards)
        targets = jax.lax.stop_gradient(imagined_returns(out['critic']))
        return {
            'world': error.mean(),
            'actor': -imagined_returns(out['actor']).mean(),
            'critic': jnp.square(out['critic'].values[:-1] - targets).mean() / 2,
        }


def imagined_returns(rollout: Rollout) -> Array:
    """Return the λ-returns of the actor's half, (T, B): from each body on, but for the last."""
    decay, steps = DISCOUNT * LAMBDA, np.arange(len(rollout.rewards))
    gains = rollout.rewards[:, 1] + DISCOUNT * (1 - LAMBDA) * rollout.values[1:]
    gains = gains.at[-1].add(decay * rollout.values[-1])
    return jnp.triu(decay ** (steps - steps[:, None])) @ gains


# --- Training -------------------------------------------------------------------------------------


class State(NamedTuple):
    """What changes in training. The memory is a Record of all pieces that were seen."""

    params: Params
    optimiser: Any
    bodies: Array
    memory: Record


def live(params: Params, bodies: Array, noise: Array) -> tuple[Array, Record]:
    """Move real pendulums (B, 2) by the actor with noise (T, B, 1); return them and a Record."""

    def step(body: Array, noise: Array) -> tuple[Array, tuple[Array, Array, Array]]:
        action = jnp.clip(Agent().apply({'params': params}, body, method='act') + noise, -1, 1)
        body = move(body, action)
        return body, (body, action, reward(body, action))

    last, (after, *others) = jax.lax.scan(step, bodies, noise)
    return last, Record(jnp.concatenate([bodies[None], after]), *others)


def optimiser(params: Params) -> optax.GradientTransformation:
    """Give each part an Adam of its own, by the predicates that the views use."""
    parts = {
        part: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
        for part, rate in RATES.items()
    }
    return optax.partition(parts, sg.labels(TRAINS, params))


@functools.partial(jax.jit, static_argnums=1)
@functools.partial(jax.vmap, in_axes=(0, None))  # over the seeds
def begin(key: Array, steps: int) -> State:
    slots = steps * PENDULUMS
    memory = Record(
        jnp.zeros((HORIZON + 1, slots, 2)),
        jnp.zeros((HORIZON, slots, 1)),
        jnp.zeros((HORIZON, slots)),
    )
    params = Agent().init(key, jax.tree.map(lambda x: x[:, :1], memory))['params']
    return State(params, optimiser(params).init(params), jnp.zeros((PENDULUMS, 2)), memory)


def total(params: Params, record: Record, way: str) -> tuple[Array, dict[str, Array]]:
    losses = Agent(way).apply({'params': params}, record)
    return sum(losses.values()), losses


@functools.partial(jax.jit, static_argnums=3)
@functools.partial(jax.vmap, in_axes=(0, 0, None, None))
def advance(state: State, key: Array, numbers: Array, way: str) -> tuple[State, dict[str, Array]]:
    """Take the steps with these numbers; return the losses of each."""

    def step(state: State, number: Array) -> tuple[State, dict[str, Array]]:
        to_start, to_noise, to_choose = jax.random.split(jax.random.fold_in(key, number), 3)
        # Practice starts at any angle. The episodes that are reported start hanging down.
        bodies = jnp.where(
            number % (EPISODE // HORIZON) == 0, at_rest(to_start, PENDULUMS, jnp.pi), state.bodies
        )
        noise = NOISE * jax.random.normal(to_noise, (HORIZON, PENDULUMS, 1))
        bodies, piece = live(state.params, bodies, noise)
        memory = jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_slice_in_dim(
                old, new, number * PENDULUMS, axis=1
            ),
            state.memory,
            piece,
        )
        chosen = jax.random.randint(to_choose, (BATCH,), 0, (number + 1) * PENDULUMS)
        record = jax.tree.map(lambda x: x[:, chosen], memory)
        grads, losses = jax.grad(total, has_aux=True)(state.params, record, way)
        changes, inner = optimiser(grads).update(grads, state.optimiser)
        params = optax.apply_updates(state.params, changes)
        return State(params, inner, bodies, memory), losses

    return jax.lax.scan(step, state, numbers)


@jax.jit
@jax.vmap
def on_the_real(params: Params) -> tuple[Array, Array]:
    """Let 16 real pendulums hang down, and move them without noise.

    Returns:
      The sum of an episode's rewards, mean over the pendulums, (); and the height of the first
      pendulum's mass in m, (EPISODE + 1,).
    """
    bodies = at_rest(jax.random.key(0), 16, 0.3)
    _, record = live(params, bodies, jnp.zeros((EPISODE, 16, 1)))
    return record.rewards.sum(0).mean(), jnp.cos(record.bodies[:, 0, 0])


class Result(NamedTuple):
    """What training left, seeds last but in the state: real returns on the way, losses, heights."""

    state: State
    returns: np.ndarray  # (POINTS + 1, seeds)
    losses: dict[str, np.ndarray]  # (steps, seeds)
    heights: np.ndarray  # (EPISODE + 1, seeds)


def train(way: str, steps: int, seeds: int) -> Result:
    keys, start = jax.vmap(jax.random.key)(jnp.arange(seeds)), time.perf_counter()
    state, losses = begin(keys, steps), []
    returns = [on_the_real(state.params)[0]]
    for numbers in jnp.arange(steps).reshape(POINTS, -1):
        state, some = advance(state, keys, numbers, way)
        score, heights = on_the_real(state.params)
        losses.append(some)
        returns.append(score)
        if len(losses) % (POINTS // 5) == 0:
            print(
                f'{way}, step {numbers[-1] + 1:4}: real return {spread(score)}, model error '
                f'{some["world"][:, -1].mean():.3g}  ({time.perf_counter() - start:.1f} s)',
                flush=True,
            )
    losses = jax.tree.map(lambda *x: np.concatenate(x, axis=1).T, *losses)
    return Result(state, np.stack(returns), losses, np.asarray(heights).T)


def spread(x: Array) -> str:
    return f'{x.mean():6.1f} ± {x.std(ddof=1):4.1f}'


# --- What it prints and draws ---------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=2)
def gradients(params: Params, record: Record, way: str) -> dict[str, Params]:
    """Return the gradient of each loss."""
    return jax.jacrev(lambda params: total(params, record, way)[1])(params)


def costs(params: Params, record: Record) -> dict[str, tuple[int, int, float]]:
    """Return the forward and backward loops of a compiled gradient step, and its median ms."""
    step = jax.jit(jax.grad(total, has_aux=True), static_argnums=2)
    compiled = {way: step.lower(params, record, way).compile() for way in ('views', 'masked calls')}
    times = {way: [] for way in compiled}
    for _ in range(20):  # in turns
        for way, run in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(params, record))
            times[way].append(1e3 * (time.perf_counter() - start))
    found = {}
    for way, run in compiled.items():
        loops = [line for line in run.as_text().splitlines() if ' while(' in line]
        backward = sum('transpose(' in line for line in loops)
        found[way] = len(loops) - backward, backward, float(np.median(times[way]))
    return found


def save_picture(path: str, results: dict[str, Result], steps: int) -> None:
    """Save the returns in training, and the real pendulums' height afterwards."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout='constrained')
    for (way, result), colour in zip(results.items(), ('#0072b2', '#d55e00'), strict=True):
        mean, sd = result.returns.mean(1), result.returns.std(1, ddof=1)
        at = np.linspace(0, steps, POINTS + 1)
        left.plot(at, mean, color=colour, label=way)
        left.fill_between(at, mean - sd, mean + sd, color=colour, alpha=0.2, lw=0)
        right.plot(DT * np.arange(EPISODE + 1), result.heights, color=colour, lw=1, alpha=0.8)
    left.set(
        ylabel=f'return: sum of {EPISODE} rewards',
        xlabel=f'training step, of {PENDULUMS * HORIZON * DT:.0f} s with real pendulums',
        title='Returns on the real pendulum, mean ± sd over the seeds',
    )
    left.legend(loc='center right')
    right.set(
        xlabel='time in s',
        ylabel='height of the mass in m',
        title='A real episode after training, a line for each seed',
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> tuple[dict[str, Result], dict, dict]:
    """Return what training left, and the figures of the two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--steps', type=int, default=800, help='of training')
    parser.add_argument('--seeds', type=int, default=3, help='how many')
    parser.add_argument('--output', default='actor_critic_world_model.png', help='the picture')
    args = parser.parse_args(argv)
    if args.steps < 1 or args.steps % POINTS:
        parser.error(f'--steps {args.steps}: expected a multiple of {POINTS}')
    if args.seeds < 2:
        parser.error(f'--seeds {args.seeds}: expected at least 2, for a standard deviation')

    results = {way: train(way, args.steps, args.seeds) for way in ('views', 'without views')}
    print(
        '\nReal return, and the imagined one. That has a discount: a true one is at most '
        f'{1 / (1 - DISCOUNT):.1f}'
    )
    for way, result in results.items():
        print(
            f'{way:14}{spread(result.returns[0])} before,{spread(result.returns[-1])} after; '
            f'imagined {-result.losses["actor"][-1].mean():.3g}'
        )

    state = jax.tree.map(lambda x: x[0], results['views'].state)
    record = jax.tree.map(lambda x: x[:, :BATCH], state.memory)
    grads = gradients(state.params, record, 'views')
    norms = {
        loss: {part: float(optax.tree.norm(tree)) for part, tree in grads[loss].items()}
        for loss in TRAINS
    }
    print('\nWhich loss moves what: norms of gradients, 0 is exactly zero')
    print(f'{"":12}' + ''.join(f'{loss:>12}' for loss in TRAINS))
    for part in TRAINS:
        cells = ('0' if norms[loss][part] == 0 else f'{norms[loss][part]:.4f}' for loss in TRAINS)
        print(f'{part:12}' + ''.join(f'{cell:>12}' for cell in cells))

    found = costs(state.params, record)
    print('\nA gradient step, compiled')
    for way, (forward, backward, ms) in found.items():
        print(f'{way:14}{forward} forward and {backward} backward loops, {ms:.1f} ms')
    save_picture(args.output, results, args.steps)
    print(f'\nReturns: {args.output}')
    return results, norms, found


if __name__ == '__main__':
    main()
