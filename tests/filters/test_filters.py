"""Filters: what each form selects, how filters combine and compare, and what is refused."""

import functools
import re

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze
from hypothesis import given, settings
from hypothesis import strategies as st

import flax_sg as sg
from flax_sg import VariableInfo, nn


def info(name, absolute=None, **kwargs):
    path = tuple(name.split('/'))
    return VariableInfo(path, path if absolute is None else tuple(absolute.split('/')), **kwargs)


@pytest.mark.parametrize(
    'pattern, name, selected',
    [
        ('gln', 'gln/kernel', True),
        ('gln', 'gln', True),
        ('gln', 'gln2/kernel', False),
        ('gln', 'net/gln/kernel', False),
        ('gln/kernel', 'gln/kernel', True),
        ('gln/kernel', 'gln/bias', False),
        ('code_*', 'code_value/Dense_0/kernel', True),
        ('code_*', 'code_presence/kernel', True),
        ('code_*', 'code', False),
        ('*', 'a/b', True),
        ('*/kernel', 'a/kernel', True),
        ('*/kernel', 'a/b/kernel', False),
        ('**/bias', 'bias', True),
        ('**/bias', 'a/b/c/bias', True),
        ('**/bias', 'a/biased', False),
        ('a/**/kernel', 'a/kernel', True),
        ('a/**/kernel', 'a/b/c/kernel', True),
        ('a/**', 'a/b', True),
        ('a/**', 'a', False),
        ('**', 'a/b/c', True),
        ('**/b/**', 'a/b/c', True),
        ('**/b/**', 'a/b', False),
        ('layer_?', 'layer_1/w', True),
        ('layer_?', 'layer_10/w', False),
        ('layer_[0-3]', 'layer_2/w', True),
        ('layer_[0-3]', 'layer_4/w', False),
        ('layer_[!0-3]', 'layer_4/w', True),
        ('layer_[!0-3]', 'layer_2/w', False),
        ('[[]x', '[x', True),
        ('[]]x', ']x', True),
        ('[a^]x', '^x', True),
        ('a?c', 'a/c', False),
        ('a[!b]c', 'a/c', False),
        ('a.c', 'abc', False),
        ('a+', 'aa', False),
        ('..', '../other/w', True),
        ('../other', '../other/w', True),
        ('*', '../w', False),
        ('?.', '../w', False),
        ('[.]*', '../w', False),
        ('*/w', '../w', False),
        ('**/w', '../../other/w', True),
        ('a\nb', 'a\nb', True),
        ('a', 'a\n', False),
    ],
)
def test_glob(pattern, name, selected):
    assert sg.path(pattern).selects(info(name)) is selected


def test_an_absolute_glob_looks_at_the_path_from_the_root():
    inside = info('kernel', 'net/gln/kernel')
    assert sg.path('/net/gln').selects(inside)
    assert not sg.path('/gln').selects(inside)
    assert not sg.path('net/gln').selects(inside)


def test_a_glob_sees_names_that_hold_a_slash():
    weight_norm = VariableInfo(('norm', 'Dense_0/kernel/scale'), ('norm', 'Dense_0/kernel/scale'))
    assert sg.path('norm/Dense_0').selects(weight_norm)
    assert sg.path('**/scale').selects(weight_norm)


_name = st.text('ab', min_size=1, max_size=2)
_paths = st.lists(_name, min_size=1, max_size=4).map('/'.join)
_globs = st.lists(
    st.sampled_from(['a', 'b', 'ab', '*', 'a*', '?', '[ab]', '[!a]', '**']), min_size=1, max_size=4
).map('/'.join)


def glob_by_hand(pattern, name):
    """Match a path or a leading part by recursion over names, as a second opinion."""

    def one(p, n):
        if not p:
            return not n
        if p[0] == '*':
            return one(p[1:], n) or bool(n) and one(p, n[1:])
        if not n:
            return False
        if p[0] == '[':
            end = p.index(']')
            chars = p[1:end]
            hit = n[0] not in chars[1:] if chars[0] == '!' else n[0] in chars
            return hit and one(p[end + 1 :], n[1:])
        return p[0] in ('?', n[0]) and one(p[1:], n[1:])

    def many(p, n):
        if not p:
            return True
        if p[0] == '**':
            if len(p) == 1:
                return bool(n)
            return any(many(p[1:], n[i:]) for i in range(len(n) + 1))
        return bool(n) and one(p[0], n[0]) and many(p[1:], n[1:])

    return many(pattern.split('/'), name.split('/'))


@settings(deadline=None, derandomize=True, max_examples=400)
@given(_globs, _paths)
def test_globs_agree_with_a_matcher_written_by_hand(pattern, name):
    assert sg.path(pattern).selects(info(name)) == glob_by_hand(pattern, name)


def test_regex_searches_the_relative_name():
    assert sg.regex(r'^layer_[0-3]/').selects(info('layer_2/w'))
    assert sg.regex('ias$').selects(info('a/bias'))
    assert not sg.regex('^a').selects(info('b', 'a/b'))
    assert sg.regex('GLN', re.IGNORECASE).selects(info('gln'))
    assert sg.regex(re.compile('gln')) == sg.regex('gln')


def test_a_callable_sees_names_shape_and_dtype_and_no_value():
    seen = []

    def predicate(v):
        seen.append(v)
        return v.shape == (2, 3)

    params = {'a': {'kernel': jnp.ones((2, 3), jnp.bfloat16), 'bias': jnp.ones(3)}}
    assert sg.where(predicate).mask(params) == {'a': {'kernel': True, 'bias': False}}
    kernel = next(v for v in seen if v.name == 'a/kernel')
    assert kernel.path == kernel.absolute_path == ('a', 'kernel')
    assert (kernel.collection, kernel.shape, kernel.dtype) == ('params', (2, 3), jnp.bfloat16)
    assert not hasattr(kernel, 'value')


@pytest.mark.parametrize(
    'predicate, names',
    [
        (True, 'abc'),
        (False, ''),
        ('a', 'a'),
        (re.compile('[bc]'), 'bc'),
        (lambda v: v.name == 'b', 'b'),
        (('a', 'b'), 'ab'),
        (['a', re.compile('c')], 'ac'),
        (sg.path('a') | 'b', 'ab'),
        ('b' | sg.path('a'), 'ab'),
        (~sg.path('a'), 'bc'),
        (sg.everything & ~sg.path('a') & 'b', 'b'),
        ('b' & ~sg.path('a'), 'b'),
        (~(sg.path('a') | 'b'), 'c'),
        (sg.nothing, ''),
        (~sg.nothing, 'abc'),
        ((('a',), ['b', ('c',)]), 'abc'),
    ],
)
def test_predicates(predicate, names):
    grads = jax.grad(lambda p: sum(sg.stop_gradient(predicate)(p).values()))(
        {'a': 1.0, 'b': 1.0, 'c': 1.0}
    )
    assert ''.join(name for name in 'abc' if grads[name] == 0) == names


def test_repr_is_what_makes_the_filter():
    line = test_repr_is_what_makes_the_filter.__code__.co_firstlineno + 2
    assert repr(sg.where(lambda v: True)) == f'where(<lambda> at test_filters.py:{line})'
    for text in [
        "path('gln')",
        "~path('gln')",
        'everything',
        'nothing',
        "regex('a')",
        "path('a') | path('b')",
        "~(path('a') | path('b'))",
        "path('a') & (path('b') | path('c'))",
        "regex('a', re.IGNORECASE)",
    ]:
        made = eval(text, {**vars(sg), 're': re})
        assert repr(made) == text
        assert made == eval(repr(made), {**vars(sg), 're': re})


def test_equality_and_hash_are_by_value():
    assert sg.path('a') == sg.path('a') != sg.path('b')
    assert sg.path('a') | 'b' == sg.path('a') | sg.path('b')
    assert sg.path('a') != sg.regex('a') != sg.regex('a', re.IGNORECASE)
    assert sg.path('a') | 'b' != sg.path('a') & 'b'
    assert sg.path('a') & 'b' != sg.path('a') & ~sg.path('b')
    assert ~~sg.path('a') == sg.path('a')
    assert len({sg.path('a'), sg.path('a'), ~sg.path('a'), sg.everything, sg.nothing}) == 4
    assert sg.path('a') != 'a'
    assert sg.stop_gradient('a') == sg.stop_gradient(sg.path('a'))
    assert sg.stop_gradient('a') != sg.stop_gradient('a', allow_unmatched=True)
    assert sg.stop_gradient('a') != sg.stop_gradient('a', collections='batch_stats')
    assert sg.stop_gradient('a', collections=['a', 'b']) == sg.stop_gradient(
        'a', collections=('b', 'a')
    )


def make(prefix):
    return sg.where(lambda v: v.name.startswith(prefix))


def test_lambdas_from_one_line_with_equal_closures_are_equal():
    assert make('a') == make('a') and hash(make('a')) == hash(make('a'))
    assert make('a') != make('b')
    assert make(1) != make(1.0) and make(True) != make(1)
    assert make(['a']) == make(['a']) != make(('a',))
    array = jnp.ones(2)
    assert make(array) == make(array) != make(jnp.ones(2))
    both = [lambda v: 'a' in v.name, lambda v: 'b' in v.name]
    assert sg.where(both[0]) != sg.where(both[1])
    same = [sg.where(lambda v, k=k: k in v.name) for k in 'aab']
    assert same[0] == same[1] != same[2]
    outer = [sg.where(lambda v, f=make(k).fn: f(v)) for k in 'aab']  # noqa: B008
    assert outer[0] == outer[1] != outer[2]


def test_a_captured_loop_variable_counts_as_it_is_now():
    filters = []
    for prefix in 'ab':
        filters.append(sg.where(lambda v: v.name.startswith(prefix)))  # noqa: B023
    assert filters[0] == filters[1]  # both say 'b' by now
    assert filters[0].selects(info('b')) and not filters[0].selects(info('a'))


def test_partials_methods_and_objects_compare_by_their_parts():
    def starts(prefix, v):
        return v.name.startswith(prefix)

    def partial(prefix):
        return sg.where(functools.partial(starts, prefix))

    assert partial('a') == partial('a') != partial('b')
    assert sg.where('abc'.startswith) == sg.where('abc'.startswith)

    class Starts:
        def __init__(self, prefix):
            self.prefix = prefix

        def ask(self, v):
            return v.name.startswith(self.prefix)

    one = Starts('a')
    assert sg.where(one.ask) == sg.where(one.ask) != sg.where(Starts('a').ask)

    def loop(v, n=3):
        return n == 0 or loop(v, n - 1)

    assert sg.where(loop) == sg.where(loop)


@pytest.mark.parametrize(
    'wrong, text',
    [
        ('', r"path\(''\): an empty pattern. Use flax_sg.everything \(or True\) to select all."),
        ('/', r"path\('/'\): an empty pattern."),
        (
            'a//b',
            r"path\('a//b'\): an empty name between, before or after '/'. Remove the extra '/'.",
        ),
        ('a/', r"path\('a/'\): an empty name"),
        (
            'a**',
            r"path\('a\*\*'\): '\*\*' must be a whole name, got 'a\*\*'. Write '\*' within a name.",
        ),
        ('[a', r"path\('\[a'\): '\[a' has a '\[' without a '\]'. Close it, or write '\[\[\]'"),
        ('[b-a]', r"path\('\[b-a\]'\): bad character range"),
        (
            None,
            r'stop_gradient: got an object of type NoneType; expected a string \(a glob\), a comp',
        ),
        (3, 'stop_gradient: got an object of type int; expected'),
        (b'a', 'stop_gradient: got an object of type bytes; expected'),
        (
            (),
            'stop_gradient: an empty tuple selects nothing. If that is meant, pass '
            'flax_sg.nothing.',
        ),
        ([], 'stop_gradient: an empty list selects nothing.'),
        (['a', None], 'stop_gradient: got an object of type NoneType'),
        ((x for x in 'ab'), 'stop_gradient: got an object of type generator; expected'),
        (nnx.Param, 'stop_gradient: got the class Param. A predicate selects by name; for an NNX'),
        (
            nn.Dense(1),
            r'stop_gradient: got an object of type Dense. A predicate says which variables; '
            r'make the transform first: stop_gradient\(predicate\)\(module\)',
        ),
        ({'a': 1}, 'stop_gradient: got an object of type dict. A predicate says which variables'),
        (jnp.ones(2), 'stop_gradient: got an object of type ArrayImpl. A predicate says'),
        (re.compile(b'a'), 'expected a str pattern, got bytes'),
        (re.compile(''), r"regex\(''\): an empty pattern. Use flax_sg.everything to select all."),
    ],
)
def test_what_is_no_predicate_is_refused(wrong, text):
    with pytest.raises(sg.PredicateError, match=text) as caught:
        sg.stop_gradient(wrong)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    'make, text',
    [
        (lambda: sg.path(3), r'path\(3\): expected a string, got an object of type int.'),
        (lambda: sg.regex('('), r"regex\('\('\): missing \), unterminated subpattern"),
        (lambda: sg.regex(3), r'regex\(3\): first argument must be string'),
        (lambda: sg.regex(re.compile('a'), re.I), 'cannot process flags argument'),
        (
            lambda: sg.where(3),
            'where: got an object of type int; expected a callable of one Variable',
        ),
        (
            lambda: sg.where(nn.Dense(1)),
            'where: got an object of type Dense. A predicate says which',
        ),
        (lambda: sg.path('a') | 3, 'predicate: got an object of type int; expected'),
        (
            lambda: sg.from_haiku(3),
            r'from_haiku: expected a callable of \(module_name, name, value\)',
        ),
        (
            lambda: sg.from_nnx(3.5),
            'from_nnx: an object of type float is no NNX filter; expected a var',
        ),
        (
            lambda: sg.stop_gradient(True, collections=3),
            'stop_gradient: collections=3; expected a coll',
        ),
        (
            lambda: sg.stop_gradient(True, collections=[3]),
            r'stop_gradient: collections=\[3\]; expected',
        ),
        (
            lambda: sg.where(lambda v: sg.path('a')).selects(info('a')),
            'returned .* expected a bool',
        ),
    ],
)
def test_other_bad_input_is_refused(make, text):
    with pytest.raises(sg.PredicateError, match=text):
        make()


def test_a_predicate_cannot_depend_on_a_traced_value():
    def f(x):
        return sg.stop_gradient(lambda v: x > 0)({'a': x})['a']

    with pytest.raises(sg.PredicateError, match="for 'a'; expected a bool. A predicate sees names"):
        jax.jit(f)(1.0)


PARAMS = {
    'gln': {'kernel': 1.0, 'bias': 2.0},
    'code_value': {'kernel': 3.0},
    'code_presence': {'kernel': 4.0},
}


def test_mask_keeps_the_tree():
    mask = sg.path('gln').mask(PARAMS)
    assert mask == {
        'gln': {'kernel': True, 'bias': True},
        'code_value': {'kernel': False},
        'code_presence': {'kernel': False},
    }
    frozen = sg.path('gln').mask(freeze(PARAMS))
    assert isinstance(frozen, FrozenDict) and frozen['gln']['kernel'] is True
    boxed = {'a': nn.Partitioned(jnp.ones(2), names=('x',)), 'b': (jnp.ones(2), jnp.ones(3))}
    mask = sg.path('a').mask(boxed)
    assert jax.tree.structure(mask) == jax.tree.structure(boxed)
    assert mask['a'].value is True and mask['b'] == (False, False)


def test_labels_name_each_parameter_once():
    got = sg.labels({'gln': 'gln', 'code': 'code_*'}, PARAMS)
    assert got == {
        'gln': {'kernel': 'gln', 'bias': 'gln'},
        'code_value': {'kernel': 'code'},
        'code_presence': {'kernel': 'code'},
    }
    assert sg.labels({'gln': 'gln'}, PARAMS, default='rest')['code_value'] == {'kernel': 'rest'}


@pytest.mark.parametrize(
    'predicates, kwargs, error, text',
    [
        (
            {'a': 'gln', 'b': '**/kernel'},
            {},
            sg.LabelError,
            r'labels: each parameter takes one label; gln/kernel \(a and b\). Make '
            r'the predicates disj',
        ),
        (
            {'a': 'gln'},
            {},
            sg.LabelError,
            'labels: no predicate selects code_value/kernel, '
            'code_presence/kernel. Add one, or pass default=.',
        ),
        (
            {},
            {},
            sg.LabelError,
            'labels: got no predicates and no default. Pass at least one of them.',
        ),
        (
            {'a': 'glm'},
            {'default': 'x'},
            sg.UnmatchedPathError,
            r"labels\['a'\]: no variable of the tree matches 'glm'. Close: 'gln/...'",
        ),
        ({'a': 3}, {}, sg.PredicateError, r"labels\['a'\]: got an object of type int"),
    ],
)
def test_labels_refuse(predicates, kwargs, error, text):
    with pytest.raises(error, match=text):
        sg.labels(predicates, PARAMS, **kwargs)


def test_long_lists_of_paths_are_cut():
    with pytest.raises(sg.LabelError, match=r'w0, w1, w2, w3, w4, w5 and 4 more. Add one'):
        sg.labels({'a': sg.nothing}, {f'w{i}': 1.0 for i in range(10)})


def test_one_dict_of_predicates_drives_optax():
    parts = {'gln': 'gln', 'code': 'code_*'}
    optimiser = optax.partition(
        {'gln': optax.sgd(1.0), 'code': optax.set_to_zero()}, sg.labels(parts, PARAMS)
    )
    updates, _ = optimiser.update(jax.tree.map(jnp.ones_like, PARAMS), optimiser.init(PARAMS))
    assert updates['gln']['kernel'] == -1 and updates['code_value']['kernel'] == 0
    frozen = optax.freeze(sg.path('gln').mask(PARAMS))
    updates, _ = frozen.update(jax.tree.map(jnp.ones_like, PARAMS), frozen.init(PARAMS))
    assert updates['gln']['kernel'] == 0 and updates['code_value']['kernel'] == 1


def test_from_nnx():
    tree = {'gln': {'kernel': jnp.ones(2)}, 'code': {'kernel': jnp.ones(3)}}
    assert sg.from_nnx(nnx.Param).mask(tree) == {'gln': {'kernel': True}, 'code': {'kernel': True}}
    assert sg.from_nnx(nnx.BatchStat).mask(tree, allow_unmatched=True)['gln'] == {'kernel': False}
    assert sg.from_nnx(nnx.PathContains('gln')).mask(tree)['code'] == {'kernel': False}
    assert sg.from_nnx(...).mask(tree)['code'] == {'kernel': True}
    shape = sg.from_nnx(lambda path, value: value.shape == (2,)).mask(tree)
    assert shape == {'gln': {'kernel': True}, 'code': {'kernel': False}}
    assert sg.from_nnx(nnx.All(nnx.Param, nnx.PathContains('gln'))) == sg.from_nnx(
        nnx.All(nnx.Param, nnx.PathContains('gln'))
    )
    assert sg.from_nnx(sg.path('gln')) == sg.path('gln')
    known = dict(nnx.variablelib.VariableTypeCache)
    other = info('count', collection='a collection that NNX does not know')
    assert not sg.from_nnx(nnx.Param).selects(other) and sg.from_nnx(nnx.Variable).selects(other)
    assert nnx.variablelib.VariableTypeCache == known
    stats = sg.from_nnx(nnx.BatchStat)
    assert stats.selects(info('mean', collection='batch_stats'))


def test_a_filter_is_an_nnx_filter():
    class Net(nnx.Module):
        def __init__(self):
            self.gln = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
            self.code = nnx.Linear(2, 3, rngs=nnx.Rngs(0))

    state = nnx.state(Net(), sg.path('gln'))
    assert set(state) == {'gln'} and set(state['gln']) == {'kernel', 'bias'}
    state = nnx.state(Net(), nnx.All(nnx.Param, ~sg.path('gln')))
    assert set(state) == {'code'}
    assert sg.path('layers/0/kernel')(('layers', 0, 'kernel'), None)
    value = nnx.Param(jnp.ones((2, 3), jnp.bfloat16))
    for predicate in (
        lambda v: v.shape == (2, 3),
        lambda v: v.dtype == jnp.bfloat16,
        lambda v: v.name == 'a/b' and v.collection == 'params',
    ):
        assert sg.where(predicate)(('a', 'b'), value)


def test_from_haiku():
    fn = lambda module_name, name, value: module_name == 'a/b' and name == 'w' and value.ndim == 1
    tree = {'a': {'b': {'w': jnp.ones(2), 'v': jnp.ones(2)}}}
    assert sg.from_haiku(fn).mask(tree) == {'a': {'b': {'w': True, 'v': False}}}
    assert sg.from_haiku(fn) == sg.from_haiku(fn)


def test_each_pattern_of_a_combination_has_to_match():
    for predicate in [
        'glm',
        ('gln', 'glm'),
        ('glm', 'gln'),
        sg.path('gln') | 'glm',
        sg.path('glm') & 'gln',
        sg.path('gln') & ~sg.path('glm'),
        re.compile('glm'),
        ~sg.path('glm'),
        ~(sg.path('gln') | 'glm'),
        sg.everything | 'glm',
    ]:
        with pytest.raises(sg.UnmatchedPathError, match="'glm'. Close: 'gln/...'") as caught:
            sg.stop_gradient(predicate)(PARAMS)
        assert isinstance(caught.value, ValueError)
        sg.stop_gradient(predicate, allow_unmatched=True)(PARAMS)
    sg.stop_gradient((False, sg.nothing))(PARAMS)


def test_the_error_lists_what_there_is_when_nothing_is_close():
    with pytest.raises(sg.UnmatchedPathError) as caught:
        sg.path('xyz').mask(PARAMS)
    assert str(caught.value) == (
        "path('xyz').mask: no variable of the tree matches 'xyz'. There are: 'gln/...', "
        "'code_value/...', 'code_presence/...'. Fix the pattern, or pass allow_unmatched=True."
    )
    with pytest.raises(sg.UnmatchedPathError, match="'/code_val'. Close: '/code_value/..."):
        sg.path('/code_val').mask(PARAMS)
    with pytest.raises(sg.UnmatchedPathError, match='There are no variables.'):
        sg.path('a').mask({})


def test_trees_keep_their_kind_and_leaves():
    t = sg.stop_gradient('a')
    box = nn.Partitioned(jnp.ones(2), names=('x',))
    key = jax.random.key(0)
    tree = freeze({'a': {'b': box, 'n': None, 's': 'text', 'i': 3, 'k': key, 'np': np.ones(2)}})
    out = t(tree)
    assert isinstance(out, FrozenDict) and jax.tree.structure(out) == jax.tree.structure(tree)
    assert out['a']['b'].names == ('x',) and out['a']['s'] == 'text' and out['a']['i'] == 3
    assert out['a']['k'] is key and out['a']['np'] is tree['a']['np']
    grads = jax.grad(lambda p: t(p)['a'].value.sum() + p['c'])({'a': box, 'c': 1.0})
    assert (grads['a'].value == 0).all() and grads['c'] == 1
    z = {'a': jnp.complex64(1j), 'c': jnp.complex64(1)}
    grads = jax.grad(lambda p: t(p)['a'].real + p['c'].real)(z)
    assert grads['a'] == 0 and grads['c'] == 1


def test_integer_and_key_leaves_pass_through_a_trace():
    def f(tree):
        out = sg.stop_gradient(True)(tree)
        return out['i'], jax.random.normal(out['k'], ()), out['w'] * 2

    tree = {'i': jnp.arange(3), 'k': jax.random.key(0), 'w': 1.5}
    i, r, w = jax.jit(f)(tree)
    assert (i == jnp.arange(3)).all() and r == jax.random.normal(tree['k'], ()) and w == 3


@pytest.mark.parametrize('target', [3, None, jnp.ones(2), [1.0], (1.0,), 'a', len])
def test_a_transform_refuses_what_it_cannot_take(target):
    with pytest.raises(
        sg.UsageError,
        match=r"stop_gradient\('a'\) was given an object of type "
        '.*; expected a flax.linen.Module( or flax.nnx.Module)? class or instance, a method, or a '
        'nested dict',
    ):
        sg.stop_gradient('a')(target)


def test_nn_is_flax_linen_with_our_names():
    for name in flax.linen.__dict__:
        if not name.startswith('_'):
            assert getattr(nn, name) is getattr(flax.linen, name), name
    assert nn.stop_gradient is sg.stop_gradient and nn.path is sg.path
    assert 'Dense' in nn.__all__ and 'stop_gradient' in dir(nn)
    with pytest.raises(AttributeError, match='no_such_name'):
        nn.no_such_name  # noqa: B018


def test_public_names_are_sorted_and_there():
    for module in (sg, sg.nn, sg.data_structures):
        assert list(module.__all__) == sorted(module.__all__)
        assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize(
    'use',
    [
        lambda f: not f,
        lambda f: f and sg.path('b'),
        lambda f: f or f,
        bool,
        lambda f: optax.selective_transform(optax.sgd(1.0), freeze_mask=f).init({'a': 1.0}),
    ],
)
def test_a_filter_is_no_bool(use):
    """``not path('a')`` would be False, and stop nothing, silently."""
    with pytest.raises(sg.PredicateError, match=r"path\('a'\) was used as a bool.*~, & and \|"):
        use(sg.path('a'))


@pytest.mark.parametrize(
    'a, b, same',
    [(0.0, -0.0, False), (float('nan'), float('nan'), True), (1.0, 1, False), (0.5, 0.5, True)],
)
def test_numbers_in_closures_count_as_they_are_written(a, b, same):
    closing = lambda number: lambda info, v: v / number
    transforms = [sg.map_values('w', closing(number)) for number in (a, b)]
    assert (transforms[0] == transforms[1]) is same
