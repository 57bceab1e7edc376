"""Random programs against their meaning; see random_programs, also for a run of thousands."""

import random

import jax
import pytest
from hypothesis import given, settings

import flax_sg as sg
from internals import stop_nothing
from oracle import assert_same
from random_programs import (
    OPS,
    Generator,
    IllConditioned,
    check,
    check_views,
    deterministic,
    draw,
    draw_views,
    evaluate,
    flatten,
    report,
    same_failure,
    seeds,
    shrink,
    unflatten,
)


def check_seed(seed, **how):
    program, drawn = draw(seed)
    how = how or drawn
    try:
        check(program, **how)
    except IllConditioned:
        pass
    except Exception as error:
        smaller = shrink(program, same_failure(error, **how))
        error.add_note(f'seed {seed}, {how}, shrunk:\n{report(smaller)}')
        raise


@pytest.mark.thinned(2)
@pytest.mark.parametrize('part', range(6))
@settings(deterministic, max_examples=10)
@given(seeds)
def test_random_programs(part, seed):
    check_seed(6 * seed + part)


@pytest.mark.long
@pytest.mark.parametrize('seed', [90617])  # a stack whose layers were lifted once more
def test_random_programs_that_were_wrong(seed):
    check_seed(seed)


@pytest.mark.long
@pytest.mark.parametrize('seed', [210284, 230043])  # constants of a linear map
def test_random_views_that_were_wrong(seed):
    program, how = draw_views(seed)
    check_views(program, **how)


@pytest.mark.long
@settings(deterministic, max_examples=3)
@given(seeds)
def test_random_programs_eager_and_compiled(seed):
    check_seed(seed, modes=('eager', 'jit'))


@settings(deterministic, max_examples=12)
@given(seeds)
def test_random_programs_at_second_order(seed):
    check_seed(seed, modes=('traced',), second=True)


NAMES = ['a', 'b', 'c0', 'w', 'k', 'layers_0', 'table_u', 'M0_0', 'inner']


@settings(deterministic, max_examples=400)
@given(seeds)
def test_the_machine_and_the_library_agree_on_what_a_filter_selects(seed):
    rng = random.Random(seed)
    mask = Generator(rng).mask()
    paths = [tuple(rng.choices(NAMES, k=rng.randint(0, 2))) + ('vwk'[i % 3],) for i in range(8)]
    paths = [p for p in dict.fromkeys(paths) if not any(q[: len(p)] == p != q for q in paths)]
    chosen = eval(mask.filter.source(), {'sg': sg}).mask(
        unflatten(dict.fromkeys(paths, 0.0)), allow_unmatched=True
    )
    assert flatten(chosen) == {p: mask.filter.selects(p, p) for p in paths}


@pytest.mark.long
def test_programs_stop_gradients_often_and_hold_every_form():
    """A generator that drifts into trivial programs would leave the tests above green."""
    programs = [draw(seed)[0] for seed in range(150)]
    text = ''.join(map(report, programs))
    for form in (
        'with sg',
        '    @sg',
        ')(self.',
        'nn.compact',
        'def setup',
        'inner: nn.Module',
        'layers[',
        "table['",
        '.aux(',
        'get_variable',
        '.variables[',
        'self.s',
        'self.t',
        'stat(',
        'noise(',
        'M0()',
        'M0(name=',
        'raw_scan',
        'raw_checkpoint',
        'raw_jit',
        'raw_cond',
        'raw_vmap',
        'lifted_scan',
        'lifted_remat',
        'lifted_jit',
        'lifted_cond',
        'scan_b(',
        'scan_s(',
        'vmap_b(',
        'vmap_s(',
        'remat(',
        'jit(',
        'lambda c',
        're.compile',
        "'../",
        "'/",
        '~(',
        ') & (',
        'bound: True',
        'params: True',
        'grad: True',
        ')(M0)',
        'tied(',
        'ruled(',
        'def steps',
        ', named',
        ', centre',
    ):
        assert form in text, form
    assert sum(check(p) for p in programs[:24]) >= 8


def first_failure(seeds):
    for seed in seeds:
        program, how = draw(seed)
        try:
            check(program, **how)
        except AssertionError as error:
            return program, how, error
    return None


def test_a_library_that_stops_nothing_is_caught_and_the_program_shrunk(monkeypatch):
    stop_nothing(monkeypatch)
    program, how, error = first_failure(range(20))
    assert 'gradient' in str(error)
    smaller = report(shrink(program, same_failure(error, **how)))
    assert smaller.count('\n') < report(program).count('\n') // 2 + 5
    assert 'sg.stop_gradient' in smaller


def test_a_jaxpr_evaluates_as_jax_runs_it():
    def f(w, x):
        def step(c, v):
            return OPS['wave'](c, w * v), OPS['mat'](c, jax.numpy.outer(v, w))

        c, ys = jax.lax.scan(step, x, jax.numpy.stack([x, 2 * x]), reverse=True)
        c = jax.lax.cond(c[0] > 0, lambda z: z * w, lambda z: -z, c)
        return jax.checkpoint(OPS['exp'])(c) + jax.jit(OPS['sine'])(ys).sum(0)

    def loss(w, x):
        return f(w, x).sum()

    x = jax.numpy.array([0.3, -0.5, 0.9])
    got = evaluate(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, 2 * x), x, 2 * x)
    for a, b in zip(got, jax.grad(loss, (0, 1))(x, 2 * x), strict=True):
        assert_same(a, b, 'gradient', rtol=1e-5)
