"""One predicate for the model and for optax: docs/optimisers.md, its traps and its figures.

What should come out is worked out by hand, or by plain optax on the trained part alone.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.core import freeze

import flax_sg as sg
from flax_sg import nn
from loading import ROOT

DOC = (ROOT / 'docs/optimisers.md').read_text()
HELD = sg.path('encoder')
RATE, DECAY = 1e-2, 0.1


def said(text):
    """Assert that the guide gives this figure."""
    assert text in ' '.join(DOC.split()), text


def adamw():
    return optax.adamw(RATE, weight_decay=DECAY)


def clipped():
    return optax.chain(optax.clip_by_global_norm(1.0), adamw())


def by_partition(inner, params):
    labels = sg.labels({'hold': HELD}, params, default='train')
    return optax.partition({'train': inner, 'hold': optax.set_to_zero()}, labels)


def by_selective_transform(inner, params):
    return optax.selective_transform(inner, freeze_mask=HELD.mask(params))


def by_freezing_last(inner, params):
    return optax.chain(inner, optax.freeze(HELD.mask(params)))


def by_masking_and_freezing(inner, params):
    return optax.chain(optax.masked(inner, (~HELD).mask(params)), optax.freeze(HELD.mask(params)))


HOLDING = [by_partition, by_selective_transform, by_masking_and_freezing, by_freezing_last]


def flat(tree):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_same(got, want):
    got, want = flat(got), flat(want)
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name].dtype, got[name].shape) == (want[name].dtype, want[name].shape), name
        assert got[name].tobytes() == want[name].tobytes(), name


def assert_close(got, want, rtol=1e-5, atol=1e-6):
    got, want = flat(got), flat(want)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol, atol, err_msg=name, strict=True)


def size(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def two(encoder, head):
    return {'encoder': {'w': jnp.float32(encoder)}, 'head': {'w': jnp.float32(head)}}


def follow(optimiser, params, gradient, steps=1, state=None):
    """Take steps along ``gradient(params)``; return the parameters and the state."""
    state = optimiser.init(params) if state is None else state
    for _ in range(steps):
        updates, state = optimiser.update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


# A Linen model, and the same written by hand.


class Encoder(nn.Module):
    boxed: bool

    @nn.compact
    def __call__(self, tokens, train):
        init = nn.initializers.lecun_normal()
        if self.boxed:
            init = nn.with_partitioning(init, ('in', 'out'))
        x = nn.Embed(7, 4, name='embed')(tokens)
        x = nn.Dense(8, use_bias=False, kernel_init=init, name='dense')(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name='norm')(x)
        return nn.tanh(x).mean(-2)


class Net(nn.Module):
    held: sg.Filter = HELD
    boxed: bool = False

    @nn.compact
    def __call__(self, tokens, train=True):
        with nn.stop_gradient(self.held):
            return nn.Dense(1, name='head')(Encoder(self.boxed, name='encoder')(tokens, train))


TOKENS = np.random.default_rng(0).integers(0, 7, size=(16, 5))
TARGET = 5 + np.random.default_rng(1).normal(size=(16, 1)).astype(np.float32)


@functools.cache
def begin(model):
    variables = jax.jit(model.init)(jax.random.key(0), TOKENS)
    return variables['params'], variables['batch_stats']


def loss(model, params, stats):
    out, new = model.apply(
        {'params': params, 'batch_stats': stats}, TOKENS, mutable=['batch_stats']
    )
    return jnp.mean((out - TARGET) ** 2), new['batch_stats']


def loss_by_hand(params):
    p = params['encoder']
    x = p['embed']['embedding'][TOKENS] @ p['dense']['kernel']
    x = (x - x.mean((0, 1))) / jnp.sqrt(x.var((0, 1)) + 1e-5)
    x = jnp.tanh(x * p['norm']['scale'] + p['norm']['bias']).mean(-2)
    return jnp.mean((x @ params['head']['kernel'] + params['head']['bias'] - TARGET) ** 2)


def train(model, optimiser, steps, params, stats, state):
    @jax.jit
    def step(params, stats, state):
        grads, stats = jax.grad(loss, argnums=1, has_aux=True)(model, params, stats)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), stats, state

    for _ in range(steps):
        params, stats, state = step(params, stats, state)
    return params, stats, state


# The recipe.


@pytest.mark.thinned(2)
@pytest.mark.parametrize('blocks', [True, False], ids=['with a block', 'without'])
@pytest.mark.parametrize('boxed', [False, True], ids=['plain', 'boxed'])
def test_a_hundred_steps_move_what_is_trained_and_nothing_else(boxed, blocks):
    model = Net(HELD if blocks else sg.nothing, boxed)
    params, stats = begin(model)
    assert isinstance(params['encoder']['dense']['kernel'], nn.Partitioned) is boxed
    grads = jax.grad(loss, argnums=1, has_aux=True)(model, params, stats)[0]
    held = optax.tree.norm(grads['encoder'])
    assert held == 0 if blocks else held > 1
    assert optax.tree.norm(grads['head']) > 1  # the clip has something to do
    optimiser = by_partition(clipped(), params)
    got, _, state = train(model, optimiser, 100, params, stats, optimiser.init(params))
    assert_same(got['encoder'], params['encoder'])
    assert jax.tree.structure(got) == jax.tree.structure(params)

    plain, alone = nn.unbox(params), clipped()
    gradient = jax.jit(jax.grad(lambda p: loss_by_hand({**plain, **p})))
    head, want = follow(alone, {'head': plain['head']}, gradient, 100)
    assert_close({'head': got['head']}, head, rtol=1e-4, atol=1e-5)
    assert abs(got['head']['kernel'] - params['head']['kernel']).min() > 0.01
    # The state holds what that of the head alone holds, number by number.
    stored, wanted = (jax.tree.leaves(tree) for tree in (state, want))
    assert [a.shape for a in stored] == [b.shape for b in wanted]
    assert_close(stored, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('by', HOLDING)
def test_what_is_held_costs_no_memory(by):
    params, _ = begin(Net())
    alone = size(clipped().init({'head': params['head']}))
    everything = size(clipped().init(params))
    assert everything - alone == 2 * size(params['encoder']) > 0
    stored = size(by(clipped(), params).init(params))
    assert stored == (everything if by is by_freezing_last else alone)
    shapes = jax.eval_shape(lambda: params)
    assert size(jax.eval_shape(by(clipped(), shapes).init, shapes)) == stored


def test_set_to_zero_stores_nothing():
    state = by_partition(clipped(), two(1, 1)).init(two(1, 1))
    assert jax.tree.leaves(state.inner_states['hold']) == []


@pytest.mark.parametrize('by', HOLDING)
@pytest.mark.parametrize('gradient', [0.0, 3.0, np.inf, np.nan])
def test_ways_to_hold(by, gradient):
    params, grads = two(0.1, 1), two(gradient, 2)
    got, _ = follow(by(adamw(), params), params, lambda p: grads, 10)
    assert_same(got['encoder'], params['encoder'])
    head, _ = follow(adamw(), params['head'], lambda p: grads['head'], 10)
    assert_same(got['head'], head)
    assert head['w'] < 1


def test_a_negative_zero_may_lose_its_sign():
    params = two(-0.0, 1)
    got, _ = follow(by_partition(adamw(), params), params, lambda p: p)
    assert got['encoder']['w'] == 0 and not np.signbit(got['encoder']['w'])
    said('A weight of -0.0 may become 0.0')


# One dict of predicates.

PARTS = {'held': 'encoder', 'slow': 'head/kernel', 'fast': 'head/bias'}


@pytest.mark.parametrize('boxed', [False, True])
@pytest.mark.parametrize('kind', [dict, freeze])
def test_one_dict_gives_labels_and_masks(kind, boxed):
    params = kind(begin(Net(boxed=boxed))[0])
    labels = sg.labels(PARTS, params)
    masks = {name: sg.path(pattern).mask(params) for name, pattern in PARTS.items()}
    for tree in (labels, *masks.values()):
        assert jax.tree.structure(tree) == jax.tree.structure(params)
    by_name = {
        tuple(k.key for k in path if hasattr(k, 'key')): label
        for path, label in jax.tree_util.tree_leaves_with_path(labels)
    }
    assert by_name == {
        ('encoder', 'embed', 'embedding'): 'held',
        ('encoder', 'dense', 'kernel'): 'held',
        ('encoder', 'norm', 'scale'): 'held',
        ('encoder', 'norm', 'bias'): 'held',
        ('head', 'kernel'): 'slow',
        ('head', 'bias'): 'fast',
    }
    for name, mask in masks.items():
        assert mask == jax.tree.map(name.__eq__, labels)

    rates = {'slow': 0.5, 'fast': 2.0}
    grads = jax.tree.map(jnp.ones_like, params)
    rules = {name: optax.sgd(rate) for name, rate in rates.items()}
    for optimiser in (
        optax.partition({**rules, 'held': optax.set_to_zero()}, labels),
        optax.chain(
            optax.masked(rules['slow'], masks['slow']),
            optax.masked(rules['fast'], masks['fast']),
            optax.freeze(masks['held']),
        ),
    ):
        updates, _ = optimiser.update(grads, optimiser.init(params), params)
        assert_same(
            updates,
            jax.tree.map(
                lambda label, g: -rates[label] * g if label in rates else 0 * g, labels, grads
            ),
        )


@pytest.mark.parametrize(
    'parts, error, text',
    [
        (
            {'held': 'encoder', 'train': ('head', '**/norm')},
            sg.LabelError,
            'labels: each parameter takes one label; encoder/norm/bias (held and train), '
            'encoder/norm/scale (held and train). Make the predicates disjoint, '
            "for example 'a' and path('b') & ~path('a').",
        ),
        (
            {'held': 'encoder/dense', 'train': 'head'},
            sg.LabelError,
            'labels: no predicate selects encoder/embed/embedding, encoder/norm/bias, '
            'encoder/norm/scale. Add one, or pass default=.',
        ),
        (
            {'held': 'encoder', 'train': 'heads'},
            sg.UnmatchedPathError,
            "labels['train']: no variable of the tree matches 'heads'. Close: 'head/...', "
            "'head/bias', 'head/kernel'. "
            'Fix the pattern, or pass allow_unmatched=True.',
        ),
    ],
)
def test_mistakes_are_errors_that_list_the_paths(parts, error, text):
    params = jax.tree.map(lambda x: x, begin(Net())[0])  # in the order of the alphabet
    with pytest.raises(error, match=f'^{re.escape(text)}$'):
        sg.labels(parts, params)


def test_a_mask_of_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(sg.UnmatchedPathError, match="matches 'encodr'. Close: 'encoder/..."):
        sg.path('encodr').mask(two(1, 1))


class Outer(nn.Module):
    held: sg.Filter

    @nn.compact
    def __call__(self, tokens):
        return Net(self.held, name='net')(tokens)


def test_a_predicate_from_the_root_is_shared_with_a_submodules_block():
    held = sg.path('/net/encoder')
    params, stats = begin(Outer(held))
    grads = jax.grad(loss, argnums=1, has_aux=True)(Outer(held), params, stats)[0]['net']
    mask = held.mask(params)['net']
    assert set(jax.tree.leaves(mask['encoder'])) == {True} != set(jax.tree.leaves(mask['head']))
    assert optax.tree.norm(grads['encoder']) == 0 < optax.tree.norm(grads['head'])
    with pytest.raises(sg.UnmatchedPathError):
        HELD.mask(params)
    said("sg.path('/net/encoder')")


# The traps. Each shows the figure that the guide gives, and then the way out.


def test_masked_adds_the_raw_gradient_of_what_it_leaves_out():
    params, gradient = two(1, 1), lambda p: p  # of (encoder² + head²) / 2
    wrong = optax.masked(optax.sgd(0.1), (~HELD).mask(params))
    got, _ = follow(wrong, params, gradient, 10)
    assert got['encoder']['w'] == 2**10
    said(f'w from 1 to {got["encoder"]["w"]:.0f} in ten steps')
    for by in HOLDING:
        right, _ = follow(by(optax.sgd(0.1), params), params, gradient, 10)
        assert_same(right['encoder'], params['encoder'])
        assert_close(right['head']['w'], jnp.float32(0.9**10))


@pytest.mark.parametrize('before', [False, True], ids=['alone', 'freeze first'])
def test_weight_decay_moves_what_has_no_gradient(before):
    params, stats = begin(Net())
    wrong = optax.chain(optax.freeze(HELD.mask(params)), adamw()) if before else adamw()
    got, _, _ = train(Net(), wrong, 100, params, stats, wrong.init(params))
    left = (1 - RATE * DECAY) ** 100
    for name, value in flat(params['encoder']).items():
        assert_close(flat(got['encoder'])[name], left * value)
    said(f'100 steps of decay take {1 - left:.1%} off'.replace('%', ' %'))
    right = by_partition(adamw(), params)
    got, _, _ = train(Net(), right, 100, params, stats, right.init(params))
    assert_same(got['encoder'], params['encoder'])


def test_momentum_moves_what_has_no_gradient_any_more():
    rate, momentum, params = 0.1, 0.9, two(0, 0)
    sgd = lambda: optax.sgd(rate, momentum=momentum)
    moved, old = follow(sgd(), params, lambda p: two(1, 1), 5)
    coasted, _ = follow(sgd(), moved, lambda p: two(0, 1), 200, old)
    trace = sum(momentum**k for k in range(5))
    travelled = -float(moved['encoder']['w'])
    further = -float(coasted['encoder']['w']) - travelled
    np.testing.assert_allclose(further, rate * trace * momentum / (1 - momentum), rtol=1e-4)
    said(f'has moved a weight by {travelled:.1f}; it coasts {further:.1f} further')

    labels = sg.labels({'encoder': HELD, 'head': 'head'}, params)
    first = optax.partition({'encoder': sgd(), 'head': sgd()}, labels)
    second = optax.partition({'encoder': optax.set_to_zero(), 'head': sgd()}, labels)
    moved, old = follow(first, params, lambda p: two(1, 1), 5)
    state = enter(second, old, moved, ['head'])
    assert jax.tree.leaves(old.inner_states['encoder']) != []
    assert jax.tree.leaves(state.inner_states['encoder']) == []
    right, _ = follow(second, moved, lambda p: two(0, 1), 200, state)
    assert_same(right['encoder'], moved['encoder'])
    assert_same(right['head'], coasted['head'])


def test_a_clip_counts_gradients_of_what_is_held():
    params, grads = two(1, 1), two(100, 1)
    plain = optax.sgd(1.0)
    inside = optax.chain(optax.clip_by_global_norm(1.0), plain)

    def trained_step(optimiser, grads):
        updates, _ = optimiser.update(grads, optimiser.init(params), params)
        assert updates['encoder']['w'] == 0
        return -float(updates['head']['w'])

    outside = optax.chain(optax.clip_by_global_norm(1.0), by_partition(plain, params))
    short = trained_step(outside, grads)
    assert trained_step(by_partition(inside, params), grads) == 1
    assert trained_step(outside, two(0, 1)) == 1  # as in a model with a block
    assert trained_step(optax.chain(optax.freeze(HELD.mask(params)), outside), grads) == 1
    assert short == pytest.approx(1 / np.hypot(100, 1), rel=1e-5)
    said(f'the trained step is {1 / short:.0f} times too short')


def test_a_block_makes_the_norm_that_of_what_is_trained():
    params, stats = begin(Net())
    norms = []
    for held in (HELD, sg.nothing):
        grads = jax.grad(loss, argnums=1, has_aux=True)(Net(held), params, stats)[0]
        norms.append(float(optax.tree.norm(grads)))
    stop = jax.lax.stop_gradient
    head = jax.grad(lambda p: loss_by_hand({**p, 'encoder': stop(p['encoder'])}))(params)
    everything = jax.grad(loss_by_hand)(params)
    np.testing.assert_allclose(
        norms, [optax.tree.norm(head), optax.tree.norm(everything)], rtol=1e-4
    )
    assert norms[1] > 1.1 * norms[0]


def test_several_groups_share_one_norm():
    grads = {'encoder': {'w': 100.0}, 'head': {'kernel': 3.0, 'bias': 4.0}}
    grads = jax.tree.map(jnp.float32, grads)
    params = jax.tree.map(jnp.ones_like, grads)
    labels = sg.labels({'hold': HELD, 'kernel': 'head/kernel'}, params, default='rest')
    optimiser = optax.chain(
        optax.freeze(HELD.mask(params)),
        optax.clip_by_global_norm(1.0),
        optax.partition(
            {'kernel': optax.sgd(1.0), 'rest': optax.sgd(10.0), 'hold': optax.set_to_zero()}, labels
        ),
    )
    updates, _ = optimiser.update(grads, optimiser.init(params), params)
    assert_close(
        updates,
        jax.tree.map(jnp.float32, {'encoder': {'w': 0.0}, 'head': {'kernel': -0.6, 'bias': -8.0}}),
    )


def test_a_mask_that_is_not_called():
    params, grads = two(1, 1), lambda p: p
    wrong = optax.selective_transform(optax.sgd(0.1), freeze_mask=HELD.mask)
    assert_same(follow(wrong, params, grads)[0], params)  # silently, nothing is trained
    want = by_partition(optax.sgd(0.1), params)
    for right in (
        by_selective_transform(optax.sgd(0.1), params),
        optax.chain(optax.sgd(0.1), optax.freeze(HELD.mask)),
        optax.chain(optax.masked(optax.sgd(0.1), (~HELD).mask), optax.freeze(HELD.mask)),
    ):
        assert_same(follow(right, params, grads)[0], follow(want, params, grads)[0])


def test_running_statistics_are_no_parameters():
    params, stats = begin(Net())
    optimiser = by_partition(adamw(), params)
    _, moved, _ = train(Net(), optimiser, 3, params, stats, optimiser.init(params))
    assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (moved, stats)), strict=True))
    held = nn.constant(HELD, collections=['params', 'batch_stats'])
    said("`nn.constant(HELD, collections=['params', 'batch_stats'])`")
    with pytest.raises(sg.FrozenVariableError, match='batch_stats'), held:
        loss(Net(), params, stats)
    with held:
        _, new = Net().apply(
            {'params': params, 'batch_stats': stats}, TOKENS, False, mutable=['batch_stats']
        )
    assert_same(new['batch_stats'], stats)


# Stages and checkpoints.


def enter(stage, old, params, kept):
    """Return the state in which a stage begins, as the guide has it."""
    new = stage.init(params)
    return new._replace(
        inner_states={**new.inner_states, **{name: old.inner_states[name] for name in kept}}
    )


def stages(params):
    labels = sg.labels({'encoder': HELD, 'head': 'head'}, params)
    first = optax.partition({'encoder': optax.set_to_zero(), 'head': adamw()}, labels)
    second = optax.partition({'encoder': optax.adamw(1e-3), 'head': adamw()}, labels)
    return first, second


def test_what_starts_later_gets_a_new_state_and_the_others_keep_theirs():
    params, stats = begin(Net())
    first, second = stages(params)
    middle, stats, state = train(Net(), first, 20, params, stats, first.init(params))
    assert_same(middle['encoder'], params['encoder'])
    carried = enter(second, state, middle, ['head'])
    assert_same(carried.inner_states['head'], state.inner_states['head'])
    assert not any(leaf.any() for leaf in jax.tree.leaves(carried.inner_states['encoder']))
    got, _, _ = train(Net(sg.nothing), second, 20, middle, stats, carried)

    # By hand: two optimisers of their own, the second one made after 20 steps.
    gradient = jax.jit(jax.grad(loss_by_hand))
    head, encoder, want = adamw(), optax.adamw(1e-3), params
    states = {'head': head.init(params['head']), 'encoder': encoder.init(params['encoder'])}
    for step in range(40):
        grads, moving = gradient(want), {'head': head, 'encoder': encoder}
        if step < 20:
            del moving['encoder']
        for name, optimiser in moving.items():
            updates, states[name] = optimiser.update(grads[name], states[name], want[name])
            want = {**want, name: optax.apply_updates(want[name], updates)}
    assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert all(
        abs(a - b).max() > 5e-3
        for a, b in zip(*map(jax.tree.leaves, (got['encoder'], params['encoder'])), strict=True)
    )


def test_zeros_merged_into_running_moments_take_too_long_steps():
    params, grads, rate = two(1, 1), lambda p: two(1, 1), 1e-4
    adam = lambda: optax.adam(rate)
    _, old = follow(by_partition(adam(), params), params, grads, 1000)
    label = sg.labels({'train': True}, params)
    everything = optax.partition({'train': adam(), 'hold': optax.set_to_zero()}, label)
    masked = lambda x: isinstance(x, optax.MaskedNode)
    merged = jax.tree.map(
        lambda old, new: new if masked(old) else old, old, everything.init(params), is_leaf=masked
    )
    lengths, now, state = [], params, merged
    for _ in range(20):
        new, state = follow(everything, now, grads, 1, state)
        lengths.append(float((now['encoder']['w'] - new['encoder']['w']) / rate))
        now = new
    fresh, _ = follow(adam(), params, grads)
    assert float((1 - fresh['encoder']['w']) / rate) == pytest.approx(1, rel=1e-3)
    said(
        f'1000 steps in, new weights first move by {lengths[0]:.1f} times the '
        f'learning rate, and soon by {max(lengths):.1f}.'
    )


@pytest.mark.parametrize('boxed', [False, True], ids=['plain', 'boxed'])
def test_training_goes_on_from_a_checkpoint(tmp_path, boxed):
    model = Net(boxed=boxed)
    params, stats = begin(model)
    optimiser = by_partition(clipped(), params)
    half = train(model, optimiser, 5, params, stats, optimiser.init(params))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / 'half', half)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / 'half', (params, stats, optimiser.init(params)))
    assert jax.tree.structure(restored) == jax.tree.structure(half)
    assert_same(restored, half)
    again, straight = (train(model, optimiser, 5, *start) for start in (restored, half))
    assert_same(again, straight)
    assert_same(again[0]['encoder'], params['encoder'])
    assert (again[0]['head']['kernel'] != half[0]['head']['kernel']).all()


def test_a_stage_goes_on_from_the_checkpoint_of_the_one_before(tmp_path):
    params, stats = begin(Net())
    first, second = stages(params)
    half = train(Net(), first, 5, params, stats, first.init(params))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / 'half', half)
        checkpointer.wait_until_finished()
        with pytest.raises(ValueError, match='tree structures do not match'):
            checkpointer.restore(tmp_path / 'half', (params, stats, second.init(params)))
        restored = checkpointer.restore(tmp_path / 'half', (params, stats, first.init(params)))
    ends = [
        train(Net(sg.nothing), second, 5, middle, stats, enter(second, state, middle, ['head']))
        for middle, stats, state in (restored, half)
    ]
    assert_same(*ends)


# The guide's own code.


def test_the_guides_code_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {'__name__': 'guide'}
    for code in re.findall(r'^```python\n(.*?)^```$', DOC, re.M | re.S):
        exec(code, names)
    shown = ' '.join(re.findall(r'^```text\n(.*?)^```$', DOC, re.M | re.S))
    assert capsys.readouterr().out.split() == shown.split() != []

    params, trained = names['params'], names['trained']
    grads = lambda p: jax.tree.map(jnp.ones_like, p)
    _, old = follow(names['first'], params, grads)
    assert_same(*(f(names['second'], old, params, ['head']) for f in (enter, names['enter'])))
    last = by_freezing_last(trained, params)
    said(f'{size(last.init(params))} bytes and not {size(names["optimiser"].init(params))}')


@pytest.mark.parametrize('empty', [None, {}, optax.MaskedNode()], ids=repr)
def test_what_holds_no_array_needs_no_label(empty):
    params = {'a': jnp.ones(2), 'b': empty, 'c': {'d': jnp.ones(1), 'e': empty}}
    want = {'a': 'x', 'b': empty, 'c': {'d': 'y', 'e': empty}}
    assert sg.labels({'x': 'a', 'y': 'c'}, params) == want
    assert sg.labels({'x': 'a', 'y': '**/d'}, params) == want
    assert (
        sg.labels(
            {'x': 'a', 'y': ['c', 'b'], 'z': sg.path('b') | 'c/e'}, params, allow_unmatched=True
        )
        == want
    )
    optax.partition({'x': optax.sgd(1.0), 'y': optax.set_to_zero()}, want).init(params)
    with pytest.raises(sg.LabelError, match='labels: no predicate selects c/d. Add one'):
        sg.labels({'x': 'a'}, params)
