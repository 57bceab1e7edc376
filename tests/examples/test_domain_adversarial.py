"""examples/domain_adversarial.py: its gradients against a reversal layer by hand, and a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from loading import load

LAMBDAS = [0.0, 0.1, 0.7, 1.0, 2.5]

example = load('domain_adversarial')


@pytest.fixture(scope='module')
def problem():
    """Parameters, some labelled digits of the source, and fewer of the target."""
    params = example.start(jax.vmap(jax.random.key)(jnp.array([3])))[0]
    data = example.first(example.load([4]))
    source = example.Digits(*(x[:40] for x in data.source))
    return example.first(params), source, data.target.pixels[:24]


@jax.custom_vjp
def reverse(features, lam):
    """The gradient reversal layer, on activations."""
    return features


reverse.defvjp(
    lambda features, lam: (features, lam),
    lambda lam, cotangent: (-lam * cotangent, jnp.zeros_like(lam)),
)


def dense(params, x):
    return jnp.dot(x, params['kernel']) + params['bias']


def encode(params, x):
    return jax.nn.relu(dense(params['layers_2'], jax.nn.relu(dense(params['layers_0'], x))))


def label_loss(params, source):
    log_p = jax.nn.log_softmax(dense(params['label'], encode(params['encoder'], source.pixels)))
    return -log_p[jnp.arange(len(source.labels)), source.labels].mean()


def domain_loss(params, source, target, layer):
    features = layer(encode(params['encoder'], jnp.concatenate([source, target])))
    hidden = jax.nn.relu(dense(params['domain']['layers_0'], features))
    logits = dense(params['domain']['layers_2'], hidden)[:, 0]
    sign = jnp.where(jnp.arange(len(logits)) < len(source), 1.0, -1.0)
    return jax.nn.softplus(sign * logits).mean()


def loss_by_hand(params, source, target, lam):
    """The loss with a reversal layer, and no module and no block."""
    return label_loss(params, source) + domain_loss(
        params, source.pixels, target, lambda features: reverse(features, lam)
    )


def assert_close(got, want, tolerance=2e-6):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, found), expected in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        np.testing.assert_allclose(
            found, expected, tolerance, tolerance, err_msg=jax.tree_util.keystr(path)
        )


def largest(tree):
    return max(float(abs(x).max()) for x in jax.tree.leaves(tree))


@pytest.mark.thinned(7)
@pytest.mark.parametrize('traced', [False, True])
@pytest.mark.parametrize('lam', LAMBDAS)
def test_gradients_are_those_of_a_reversal_layer(problem, lam, traced):
    want = jax.grad(loss_by_hand)(*problem, jnp.float32(lam))
    got = (jax.jit(example.gradients) if traced else example.gradients)(*problem, lam)
    assert set(got) == {'encoder', 'label', 'domain'}
    assert_close(got, want)
    assert min(largest(part) for part in got.values()) > 1e-3
    np.testing.assert_allclose(
        example.loss(*problem, lam), loss_by_hand(*problem, jnp.float32(lam)), rtol=1e-6
    )


@pytest.mark.parametrize('lam', LAMBDAS)
def test_encoder_gets_the_label_gradient_less_lambda_times_the_domain_gradient(problem, lam):
    params, source, target = problem
    of_label = jax.grad(label_loss)(params, source)
    of_domain = jax.grad(domain_loss)(params, source.pixels, target, lambda features: features)
    assert largest(of_domain['encoder']) > 1e-2
    want = {
        'encoder': jax.tree.map(
            lambda a, b: a - lam * b, of_label['encoder'], of_domain['encoder']
        ),
        'label': of_label['label'],
        'domain': of_domain['domain'],
    }
    assert_close(example.gradients(params, source, target, lam), want)


def test_lambda_moves_the_encoder_alone(problem):
    gradients = jax.jit(example.gradients)
    one, other = gradients(*problem, 0.0), gradients(*problem, 1.0)
    for part in ('label', 'domain'):
        for a, b in zip(jax.tree.leaves(one[part]), jax.tree.leaves(other[part]), strict=True):
            np.testing.assert_array_equal(a, b)
    for a, b in zip(
        jax.tree.leaves(one['encoder']), jax.tree.leaves(other['encoder']), strict=True
    ):
        assert abs(a - b).max() > 1e-3


def test_inputs_keep_the_sign_that_a_reversal_layer_would_turn(problem):
    params, source, target = problem
    got = jax.grad(example.loss, argnums=2)(params, source, target, 0.7)
    plain = jax.grad(domain_loss, argnums=2)(params, source.pixels, target, lambda x: x)
    turned = jax.grad(loss_by_hand, argnums=2)(params, source, target, jnp.float32(0.7))
    assert largest(plain) > 1e-4
    assert_close(got, plain)
    assert_close(turned, -0.7 * plain)


def test_ramp_is_that_of_the_paper():
    progress = np.linspace(0, 1, 11)
    np.testing.assert_allclose(example.ramp(progress), np.tanh(5 * progress), atol=1e-6)
    assert example.ramp(0.0) == 0


def test_slant_moves_each_row_by_half_a_pixel():
    image = np.zeros((1, 8, 8))
    image[0, :, 4] = 1
    centres = (example.slanted(image)[0] * np.arange(8)).sum(1)
    np.testing.assert_allclose(centres, 4 - 0.5 * (np.arange(8) - 3.5))
    np.testing.assert_allclose(example.slanted(image).sum(2), 1)


def test_sets_are_disjoint_and_from_their_domain():
    plain, labels = load_digits(return_X_y=True)
    data = example.load([0, 1])
    plain = (plain / 16).astype(np.float32)
    slanted = example.slanted(plain.reshape(-1, 8, 8)).reshape(-1, 64).astype(np.float32)
    for seed in range(2):
        used = []
        for name, pixels in (
            ('source', plain),
            ('source_test', plain),
            ('target', slanted),
            ('target_test', slanted),
        ):
            digits = getattr(data, name)
            where = {row.tobytes(): i for i, row in enumerate(pixels)}
            found = [where[row.tobytes()] for row in digits.pixels[seed]]
            np.testing.assert_array_equal(labels[found], digits.labels[seed])
            used += found
        assert sorted(used) == list(range(len(labels)))
    assert (data.source.labels[0] != data.source.labels[1]).any()


def short(name, data):
    return example.train(example.RUNS[name], data, [0, 1], 60)


def test_labels_of_the_target_are_not_used_but_by_the_oracle():
    data = example.load([0, 1])
    scrambled = data._replace(target=data.target._replace(labels=9 - data.target.labels))
    for name, same in (('plain', True), ('adversarial', True), ('oracle', False)):
        one, other = (short(name, d).params for d in (data, scrambled))
        assert (
            all(
                np.array_equal(a, b)
                for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
            )
            == same
        )


def test_source_only_encoder_does_not_see_the_target():
    data = example.load([0, 1])
    blank = data._replace(target=data.target._replace(pixels=0 * data.target.pixels))
    for name, same in (('plain', True), ('adversarial', False)):
        one, other = (short(name, d).params for d in (data, blank))
        for part in ('encoder', 'label'):
            assert (
                all(
                    np.array_equal(a, b)
                    for a, b in zip(
                        jax.tree.leaves(one[part]), jax.tree.leaves(other[part]), strict=True
                    )
                )
                == same
            )
        assert (one['domain']['layers_0']['kernel'] != other['domain']['layers_0']['kernel']).any()


@pytest.mark.long
def test_main_gains_on_the_target_and_draws(tmp_path, capsys):
    picture = tmp_path / 'picture.png'
    results = example.main(['--quick', '--output', str(picture)])
    assert picture.read_bytes().startswith(b'\x89PNG') and picture.stat().st_size > 20_000
    assert [p.name for p in tmp_path.iterdir()] == ['picture.png']
    plain, adversarial, oracle = (results[n] for n in ('plain', 'adversarial', 'oracle'))
    assert adversarial.target.mean() > plain.target.mean() + 0.1
    assert adversarial.source.mean() > plain.source.mean() - 0.05 > 0.85
    assert oracle.target.min() > 0.9 > adversarial.target.mean()
    assert plain.domain.mean() > 0.9 and 0.4 < adversarial.domain.mean() < 0.8
    # The accuracies are those of the parameters.
    data = example.load([0, 1, 2])
    for result in (plain, adversarial, oracle):
        for seed in range(3):
            params = jax.tree.map(lambda x, seed=seed: x[seed], result.params)
            logits = dense(
                params['label'], encode(params['encoder'], data.target_test.pixels[seed])
            )
            right = (logits.argmax(-1) == data.target_test.labels[seed]).mean()
            assert abs(result.target[seed] - right) < 0.01
    printed = capsys.readouterr().out
    for name, result in results.items():
        title = example.RUNS[name].title
        assert f'\n{title} ' in printed and f'{title}, step 900: accuracy' in printed
        assert f'{result.target.mean():.3f} ± {result.target.std(ddof=1):.3f}' in printed
    assert ', '.join(f'{g:+.3f}' for g in adversarial.target - plain.target) in printed
    assert str(picture) in printed
