"""Fine-tuning: a pre-trained part is held by one predicate, in the model and in the optimiser.

An encoder learns to reproduce the digits 0 to 4, without labels. Then it gets a head, which learns
to tell the digits 5 to 9 apart from few examples, in two stages: the head alone, and then all at a
smaller learning rate. (First the head, then the rest: see arXiv 2202.10054.)

What is held in a stage is one object, such as `sg.path('encoder')`, and three things follow it:

- Gradients. `nn.constant(held)` is `nn.stop_gradient(held)`: the backward pass leaves the part out.
- Writes. A BatchNorm in training mode would change the running statistics of the held encoder,
  which are no parameters, and no gradient or optimiser is asked. In a block of `nn.constant` with
  `collections=['params', 'batch_stats']` that is an error. The program makes the mistake once, to
  show the message. The way out is to use the running averages while the encoder is held.
- The optimiser. A gradient of zero does not freeze: AdamW's weight decay would still shrink the
  encoder. `optax.partition` with `sg.labels` sends what is held to `set_to_zero`, which also keeps
  no moments for it. Clipping stands in the transform of what is trained, and counts nothing else.

The data are scikit-learn's digits. The program prints what moved in each stage, with "0" for what
is the same in every bit, the bytes of optimiser state, and the accuracy on held-out digits. All of
it is done with an encoder that was not pre-trained, too, to see what the pre-training is worth.

Run it: python examples/finetune_frozen.py [--quick] [--output PATH]
"""

import argparse
import dataclasses
import textwrap
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import flax_sg as sg
from flax_sg import nn

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)

Array = jax.Array
Variables = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of training.

    Attributes:
      title: the name in the table and the picture.
      held: what is held, in the model and in the optimiser.
      batch_statistics: BatchNorm uses those of the batch, and writes running averages.
      rate: the learning rate.
    """

    title: str
    held: sg.Filter
    batch_statistics: bool
    rate: float


HEAD = Stage('head alone', sg.path('encoder'), False, 1e-2)
ALL = Stage('all', sg.nothing, True, 1e-3)
DECAY, CLIP = 0.1, 1.0


class Encoder(nn.Module):
    """Two layers, each with BatchNorm."""

    features: int = 64

    @nn.compact
    def __call__(self, x: Array, batch_statistics: bool) -> Array:
        for _ in range(2):
            x = nn.Dense(self.features, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(not batch_statistics, momentum=0.9)(x))
        return x


class Autoencoder(nn.Module):
    """The encoder, and a layer that draws a digit from its code."""

    @nn.compact
    def __call__(self, pixels: Array, batch_statistics: bool) -> Array:
        return nn.Dense(64, name='decoder')(Encoder(name='encoder')(pixels, batch_statistics))


class Classifier(nn.Module):
    """The encoder, held or not, and a head for five digits."""

    held: sg.Filter

    @nn.compact
    def __call__(self, pixels: Array, batch_statistics: bool) -> Array:
        with nn.constant(self.held, collections=['params', 'batch_stats']):
            code = Encoder(name='encoder')(pixels, batch_statistics)
        return nn.Dense(5, name='head')(code)


def pretrain(pixels: np.ndarray, steps: int, batch: int = 64) -> tuple[Variables, np.ndarray]:
    """Train the autoencoder; return its variables, and the squared error of a digit on the way."""
    variables = Autoencoder().init(jax.random.key(0), pixels[:1], False)
    optimiser = optax.adam(3e-3)

    def body(carry, key):
        variables, opt_state = carry
        chosen = jax.random.choice(key, jnp.asarray(pixels), (batch,), replace=False)

        def error(params):
            drawn, written = Autoencoder().apply(
                {**variables, 'params': params}, chosen, True, mutable=['batch_stats']
            )
            return jnp.sum((drawn - chosen) ** 2, -1).mean(), written

        (found, written), grads = jax.value_and_grad(error, has_aux=True)(variables['params'])
        updates, opt_state = optimiser.update(grads, opt_state)
        params = optax.apply_updates(variables['params'], updates)
        return ({'params': params, **written}, opt_state), found

    start = variables, optimiser.init(variables['params'])
    (variables, _), errors = jax.jit(lambda keys: jax.lax.scan(body, start, keys))(
        jax.random.split(jax.random.key(1), steps)
    )
    return variables, np.asarray(errors)


def make_optimiser(stage: Stage, params: Variables) -> optax.GradientTransformation:
    """Return AdamW with clipping for what is trained, and nothing for what is held."""
    trained = optax.chain(
        optax.clip_by_global_norm(CLIP), optax.adamw(stage.rate, weight_decay=DECAY)
    )
    labels = sg.labels({'freeze': stage.held, 'train': ~stage.held}, params)
    return optax.partition({'train': trained, 'freeze': optax.set_to_zero()}, labels)


class Digits(NamedTuple):
    """Pixels between 0 and 1, of shape (digits, 64), and which of five digits they are."""

    pixels: np.ndarray
    labels: np.ndarray


def loss(
    params: Variables, statistics: Variables, stage: Stage, digits: Digits
) -> tuple[Array, Variables]:
    """Return the cross-entropy, and the running statistics after it."""
    logits, written = Classifier(stage.held).apply(
        {'params': params, 'batch_stats': statistics},
        digits.pixels,
        stage.batch_statistics,
        mutable=['batch_stats'],
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, digits.labels)
    return losses.mean(), written['batch_stats']


def step(
    stage: Stage, variables: Variables, opt_state: Any, digits: Digits
) -> tuple[Variables, Any]:
    """Make one step on a batch."""
    params = variables['params']
    grads, statistics = jax.grad(loss, has_aux=True)(
        params, variables['batch_stats'], stage, digits
    )
    updates, opt_state = make_optimiser(stage, params).update(grads, opt_state, params)
    return {'params': optax.apply_updates(params, updates), 'batch_stats': statistics}, opt_state


@jax.jit
def accuracy(variables: Variables, digits: Digits) -> Array:
    logits = Classifier(sg.nothing).apply(variables, digits.pixels, False)
    return jnp.mean(logits.argmax(-1) == digits.labels)


class Run(NamedTuple):
    """A stage when it is over: the variables, the optimiser's state, and accuracies on the way."""

    variables: Variables
    opt_state: Any
    steps: np.ndarray
    accuracy: np.ndarray


def train(
    stage: Stage,
    variables: Variables,
    digits: Digits,
    held_out: Digits,
    steps: int,
    batch: int = 32,
) -> Run:
    """Train for a stage, with an optimiser of its own."""
    opt_state = make_optimiser(stage, variables['params']).init(variables['params'])

    @jax.jit
    def some_steps(variables, opt_state, keys):
        def body(carry, key):
            chosen = jax.random.choice(key, len(digits.labels), (batch,), replace=False)
            return step(stage, *carry, jax.tree.map(lambda x: jnp.asarray(x)[chosen], digits)), None

        return jax.lax.scan(body, (variables, opt_state), keys)[0]

    found = [float(accuracy(variables, held_out))]
    for keys in jax.random.split(jax.random.key(1), (20, steps // 20)):
        variables, opt_state = some_steps(variables, opt_state, keys)
        found.append(float(accuracy(variables, held_out)))
    return Run(variables, opt_state, np.linspace(0, steps, 21), np.array(found))


@jax.jit
def init(key: Array) -> Variables:
    return Classifier(sg.nothing).init(key, jnp.zeros((1, 64)), False)


def load_data(few: int = 50) -> tuple[np.ndarray, Digits, Digits]:
    """Return the digits 0 to 4, ``few`` of each digit from 5 to train on, and the other ones."""
    data, target = load_digits(return_X_y=True)
    pixels = (data / 16).astype(np.float32)
    late = target >= 5
    some, other, some_labels, other_labels = train_test_split(
        pixels[late], target[late] - 5, train_size=5 * few, stratify=target[late], random_state=0
    )
    return pixels[~late], Digits(some, some_labels), Digits(other, other_labels)


def parts(variables: Variables) -> dict[str, list[np.ndarray]]:
    """Return the arrays of each layer, parameters and statistics apart."""
    encoder, statistics = variables['params']['encoder'], variables['batch_stats']['encoder']
    found = {f'encoder/{name}': tree for name, tree in encoder.items()}
    found |= {f'encoder/{name}, statistics': tree for name, tree in statistics.items()}
    found['head'] = variables['params']['head']
    return {name: jax.tree.leaves(jax.device_get(found[name])) for name in sorted(found)}


def changes(before: Variables, after: Variables) -> dict[str, float]:
    """Return the norm of each layer's change over its norm; 0 if it is the same in every bit."""
    found = {}
    for (name, old), new in zip(parts(before).items(), parts(after).values(), strict=True):
        same = all(a.tobytes() == b.tobytes() for a, b in zip(old, new, strict=True))
        change = optax.tree.norm([a - b for a, b in zip(old, new, strict=True)])
        found[name] = 0.0 if same else float(change / optax.tree.norm(old))
    return found


def size(tree: Any) -> int:
    """Return the bytes of a tree's arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def mistake(variables: Variables, digits: Digits) -> str:
    """Return the error of training-mode BatchNorm in an encoder that is held."""
    wrong = dataclasses.replace(HEAD, batch_statistics=True)
    try:
        loss(variables['params'], variables['batch_stats'], wrong, digits)
    except sg.FrozenVariableError as error:
        return f'{type(error).__name__}: {error}'
    raise AssertionError('the statistics of a held encoder were written')


def save_picture(
    path: str, runs: dict[str, dict[Stage, Run]], moved: dict[Stage, dict[str, float]]
) -> None:
    """Save the picture: accuracy over both stages, and how much each layer moved."""
    figure, (curve, bars) = plt.subplots(
        1, 2, figsize=(12, 4.6), layout='constrained', width_ratios=(1, 1.2)
    )
    colors = {HEAD: '#0072b2', ALL: '#d55e00'}
    for (encoder, stages), line in zip(runs.items(), ('-', '--'), strict=True):
        start = 0
        for stage, run in stages.items():
            curve.plot(
                start + run.steps,
                run.accuracy,
                line,
                color=colors[stage],
                label=f'{stage.title}, {encoder} encoder',
            )
            start += run.steps[-1]
    curve.set(title='accuracy on held-out digits 5 to 9', xlabel='step', ylim=(0.7, 1))
    curve.legend(loc='lower right')

    names = list(moved[HEAD])
    for shift, (stage, found) in zip((-0.2, 0.2), moved.items(), strict=True):
        at, values = np.arange(len(names)) + shift, np.array([found[name] for name in names])
        bars.barh(at, values, height=0.4, color=colors[stage], label=stage.title)
        for y, value in zip(at, values, strict=True):
            bars.text(
                value,
                y,
                f' {value:.2g}' if value else ' 0',
                va='center',
                fontsize=8,
                color=colors[stage],
            )
    bars.set_yticks(np.arange(len(names)), names)
    bars.invert_yaxis()
    bars.margins(x=0.12)
    bars.set(title='norm of the change over the norm before')
    bars.legend(loc='upper right')
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--quick', action='store_true', help='a short run, for the tests')
    parser.add_argument('--output', default='finetune_frozen.png', help='the picture')
    args = parser.parse_args(argv)
    began, steps = time.perf_counter(), 100 if args.quick else 1000

    early, digits, held_out = load_data()
    pretrained, errors = pretrain(early, 3 * steps)
    print(
        f'Autoencoder of {len(early)} digits 0 to 4: squared error {errors[0]:.3f} at the start, '
        f'{errors[-1]:.3f} at the end, {time.perf_counter() - began:.1f} s so far',
        flush=True,
    )

    print(f'Digits 5 to 9: {len(digits.labels)} to train on, {len(held_out.labels)} held out')
    fresh = init(jax.random.key(2))
    ready = {
        collection: {**tree, 'encoder': pretrained[collection]['encoder']}
        for collection, tree in fresh.items()
    }
    runs = {}
    for encoder, variables in {'pre-trained': ready, 'untrained': fresh}.items():
        runs[encoder] = {}
        for stage in (HEAD, ALL):
            run = runs[encoder][stage] = train(stage, variables, digits, held_out, steps)
            variables = run.variables
            print(
                f'{encoder:12} encoder, {stage.title + ":":11} accuracy {run.accuracy[-1]:.1%}, '
                f'{size(run.opt_state):6d} bytes of optimiser state, '
                f'{time.perf_counter() - began:.1f} s so far',
                flush=True,
            )

    head, both = (run.variables for run in runs['pre-trained'].values())
    moved = {HEAD: changes(ready, head), ALL: changes(head, both)}
    print(f'\n{"change over norm":34}' + ''.join(f'{stage.title:>14}' for stage in moved))
    for name in moved[HEAD]:
        cells = (
            f'{found[name]:14.4f}' if found[name] else f'{"0":>14}' for found in moved.values()
        )
        print(f'{name:34}' + ''.join(cells))
    print('\nBatchNorm in training mode while the encoder is held:')
    print(textwrap.fill(mistake(ready, digits), 100))
    save_picture(args.output, runs, moved)
    print(f'\nPicture: {args.output}. {time.perf_counter() - began:.1f} s.')
    return {'start': ready, 'runs': runs, 'moved': moved}


if __name__ == '__main__':
    main()
