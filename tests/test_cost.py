"""What a mask costs: nothing in the compiled step, and a trace that grows with what it reads.

The programs are those of `benchmarks/`, made small: each masked loss beside the same one by hand,
with two copies of the parameters. Every figure here is exact; times are measured in `benchmarks/`.
"""

import functools
import sys
from pathlib import Path

import jax
import pytest

import flax_sg
from flax_sg import path, stop_gradient

sys.path.append(str(Path(__file__).resolve().parents[1] / 'benchmarks'))

import cases  # noqa: E402
import measure  # noqa: E402
import transformer  # noqa: E402

SMALL = dict(depth=2, width=8, heads=2, batch=2, length=4)
MODELS = {
    'loop': functools.partial(cases.transformer_cases, **SMALL),
    'remat': functools.partial(cases.transformer_cases, **SMALL, remat=True),
    'scan': functools.partial(cases.transformer_cases, **SMALL, scan=True),
    'scan_remat': functools.partial(cases.transformer_cases, **SMALL, scan=True, remat=True),
    'recurrent': functools.partial(
        cases.encoder_cases, features=3, hidden=4, iterations=3, batch=2),
}
TRANSFORMER = ['block around apply', 'block inside', 'method', 'instance, bound',
               'instance, unbound', 'class of the encoder']
LAYER, IN_BODY = 'class of the layer', 'class of the layer, held in the scan by hand too'
PAIRS = [
    *(('loop', name) for name in (*TRANSFORMER, LAYER)),
    *(('scan', name) for name in (*TRANSFORMER, IN_BODY)),
    *(('remat', name) for name in ('block around apply', 'block inside', LAYER)),
    *(('scan_remat', name) for name in ('block around apply', 'block inside', IN_BODY)),
    *(('recurrent', name) for name in
      ('blocks around apply', 'blocks inside', 'methods', 'instances, bound')),
]
# Loops in the compiled step. Scans: one forward and one backward; of the recurrent model, for each
# of its three losses. A loop of layers has none.
LOOPS = {'loop': 0, 'remat': 0, 'scan': 2, 'scan_remat': 2, 'recurrent': 6}
# Scans in the undifferentiated program.
SCANS = {'loop': 0, 'remat': 0, 'scan': 1, 'scan_remat': 1, 'recurrent': 3}


@functools.cache
def cases_of(model):
    return MODELS[model]()


@functools.cache
def step_of(model, fn):
    """Compile a step once; several pairs share the one by hand."""
    return measure.compiled_step(fn, cases_of(model).params)


def count_scans(jaxpr):
    found = 0
    for eqn in jaxpr.eqns:
        found += eqn.primitive.name == 'scan'
        found += sum(map(count_scans, jax.core.jaxprs_in_params(eqn.params)))
    return found


@pytest.mark.parametrize('model, name', PAIRS)
def test_compiled_step_costs_what_it_costs_by_hand(model, name):
    params, _, pairs = cases_of(model)
    masked, by_hand = (step_of(model, fn) for fn in pairs[name])
    cost = measure.cost_of(masked)
    assert cost == measure.cost_of(by_hand)
    assert cost.flops > 0 and cost.temp_bytes > 0
    assert cost.loops == LOOPS[model]
    # And it is the same function: the loss and every gradient, bit for bit.
    same = jax.tree.map(lambda a, b: bool((a == b).all()), masked(params), by_hand(params))
    assert jax.tree.all(same), same


@pytest.mark.parametrize('model, name', PAIRS)
def test_forward_pass_has_the_scans_it_has_by_hand(model, name):
    params, unmasked, pairs = cases_of(model)
    for fn in (pairs[name].masked, pairs[name].by_hand, unmasked):
        # A new function, or JAX would answer from the trace made for the compiled step.
        jaxpr = jax.make_jaxpr(lambda params, fn=fn: fn(params))(params).jaxpr
        assert count_scans(jaxpr) == SCANS[model]


@pytest.mark.parametrize('model', MODELS)
def test_the_figures_tell_masked_from_unmasked(model):
    """The comparison above can fail: a step without the mask has other figures."""
    _, unmasked, pairs = cases_of(model)
    by_hand = measure.cost_of(step_of(model, next(iter(pairs.values())).by_hand))
    assert measure.cost_of(step_of(model, unmasked)) != by_hand


def test_every_pair_of_the_benchmarks_is_tested():
    for model in ('loop', 'scan', 'recurrent'):
        assert set(cases_of(model).pairs) == {name for other, name in PAIRS if other == model}


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
    x = transformer.tokens(1, 2)

    def make_of(mask):
        model = FirstHeld(transformer.Encoder(depth=depth, width=4, heads=2), mask=mask)
        params = jax.eval_shape(model.init, jax.random.key(0), x)
        return lambda: (lambda params: model.apply(params, x), (params,))

    return measure.calls_in(flax_sg, make_of(mask)) - measure.calls_in(flax_sg, make_of(None))


@pytest.mark.parametrize('predicate', [
    True, 'encoder/layer_*', '**/attention', path('encoder/layer_0') | path('encoder/layer_1'),
    lambda v: v.name.endswith('bias'),
], ids=['everything', 'glob', 'deep', 'either', 'callable'])
def test_added_trace_grows_with_the_reads_and_not_with_the_model(predicate):
    mask = stop_gradient(predicate)
    few, many = added_calls(mask, 2), added_calls(mask, 20)
    assert few > 0
    assert many == few
