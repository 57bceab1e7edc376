"""examples/gan_one_pass.py: its gradients against copies of the parameters, its cost, and a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import flax_sg as sg
from loading import load

PARTS = {'generator', 'discriminator'}

example = load('gan_one_pass')


@pytest.fixture(scope='module')
def problem():
    """The state at the start of training, its parameters, and a batch."""
    images = (load_digits(return_X_y=True)[0] / 8 - 1).astype(np.float32)
    batch = example.draw_batch(images, np.random.default_rng(1))
    state = example.start(2, batch)
    return state, {part: own.params for part, own in state.items()}, batch


def losses_by_hand(params, batch):
    """The losses of the whole model, with copies of the parameters that are held."""
    held = jax.lax.stop_gradient(params)

    def softplus(x):
        return jnp.log1p(jnp.exp(x))

    def judged(generator, discriminator):
        fake = example.Generator().apply({'params': generator}, batch.noise) + batch.blur[0]
        return example.Discriminator().apply({'params': discriminator}, fake)

    real = example.Discriminator().apply(
        {'params': params['discriminator']}, batch.real + batch.blur[1]
    )
    return {
        'generator': softplus(-judged(params['generator'], held['discriminator'])).mean(),
        'discriminator': (
            softplus(judged(held['generator'], params['discriminator'])) + softplus(-real)
        ).mean(),
    }


def assert_close(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * abs(b).max())


def test_every_way_has_the_losses_and_gradients_of_copies(problem):
    _, params, batch = problem

    @jax.jit
    def all_ways(params, batch):
        ways = [[fn(params, batch) for fn in fns] for fns in example.WAYS.values()]
        wanted = losses_by_hand(params, batch)
        return ways, wanted, jax.grad(lambda p: sum(losses_by_hand(p, batch).values()))(params)

    ways, losses, grads = jax.device_get(all_ways(params, batch))
    assert set(losses) == set(grads) == PARTS and len(ways) == 4
    assert all(abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(grads))
    for found in ways:
        assert_close({part: x for own, _ in found for part, x in own.items()}, losses)
        assert_close({part: x for _, own in found for part, x in own.items()}, grads)


def test_each_loss_trains_its_own_part(problem):
    _, params, batch = problem
    grads = jax.jit(jax.jacrev(lambda p: example.Gan().apply({'params': p}, batch)))(params)
    assert set(grads) == PARTS
    for loss, grad in grads.items():
        for part in PARTS:
            reached = [bool((leaf != 0).any()) for leaf in jax.tree.leaves(grad[part])]
            assert all(reached) if part == loss else not any(reached)


@pytest.fixture(scope='module')
def costs(problem):
    state, _, batch = problem
    return example.costs_of(state, batch, rounds=1)


def test_one_pass_runs_the_generator_once_and_costs_what_it_costs_by_hand(costs):
    one, two, programs, by_hand = costs.values()
    assert one.loops == by_hand.loops == 2  # the strokes, there and back
    assert two.loops == programs.loops == 3
    assert one.flops <= 1.01 * by_hand.flops
    assert one.temp_bytes <= 1.01 * by_hand.temp_bytes
    assert 1.15 * one.flops < two.flops < 4 / 3 * one.flops
    assert one.times == 1 and all(cost.seconds > 0 for cost in (one, two, programs, by_hand))


@pytest.mark.long
def test_a_step_descends_both_losses_at_once(problem):
    state, params, batch = problem
    new, losses = example.step_of(example.one_pass)(state, batch)
    assert set(new) == set(losses) == PARTS
    # Adam's first step has the size of its rate and the sign of the gradient, whatever its size.
    grads = jax.jit(jax.grad(lambda p: sum(losses_by_hand(p, batch).values())))(params)
    for part, rate in example.RATES.items():
        for old, now, grad in zip(
            *map(jax.tree.leaves, (params[part], new[part].params, grads[part])), strict=True
        ):
            large = abs(grad) > 1e-5
            np.testing.assert_allclose((old - now)[large], rate * jnp.sign(grad)[large], rtol=0.01)


def test_quality_counts_what_a_classifier_is_sure_of():
    classifier = LogisticRegression(C=1e6, max_iter=20_000).fit(np.eye(10), np.arange(10))
    sure = example.quality(classifier, np.eye(10)[[3, 3, 7]])
    assert sure.sure == 1 and sure.classes.tolist() == [0, 0, 0, 2, 0, 0, 0, 1, 0, 0]
    assert example.quality(classifier, np.zeros((4, 10))).sure == 0


@pytest.mark.long
def test_main_runs_and_draws(costs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(example, 'costs_of', lambda state, batch, rounds: costs)
    result = example.main(['--quick'])
    assert list(result.course) == list(range(0, 17, 2))
    assert all(found.classes.sum() == 500 for found in result.course.values())
    for difference, largest in result.differences:
        assert difference < 1e-5 * largest and largest > 1e-2
    picture = plt.imread(tmp_path / 'gan_one_pass.png')
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 100
    assert [path.name for path in tmp_path.iterdir()] == ['gan_one_pass.png']
    out = capsys.readouterr().out
    assert 'step    16  classifier sure of' in out and 'Picture: gan_one_pass.png' in out
    for name, cost in result.costs.items():
        row = next(line for line in out.splitlines() if line.startswith(f'{name}  '))
        assert f'{1e3 * cost.seconds:.2f} ms ({cost.times:.2f})' in row


def test_needs_a_step(capsys):
    with pytest.raises(SystemExit):
        example.main(['--steps', '0'])
    assert '--steps 0: expected at least 1' in capsys.readouterr().err


def test_each_loss_reaches_its_own_part(problem):
    _, params, batch = problem
    losses = lambda params: example.Gan().apply({'params': params}, batch)
    flow = sg.assert_flow(losses, {part: part for part in PARTS}, params)
    assert {str(r.verdict) for r in flow} == {'REACHED', 'MASKED'}
    assert all(r.operation.startswith('gradient_views') for r in flow if not r.reached)
