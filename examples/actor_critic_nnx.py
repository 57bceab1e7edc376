"""A shared torso and a target network in flax.nnx: one gradient, and each loss trains its own part.

An agent swings up the pendulum of actor_critic_world_model.py by DDPG (Lillicrap et al., arXiv
1509.02971). Actor and critic look through one torso, which only the critic's loss should train
(Yarats et al., arXiv 1910.01741). The actor's loss is minus the critic's value of the actor's
action. Its gradient goes through the critic to the actor, and may move the actor alone:

    with nnx.stop_gradient([self.torso, self.critic]):     # parameters are held, activations live
        features = self.features(body)
        loss = -self.value(features, self.policy(features)).mean()

The usual way is two calls of `nnx.grad`, with a `DiffState` each, the forward pass in both, and two
gradients for the optimiser to take (google/flax issue 4391). Here it is one gradient of the sum of
the losses, and one optimiser. Training runs `Agent.losses`, where `nnx.gradient_views` has one
forward pass for both. `Agent.losses_in_blocks` has the block above, at the same cost here: XLA
merges equal products, if they are in no loop.

The target network is no second module. It is a dict of slow values, and `nnx.replace_values` has
the agent read them in place of its own. So nothing is there to alias, to train by mistake or to
leave out of the optimiser; and as a gradient is taken of the agent, the slow values are data.

For comparison the actor's loss trains the torso too, or all that it reaches, as it does when
nothing says no. Of six seeds each, all that train the actor alone swing the pendulum up and hold
it, and none of the others. That depends on what the actor's loss counts in the sum: at --weight
0.1 the six with the torso do it too, and two of the other six; at 0.01 all do. Where a loss trains
parts of its own there is nothing to weigh: Adam takes no notice of its scale (jax 0.12.0.1).

    python actor_critic_nnx.py [--steps N] [--seeds N] [--seed N] [--weight W] [--quick]
        [--output FILE]

It prints which loss moves which parameters, returns while it trains, and how the ways end. Returns
and last episodes go to FILE, a picture.
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
from actor_critic_world_model import DT, EPISODE, at_rest, move, reward, seen

import flax_sg as sg
from flax_sg import nnx

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)

WAYS = {  # what the actor's loss may move, and a colour
    'the actor alone': (('actor',), '#0072b2'),
    'the torso too': (('actor', 'torso'), '#d55e00'),
    'all that it reaches': (('actor', 'torso', 'critic'), '#009e73'),
}
PENDULUMS, BATCH, WIDTH = 4, 128, 64  # practice: pendulums that move by DT in each training step
DISCOUNT, NOISE, RATE, SLOWNESS = 0.97, 0.3, 1e-3, 0.01
POINTS = 20  # of a curve

Array = jax.Array


class Moves(NamedTuple):
    """What happened: bodies before and after (B, 2), actions (B, 1) and rewards (B,)."""

    before: Array
    action: Array
    reward: Array
    after: Array


class Perceptron(nnx.Module):
    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        self.lower = nnx.Linear(inputs, WIDTH, rngs=rngs)
        self.upper = nnx.Linear(WIDTH, outputs, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.upper(nnx.silu(self.lower(x)))


# --- The agent: this is what the example is about -------------------------------------------------


class Agent(nnx.Module):
    """A torso, and on it an actor and a critic.

    `way` is one of WAYS; `weight` is what the actor's loss counts in the sum.
    """

    def __init__(self, rngs: nnx.Rngs, way: str = 'the actor alone', weight: float = 1.0):
        self.way, self.weight = way, weight
        self.torso = Perceptron(3, WIDTH, rngs)
        self.actor = Perceptron(WIDTH, 1, rngs)
        self.critic = Perceptron(WIDTH + 1, 1, rngs)

    def features(self, body: Array) -> Array:
        return nnx.silu(self.torso(seen(body)))

    def policy(self, features: Array) -> Array:
        """Return actions, (B, 1)."""
        return jnp.tanh(self.actor(features))

    def value(self, features: Array, action: Array) -> Array:
        """Return what the critic says the discounted rewards will be, (B,)."""
        return self.critic(jnp.concatenate([features, action], -1))[..., 0]

    def values(self, body: Array, action: Array) -> tuple[Array, Array]:
        """Return the value of an action, and of the actor's own."""
        features = self.features(body)
        return self.value(features, action), self.value(features, self.policy(features))

    def goal(self, moves: Moves, slow: Any) -> Array:
        """Return what the critic should have said, by the target network, (B,)."""
        with nnx.replace_values(True, slow).on(self):  # the same code, of other values
            return moves.reward + DISCOUNT * self.values(moves.after, moves.action)[1]

    def losses(self, moves: Moves, slow: Any) -> dict[str, Array]:
        """Return the losses, of one forward pass."""
        views = nnx.gradient_views({'critic': ('torso', 'critic'), 'actor': WAYS[self.way][0]})
        out = views(self.values)(moves.before, moves.action)
        return {
            'critic': jnp.square(out['critic'][0] - self.goal(moves, slow)).mean(),
            'actor': -out['actor'][1].mean(),
        }

    def losses_in_blocks(self, moves: Moves, slow: Any) -> dict[str, Array]:
        """Return the same losses, where the actor's trains the actor alone."""
        value = self.value(self.features(moves.before), moves.action)
        with nnx.stop_gradient([self.torso, self.critic]):
            features = self.features(moves.before)
            of_own_action = self.value(features, self.policy(features))
        return {
            'critic': jnp.square(value - self.goal(moves, slow)).mean(),
            'actor': -of_own_action.mean(),
        }


# --- Training -------------------------------------------------------------------------------------


class Learner(nnx.Module):
    """All that changes in training: agent, slow values, optimiser, pendulums and what they did."""

    def __init__(self, rngs: nnx.Rngs, steps: int, *of_agent: Any):
        self.agent, self.rngs = Agent(rngs, *of_agent), rngs
        self.slow = nnx.Variable(nnx.to_pure_dict(nnx.state(self.agent)))
        self.optimiser = nnx.Optimizer(self.agent, optax.adam(RATE), wrt=nnx.Param)
        self.bodies = nnx.Variable(jnp.zeros((PENDULUMS, 2)))
        slots = steps * PENDULUMS
        self.memory = nnx.Variable(
            Moves(*(jnp.zeros((slots, *shape)) for shape in ((2,), (1,), (), (2,))))
        )

    def practise(self, number: Array) -> Moves:
        """Move the pendulums with noise, and remember it; return moves (BATCH, ...) to learn of."""
        # Practice starts at any angle. The episodes that are reported start hanging down.
        fresh = at_rest(self.rngs(), PENDULUMS, jnp.pi)
        before = jnp.where(number % EPISODE == 0, fresh, self.bodies[...])
        noise = NOISE * jax.random.normal(self.rngs(), (PENDULUMS, 1))
        action = jnp.clip(self.agent.policy(self.agent.features(before)) + noise, -1, 1)
        after = self.bodies[...] = move(before, action)
        store = functools.partial(
            jax.lax.dynamic_update_slice_in_dim, start_index=number * PENDULUMS, axis=0
        )
        new = Moves(before, action, reward(after, action), after)
        memory = jax.tree.map(store, self.memory.get_value(), new)
        self.memory.set_value(memory)
        chosen = jax.random.randint(self.rngs(), (BATCH,), 0, (number + 1) * PENDULUMS)
        return jax.tree.map(lambda x: x[chosen], memory)

    def step(self, number: Array) -> dict[str, Array]:
        """Take the training step of this number; return the losses."""
        moves, slow = self.practise(number), self.slow.get_value()
        grads, losses = nnx.grad(total, has_aux=True)(self.agent, moves, slow)
        self.optimiser.update(self.agent, grads)
        fast = nnx.to_pure_dict(nnx.state(self.agent))
        self.slow.set_value(optax.incremental_update(fast, slow, SLOWNESS))
        return losses


def total(agent: Agent, moves: Moves, slow: Any) -> tuple[Array, dict[str, Array]]:
    losses = agent.losses(moves, slow)
    return losses['critic'] + agent.weight * losses['actor'], losses


@nnx.jit
@functools.partial(nnx.vmap, in_axes=(0, None))  # over the seeds
def advance(learner: Learner, numbers: Array) -> dict[str, Array]:
    """Take the steps with these numbers; return the losses of each, (seeds, steps)."""
    steps = nnx.scan(
        lambda learner, number: (learner, learner.step(number)),
        in_axes=(nnx.Carry, 0),
        out_axes=(nnx.Carry, 0),
    )
    return steps(learner, numbers)[1]


class Episodes(NamedTuple):
    """What 16 pendulums do that hang down at first, moved without noise.

    The sum of their rewards, a mean over them, (); the heights of the masses in m, (EPISODE, 16).
    """

    returns: Array
    heights: Array


@nnx.jit
@nnx.vmap
def evaluate(agent: Agent) -> Episodes:
    def step(body: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        action = agent.policy(agent.features(body))
        body = move(body, action)
        return body, (reward(body, action), jnp.cos(body[:, 0]))

    start = at_rest(jax.random.key(0), 16, 0.3)
    rewards, heights = jax.lax.scan(step, start, length=EPISODE)[1]
    return Episodes(rewards.sum(0).mean(), heights)


class Result(NamedTuple):
    """Returns in training, (POINTS + 1, seeds), and the episodes after it."""

    returns: np.ndarray
    last: Episodes


def train(way: str, steps: int, seeds: Sequence[int], weight: float = 1.0) -> Result:
    start = time.perf_counter()
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    learner = nnx.vmap(lambda key: Learner(nnx.Rngs(key), steps, way, weight))(keys)
    returns = [evaluate(learner.agent).returns]
    for numbers in jnp.arange(steps).reshape(POINTS, -1):
        losses = advance(learner, numbers)
        last = jax.device_get(evaluate(learner.agent))
        returns.append(last.returns)
        if len(returns) % (POINTS // 5) == 1:
            print(
                f'{way}, step {numbers[-1] + 1:4}: returns {shown(last.returns)}, critic loss '
                f'{losses["critic"][:, -1].mean():.2f}  ({time.perf_counter() - start:.1f} s)',
                flush=True,
            )
    return Result(np.stack(returns), last)


def shown(x: Array) -> str:
    """Write one number for each seed."""
    return ' '.join(f'{value:4.0f}' for value in x)


def upright(last: Episodes) -> np.ndarray:
    """Return the part of the pendulums that stand for the last 2 s, for each seed."""
    return (last.heights[:, -round(2 / DT) :] > 0.9).all(1).mean(1)


# --- What it prints and draws ---------------------------------------------------------------------


def save_picture(path: str, results: dict[str, Result], steps: int) -> None:
    """Save the returns in training, and the last episodes."""
    figure, axes = plt.subplot_mosaic(
        [['returns', way] for way in WAYS],
        width_ratios=[1.3, 1],
        figsize=(12, 5.5),
        layout='constrained',
    )
    left, at = axes['returns'], np.linspace(0, steps, POINTS + 1)
    for way, result in results.items():
        right, colour = axes[way], WAYS[way][1]
        left.plot(at, result.returns, color=colour, lw=0.8, alpha=0.4)
        left.plot(at, np.median(result.returns, 1), color=colour, lw=2.5, label=way)
        heights = result.last.heights[..., 0]  # of the first pendulum
        right.plot(DT * np.arange(1, EPISODE + 1), heights.T, color=colour, lw=1, alpha=0.8)
        right.set(ylabel='height in m', ylim=(-1.1, 1.1))
        right.tick_params(labelbottom=way == list(WAYS)[-1])
        right.set_title(way, loc='right', color=colour, fontsize='medium')
    left.set(
        title='Returns in training: median, and a thin line for each seed',
        xlabel=f'training step, of {PENDULUMS} moves by {DT} s',
        ylabel=f'sum of {EPISODE} rewards (a spinning pendulum has less than is drawn)',
        ylim=(-200, 100),
    )
    left.legend(title="The actor's loss trains", loc='lower right')
    axes[list(WAYS)[0]].set_title('After training, a line for each seed', loc='left')
    axes[list(WAYS)[-1]].set(xlabel='time in s')
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> tuple[dict[str, Result], sg.Flow]:
    """Return what came of each way, and which loss trains what."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--steps', type=int, default=4000, help=f'of training, {POINTS} at least')
    parser.add_argument('--seeds', type=int, default=6, help='how many')
    parser.add_argument('--seed', type=int, default=0, help='the first of them')
    parser.add_argument('--weight', type=float, default=1.0, help="of the actor's loss")
    parser.add_argument('--quick', action='store_true', help='200 steps of 2 seeds')
    parser.add_argument('--output', default='actor_critic_nnx.png', help='the picture')
    args = parser.parse_args(argv)
    if args.steps < 1 or args.steps % POINTS or args.seeds < 1:
        parser.error(f'expected --steps in multiples of {POINTS}, and a seed at least')
    steps, count = (200, 2) if args.quick else (args.steps, args.seeds)
    seeds = range(args.seed, args.seed + count)

    agent = Agent(nnx.Rngs(args.seed))
    slow = nnx.to_pure_dict(nnx.state(agent))
    body = at_rest(jax.random.key(args.seed), BATCH, jnp.pi)
    moves = Moves(body, body[:, :1] / 4, jnp.ones(BATCH), body)
    flow = sg.gradient_flow(lambda agent: agent.losses(moves, slow))(agent)
    print(f'Which loss trains what\n\n{flow}\n')

    print(f"Returns, of {count} seeds, where the actor's loss trains")
    results = {way: train(way, steps, seeds, args.weight) for way in WAYS}

    print(f'\n{"After training":20}{"mean return":>12}  pendulums that stand for the last 2 s')
    for way, (_, last) in results.items():
        stand = ' '.join(f'{part:4.0%}' for part in upright(last))
        print(f'{way:20}{last.returns.mean():12.1f}  {stand}')

    save_picture(args.output, results, steps)
    print(f'\nPicture: {args.output}')
    return results, flow


if __name__ == '__main__':
    main()
