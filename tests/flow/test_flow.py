"""gradient_flow as people use it: records, tables, pictures, assertions and errors."""

import copy
import html.parser
import io
import json
import pathlib
import pickle
import re
import xml.etree.ElementTree

import jax
import jax.numpy as jnp
import jax_resnet
import pytest
import rich.console
from flax import nnx

import flax_sg as sg
from flax_sg import nn
from internals import misjudge

SOURCE = pathlib.Path(__file__).read_text().splitlines()
X = jnp.asarray([0.5, -1.0, 2.0])
PARAMS = {
    'encoder': {'bias': jnp.ones(3), 'kernel': jnp.ones(3)},
    'head': jnp.ones(3),
    'old': jnp.ones(3),
}


def line(marker):
    """Return the source that stands for the line with a marker, but for the function."""
    for number, text in enumerate(SOURCE, 1):
        if text.rstrip().endswith(f'# <- {marker}'):
            return f'{__file__}:{number} ('
    raise AssertionError(marker)


def losses(params, x):
    h = params['encoder']['kernel'] * x + params['encoder']['bias']
    held = jax.lax.stop_gradient(h)  # <- held
    return {
        'both': (h * params['head']).sum(),
        'head': (held * params['head']).sum(),
        'rank': (jnp.argsort(h) * x).sum(),  # <- rank
    }


@pytest.fixture(scope='module')
def flow():
    return sg.gradient_flow(losses)(PARAMS, X)


def test_records(flow):
    assert len(flow) == 12 and tuple(flow) == flow.records
    assert flow.losses == ('both', 'head', 'rank')
    assert flow.names == ('encoder/bias', 'encoder/kernel', 'head', 'old')
    record = flow['head', 'encoder/kernel']
    assert (record.loss, record.name, record.norm) == ('head', 'encoder/kernel', None)
    assert record.verdict == 'MASKED' and record.verdict is sg.Verdict.MASKED
    assert record.operation == 'stop_gradient' and record.source == line('held') + 'losses)'
    assert not record.reached and flow['both', 'head'].reached
    assert flow['rank', 'encoder/bias'].verdict == 'PIECEWISE_CONSTANT'
    assert flow['rank', 'encoder/bias'].operation == 'argsort (sort)'
    assert flow['rank', 'encoder/bias'].source == line('rank') + 'losses)'
    assert {r.verdict for r in flow if r.name == 'old'} == {'UNUSED'}
    assert pickle.loads(pickle.dumps(flow)).records == flow.records == copy.copy(flow).records


@pytest.mark.parametrize(
    'key, text',
    [
        (('heda', 'old'), "flow['heda', 'old']: there is no loss 'heda'. Close: 'head'."),
        (
            ('head', 'encoder/krnel'),
            "flow['head', 'encoder/krnel']: there is no parameter "
            "'encoder/krnel'. Close: 'encoder/kernel'",
        ),
        ('head', "flow['head']: expected flow[loss, name]."),
    ],
)
def test_lookup_errors(flow, key, text):
    with pytest.raises(sg.UnknownRecordError) as caught:
        flow[key]
    assert str(caught.value).startswith(text)
    assert isinstance(caught.value, KeyError) and isinstance(caught.value, ValueError)


def test_plain_data(flow):
    plain = json.loads(json.dumps(flow.to_dict()))
    assert set(plain) == set(flow.losses) and list(plain['head']) == list(flow.names)
    found = plain['head']['encoder/bias']
    assert found['verdict'] == 'MASKED' and found['source'] == line('held') + 'losses)'
    assert found['obstacles'][0] == {
        'verdict': 'MASKED',
        'operation': 'stop_gradient',
        'source': found['source'],
        'reason': '',
        'alone': True,
    }


# Forms of losses, parameters and arguments.


def test_one_scalar_and_a_dict_of_functions():
    alone = sg.gradient_flow(lambda p, x: losses(p, x)['both'])(PARAMS, X)
    assert alone.losses == ('loss',) and alone['loss', 'head'].verdict == 'REACHED'
    several = sg.gradient_flow(
        {'b': lambda p, x: losses(p, x)['rank'], 'a': lambda p, x: losses(p, x)['both']}
    )(PARAMS, x=X)
    assert several.losses == ('b', 'a')
    assert several['a', 'head'].verdict == 'REACHED' and several['b', 'head'].verdict == 'UNUSED'


def test_arguments_are_as_the_losses_take_them():
    def loss(params, x, train, *, name, key, scale=1.0):
        assert name == 'net' and train is True and scale > 0
        noise = jax.random.normal(key, x.shape)
        return (params['w'] * (x + scale * noise)).sum()

    shapes = {'w': jax.ShapeDtypeStruct((3,), jnp.float32)}
    for x in (X, jax.ShapeDtypeStruct((3,), jnp.float32)):
        flow = sg.gradient_flow(loss)(shapes, x, True, name='net', key=jax.random.key(0))
        assert flow['loss', 'w'].verdict == 'REACHED'


def test_losses_are_named_in_the_order_of_their_keys():
    flow = sg.gradient_flow(lambda p: {10: p['a'].sum(), 2: p['b'].sum()})({'a': X, 'b': X})
    assert flow.losses == ('2', '10')
    assert flow['10', 'a'].reached and flow['2', 'b'].reached and not flow['2', 'a'].reached


def test_names_with_slashes():
    params = {'a': X, 'a/b': X, 'a/b/c': {'d': X}}
    flow = sg.gradient_flow(lambda p: p['a'].sum() + p['a/b/c']['d'].sum())(params)
    assert [r.reached for r in flow] == [True, False, True] and 'a/b/c/d' in str(flow)
    with pytest.raises(sg.UsageError, match="gradient_flow: params has two leaves named 'a/b'."):
        sg.gradient_flow(lambda p: p['a/b'].sum())({'a/b': X, 'a': {'b': X}})


def test_it_does_not_run_the_loss():
    ran = []

    def loss(params):
        jax.debug.callback(lambda: ran.append(1))
        return (params**2).sum()

    assert sg.gradient_flow(loss)(X).records[0].name == 'params'
    jax.effects_barrier()
    assert not ran
    sg.gradient_flow(loss, norms=True)(X)
    jax.effects_barrier()
    assert ran == [1]


def test_names_in_other_trees():
    class Model(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0)) for _ in range(2)])

        def __call__(self, x):
            return self.layers[0](x)

    graph, state = nnx.split(Model())
    flow = sg.gradient_flow(lambda s, x: nnx.merge(graph, s)(x).sum())(state, jnp.ones((1, 2)))
    assert flow['loss', 'layers/0/kernel'].verdict == 'REACHED'
    assert flow['loss', 'layers/1/kernel'].verdict == 'UNUSED'
    flow = sg.gradient_flow(lambda p: (p[0]['a'].value * p[1]).sum())(
        [{'a': nn.Partitioned(X, (None,))}, X]
    )
    assert flow.names == ('0/a', '1')


@pytest.mark.parametrize(
    'wrong, text',
    [
        (
            3,
            'gradient_flow was given an object of type int; expected a function of '
            '(params, *args), '
            'or a dict of such functions by name.',
        ),
        ({}, 'gradient_flow was given an object of type dict;'),
        ({'a': 1}, 'gradient_flow was given an object of type dict;'),
    ],
)
def test_losses_that_are_none(wrong, text):
    with pytest.raises(sg.UsageError, match='^' + re.escape(text)):
        sg.gradient_flow(wrong)


@pytest.mark.parametrize(
    'loss, text',
    [
        (
            lambda p: p['w'] * 2,
            "the loss 'loss' returns float32[3]; expected a real scalar. Of an array take the "
            'mean, or leave it out of the dict.',
        ),
        (
            lambda p: (p['w'].sum(), 1.0, 2.0),
            "the loss 'loss' returns an object of type tuple; expected a real scalar. Of a step of "
            'training pass the loss in it; of a loss with further results the first: '
            'lambda *args: loss(*args)[0].',
        ),
        (lambda p: {'a': p['w'].sum(), 'b': p['w']}, "the loss 'b' returns float32[3]; expected"),
        (lambda p: {'hits': (p['w'] > 0).sum()}, 'the function returns no loss; expected a real'),
        (
            jax.grad(lambda p: p['w'].sum()),
            "the loss 'w' returns a tree like the parameters; expected a real scalar. Pass the "
            'loss itself, and not its gradient, nor a step that returns parameters.',
        ),
        (
            lambda p: jax.tree.map(lambda v: v - 0.1, p),
            "the loss 'w' returns a tree like the parameters",
        ),
    ],
)
def test_losses_that_are_no_scalars(loss, text):
    with pytest.raises(sg.UsageError, match='^gradient_flow: ' + re.escape(text)):
        sg.gradient_flow(loss)({'w': X})


@pytest.mark.parametrize(
    'loss, names',
    [
        (lambda p: (p['w'].sum(), {'logits': p['w']}), ('loss',)),
        (lambda p: {'a': p['w'].sum(), 'hits': (p['w'] > 0).sum()}, ('a',)),
        (lambda p: {'a': {'x': p['w'].sum(), 'y': p['w'].prod()}}, ('a/x', 'a/y')),
        (lambda p: ({'hits': 1, 'z': p['w'].sum()}), ('z',)),
    ],
    ids=['has_aux', 'metrics', 'nested', 'numbers'],
)
def test_losses_with_what_else_people_return(loss, names):
    flow = sg.gradient_flow(loss, norms=True)({'w': X})
    assert flow.losses == names
    assert all(record.reached and record.norm > 0 for record in flow)


def test_parameters_that_hold_no_arrays():
    for params in ({}, {'f': jnp.tanh}):
        with pytest.raises(sg.UsageError, match='gradient_flow: got .* in which there is no array'):
            sg.gradient_flow(lambda p: jnp.float32(0))(params)


def test_leaves_that_are_no_arrays_are_held_fixed():
    params = {'f': jnp.tanh, 'name': 'net', 'scale': 2.0, 'w': X}
    flow = sg.gradient_flow(lambda p: (p['f'](p['w']) * p['scale']).sum(), norms=True)(params)
    assert flow.names == ('scale', 'w') and all(record.reached for record in flow)


def test_assert_flow_needs_parameters():
    loss = lambda p: p['w'].sum()
    with pytest.raises(sg.UsageError, match='^assert_flow was given no parameters, and has asser'):
        sg.assert_flow(loss, {'loss': 'w'})({'w': X})


# Words.


@pytest.mark.parametrize(
    'fn, operation',
    [
        (lambda v: v.astype(int).astype(jnp.float32), 'astype (convert_element_type)'),
        (lambda v: (v < 0.5) * 1.0, '<, less (lt)'),
        (lambda v: (v == 0.5) * 1.0, '==, equal (eq)'),
        (lambda v: jnp.greater(v, 0.5) * 1.0, '>, greater (gt)'),
        (lambda v: jax.tree.map(jnp.sign, v), 'sign'),
        (lambda v: jax.vmap(jnp.sign)(v), 'sign'),
        (jnp.floor, 'floor'),
    ],
)
def test_operations_have_the_names_that_people_typed(fn, operation):
    record = sg.gradient_flow(lambda p: fn(p['a']).sum())({'a': X})['loss', 'a']
    assert record.operation == operation


# Norms.


def test_norms():
    def loss(params, x):
        return (
            (params['w'] * x).sum()
            + 0.0 * params['off'].sum()
            + jax.nn.relu(params['dead'] - 10).sum()
            + (params['held'].argmax() * x).sum()
        )

    params = {name: jnp.ones(3) for name in ('dead', 'held', 'off', 'w')}
    flow = sg.gradient_flow(loss, norms=True)(params, jnp.asarray([3.0, 4.0, 0.0]))
    # d/dw is x, of norm 5; the others are 0, 0 by the dead relu, by argmax, by the factor.
    assert [r.norm for r in flow] == [0.0, 0.0, 0.0, 5.0]
    assert [r.verdict for r in flow] == [
        'NUMERIC_ZERO',
        'PIECEWISE_CONSTANT',
        'NUMERIC_ZERO',
        'REACHED',
    ]
    assert '5' in str(flow)
    structural = sg.gradient_flow(loss)(params, X)
    assert structural['loss', 'dead'].verdict == structural['loss', 'off'].verdict == 'REACHED'


# The cross-check with JAX's derivative of the whole.


def test_a_disagreement_is_unknown(monkeypatch):
    """Were an operation misjudged, the derivative of the whole would not agree."""
    misjudge(monkeypatch, 'sin')
    (record,) = sg.gradient_flow(lambda w: jnp.sin(w).sum())(X)
    assert record.verdict == 'UNKNOWN'
    assert record.reason == (
        "the operations one by one have no path for its gradient, JAX's "
        'derivative of the whole has a path'
    )


def test_what_jax_does_not_differentiate_is_unknown_for_its_parameters_alone():
    def loss(params):
        called = jax.pure_callback(lambda w: w, params['a'], params['a'])  # <- called
        return (called * params['b']).sum()

    flow = sg.gradient_flow(loss)({'a': X, 'b': X})
    record = flow['loss', 'a']
    assert record.verdict == 'UNKNOWN' and record.operation == 'pure_callback'
    assert record.source.startswith(line('called')) and 'do not support JVP' in record.reason
    assert flow['loss', 'b'].verdict == 'REACHED'


def test_a_rule_that_closes_over_a_parameter_is_unknown_as_jax_grad_is_an_error():
    def loss(params):
        scaled = jax.custom_jvp(lambda v: v * params['b'])
        scaled.defjvp(lambda xs, ts: (xs[0] * params['b'], ts[0]))
        return scaled(params['a']).sum()

    flow = sg.gradient_flow(loss)({'a': X, 'b': X, 'c': X})
    with pytest.raises(jax.errors.UnexpectedTracerError):
        jax.grad(loss)({'a': X, 'b': X, 'c': X})
    assert [r.verdict for r in flow] == ['REACHED', 'UNKNOWN', 'UNUSED']
    assert 'JAX does not differentiate it: UnexpectedTracerError' in flow['loss', 'b'].reason


def test_what_jax_refuses_spoils_no_other_parameter():
    def loss(params):
        jax.experimental.io_callback(lambda a: None, None, params['a'])
        return sum((params[k] * X).sum() for k in 'bcdefg')

    flow = sg.gradient_flow(loss)({k: X for k in 'abcdefg'})
    with pytest.raises(ValueError, match='^IO callbacks do not support JVP'):
        jax.grad(loss)({k: X for k in 'abcdefg'})
    assert [r.verdict for r in flow] == ['UNKNOWN', *['REACHED'] * 6]
    assert 'JAX does not differentiate it: ValueError' in flow['loss', 'a'].reason


def test_one_refusal_among_many_parameters():
    def loss(params):
        called = jax.pure_callback(lambda w: w, params['p7'], params['p7'])
        return called.sum() + sum((params[name] * X).sum() for name in params if name != 'p7')

    flow = sg.gradient_flow(loss)({f'p{i}': X for i in range(64)})
    assert {r.name for r in flow if r.verdict == 'UNKNOWN'} == {'p7'}
    assert all(r.verdict == 'REACHED' for r in flow if r.name != 'p7')


def test_a_while_loop_has_forward_mode_alone():
    def loss(params):
        out = jax.lax.while_loop(lambda c: c.sum() < 100, lambda c: c + params['a'] ** 2, X)
        return (out * params['b']).sum()

    flow = sg.gradient_flow(loss)({'a': X, 'b': X})
    assert flow['loss', 'a'].verdict == 'REACHED_PARTLY' and flow['loss', 'b'].verdict == 'REACHED'
    assert flow['loss', 'a'].operation == '<, less (lt)'  # how often it runs depends on a as well
    assert flow['loss', 'a'].reason.startswith('forward mode alone: jax.grad does not')
    assert flow['loss', 'b'].reason == ''


# What people look at.


def test_the_table_folds_and_puts_problems_first(flow):
    text = str(flow)
    assert text.splitlines()[0] == 'gradient_flow: 4 parameters, 3 losses; no loss trains 1 of them'
    rows = [[cell.strip() for cell in row.split('│')] for row in text.splitlines() if '│' in row]
    assert rows[0] == ['old', 'UNUSED', 'UNUSED', 'UNUSED']
    assert rows[1] == ['encoder/ (2)', 'REACHED', 'MASKED [1]', 'PIECEWISE_CONSTANT [2]']
    assert rows[2] == ['head', 'REACHED', 'REACHED', 'UNUSED']
    assert '[1] stop_gradient at ' in text and '[2] argsort (sort) at ' in text
    assert len(rows) == 3


def big_losses(params, x):
    held = sg.stop_gradient('layer_[0-9]')(params)  # <- big
    layers = [layer for name, layer in held.items() if name.startswith('layer')]
    h = sum(
        (layer['attention']['kernel'] * x * layer['norm']['scale'] + layer['norm']['bias']).sum()
        for layer in layers
    )
    return {'lm': h * params['head'].sum(), 'argmax': 1.0 * (h * params['head']).argmax()}


BIG = {
    **{
        f'layer_{i}': {
            'attention': {'kernel': jnp.ones(3), 'unused': jnp.ones(3)},
            'norm': {'scale': jnp.ones(3), 'bias': jnp.ones(3)},
        }
        for i in range(100)
    },
    'head': jnp.ones(3),
}


@pytest.fixture(scope='module')
def big():
    return sg.gradient_flow(big_losses)(BIG, X)


def test_four_hundred_parameters_fit_a_screen(big):
    assert len(big.names) == 401
    text = str(big)
    assert len(text.splitlines()) < 30
    assert 'layer_0/ … layer_9/ (40)' in text and 'layer_10/ … layer_99/ (360)' in text
    number = re.escape(line('big').rpartition(':')[2])
    assert re.search(rf"stop_gradient\('layer_\[0-9\]'\) at \S*test_flow.py:{number}", text)
    assert max(map(len, text.splitlines())) <= 150


def test_many_notes_do_not_flood_the_screen():
    def loss(params):
        held = [sg.stop_gradient(name)(params)[name] for name in params]
        return sum(map(jnp.sum, held))

    text = str(sg.gradient_flow(loss)({f'p{i}': X for i in range(30)}))
    assert text.splitlines()[-1] == (
        '… and 10 more: show fewer parameters, or look at the records.'
    )
    assert "[20] stop_gradient('p19') at " in text and "p20'" not in text


def test_the_table_can_be_opened(big, capsys):
    big.show('layer_3')
    shown = capsys.readouterr().out
    assert 'layer_3/attention/kernel' in shown and 'layer_4' not in shown
    big.show(depth=1)
    assert 'attention' not in capsys.readouterr().out
    big.show(['layer_3', 'layer_12'], depth=3)
    assert 'layer_12/attention/unused' in capsys.readouterr().out
    with pytest.raises(sg.UnmatchedPathError, match='Flow.show: no variable of the parameters'):
        big.show('layr_3')


def test_names_are_no_markup():
    flow = sg.gradient_flow(lambda p: {'[red]a[/]': p['[b]'].sum()})({'[b]': X})
    assert '[red]a[/]' in str(flow) and '[b]' in str(flow)


def test_files_with_any_name():
    code = 'def loss(params):\n    with sg.stop_gradient(True):\n        return model(params)\n'
    model = lambda params: nn.Dense(1).apply({'params': params}, X[None]).sum()
    names = {'sg': sg, 'model': model}
    exec(compile(code, '/me at work @ home.py', 'exec'), names)
    params = nn.Dense(1).init(jax.random.key(0), X[None])['params']
    record = sg.gradient_flow(names['loss'])(params)['loss', 'kernel']
    assert record.operation == 'stop_gradient(everything)'
    assert record.source == '/me at work @ home.py:2 (loss)'


def test_colours_in_a_terminal(flow):
    out = io.StringIO()
    rich.console.Console(file=out, force_terminal=True, width=100, color_system='truecolor').print(
        flow
    )
    assert '\x1b[' in out.getvalue() and 'PIECEWISE_CONSTANT' in out.getvalue()


class Balanced(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.text, self.details = [], '', 0

    def handle_starttag(self, tag, attrs):
        self.details += tag == 'details'
        if tag != 'br':
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_html(flow, big):
    page = Balanced()
    page.feed(flow._repr_html_())
    assert not page.open and page.details == 1
    assert 'encoder/kernel' in page.text and '[2] argsort (sort) at' in page.text
    page = Balanced()
    page.feed(big._repr_html_())
    assert not page.open and page.details > 100 and 'layer_57/norm/bias' in page.text
    escaped = sg.gradient_flow(lambda p: p['<b>'].sum())({'<b>': X})._repr_html_()
    assert (
        '<b>' not in escaped.partition('</p>')[2].replace('<b>parameter', '').replace('<b>loss', '')
        and '&lt;b&gt;' in escaped
    )


@pytest.mark.parametrize('which', ['flow', 'big'])
def test_pictures(which, request, tmp_path):
    found = request.getfixturevalue(which)
    found.plot(tmp_path / 'flow.png')
    found.plot(str(tmp_path / 'flow.svg'))
    assert (tmp_path / 'flow.png').read_bytes().startswith(b'\x89PNG')
    svg = xml.etree.ElementTree.parse(tmp_path / 'flow.svg').getroot()
    assert svg.tag.endswith('svg')
    words = (tmp_path / 'flow.svg').read_text()
    assert 'piecewise constant (' in words and ('encoder/bias' in words or 'layer_10/' in words)
    with pytest.raises(sg.UsageError, match=r'ending in \.svg or \.png'):
        found.plot(tmp_path / 'flow.jpg')
    assert not (tmp_path / 'flow.jpg').exists()


# assert_flow.


def test_assert_flow_holds():
    spec = {'both': sg.everything & ~sg.path('old'), 'head': 'head'}
    flow = sg.assert_flow(losses, spec, PARAMS, X)
    assert isinstance(flow, sg.Flow) and flow['head', 'head'].reached


def test_assert_flow_lists_leaks_and_what_is_missing():
    with pytest.raises(AssertionError) as caught:
        sg.assert_flow(losses, {'both': 'head', 'head': ['head', 'encoder', 'old']}, PARAMS, X)
    first, *rest = str(caught.value).splitlines()
    assert first == 'assert_flow: 5 gradients are not as expected.'
    shown = [text.strip() for text in rest]
    use = [n for n, text in enumerate(SOURCE, 1) if text.startswith('    h = params[')][0]
    assert re.fullmatch(
        rf"loss 'both': encoder/kernel is a LEAK, reached at \S*test_flow\.py:{use} \(losses\); "
        r"the spec has 'head'\.",
        shown[1],
    )
    held = re.escape(line('held').rpartition(':')[2])
    assert re.fullmatch(
        rf"loss 'head': encoder/bias is MASKED, stop_gradient at \S*test_flow\.py:{held}"
        r'losses\)\.',
        shown[2],
    )
    assert shown[4] == "loss 'head': old is UNUSED."


def test_assert_flow_counts_what_is_unknown():
    loss = lambda p: jax.pure_callback(lambda w: w, p['a'], p['a']).sum() + p['b'].sum()
    for spec in ('b', ['a', 'b']):
        with pytest.raises(AssertionError, match="loss 'loss': a is UNKNOWN, pure_callback at"):
            sg.assert_flow(loss, {'loss': spec}, {'a': X, 'b': X})


def test_assert_flow_with_norms():
    loss = lambda p: 0.0 * p['w'].sum()
    sg.assert_flow(loss, {'loss': 'w'}, {'w': X})
    with pytest.raises(AssertionError, match="loss 'loss': w is NUMERIC_ZERO"):
        sg.assert_flow(loss, {'loss': 'w'}, {'w': X}, norms=True)


@pytest.mark.parametrize(
    'spec, kind, text',
    [
        (
            {},
            sg.UsageError,
            'assert_flow: spec is an object of type dict; expected a dict '
            '{loss: predicate} that is not empty.',
        ),
        ('head', sg.UsageError, 'assert_flow: spec is an object of type str;'),
        (
            {'hed': 'head'},
            sg.UsageError,
            "assert_flow: there is no loss 'hed'; there is 'both', 'head', 'rank'.",
        ),
        (
            {'head': 'haed'},
            sg.UnmatchedPathError,
            "assert_flow['head']: no variable of params matches 'haed'. Close: 'head'",
        ),
        ({'head': 3}, sg.PredicateError, "assert_flow['head']"),
    ],
)
def test_assert_flow_errors(spec, kind, text):
    with pytest.raises(kind, match='^' + re.escape(text)):
        sg.assert_flow(losses, spec, PARAMS, X)


# A model of someone else's, with three things planted in it.


def test_three_planted_faults_in_a_published_model():
    model = jax_resnet.ResNet18(n_classes=10)
    x = jnp.ones((1, 32, 32, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    stats = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes['batch_stats'])

    def through(params, h, *layers):
        for i in layers:
            name = f'layers_{i}'
            if name in params:
                variables = {'params': params[name], 'batch_stats': stats[name]}
                h, _ = model.layers[i].apply(variables, h, mutable=['batch_stats'])
            else:
                h = model.layers[i](h)
        return h

    def loss(params, x):
        h = through(params, x, 0, 1, 2)
        with sg.stop_gradient(sg.everything):  # <- planted mask
            h = h + through(params, h, 3)
        order = jnp.argsort(through(params, h, 4).mean((0, 1, 2)))  # <- planted order
        h = h[..., order % h.shape[-1]]
        return through(params, through(params, h, 5), 6, 7, 8, 9, 10).mean()  # 11, the head, is not

    flow = sg.gradient_flow(loss)(shapes['params'], x)
    assert len(flow.names) == 62
    for record in flow:
        layer = record.name.split('/')[0]
        if layer == 'layers_3':
            assert record.verdict == 'MASKED' and record.operation == 'stop_gradient(everything)'
            assert record.source.startswith(line('planted mask'))
        elif layer == 'layers_4':
            assert record.verdict == 'PIECEWISE_CONSTANT'
            assert record.operation == 'argsort (sort)'
            assert record.source.startswith(line('planted order'))
        elif layer == 'layers_11':
            assert record.verdict == 'UNUSED'
        else:
            assert record.reached, record
    rows = [row for row in str(flow).splitlines() if '│' in row]
    assert len(rows) <= 8 and 'layers_11' in ''.join(rows[:3])
