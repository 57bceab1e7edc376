"""A VQ-VAE, whose loss says three times what a term must not train (arXiv 1711.00937).

An encoder turns the quarters of a digit into vectors z_e(x), each is replaced by the nearest vector
e of a codebook, and a decoder draws the digit from the four. The loss, with the paper's sg, is

    -log p(x|z_q(x))  +  ||sg[z_e(x)] - e||²  +  β ||z_e(x) - sg[e]||²

The last two are the same distance. They differ in what is held: the codebook loss pulls codes
towards the encoder's outputs, the commitment loss pulls outputs towards codes. In flax_sg:

    with nn.stop_gradient('encoder'):
        codebook = distance(self.encode(pixels), self.codebook(index))
    with nn.stop_gradient('codebook'):
        commitment = BETA * distance(z_e, self.codebook(index))

A value read before a block keeps its gradient. That is right for z_e in the commitment loss. The
codebook loss must not have it, and so computes z_e(x) again. Under jit this costs nothing: XLA
finds the equal computations and does them once.

The first term needs a third sg. The choice of a code has no derivative, and the decoder's gradient
at z_q(x) should go to z_e(x), straight through: z_q = z_e + sg[e - z_e]. This speaks of one value,
whatever it was made of, so it is jax.lax.stop_gradient.

sg of a value, as in the paper, and sg of parameters are not the same in general. A held encoder
still passes cotangents on to its input. Their gradients agree here: z_e(x) depends on nothing but
the encoder's parameters and x, and x is not differentiated. If x came from a network that is
trained too, the codebook loss would train it, unless its predicate names that network as well.

The data are scikit-learn's digits. The program prints how strongly each term trains each part, and
how well held-out digits are drawn from their four codes out of 64, which are 24 bits. Beside it are
the mean digit, PCA with four numbers, and k-means of quarters, of as many bits: with one codebook
for all four places, like the VQ-VAE, and with a codebook for each.

Run it: python examples/vq_vae.py [--quick] [--output PATH]
"""

import argparse
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split

from flax_sg import nn

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)

CODES, FEATURES = 64, 8  # the codebook: vectors, and numbers in a vector
BETA = 0.25
TERMS = ('reconstruction', 'codebook', 'commitment')
PARTS = ('encoder', 'codebook', 'decoder')

Array = jax.Array
Params = dict[str, Any]


def quarters(pixels: Array) -> Array:
    """Cut digits of shape (digits, 64) into (digits, 4, 16)."""
    return pixels.reshape(-1, 2, 4, 2, 4).swapaxes(2, 3).reshape(-1, 4, 16)


def distance(a: Array, b: Array) -> Array:
    """Return the squared length of a - b, averaged over their vectors."""
    return jnp.sum((a - b) ** 2, -1).mean()


class Perceptron(nn.Module):
    """One hidden layer."""

    features: int
    hidden: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.gelu(nn.Dense(self.hidden)(x))
        return nn.Dense(self.features)(x)


class VQVAE(nn.Module):
    """Draws digits from codes."""

    def setup(self):
        self.encoder = Perceptron(FEATURES, hidden=128)
        self.codebook = nn.Embed(CODES, FEATURES, embedding_init=nn.initializers.normal(0.5))
        self.decoder = Perceptron(64, hidden=64)

    def encode(self, pixels: Array) -> Array:
        """Return z_e(x), of shape (digits, 4, FEATURES)."""
        return self.encoder(quarters(pixels))

    def index(self, z_e: Array) -> Array:
        """Return which code is nearest to each vector."""
        vectors = self.codebook.embedding
        return jnp.argmin(jnp.sum(vectors**2, -1) - 2 * z_e @ vectors.T, -1)

    def draw(self, z_q: Array) -> Array:
        return self.decoder(z_q.reshape(len(z_q), -1))

    def __call__(self, pixels: Array) -> dict[str, Array]:
        """Return the three terms of the loss."""
        z_e = self.encode(pixels)
        index = self.index(z_e)
        z_q = z_e + jax.lax.stop_gradient(self.codebook(index) - z_e)
        reconstruction = distance(self.draw(z_q), pixels)
        with nn.stop_gradient('encoder'):
            codebook = distance(self.encode(pixels), self.codebook(index))
        with nn.stop_gradient('codebook'):
            commitment = BETA * distance(z_e, self.codebook(index))
        return {'reconstruction': reconstruction, 'codebook': codebook, 'commitment': commitment}

    def reconstruct(self, pixels: Array) -> tuple[Array, Array]:
        """Return the digits as drawn from their codes, and the codes."""
        index = self.index(self.encode(pixels))
        return self.draw(self.codebook(index)), index


@jax.jit
def init(key: Array) -> Params:
    return VQVAE().init(key, jnp.zeros((1, 64)))['params']


def terms(params: Params, pixels: Array) -> dict[str, Array]:
    return VQVAE().apply({'params': params}, pixels)


@jax.jit
def gradients(params: Params, pixels: Array) -> dict[str, Params]:
    """Return the gradient of each term by itself."""
    return jax.jacrev(terms)(params, pixels)


@jax.jit
def reconstruct(params: Params, pixels: Array) -> tuple[Array, Array]:
    return VQVAE().apply({'params': params}, pixels, method='reconstruct')


def load_data() -> tuple[np.ndarray, np.ndarray]:
    """Return digits to train on and held-out digits, of shape (digits, 64), between 0 and 1."""
    data, target = load_digits(return_X_y=True)
    return train_test_split(
        (data / 16).astype(np.float32), test_size=0.25, stratify=target, random_state=0
    )


def train(
    pixels: np.ndarray, held_out: np.ndarray, steps: int, batch: int = 128
) -> tuple[Params, dict[str, np.ndarray]]:
    """Train; return the parameters and what was measured on the way, 40 times."""
    optimiser = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    params = init(jax.random.key(0))
    opt_state = optimiser.init(params)

    def step(carry, key):
        params, opt_state = carry
        chosen = jax.random.choice(key, jnp.asarray(pixels), (batch,))

        def loss(params):
            found = terms(params, chosen)
            return sum(found.values()), found

        grads, found = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimiser.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), found

    run = jax.jit(functools.partial(jax.lax.scan, step))
    keys = jax.random.split(jax.random.key(1), (40, steps // 40))
    course, began = [], time.perf_counter()
    for i, some in enumerate(keys, 1):
        (params, opt_state), found = run((params, opt_state), some)
        drawn, index = reconstruct(params, held_out)
        course.append(
            {
                'step': i * len(some),
                'held out': float(distance(drawn, held_out)),
                'perplexity': perplexity(index),
                **{name: float(term.mean()) for name, term in found.items()},
            }
        )
        if i % 5 == 0:
            print(
                f'step {course[-1]["step"]:5d}  '
                + '  '.join(
                    f'{name} {course[-1][name]:.3f}' for name in (*TERMS, 'held out', 'perplexity')
                )
                + f'  {time.perf_counter() - began:.1f} s',
                flush=True,
            )
    return params, {name: np.array([c[name] for c in course]) for name in course[0]}


def perplexity(index: Array) -> float:
    """Return how many codes are in use: the exponential of the entropy of their frequencies."""
    frequency = np.bincount(np.ravel(index), minlength=CODES) / index.size
    return float(np.exp(-np.sum(frequency * np.log(np.where(frequency, frequency, 1)))))


def baselines(pixels: np.ndarray, held_out: np.ndarray) -> dict[str, np.ndarray]:
    """Return held-out digits as simpler methods draw them."""
    pca = PCA(4, random_state=0).fit(pixels)

    def nearest(some: np.ndarray, other: np.ndarray) -> np.ndarray:
        means = KMeans(CODES, n_init=1, random_state=0).fit(some.reshape(-1, 16))
        return means.cluster_centers_[means.predict(other.reshape(-1, 16))].reshape(other.shape)

    def joined(parts: np.ndarray) -> np.ndarray:
        return parts.reshape(-1, 2, 2, 4, 4).swapaxes(2, 3).reshape(-1, 64)

    some, other = quarters(pixels), quarters(held_out)
    each = np.stack([nearest(some[:, i], other[:, i]) for i in range(4)], 1)
    return {
        'mean digit': np.broadcast_to(pixels.mean(0), held_out.shape),
        'PCA, 4 numbers': pca.inverse_transform(pca.transform(held_out)),
        'k-means, 1 codebook': joined(nearest(some, other)),
        'k-means, 4 codebooks': joined(each),
    }


def print_gradients(params: Params, pixels: np.ndarray) -> None:
    """Print the norm of each term's gradient for each part."""
    grads = gradients(params, pixels)
    print('Norm of the gradient of each term, at the start:')
    print(f'{"":10}' + ''.join(f'{term:>16}' for term in TERMS))
    for part in PARTS:
        norms = (float(optax.tree.norm(grads[term][part])) for term in TERMS)
        print(f'{part:10}' + ''.join(f'{norm:16.4f}' if norm else f'{"0":>16}' for norm in norms))
    print()


def save_picture(
    path: str, course: dict[str, np.ndarray], held_out: np.ndarray, drawn: dict[str, np.ndarray]
) -> None:
    """Save the picture: curves, and below them held-out digits as each method draws them."""
    figure = plt.figure(figsize=(12, 8.6), layout='constrained')
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    error, spread, usage = top.subplots(1, 3, width_ratios=(1.5, 1, 1))
    error.semilogy(course['step'], course['reconstruction'], label='VQ-VAE, training')
    error.semilogy(course['step'], course['held out'], label='VQ-VAE, held out')
    others = {name: images for name, images in drawn.items() if name != 'VQ-VAE'}
    for (name, images), style in zip(others.items(), ('-', '-.', '--', ':'), strict=True):
        error.axhline(float(distance(images, held_out)), color='black', ls=style, lw=1, label=name)
    error.set(title='squared error of a digit', xlabel='step', ylim=(0.5, 20))
    error.set_yticks([0.5, 1, 2, 5], ['0.5', '1', '2', '5'])
    error.minorticks_off()
    error.legend(fontsize=8, loc='upper right', ncols=2)
    spread.plot(course['step'], course['codebook'], color='#009e73')
    spread.set(title='||z_e(x) - e||²', xlabel='step', ylim=(0, None))
    usage.plot(course['step'], course['perplexity'], color='#d55e00')
    usage.axhline(CODES, color='black', ls=':', lw=1)
    usage.set(title=f'perplexity of {CODES} codes, held out', xlabel='step', ylim=(0, 1.08 * CODES))

    rows = {'held out': held_out, **drawn}
    for cell, (name, images) in zip(bottom.subplots(len(rows)), rows.items(), strict=True):
        framed = [np.pad(image.reshape(8, 8), 1) for image in images[:15]]
        cell.imshow(np.hstack(framed), cmap='gray_r', vmin=0, vmax=1)
        cell.set(xticks=[], yticks=[], frame_on=False)
        cell.set_ylabel(name.replace(', ', ',\n'), rotation=0, ha='right', va='center')
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--quick', action='store_true', help='a short run, for the tests')
    parser.add_argument('--output', default='vq_vae.png', help='the picture')
    args = parser.parse_args(argv)
    began = time.perf_counter()
    pixels, held_out = load_data()
    print_gradients(init(jax.random.key(0)), pixels)
    params, course = train(pixels, held_out, steps=400 if args.quick else 4000)

    vq_vae, index = jax.device_get(reconstruct(params, held_out))
    drawn = baselines(pixels, held_out) | {'VQ-VAE': vq_vae}
    errors = {name: float(distance(images, held_out)) for name, images in drawn.items()}
    print(f'\n{"held-out digits":20}{"squared error":>15}{"of the mean":>13}')
    for name, error in errors.items():
        print(f'{name:20}{error:15.3f}{error / errors["mean digit"]:13.1%}')
    print(
        f'{len(np.unique(index))} of {CODES} codes are used, with perplexity '
        f'{perplexity(index):.1f}.'
    )
    save_picture(args.output, course, held_out, drawn)
    print(f'Picture: {args.output}. {time.perf_counter() - began:.1f} s.')
    return errors


if __name__ == '__main__':
    main()
