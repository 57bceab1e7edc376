"""Fine-tuning with LoRA on flax.nnx: one predicate says what is held, to the block and to optax.

google/flax issue 3929 asks how to train only the LoRA parameters of a model. They are named, so

    held = ~sg.path('**/lora_*')

is what does not learn, and everything else follows that object:

- Gradients. `with nnx.stop_gradient(held).on(model):` makes what is held a constant of the loss.
- The optimiser. `nnx.Optimizer(model, tx, wrt=nnx.All(nnx.Param, ~held))`, or `optax.partition`
  with `sg.labels`. A block alone does not freeze: AdamW decays a weight without a gradient too.
- `nnx.DiffState(0, nnx.All(nnx.Param, ~held))`, where one choice for all of a function will do: the
  gradient has no entries for what is held, while a block gives zeros, and may be for one of several
  losses. The numbers are the same.

`nnx.LoRAParam` is a kind of `nnx.Param`, of the collection `params`: blocks see it, and so does
`wrt=nnx.Param`. (`nnx.LoRAParam` itself will do for `wrt=`, and says nothing of a head.)

A small mixer (arXiv 2105.01601) learns scikit-learn's digits. Then they are turned by 90 degrees,
and from a few labels of each it learns them again: with all its parameters, with LoRA in its blocks
(arXiv 2106.09685), or with its head. All is best here; LoRA comes close with enough labels, and has
a fifth of the optimiser's state. The program prints the accuracies, what moved that should not,
the bytes of optimiser state, and how far W + AB in place of W and A, B changes what comes out.

    python examples/lora_nnx.py [--quick] [--seed N] [--output PATH]
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import flax_sg as sg
from flax_sg import nnx

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)

Array = jax.Array
RANK, RATE, DECAY, BATCH = 4, 1e-2, 0.1, 32
ADAMW = optax.adamw(RATE, weight_decay=DECAY)  # one object: nnx.jit compiles anew for another one
LAYERS = ('tokens_in', 'tokens_out', 'channels_in', 'channels_out')

LORA = ~sg.path('**/lora_*')

# What is held in each way of fine-tuning.
HELD = {
    'all': sg.nothing,
    'LoRA and head': LORA & ~sg.path('head'),
    'LoRA': LORA,
    'head': ~sg.path('head'),
}


# --- The model, and LoRA in it --------------------------------------------------------------------


class Block(nnx.Module):
    """Mixes the patches of each channel, and then the channels of each patch."""

    def __init__(self, patches: int, width: int, *, rngs: nnx.Rngs):
        self.token_norm, self.channel_norm = (nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
        self.tokens_in = nnx.Linear(patches, 2 * patches, rngs=rngs)
        self.tokens_out = nnx.Linear(2 * patches, patches, rngs=rngs)
        self.channels_in = nnx.Linear(width, 2 * width, rngs=rngs)
        self.channels_out = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        mixed = self.tokens_out(nnx.gelu(self.tokens_in(self.token_norm(x).mT))).mT
        x = x + mixed
        return x + self.channels_out(nnx.gelu(self.channels_in(self.channel_norm(x))))


class Mixer(nnx.Module):
    """Tells digits of 8 x 8 pixels by their 16 patches."""

    def __init__(self, width: int = 32, blocks: int = 2, *, rngs: nnx.Rngs):
        self.embed = nnx.Linear(4, width, rngs=rngs)
        self.blocks = nnx.List([Block(16, width, rngs=rngs) for _ in range(blocks)])
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, pixels: Array) -> Array:
        patches = pixels.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)
        x = self.embed(patches)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def with_lora(model: Mixer, rngs: nnx.Rngs) -> Mixer:
    """Return a copy with an nnx.LoRA around each Linear of the blocks."""
    model = nnx.clone(model)
    for block in model.blocks:
        for name in LAYERS:
            base = getattr(block, name)
            sizes = base.in_features, RANK, base.out_features
            setattr(block, name, nnx.LoRA(*sizes, base_module=base, rngs=rngs))
    return model


def merged(model: Mixer) -> Mixer:
    """Return a copy without LoRA, in which each kernel is W + AB."""
    model = nnx.clone(model)
    for block in model.blocks:
        for name in LAYERS:
            lora = getattr(block, name)
            lora.base_module.kernel[...] += lora.lora_a[...] @ lora.lora_b[...]
            setattr(block, name, lora.base_module)
    return model


# --- Fine-tuning: what is held is one object ------------------------------------------------------


class Digits(NamedTuple):
    """Pixels between 0 and 1, of shape (..., 64), and which digits they are."""

    pixels: Any
    labels: Any


def loss(model: Mixer, digits: Digits, held: sg.Filter = sg.nothing) -> Array:
    """Return the cross-entropy; what is held does not learn from it."""
    with nnx.stop_gradient(held).on(model):
        logits = model(digits.pixels)
    return optax.softmax_cross_entropy_with_integer_labels(logits, digits.labels).mean()


def optimizer_of_trained(model: Mixer, held: sg.Filter) -> nnx.Optimizer:
    """Return an optimiser that knows nothing of what is held."""
    return nnx.Optimizer(model, ADAMW, wrt=nnx.All(nnx.Param, ~held))


def optimizer_by_labels(model: Mixer, held: sg.Filter) -> nnx.Optimizer:
    """Return one of all parameters, in which what is held gets no update and has no state."""
    labels = sg.labels({'hold': held, 'train': ~held}, nnx.state(model, nnx.Param))
    both = optax.partition({'train': ADAMW, 'hold': optax.set_to_zero()}, labels)
    return nnx.Optimizer(model, both, wrt=nnx.Param)


def optimizer_of_all(model: Mixer, held: sg.Filter) -> nnx.Optimizer:
    """Return one of all parameters: the mistake."""
    return nnx.Optimizer(model, ADAMW, wrt=nnx.Param)


@nnx.jit(static_argnames='held')
def train(model: Mixer, optimizer: nnx.Optimizer, batches: Digits, held: sg.Filter) -> Array:
    """Make a step for each batch; return the losses."""

    def step(carry: tuple[Mixer, nnx.Optimizer], digits: Digits):
        model, optimizer = carry
        value, grads = nnx.value_and_grad(loss)(model, digits, held)
        optimizer.update(model, grads)
        return carry, value

    carry = model, optimizer
    return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(carry, batches)[1]


@nnx.jit
def accuracy(model: Mixer, digits: Digits) -> Array:
    return jnp.mean(model(digits.pixels).argmax(-1) == digits.labels)


def batches_of(digits: Digits, steps: int, rng: np.random.Generator) -> Digits:
    chosen = rng.integers(len(digits.labels), size=(steps, BATCH))
    return Digits(digits.pixels[chosen], digits.labels[chosen])


# --- Data, and what is printed --------------------------------------------------------------------


def turned(digits: Digits) -> Digits:
    images = digits.pixels.reshape(-1, 8, 8)
    return Digits(np.rot90(images, axes=(1, 2)).reshape(-1, 64), digits.labels)


def load_data() -> tuple[Digits, Digits]:
    """Return digits to learn from, and held-out digits."""
    data, target = load_digits(return_X_y=True)
    train, held_out, train_labels, held_out_labels = train_test_split(
        (data / 16).astype(np.float32), target, test_size=0.4, stratify=target, random_state=0
    )
    return Digits(train, train_labels), Digits(held_out, held_out_labels)


def few_of(digits: Digits, few: int, rng: np.random.Generator) -> Digits:
    """Return some of each digit."""
    of_each = [np.flatnonzero(digits.labels == digit) for digit in range(10)]
    chosen = np.concatenate([rng.choice(each, few, replace=False) for each in of_each])
    return Digits(digits.pixels[chosen], digits.labels[chosen])


def size(tree: Any) -> int:
    """Return the bytes of a tree's arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def change(before: nnx.State, after: nnx.State, of: sg.Filter) -> float:
    """Return the norm of a change over the norm before; 0 if it is the same in every bit."""
    old, new = (jax.device_get(jax.tree.leaves(nnx.filter_state(s, of))) for s in (before, after))
    if all(a.tobytes() == b.tobytes() for a, b in zip(old, new, strict=True)):
        return 0.0
    return float(optax.tree.norm(jax.tree.map(np.subtract, new, old)) / optax.tree.norm(old))


class Run(NamedTuple):
    """A model after fine-tuning, its optimiser, and on the way the change of what is held."""

    model: Mixer
    optimizer: nnx.Optimizer
    moved: list[float]


def fine_tune(
    base: Mixer,
    digits: Digits,
    held: sg.Filter,
    *,
    steps: int,
    seed: int,
    lora: bool,
    optimizer_of: Callable[[Mixer, sg.Filter], nnx.Optimizer] = optimizer_of_trained,
) -> Run:
    """Fine-tune a copy of a model, in ten parts."""
    model = with_lora(base, nnx.Rngs(seed)) if lora else nnx.clone(base)
    before, optimizer = nnx.state(nnx.clone(model), nnx.Param), optimizer_of(model, held)
    rng, moved = np.random.default_rng(seed), [0.0]
    for _ in range(10):
        train(model, optimizer, batches_of(digits, steps // 10, rng), held)
        moved.append(change(before, nnx.state(model, nnx.Param), held))
    return Run(model, optimizer, moved)


@nnx.jit(static_argnames='held')
def gradients(model: Mixer, digits: Digits, held: sg.Filter) -> tuple[nnx.State, nnx.State]:
    """Return the gradient with a block, and with DiffState and no block."""
    trained = nnx.DiffState(0, nnx.All(nnx.Param, ~held))
    return nnx.grad(loss)(model, digits, held), nnx.grad(loss, argnums=trained)(model, digits)


def save_picture(
    path: str, digits: Digits, found: dict[str, np.ndarray], few: list[int], runs: dict[str, Run]
) -> None:
    """Save the picture: the digits, accuracy by the number of labels, and what moved."""
    figure = plt.figure(figsize=(13, 4.6), layout='constrained')
    left, right = figure.subfigures(1, 2, width_ratios=(1, 4.2))
    left.suptitle('learned, and turned')
    grid = left.subplots(5, 2)
    for column, images in zip(grid.T, (digits.pixels, turned(digits).pixels), strict=True):
        for axes, image in zip(column, images[:5], strict=True):
            axes.imshow(image.reshape(8, 8), cmap='gray_r')
            axes.set(xticks=[], yticks=[])

    curves, moves = right.subplots(1, 2)
    colors = ['#000000', '#0072b2', '#56b4e9', '#d55e00']
    for (way, accuracies), color in zip(found.items(), colors, strict=True):
        mean, spread = accuracies.mean(-1), accuracies.std(-1)
        curves.plot(few, mean, 'o-', color=color, label=way)
        curves.fill_between(few, mean - spread, mean + spread, color=color, alpha=0.12, lw=0)
    curves.set_xscale('log')
    curves.set_xticks(few, few)
    curves.minorticks_off()
    curves.set(
        title='accuracy on turned digits, mean and deviation of seeds',
        xlabel='labels of each digit',
    )
    curves.legend(title='what is trained', loc='lower right')

    styles = {'#cc79a7': '-', '#009e73': '-', '#e69f00': '--'}
    for (name, run), (color, style) in zip(runs.items(), styles.items(), strict=True):
        label = f'{name}: {size(nnx.state(run.optimizer.opt_state)) / 1e3:.0f} kB of state'
        moved = 100 * np.array(run.moved)
        moves.plot(np.linspace(0, 100, 11), moved, style, color=color, label=label, lw=2)
    moves.set(
        title='what LoRA holds, in blocks alone and in optimisers',
        xlabel='% of the steps',
        ylabel='change, % of the norm',
        ylim=(-0.05 * moves.get_ylim()[1], 1.3 * moves.get_ylim()[1]),  # the legend is above
    )
    moves.legend(loc='upper left')
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--quick', action='store_true', help='a short run, for the tests')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--output', default='lora_nnx.png', help='the picture')
    args = parser.parse_args(argv)
    began = time.perf_counter()
    steps, seeds, few = (20, 1, [3]) if args.quick else (200, 3, [1, 3, 10, 30])
    passed = lambda: f'{time.perf_counter() - began:5.1f} s'

    digits, held_out = load_data()
    new, new_held_out = turned(digits), turned(held_out)
    rng, base = np.random.default_rng(args.seed), Mixer(rngs=nnx.Rngs(args.seed))
    optimizer = nnx.Optimizer(base, optax.adamw(3e-3), wrt=nnx.Param)
    train(base, optimizer, batches_of(digits, 5 * steps, rng), sg.nothing)
    print(
        f'A mixer of {size(nnx.state(base, nnx.Param)) // 4} parameters learned digits: accuracy '
        f'{accuracy(base, held_out):.1%} as they are, {accuracy(base, new_held_out):.1%} turned '
        f'by 90 degrees. {passed()}'
    )

    print(f'\nAccuracy on turned digits, mean and deviation of {seeds} seeds, by labels of each')
    print(f'{"trained":16}{"parameters":>11}' + ''.join(f'{n:>15}' for n in few))
    found = {}
    for way, held in HELD.items():
        cells = []
        for n in few:
            runs = [
                fine_tune(
                    base,
                    few_of(new, n, np.random.default_rng(args.seed + seed)),
                    held,
                    steps=steps,
                    seed=args.seed + seed,
                    lora='LoRA' in way,
                )
                for seed in range(seeds)
            ]
            cells.append([float(accuracy(run.model, new_held_out)) for run in runs])
        found[way] = np.array(cells)
        trained = nnx.filter_state(nnx.state(runs[0].model, nnx.Param), ~held)
        shown = (f'{cell.mean():8.1%} ±{cell.std():5.1%}' for cell in found[way])
        print(f'{way:16}{size(trained) // 4:11}{"".join(shown)}  {passed()}', flush=True)

    print('\nLoRA, 10 labels of each: bytes of optimiser state, change of what is held')
    ways = {
        'adamw of all, a block alone': optimizer_of_all,
        'optax.partition(sg.labels)': optimizer_by_labels,
        'wrt=nnx.All(nnx.Param, ~held)': optimizer_of_trained,
    }
    ten, runs = few_of(new, 10, np.random.default_rng(args.seed)), {}
    for name, make in ways.items():
        run = runs[name] = fine_tune(
            base, ten, LORA, steps=steps, seed=args.seed, lora=True, optimizer_of=make
        )
        moved = f'{run.moved[-1]:.2%}' if run.moved[-1] else '0'
        print(f'{name:32}{size(nnx.state(run.optimizer.opt_state)):8}{moved:>9}', flush=True)

    block, diff_state = gradients(run.model, ten, LORA)
    zeros = sum(not leaf.any() for leaf in jax.tree.leaves(block))
    kept = nnx.filter_state(block, ~LORA)
    apart = jax.tree.map(lambda a, b: float(abs(a - b).max()), kept, diff_state)
    print(
        f'\nGradients: {len(jax.tree.leaves(block))} arrays with a block, {zeros} of them zero; '
        f'{len(jax.tree.leaves(diff_state))} with DiffState, at most {max(jax.tree.leaves(apart))} '
        'from those'
    )
    out, same = run.model(new_held_out.pixels), merged(run.model)(new_held_out.pixels)
    apart = abs(out - same).max()
    print(f'W + AB in place of W, A, B: {apart:.1g} apart, of outputs up to {abs(out).max():.1f}')
    save_picture(args.output, held_out, found, few, runs)
    print(f'\nPicture: {args.output}. {passed()}')
    return {'accuracy': found, 'runs': runs}


if __name__ == '__main__':
    main()
