"""Random programs of flax.nnx against their meaning; random_nnx runs thousands."""

import pytest

from internals import stop_nothing
from random_nnx import IllConditioned, Refused, check, draw, report


def check_seed(seed):
    program, how = draw(seed)
    try:
        check(program, **how)
    except (IllConditioned, Refused):
        pass
    except Exception as error:
        error.add_note(f'seed {seed}, {how}:\n{report(program)}')
        raise


@pytest.mark.thinned(9)
@pytest.mark.parametrize('seed', range(36))
def test_random_programs(seed):
    check_seed(seed)


@pytest.mark.long
def test_programs_hold_every_form():
    """A generator that drifts into trivial programs would leave the test above green."""
    text = ''.join(report(draw(seed)[0]) for seed in range(150))
    for form in (
        *('with sg', '    @sg', ').on(self)', 'sg.within(', '~(', ') & (', ') | (', "'../"),
        *('nnx.List', 'nnx.Dict', 'self.t = ', 'nnx.BatchStat', 'self.rngs', '.set_value('),
        *('nnx.update(', 'nnx.clone(', 'copy.deepcopy(', 'nnx.merge(', 'jax.tree.map('),
        *('nnx.split(', 'nnx.state(', '[...]', '.get_value()', '.get_raw_value()', '[*self'),
        *(f'sg.{kind}(' for kind in ('scale_gradient', 'map_gradient', 'map_values', 'constant')),
        *(f"traced['{kind}'" for kind in ('jit', 'remat', 'vmap', 'scan', 'fori_loop', 'cond')),
        *(f"traced['{kind}'" for kind in ('scan, carrying', 'switch', 'stacked scan')),
        *(f"traced['{kind}'" for kind in ('stacked vmap', 'grad of input', 'grad of model')),
        *(f"traced['{kind}'" for kind in ('jax.jit', 'jax.vmap', 'lax.scan', 'lax.cond')),
        *(
            f"captured['{kind}'"
            for kind in ('jit', 'checkpoint', 'scan', 'vmap', 'cond', 'nnx.jit')
        ),
        *('# values', '# nnx.grad', '# jit of nnx.grad', '# split', 'around: True', "'tree')"),
        *('# sg.gradient_views', 'model.__call__', 'lambda m, x: m(x)', 'type(model).__call__'),
    ):
        assert form in text, form


def test_a_library_that_stops_nothing_is_caught(monkeypatch):
    check(draw(0)[0])  # after the library's own check of what it does
    stop_nothing(monkeypatch)
    with pytest.raises(AssertionError, match='^run'):
        for seed in range(20):
            check(draw(seed)[0])
