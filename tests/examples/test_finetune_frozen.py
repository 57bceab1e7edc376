"""examples/finetune_frozen.py: what is held, against code with no block, and a run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_sg as sg
from loading import load

ft = load('finetune_frozen')
WRONG = dataclasses.replace(ft.HEAD, batch_statistics=True)


def problem(seed, batch=16):
    """Variables with nothing at its initial zero or one, and random digits."""
    rng = np.random.default_rng(seed)
    variables = jax.tree.map(
        lambda x: x + 0.1 * rng.uniform(size=x.shape).astype(np.float32),
        jax.device_get(ft.init(jax.random.key(seed))),
    )
    return variables, ft.Digits(
        rng.uniform(size=(batch, 64)).astype(np.float32), rng.integers(5, size=batch)
    )


def code(params, statistics, x, batch_statistics):
    """The encoder: its output, and the running statistics after it."""
    after = {}
    for i in range(2):
        x = x @ params[f'Dense_{i}']['kernel']
        norm, old = params[f'BatchNorm_{i}'], statistics[f'BatchNorm_{i}']
        mean, var = (x.mean(0), x.var(0)) if batch_statistics else (old['mean'], old['var'])
        x = jax.nn.relu((x - mean) / jnp.sqrt(var + 1e-5) * norm['scale'] + norm['bias'])
        after[f'BatchNorm_{i}'] = {
            'mean': 0.9 * old['mean'] + 0.1 * mean,
            'var': 0.9 * old['var'] + 0.1 * var,
        }
    return x, after if batch_statistics else statistics


def cross_entropy(head, x, labels):
    logits = x @ head['kernel'] + head['bias']
    return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[jnp.arange(len(labels)), labels])


def assert_close(got, want, rtol=1e-4, atol=1e-5):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol, atol)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def encoder_of(variables):
    return [variables[collection]['encoder'] for collection in ('params', 'batch_stats')]


def run(stage, variables, digits, steps=20):
    return jax.device_get(ft.train(stage, variables, digits, digits, steps, batch=8))


def compiled_or_not(fn, mode):
    return jax.jit(fn, static_argnums=2) if mode == 'jit' else fn


@pytest.mark.parametrize('mode', ['eager', 'jit'])
@pytest.mark.parametrize('seed', [0, 1])
def test_the_held_stage_has_the_gradients_of_a_head_on_constants(seed, mode):
    variables, digits = problem(seed)
    params, statistics = variables['params'], variables['batch_stats']
    (value, after), grads = compiled_or_not(jax.value_and_grad(ft.loss, has_aux=True), mode)(
        params, statistics, ft.HEAD, digits
    )
    x = jax.lax.stop_gradient(
        code(params['encoder'], statistics['encoder'], digits.pixels, False)[0]
    )
    want, want_grads = jax.value_and_grad(cross_entropy)(params['head'], x, digits.labels)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    assert_close(grads['head'], want_grads)
    assert all(leaf.any() for leaf in jax.tree.leaves(grads['head']))
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads['encoder']))
    assert bits(after) == bits(statistics)


@pytest.mark.parametrize('mode', ['eager', 'jit'])
def test_the_last_stage_trains_all_and_writes_statistics(mode):
    variables, digits = problem(2)
    params, statistics = variables['params'], variables['batch_stats']
    (value, after), grads = compiled_or_not(jax.value_and_grad(ft.loss, has_aux=True), mode)(
        params, statistics, ft.ALL, digits
    )

    def by_hand(params):
        x, after = code(params['encoder'], statistics['encoder'], digits.pixels, True)
        return cross_entropy(params['head'], x, digits.labels), {'encoder': after}

    (want, want_after), want_grads = jax.value_and_grad(by_hand, has_aux=True)(params)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    assert_close(grads, want_grads, rtol=1e-3, atol=1e-5)
    assert_close(after, want_after)
    assert all(leaf.any() for leaf in jax.tree.leaves(grads))


@pytest.mark.long
def test_the_held_stage_moves_the_head_alone_as_adamw_of_the_head_does():
    variables, digits = problem(3)
    found = run(ft.HEAD, variables, digits).variables
    assert bits(encoder_of(found)) == bits(encoder_of(variables))

    # By hand: features once, and an optimiser that never saw the encoder. The same batches.
    x, _ = code(
        variables['params']['encoder'], variables['batch_stats']['encoder'], digits.pixels, False
    )
    optimiser = optax.chain(
        optax.clip_by_global_norm(ft.CLIP), optax.adamw(ft.HEAD.rate, weight_decay=ft.DECAY)
    )
    head = variables['params']['head']
    state = optimiser.init(head)
    for key in jax.random.split(jax.random.key(1), (20, 1))[:, 0]:
        chosen = jax.random.choice(key, 16, (8,), replace=False)
        grads = jax.grad(cross_entropy)(head, x[chosen], digits.labels[chosen])
        updates, state = optimiser.update(grads, state, head)
        head = optax.apply_updates(head, updates)
    assert_close(found['params']['head'], head, rtol=1e-3, atol=1e-5)
    assert np.abs(head['kernel'] - variables['params']['head']['kernel']).mean() > 1e-3


def test_a_block_alone_does_not_freeze(monkeypatch):
    variables, digits = problem(3)
    monkeypatch.setattr(
        ft, 'make_optimiser', lambda stage, params: optax.adamw(stage.rate, weight_decay=ft.DECAY)
    )
    found = run(ft.HEAD, variables, digits).variables
    shrunk = (1 - ft.HEAD.rate * ft.DECAY) ** 20
    assert_close(
        found['params']['encoder'],
        jax.tree.map(lambda leaf: np.float32(shrunk) * leaf, variables['params']['encoder']),
        atol=0,
    )


def test_optimiser_state_holds_nothing_for_what_is_held():
    variables, digits = problem(4)
    params = variables['params']
    for stage, trained in ((ft.HEAD, params['head']), (ft.ALL, params)):
        state = run(stage, variables, digits).opt_state
        assert ft.size(state) == 2 * ft.size(trained) + 4  # two moments, and a count of steps
        shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
        assert ((64, 64) in shapes) == (stage is ft.ALL) and (64, 5) in shapes


def test_clipping_does_not_count_what_is_held():
    variables, _ = problem(5)
    params, rng = variables['params'], np.random.default_rng(5)
    optimiser = ft.make_optimiser(ft.HEAD, params)
    alone = optax.chain(
        optax.clip_by_global_norm(ft.CLIP), optax.adamw(ft.HEAD.rate, weight_decay=ft.DECAY)
    )
    state, state_alone = optimiser.init(params), alone.init(params['head'])
    for size in (0.0, 100.0, 3.0):  # of the encoder's gradient, which a block would make zero
        grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
        grads['encoder'] = jax.tree.map(lambda x, size=size: size * x, grads['encoder'])
        updates, state = optimiser.update(grads, state, params)
        want, state_alone = alone.update(grads['head'], state_alone, params['head'])
        assert bits(updates['head']) == bits(want)
        assert not any(leaf.any() for leaf in jax.tree.leaves(updates['encoder']))


@pytest.mark.parametrize('mode', ['eager', 'jit'])
def test_training_mode_batchnorm_is_an_error_while_held(mode):
    variables, digits = problem(6)
    before = bits(variables)
    with pytest.raises(sg.FrozenVariableError, match="'/encoder/BatchNorm_0'.*batch_stats"):
        compiled_or_not(ft.loss, mode)(variables['params'], variables['batch_stats'], WRONG, digits)
    with pytest.raises(sg.FrozenVariableError):
        run(WRONG, variables, digits)
    assert bits(variables) == before
    assert ft.mistake(variables, digits).startswith('FrozenVariableError: ')


def test_changes_are_norms_and_zero_means_every_bit():
    before, _ = problem(7)
    after = jax.tree.map(np.copy, before)
    assert set(ft.changes(before, after).values()) == {0.0}
    after['params']['head'] = jax.tree.map(lambda x: 1.5 * x, after['params']['head'])
    mean = after['batch_stats']['encoder']['BatchNorm_1']['mean']
    mean[0] = np.nextafter(mean[0], np.float32(2))
    found = ft.changes(before, after)
    np.testing.assert_allclose(found.pop('head'), 0.5, rtol=1e-6)
    assert found.pop('encoder/BatchNorm_1, statistics') > 0
    assert set(found.values()) == {0.0} and len(found) == 5


@pytest.mark.long
def test_main_freezes_then_trains_all(tmp_path, capsys):
    picture = tmp_path / 'picture.png'
    result = ft.main(['--quick', '--output', str(picture)])
    assert picture.read_bytes().startswith(b'\x89PNG') and picture.stat().st_size > 20_000
    assert [p.name for p in tmp_path.iterdir()] == ['picture.png']
    head, both = (run.variables for run in result['runs']['pre-trained'].values())
    assert bits(encoder_of(head)) == bits(encoder_of(result['start']))
    assert bits(head['params']['head']) != bits(result['start']['params']['head'])
    assert all(a != b for a, b in zip(bits(both), bits(head), strict=True))
    for name, change in result['moved'][ft.HEAD].items():
        assert (change > 0.5) if name == 'head' else change == 0
    assert all(0.01 < change < 1 for change in result['moved'][ft.ALL].values())
    for runs in result['runs'].values():
        assert runs[ft.HEAD].accuracy[0] < 0.5 and 0.8 < runs[ft.HEAD].accuracy[-1]
        assert runs[ft.HEAD].accuracy[-1] < runs[ft.ALL].accuracy[-1]
    printed = capsys.readouterr().out
    assert 'FrozenVariableError: ' in printed and str(picture) in printed
    for name, change in result['moved'][ft.ALL].items():
        first = result['moved'][ft.HEAD][name]
        first = f'{first:14.4f}' if name == 'head' else f'{"0":>14}'
        assert f'\n{name:34}{first}{change:14.4f}\n' in printed


def test_the_first_stage_reaches_the_head_alone():
    variables, digits = problem(0)
    for stage, spec in ((ft.HEAD, 'head'), (ft.ALL, True)):
        loss = lambda params, *args, stage=stage: ft.loss(params, args[0], stage, args[1])[0]
        flow = sg.assert_flow(
            loss, {'loss': spec}, variables['params'], variables['batch_stats'], digits
        )
        held = [record for record in flow if not record.reached]
        assert all(record.operation.startswith(('constant', 'stop_gradient')) for record in held)
        assert bool(held) is (stage is ft.HEAD)
