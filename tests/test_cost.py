"""What a mask costs: nothing in the compiled step, and a trace that grows with what it reads.

The programs are those of `benchmarks/`, made small: each masked loss beside the same one by hand,
with two copies of the parameters. Every figure here is exact; times are measured in `benchmarks/`.
"""

import functools

import jax
import pytest

import cases
import flax_sg
import measure
import transformer
from flax_sg import path, stop_gradient

SMALL = dict(depth=2, width=8, heads=2, batch=2, length=4)
MODELS = {
    'loop': functools.partial(cases.transformer_cases, **SMALL),
    'remat': functools.partial(cases.transformer_cases, **SMALL, remat=True),
    'scan': functools.partial(cases.transformer_cases, **SMALL, scan=True),
    'scan_remat': functools.partial(cases.transformer_cases, **SMALL, scan=True, remat=True),
    'recurrent': functools.partial(
        cases.encoder_cases, features=3, hidden=4, iterations=3, batch=2
    ),
    'example': functools.partial(cases.example_cases, iterations=3, batch=2),
}
TRANSFORMER = [
    'block around apply',
    'block inside',
    'method',
    'instance, bound',
    'instance, unbound',
    'class of the encoder',
]
LAYER, IN_BODY = 'class of the layer', 'class of the layer, held in the scan by hand too'
PAIRS = [
    *(('loop', name) for name in (*TRANSFORMER, LAYER)),
    *(('scan', name) for name in (*TRANSFORMER, IN_BODY)),
    *(('remat', name) for name in ('block inside', LAYER)),
    *(('scan_remat', name) for name in ('block inside', IN_BODY)),
    *(
        ('recurrent', name)
        for name in ('blocks around apply', 'blocks inside', 'methods', 'instances, bound')
    ),
    ('example', 'blocks inside'),
]
# Scans in the undifferentiated program: the layers; a run for each of three losses; the sampler.
SCANS = {'loop': 0, 'remat': 0, 'scan': 1, 'scan_remat': 1, 'recurrent': 3, 'example': 1}


@functools.cache
def cases_of(model):
    return MODELS[model]()


@functools.cache
def step_of(model, fn):
    """Compile a step once; several pairs share the one by hand."""
    return measure.compiled_step(fn, cases_of(model).params, quick=True)


def count_scans(value):
    """Count the scan equations of a jaxpr, and of those in its equations' parameters."""
    value = getattr(value, 'jaxpr', value)
    if isinstance(value, (tuple, list)):
        return sum(map(count_scans, value))
    return sum(
        (eqn.primitive.name == 'scan') + count_scans(list(eqn.params.values()))
        for eqn in getattr(value, 'eqns', ())
    )


@pytest.mark.thinned(12)
@pytest.mark.parametrize('model, name', PAIRS)
def test_compiled_step_costs_what_it_costs_by_hand(model, name):
    params, _, pairs = cases_of(model)
    masked, by_hand = (step_of(model, fn) for fn in pairs[name])
    cost = measure.cost_of(masked)
    assert cost == measure.cost_of(by_hand)
    assert cost.flops > 0 and cost.temp_bytes > 0
    assert cost.loops >= 2 * SCANS[model]  # forward and backward
    # And it is the same function: the loss and every gradient, bit for bit.
    same = jax.tree.map(lambda a, b: bool((a == b).all()), masked(params), by_hand(params))
    assert jax.tree.all(same), same


@pytest.mark.parametrize('model, name', PAIRS)
def test_forward_pass_runs_each_scan_once(model, name):
    params, _, pairs = cases_of(model)
    assert count_scans(jax.make_jaxpr(pairs[name].masked)(params)) == SCANS[model]


@pytest.mark.parametrize('model', ['loop', 'scan', 'recurrent', 'example'])
def test_the_figures_tell_masked_from_unmasked(model):
    """The comparison above can fail: a step without the mask has other figures."""
    _, unmasked, pairs = cases_of(model)
    by_hand = measure.cost_of(step_of(model, next(iter(pairs.values())).by_hand))
    assert measure.cost_of(step_of(model, unmasked)) != by_hand


def test_every_pair_of_the_benchmarks_is_tested():
    for model in ('loop', 'scan', 'recurrent', 'example'):
        assert set(cases_of(model).pairs) == {name for other, name in PAIRS if other == model}


TOKENS = transformer.tokens(1, 2)


class FirstHeld(transformer.Transformer):
    """A block that reads the first two layers, whatever the depth."""

    mask: object = None

    def encode(self, x):
        h, layers = self.encoder.embed(x), self.encoder.layer_list
        for i, layer in enumerate(layers):
            if i < 2 and self.mask is not None:
                with self.mask:
                    h, _ = layer(h)
            else:
                h, _ = layer(h)
        return h


def added_calls(mask, depth):
    """Count what a block adds to a trace: calls of flax_sg's functions, masked less unmasked."""
    return calls_of(mask, depth) - calls_of(None, depth)


@functools.cache
def calls_of(mask, depth):
    model, x = FirstHeld(transformer.Encoder(depth=depth, width=4, heads=2), mask), TOKENS
    return measure.calls_in(
        lambda: (lambda params: model.apply(params, x), (params_of(depth),)), flax_sg
    )


@functools.cache
def params_of(depth):
    model = FirstHeld(transformer.Encoder(depth=depth, width=4, heads=2))
    return jax.eval_shape(model.init, jax.random.key(0), TOKENS)


@pytest.mark.thinned(6)
@pytest.mark.parametrize(
    'predicate',
    [
        True,
        'encoder/layer_*',
        '**/attention',
        path('encoder/layer_0') | path('encoder/layer_1'),
        lambda v: v.name.endswith('bias'),
    ],
    ids=['everything', 'glob', 'deep', 'either', 'callable'],
)
def test_added_trace_grows_with_the_reads_and_not_with_the_model(predicate):
    mask = stop_gradient(predicate)
    few, many = added_calls(mask, 2), added_calls(mask, 10)
    assert few > 0
    assert many == few


def test_a_pattern_that_nothing_in_the_block_meets_is_looked_up_and_not_searched_for():
    """As in `with stop_gradient(~path('head'))` around an encoder."""

    def added(depth):
        last = f'encoder/layer_{depth - 1}'
        return added_calls(stop_gradient(~path(last) & ~path(f'/{last}/up/ker*')), depth)

    assert added(10) == added(3) > 0
