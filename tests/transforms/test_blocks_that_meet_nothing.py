"""Patterns that select nothing, collections that do not exist, blocks that read nothing."""

import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_sg as sg
from flax_sg import nn
from models import Scale

one = jnp.ones(())


class Named(nn.Module):
    name_: str = 'encoder'

    @nn.compact
    def __call__(self, x):
        return Scale(name=self.name_)(x)


SCALE = {'params': {'w': one}}
ENCODER = {'params': {'encoder': {'w': one}}}
TYPOS = {
    'glob': 'ww',
    'regex': sg.regex('^ww'),
    'callable': lambda v: v.name == 'ww',
    'part': ['w', 'ww'],
    'part of a complement': ~(sg.path('w') | 'ww'),
    'callable part': sg.path('w') | (lambda v: v.name == 'ww'),
}


@pytest.mark.parametrize('warm', [False, True], ids=['cold', 'warm'])
@pytest.mark.parametrize('typo', TYPOS)
def test_a_typo_is_an_error_each_time(typo, warm):
    f = jax.jit(Scale().apply)
    text = (
        r"where\(<lambda> at .*\) selects no variable of '/'"
        if 'callable' in typo
        else r"no variable of '/' matches '\^?ww'\. Close: 'w'\."
    )
    if warm:
        f(SCALE, 1.0)
    for _ in range(3):
        with pytest.raises(sg.UnmatchedPathError, match=text):
            with sg.stop_gradient(TYPOS[typo]):
                f(SCALE, 1.0)
    with sg.stop_gradient('w'):
        f(SCALE, 1.0)
    with sg.stop_gradient(TYPOS[typo], allow_unmatched=True):
        f(SCALE, 1.0)


def test_a_typo_in_another_thread_and_after_the_fix():
    f, errors = jax.jit(Scale().apply), []

    def run(pattern):
        try:
            with sg.stop_gradient(pattern):
                f(SCALE, 1.0)
        except sg.UnmatchedPathError as error:
            errors.append(str(error))

    for pattern in ('wrong', 'w', 'wrong', 'w'):
        thread = threading.Thread(target=run, args=(pattern,))
        thread.start()
        thread.join()
    assert len(errors) == 2 and errors[0] == errors[1] and "'wrong'" in errors[0]


@pytest.mark.parametrize('eager', ['first', 'second', 'both', 'none'])
def test_two_models_in_a_block_again_and_again(eager):
    f = Named().apply if eager in ('first', 'both') else jax.jit(Named().apply)
    g = Scale().apply if eager in ('second', 'both') else jax.jit(Scale().apply)
    for _ in range(3):
        with sg.stop_gradient(['encoder', 'w']):
            f(ENCODER, 1.0)
            g(SCALE, 1.0)
        with sg.stop_gradient('encoder'):
            f(ENCODER, 1.0)
            g(SCALE, 1.0)


def test_a_block_that_was_right_does_not_excuse_another_model():
    block = lambda: sg.stop_gradient('alone')
    with block():
        Named('alone').apply({'params': {'alone': {'w': one}}}, 1.0)
    with pytest.raises(sg.UnmatchedPathError, match="matches 'alone'"):
        with block():
            Scale().apply(SCALE, 1.0)


@pytest.mark.parametrize('collections', ['param', ['params', 'batchstats'], ('param', 'params')])
@pytest.mark.parametrize('predicate', [True, 'w', lambda v: True])
@pytest.mark.parametrize('use', ['around', 'inside', 'class', 'method', 'init'])
def test_a_collection_that_does_not_exist(use, predicate, collections):
    t = sg.stop_gradient(predicate, collections=collections)

    class Inside(Scale):
        @nn.compact
        def __call__(self, x):
            with t:
                return Scale.__call__.__wrapped__(self, x)

    wrong = 'batchstats' if 'batchstats' in collections else 'param'
    with pytest.raises(
        sg.UnmatchedPathError,
        match=(
            f"'/' has no collection '{wrong}'. There are: 'params'. Fix collections=, or pass allow"
        ),
    ):
        if use == 'around':
            with t:
                Scale().apply(SCALE, 1.0)
        elif use == 'init':
            with t:
                Scale().init(jax.random.key(0), 1.0)
        else:
            model = {
                'inside': Inside,
                'class': t(Scale),
                'method': type(
                    'M', (Scale,), {'__call__': t(Scale.__call__), '__module__': __name__}
                ),
            }[use]
            model().apply(SCALE, 1.0)


def test_collections_that_are_made_in_the_block_or_need_not_exist():
    class Sows(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow('losses', 'l', x)
            return self.variable('state', 'v', lambda: one).value

    with sg.stop_gradient(True, collections=['state', 'losses']):
        Sows().apply({}, 1.0, mutable=['state', 'losses'])
    with sg.stop_gradient(True, collections=['state', 'other'], allow_unmatched=True):
        Sows().apply({}, 1.0, mutable=['state', 'losses'])
    with sg.stop_gradient(True), sg.stop_gradient(True, collections=True):
        Sows().apply({}, 1.0, mutable=['state', 'losses'])


# Blocks that read nothing -------------------------------------------------------------------------


def nothing_read():
    compiled = jax.jit(Scale().apply).lower(SCALE, 1.0).compile()
    return {
        'nothing': lambda: None,
        'a function': lambda: jnp.sin(SCALE['params']['w']),
        'compiled': lambda: compiled(SCALE, 1.0),
        'a tree': lambda: sg.stop_gradient(True)(SCALE),
    }


@pytest.mark.parametrize('what', ['nothing', 'a function', 'compiled', 'a tree'])
@pytest.mark.parametrize('predicate', [True, 'w', lambda v: v.name == 'w'])
def test_a_block_that_reads_nothing_warns_at_its_line(predicate, what):
    run = nothing_read()[what]
    t = sg.scale_gradient(predicate, 1.0 + len(what), allow_unmatched=False)  # not met before
    with pytest.warns(
        sg.UnreadBlockWarning,
        match=r'scale_gradient\(.*\): no variable of a Flax '
        'model was read in this block, so that it did nothing.',
    ) as caught:
        with t:
            run()
    assert [w.filename for w in caught] == [__file__]
    with sg.scale_gradient(predicate, 2.0, allow_unmatched=True):
        run()


def test_a_block_whose_traces_are_in_the_caches_does_not_warn():
    f = jax.jit(Scale().apply)
    for _ in range(3):
        with sg.stop_gradient('w'):
            f(SCALE, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', sg.UnreadBlockWarning)
        with sg.stop_gradient('w'), sg.stop_gradient('other'):
            pass


def test_a_block_inside_a_module_that_reads_nothing_is_no_matter():
    class Idle(nn.Module):
        @nn.compact
        def __call__(self, x):
            with nn.stop_gradient(True):
                y = jnp.sin(x)
            return Scale(name='s')(y)

    Idle().apply({'params': {'s': {'w': one}}}, 1.0)


class Outer(nn.Module):
    def setup(self):
        self.part = Scale()
        self.v = self.param('v', nn.initializers.ones, ())

    def __call__(self, x):
        return self.part(x) + self.v


OUTER = {'params': {'part': {'w': one}, 'v': one}}
FROM_OUTSIDE = {
    'attribute': lambda m: m.v,
    'part': lambda m: m.part(1.0),
    'remat': lambda m: nn.remat(lambda part: part(1.0))(m.part),
    'variables': lambda m: m.variables['params']['v'],
}


@pytest.mark.parametrize('collections', ['params', 'none'])
@pytest.mark.parametrize('read', FROM_OUTSIDE.values(), ids=FROM_OUTSIDE)
@pytest.mark.parametrize(
    'lift',
    [
        lambda t: t(Outer().bind(OUTER)),
        lambda t: t(Outer)().bind(OUTER),
        lambda t: t(Outer()).bind(OUTER),
    ],
    ids=['mirror', 'class', 'instance'],
)
def test_a_typo_around_a_lifted_module_that_is_read_from_outside(lift, read, collections):
    read(lift(sg.stop_gradient('part')))
    bad, text = (sg.stop_gradient('prat'), "no variable of '/' matches 'prat'")
    if collections == 'none':
        bad, text = sg.stop_gradient('part', collections='none'), "'/' has no collection 'none'"
    with pytest.raises(sg.UnmatchedPathError, match=text):
        read(lift(bad))


class Creates(nn.Module):
    def setup(self):
        self.w = self.param('w', nn.initializers.ones, ())

    @nn.compact
    def __call__(self, x):
        return x * self.w * self.variable('cache', 'n', lambda: one).value


@pytest.mark.parametrize('attribute_first', [False, True])
@pytest.mark.parametrize('mirror', [False, True])
def test_a_lifted_module_that_is_read_before_it_makes_what_is_selected(mirror, attribute_first):
    lift = sg.stop_gradient('n', collections='cache')

    class Reads(nn.Module):
        def setup(self):
            self.c = (Creates if mirror else lift(Creates))()

        def __call__(self):
            c = lift(self.c) if mirror else self.c
            return c.w + c(1.0) if attribute_first else c(1.0) + c.w

    assert Reads().apply({'params': {'c': {'w': one}}}, mutable=['cache'])[0] == 2


@pytest.mark.parametrize('predicate', [True, 'kernel', '**/bias'])
def test_a_step_that_another_thread_traced_in_an_equal_block_that_is_open(predicate):
    """The trace is in JAX's caches before the block that it was made in ends."""
    model, x = nn.Dense(1), jnp.ones((1, 2))
    params = model.init(jax.random.key(0), x)['params']
    step = jax.jit(jax.grad(lambda params: model.apply({'params': params}, x).sum()))
    traced, done, found = threading.Event(), threading.Event(), []

    def first():
        with sg.stop_gradient(predicate):
            found.append(step(params))
            traced.set()
            done.wait(60)

    thread = threading.Thread(target=first)
    thread.start()
    try:
        assert traced.wait(60)
        with sg.stop_gradient(predicate):
            found.append(step(params))
    finally:
        done.set()
        thread.join()
    jax.tree.map(np.testing.assert_array_equal, *found)
