"""examples/lora_nnx.py: what is held, against functions of plain arrays, and a run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_sg as sg
from flax_sg import nnx
from loading import load

ex = load('lora_nnx')
STEPS = 20


def problem(seed=0, lora=True):
    """A mixer with nothing at its initial zero or one, and random digits."""
    rng = np.random.default_rng(seed)
    model = ex.Mixer(width=6, blocks=1, rngs=nnx.Rngs(seed))
    model = ex.with_lora(model, nnx.Rngs(seed)) if lora else model
    some = lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32)
    nnx.update(model, jax.tree.map(some, nnx.state(model)))
    pixels = rng.uniform(size=(12, 64)).astype(np.float32)
    return model, ex.Digits(pixels, rng.integers(10, size=12))


def flat(tree):
    """The arrays of a State by path, such as 'head/kernel'."""
    pure = nnx.to_pure_dict(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(pure)
    }


def by_hand(lora, rest, digits):
    """The cross-entropy as a function of the factors of LoRA, and of all other parameters."""

    def linear(x, name):
        a, b = lora[f'{name}/lora_a'], lora[f'{name}/lora_b']
        kernel, bias = (rest[f'{name}/base_module/{each}'] for each in ('kernel', 'bias'))
        return x @ (kernel + a @ b) + bias

    def norm(x, name):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / jnp.sqrt(var + 1e-6) * rest[f'{name}/scale'] + rest[f'{name}/bias']

    # Patch (i, j) of an image is its rows 2i and 2i + 1, columns 2j and 2j + 1.
    images = digits.pixels.reshape(-1, 8, 8)
    corners = [(i, j) for i in range(0, 8, 2) for j in range(0, 8, 2)]
    x = jnp.stack([images[:, i : i + 2, j : j + 2].reshape(-1, 4) for i, j in corners], 1)
    x = x @ rest['embed/kernel'] + rest['embed/bias']
    tokens = jnp.swapaxes(norm(x, 'blocks/0/token_norm'), 1, 2)
    tokens = linear(jax.nn.gelu(linear(tokens, 'blocks/0/tokens_in')), 'blocks/0/tokens_out')
    x = x + jnp.swapaxes(tokens, 1, 2)
    channels = linear(norm(x, 'blocks/0/channel_norm'), 'blocks/0/channels_in')
    x = x + linear(jax.nn.gelu(channels), 'blocks/0/channels_out')
    logits = x.mean(1) @ rest['head/kernel'] + rest['head/bias']
    chosen = logits[jnp.arange(len(digits.labels)), digits.labels]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - chosen)


def parted(model):
    params = flat(nnx.state(model))
    return [{n: v for n, v in params.items() if ('/lora_' in n) == is_lora} for is_lora in (1, 0)]


def train(model, digits, held, optimizer_of, steps=STEPS):
    optimizer = optimizer_of(model, held)
    repeated = ex.Digits(*(np.stack([leaf] * steps) for leaf in digits))
    ex.train(model, optimizer, repeated, held)
    return optimizer


def test_gradients_of_lora_are_those_by_hand():
    model, digits = problem()
    lora, rest = parted(model)
    want_value, want = jax.jit(jax.value_and_grad(by_hand))(lora, rest, digits)
    value = nnx.jit(lambda model: ex.loss(model, digits, ex.LORA))(model)
    np.testing.assert_allclose(value, want_value, rtol=1e-5)

    block, diff_state = map(flat, ex.gradients(model, digits, held=ex.LORA))
    assert len(lora) == 8 and set(diff_state) == set(lora) and set(block) == {*lora, *rest}
    for name, gradient in (*block.items(), *diff_state.items()):
        if name in lora:
            np.testing.assert_allclose(gradient, want[name], rtol=1e-3, atol=1e-6, err_msg=name)
            assert gradient.any()
        else:
            assert not gradient.any(), name


@pytest.mark.parametrize('by', ['of_trained', 'by_labels'])
def test_twenty_steps_of_adamw_are_those_by_hand(by):
    model, digits = problem(1)
    lora, rest = parted(model)
    optimizer = train(model, digits, ex.LORA, getattr(ex, f'optimizer_{by}'))
    got_lora, got_rest = parted(model)
    assert {n: v.tobytes() for n, v in got_rest.items()} == {
        n: v.tobytes() for n, v in rest.items()
    }

    tx = optax.adamw(ex.RATE, weight_decay=ex.DECAY)
    state, before = tx.init(lora), lora

    @jax.jit
    def step(lora, state):
        updates, state = tx.update(jax.grad(by_hand)(lora, rest, digits), state, lora)
        return optax.apply_updates(lora, updates), state

    for _ in range(STEPS):
        lora, state = step(lora, state)
    for name, want in lora.items():
        np.testing.assert_allclose(got_lora[name], want, rtol=2e-3, atol=2e-4, err_msg=name)
        assert np.abs(want - before[name]).max() > 0.05
    # Two moments of what is trained, and a count.
    assert ex.size(nnx.state(optimizer.opt_state)) == 2 * ex.size(lora) + 4


def test_a_block_alone_does_not_freeze():
    model, digits = problem(2)
    _, before = parted(model)
    optimizer = train(model, digits, ex.LORA, ex.optimizer_of_all)
    shrunk = np.float32((1 - ex.RATE * ex.DECAY) ** STEPS)
    _, after = parted(model)
    for name, old in before.items():
        np.testing.assert_allclose(after[name], shrunk * old, rtol=1e-5, err_msg=name)
    assert ex.size(nnx.state(optimizer.opt_state)) == 2 * ex.size(nnx.state(model)) + 4


@pytest.mark.parametrize('way', ex.HELD)
def test_what_each_way_holds(way):
    model, digits = problem(3, lora='LoRA' in way)
    before = flat(nnx.state(model))
    train(model, digits, ex.HELD[way], ex.optimizer_of_trained, steps=2)
    moved = {name for name, leaf in flat(nnx.state(model)).items() if (leaf != before[name]).any()}
    is_lora, is_head = (lambda n: '/lora_' in n), (lambda n: n.startswith('head/'))
    trained = {
        'all': lambda n: True,
        'LoRA and head': lambda n: is_lora(n) or is_head(n),
        'LoRA': is_lora,
        'head': is_head,
    }[way]
    assert moved == set(filter(trained, before)) and moved


def test_what_is_trained_is_what_the_gradient_reaches():
    model, digits = problem(4)
    loss = lambda model: ex.loss(model, digits, ex.LORA)
    flow = sg.assert_flow(loss, {'loss': '**/lora_*'}, model)
    assert len([record for record in flow if record.reached]) == 8


def test_lora_starts_as_the_model_and_merges_into_it():
    model, digits = problem(5, lora=False)
    logits = model(digits.pixels)
    fresh = ex.with_lora(model, nnx.Rngs(0))
    assert np.array_equal(fresh(digits.pixels), logits)  # B is zero
    model, digits = problem(5)
    merged, logits = ex.merged(model), model(digits.pixels)
    np.testing.assert_allclose(merged(digits.pixels), logits, rtol=1e-4, atol=1e-5)
    assert set(flat(nnx.state(merged))) == set(flat(nnx.state(problem(lora=False)[0])))
    # A copy: the one with LoRA is what it was.
    assert np.array_equal(model(digits.pixels), logits)


def test_change_is_a_norm_and_zero_means_every_bit():
    model, _ = problem(6)
    before = nnx.state(nnx.clone(model))
    assert ex.change(before, nnx.state(model), ex.LORA) == 0
    model.blocks[0].tokens_in.lora_a[...] *= 2
    assert ex.change(before, nnx.state(model), ex.LORA) == 0
    model.head.kernel[...] = jnp.nextafter(model.head.kernel[...], jnp.inf)
    assert 0 < ex.change(before, nnx.state(model), ex.LORA) < 1e-6
    both = jax.tree.map(lambda leaf: 1.5 * leaf, before)
    np.testing.assert_allclose(ex.change(before, both, ex.LORA), 0.5, rtol=1e-6)


@pytest.mark.long
def test_quick_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    result = ex.main(['--quick'])
    out = capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ['lora_nnx.png']
    assert (tmp_path / 'lora_nnx.png').stat().st_size > 20_000
    assert set(result['accuracy']) == set(ex.HELD)
    assert all(0.1 < found.min() <= found.max() <= 1 for found in result['accuracy'].values())
    block, *optimisers = result['runs'].values()
    assert 0.01 < block.moved[-1] < 0.03 and all(run.moved == [0.0] * 11 for run in optimisers)
    assert 'with DiffState, at most 0.0 from those' in out
    for name, run in result['runs'].items():
        moved = f'{run.moved[-1]:.2%}' if run.moved[-1] else '0'
        assert f'{name:32}{ex.size(nnx.state(run.optimizer.opt_state)):8}{moved:>9}\n' in out
