"""examples/vq_vae.py: its gradients against the paper's formula with sg on values, and a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_sg as sg
from loading import load

SEEDS = [0, 1]
TRAINED = {
    'reconstruction': {'encoder', 'decoder'},
    'codebook': {'codebook'},
    'commitment': {'encoder'},
}

vq = load('vq_vae')


def problem(seed):
    """Parameters, biases included, and random pixels that choose various codes."""
    rng = np.random.default_rng(seed)
    params = vq.init(jax.random.key(seed))
    params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)
    return params, rng.normal(0, 1.5, (12, 64)).astype(np.float32)


def perceptron(params, x):
    first, second = params['Dense_0'], params['Dense_1']
    x = x @ first['kernel'] + first['bias']
    x = 0.5 * x * (1 + jnp.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + 0.044715 * x**3)))
    return x @ second['kernel'] + second['bias']


def corners(pixels):
    """The quarters of digits, one by one."""
    images = pixels.reshape(-1, 8, 8)
    return [images[:, i : i + 4, j : j + 4].reshape(-1, 16) for i in (0, 4) for j in (0, 4)]


def nearest(params, pixels):
    """The codes that are chosen, in numpy: a row for each quarter."""
    vectors = np.asarray(params['codebook']['embedding'])
    z_e = np.stack([perceptron(params['encoder'], corner) for corner in corners(pixels)])
    return ((z_e[:, :, None] - vectors) ** 2).sum(-1).argmin(-1)


def paper(params, pixels, codes):
    """The three terms with sg on values, quarter by quarter; no module, no block."""
    sg = jax.lax.stop_gradient
    z_e = [perceptron(params['encoder'], corner) for corner in corners(pixels)]
    e = [params['codebook']['embedding'][row] for row in codes]
    z_q = jnp.concatenate([z + sg(c - z) for z, c in zip(z_e, e, strict=True)], -1)
    drawn = perceptron(params['decoder'], z_q)
    apart = lambda left, right: (
        sum(((a - b) ** 2).sum(-1).mean() for a, b in zip(left, right, strict=True)) / 4
    )
    return {
        'reconstruction': ((drawn - pixels) ** 2).sum(-1).mean(),
        'codebook': apart(sg(z_e), e),
        'commitment': vq.BETA * apart(z_e, sg(e)),
    }


def total(terms, some):
    return sum(terms[name] for name in some)


def assert_close(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('seed', SEEDS)
def test_terms_are_the_papers(seed):
    params, pixels = problem(seed)
    codes = nearest(params, pixels)
    assert len(np.unique(codes)) >= 10
    assert_close(vq.terms(params, pixels), paper(params, pixels, codes))
    drawn, index = vq.reconstruct(params, pixels)
    np.testing.assert_array_equal(index, codes.T)
    np.testing.assert_allclose(
        vq.distance(drawn, pixels), vq.terms(params, pixels)['reconstruction'], rtol=1e-5
    )


@pytest.mark.thinned(5)
@pytest.mark.parametrize('mode', ['eager', 'jit'])
@pytest.mark.parametrize('some', [*((name,) for name in vq.TERMS), vq.TERMS], ids='+'.join)
@pytest.mark.parametrize('seed', SEEDS)
def test_gradients_are_the_papers(seed, some, mode):
    params, pixels = problem(seed)
    wrap = jax.jit if mode == 'jit' else lambda fn: fn
    got = wrap(jax.grad(lambda p: total(vq.terms(p, pixels), some)))(params)
    codes = nearest(params, pixels)
    want = jax.grad(lambda p: total(paper(p, pixels, codes), some))(params)
    assert_close(got, want)
    trained = set().union(*(TRAINED[name] for name in some))
    for part in vq.PARTS:  # exactly zero where nothing is to be trained, and nowhere else
        leaves = jax.tree.leaves(got[part])
        assert all(np.any(leaf) for leaf in leaves) == (part in trained), part
        assert any(np.any(leaf) for leaf in leaves) == (part in trained), part


def test_gradients_of_each_term_by_itself():
    params, pixels = problem(0)
    codes = nearest(params, pixels)
    assert_close(
        vq.gradients(params, pixels), jax.jacrev(lambda p: paper(p, pixels, codes))(params)
    )


def test_the_codebook_moves_towards_what_chose_it():
    # In closed form: the gradient of ||z - e||² is 2 (e - z), summed over those that chose e.
    params, pixels = problem(1)
    grads = jax.grad(lambda p: total(vq.terms(p, pixels), vq.TERMS))(params)
    want = np.zeros((vq.CODES, vq.FEATURES), np.float32)
    for corner, row in zip(corners(pixels), nearest(params, pixels), strict=True):
        z_e = np.asarray(perceptron(params['encoder'], corner))
        np.add.at(want, row, 2 * (np.asarray(params['codebook']['embedding'])[row] - z_e))
    np.testing.assert_allclose(
        grads['codebook']['embedding'], want / (4 * len(pixels)), rtol=1e-4, atol=1e-6
    )


def test_a_held_encoder_passes_cotangents_to_its_input_and_a_held_value_does_not():
    params, pixels = problem(2)
    codes = nearest(params, pixels)
    got, want = (
        jax.jacrev(fn)(pixels)
        for fn in (lambda x: vq.terms(params, x), lambda x: paper(params, x, codes))
    )
    assert not np.any(want['codebook'])
    # The distance as it would be differentiated with no sg: that of the commitment loss, unscaled.
    assert_close(got['codebook'], want['commitment'] / vq.BETA)
    for name in ('reconstruction', 'commitment'):
        assert_close(got[name], want[name])


def test_the_second_encoding_costs_nothing():
    params, pixels = problem(0)

    def flops(terms):
        step = jax.jit(jax.grad(lambda p: total(terms(p), vq.TERMS)))
        return step.lower(params).compile().cost_analysis()['flops']

    def by_hand(params):
        """The model's own code, with sg on values in place of the blocks."""
        model, sg = vq.VQVAE().bind({'params': params}), jax.lax.stop_gradient
        z_e = model.encode(pixels)
        e = model.codebook(model.index(z_e))
        return {
            'reconstruction': vq.distance(model.draw(z_e + sg(e - z_e)), pixels),
            'codebook': vq.distance(sg(z_e), e),
            'commitment': vq.BETA * vq.distance(z_e, sg(e)),
        }

    assert flops(lambda p: vq.terms(p, pixels)) <= flops(by_hand)


@pytest.mark.parametrize(
    'counts, want', [([5], 1), ([3, 3], 2), ([2] * 64, 64), ([3, 1], 4 / 27**0.25)]
)
def test_perplexity(counts, want):
    index = np.repeat(np.arange(len(counts)), counts)
    np.testing.assert_allclose(vq.perplexity(index), want, rtol=1e-6)


def test_main_draws_digits(tmp_path, capsys):
    picture = tmp_path / 'picture.png'
    errors = vq.main(['--quick', '--output', str(picture)])
    assert picture.read_bytes().startswith(b'\x89PNG') and picture.stat().st_size > 20_000
    assert [p.name for p in tmp_path.iterdir()] == ['picture.png']
    assert errors['VQ-VAE'] < 0.7 * errors['mean digit']
    assert errors['k-means, 4 codebooks'] < errors['k-means, 1 codebook'] < errors['mean digit']
    data = vq.load_digits().data / 16
    assert abs(errors['mean digit'] / data.var(0).sum() - 1) < 0.05
    printed = capsys.readouterr().out
    table = {line.split()[0]: line.split()[1:] for line in printed.splitlines()[2:5]}
    for i, term in enumerate(vq.TERMS):
        assert {part for part in table if table[part][i] != '0'} == TRAINED[term]
    for name, error in errors.items():
        assert f'\n{name:20}{error:15.3f}' in printed
    assert '\nstep   400 ' in printed and str(picture) in printed


def test_each_loss_reaches_its_own_part():
    params, pixels = problem(0)
    spec = {loss: sorted(parts) for loss, parts in TRAINED.items()}
    flow = sg.assert_flow(vq.terms, spec, params, pixels)
    assert flow['reconstruction', 'codebook/embedding'].operation == 'stop_gradient'
