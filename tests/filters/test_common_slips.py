"""Common slips with predicates: each says where, what was expected, what was got, the way out."""

import functools
import re

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flax_sg as sg
from flax_sg import nn
from models import Scale

ONE = jnp.ones(())
TREE = {'encoding': {'gln': {'w': ONE, 'b': ONE}}, 'head': {'w': ONE}}
LINE = __file__.rpartition('/')[2]


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Scale(name='gln')(x)


class Net(nn.Module):
    predicate: object
    allow_unmatched: bool = False

    @nn.compact
    def __call__(self, x):
        with nn.stop_gradient(self.predicate, allow_unmatched=self.allow_unmatched):
            return Encoder(name='encoding')(x)


VARIABLES = {'params': {'encoding': {'gln': {'w': ONE}}}}
ASKED = {  # callables of names, as each kind of predicate asks for them
    'callable': lambda fn: fn,
    'where': sg.where,
    'from_haiku': lambda fn: sg.from_haiku(
        lambda module_name, name, value: fn(Named(module_name, name))
    ),
    'from_nnx': lambda fn: sg.from_nnx(lambda path, value: fn(Named(*path))),
}


class Named:
    def __init__(self, *path):
        self.name = '/'.join(path).removeprefix('/')


# What a callable answers.


@pytest.mark.parametrize('kind', ASKED)
@pytest.mark.parametrize(
    'answer, text',
    [
        (
            'frozen',
            r"returned 'frozen' for 'encoding/gln/w'; expected a bool. For labels, as optax "
            r'takes them, use flax_sg.labels\({label: predicate}, params\); for a '
            r'predicate compare',
        ),
        ('', "returned '' for .* use flax_sg.labels"),
        (
            1,
            r'returned 1 for .*; expected a bool. For class numbers, as of partition_n, use '
            r'flax_sg.data_structures.partition_n; for a predicate compare: fn\(...\) == 1.',
        ),
        (0, 'returned 0 for .* use flax_sg.data_structures.partition_n'),
        (
            np.int32(2),
            'returned an object of type int32 for .* use flax_sg.data_structures.partition_',
        ),
        (0.5, 'returned 0.5 for .* Return a comparison'),
        (
            jnp.array(True),
            'for .* A predicate sees names, shapes and dtypes; it cannot depend on a tr',
        ),
        (np.array(True), 'returned an object of type ndarray for .* or an array'),
        (np.ones(3), 'returned an object of type ndarray for .* or an array'),
        (
            sg.path('a'),
            r'type _Glob for .* Use that filter itself as the predicate, or return its .se',
        ),
        (
            ['a'],
            r'returned an object of type list for .* Return a comparison, or bool\(...\) of it',
        ),
        ((), 'returned an object of type tuple for .* Return a comparison'),
        (len, 'returned an object of type builtin_function_or_method for .* Return a comparison'),
    ],
)
def test_an_answer_that_is_no_bool_is_refused(kind, answer, text):
    made = ASKED[kind](lambda v: answer)
    shown = 'where' if kind == 'callable' else kind
    for use in (
        sg.stop_gradient(made),
        (sg.nothing | made).mask,
        lambda tree: sg.labels({'x': made}, tree, default='y'),
        lambda tree: Net(made).apply(VARIABLES, 1.0),
    ):
        with pytest.raises(sg.PredicateError, match=text) as caught:
            use(TREE)
        assert re.match(
            rf"{shown}\(<lambda> at {LINE}:\d+\) returned .* for 'encoding/gln/w'; "
            'expected a bool. ',
            str(caught.value),
        )


@pytest.mark.parametrize('ask', ASKED.values(), ids=ASKED)
@pytest.mark.parametrize(
    'yes, no',
    [(True, False), (np.True_, np.False_), (re.match('a', 'a'), None)],
    ids=['bool', 'numpy', 're'],
)
def test_what_people_return_for_a_bool_is_one(ask, yes, no):
    made = ask(lambda v: yes if v.name.endswith('b') else no)
    out = sg.map_values(made, lambda info, value: value * 2)(TREE)
    assert out == {'encoding': {'gln': {'w': 1, 'b': 2}}, 'head': {'w': 1}}


def test_a_predicate_of_partition_n_is_refused_by_from_haiku():
    classes = lambda module_name, name, value: 2 if 'gln' in module_name else 0
    with pytest.raises(sg.PredicateError, match=rf'^from_haiku\(<lambda> at {LINE}:\d+\) returned'):
        sg.stop_gradient(sg.from_haiku(classes))(TREE)
    two = sg.from_haiku(lambda *entry: classes(*entry) == 2)
    assert two.mask(TREE)['encoding']['gln'] == {'w': True, 'b': True}


@pytest.mark.parametrize(
    'use',
    [
        lambda p: sg.stop_gradient(p)(TREE),
        lambda p: sg.stop_gradient(~sg.where(p) & 'head')(TREE),
        lambda p: Net(p).apply(VARIABLES, 1.0),
        lambda p: sg.labels({'x': p}, TREE),
    ],
)
@pytest.mark.parametrize('error', [KeyError, ZeroDivisionError, AttributeError])
def test_what_a_callable_raises_carries_a_note(use, error):
    def broken(v):
        raise error('mine')

    with pytest.raises(error) as caught:
        use(broken)
    assert [type(caught.value), caught.value.args] == [error, ('mine',)]
    assert re.fullmatch(
        rf"flax_sg: in where\(broken at {LINE}:\d+\), asked about 'encoding/gln/w' "
        r'\(params\).',
        caught.value.__notes__[0],
    )


def test_a_note_names_the_adaptor():
    fn = lambda module_name, name, value: value.no_such_name
    with pytest.raises(AttributeError) as caught:
        sg.from_haiku(fn).mask(TREE)
    assert caught.value.__notes__[0].startswith('flax_sg: in from_haiku(<lambda> at test_common_sl')


# What a callable takes.


class Method:
    def ask(self, v):
        return True

    def none(self):
        return True

    def __call__(self, v, strict=False):
        return True


@pytest.mark.parametrize(
    'fn, text',
    [
        (
            lambda info, value: True,
            rf'got <lambda> at {LINE}:\d+, a callable of \(info, value\); '
            r'expected one of \(info\). A predicate sees names, shapes and dtypes, '
            r'and no value. For a '
            r'callable of \(path, value\), as NNX has it, use flax_sg.from_nnx\(fn\).',
        ),
        (
            lambda module_name, name, value: True,
            r'For a callable of \(module_name, name, value\), as '
            r'Haiku has it, use flax_sg.from_haiku\(fn\).',
        ),
        (lambda: True, r'a callable of \(\); expected one of \(info\).* Fix its arguments.'),
        (
            lambda *, info: True,
            r'a callable of \(info\); expected one of \(info\).* Fix its arguments',
        ),
        (Method().none, r'got Method.none at .*, a callable of \(\); expected one of \(info\)'),
        (
            Method.ask,
            r'got the method Method.ask at .*; expected a predicate. To decorate a method, '
            r'write @nn.stop_gradient\(True\).',
        ),
        (Method.none, r'got the method Method.none at .* @nn.stop_gradient\(True\)'),
        (Scale.__call__, r'got the method Scale.__call__ at .* @nn.stop_gradient\(True\)'),
    ],
)
@pytest.mark.parametrize('make, name', [(sg.stop_gradient, 'stop_gradient'), (sg.where, 'where')])
def test_a_callable_of_other_arguments_is_refused_at_once(fn, text, make, name):
    with pytest.raises(sg.PredicateError, match=rf'^{name}: .*{text}'):
        make(fn)


@pytest.mark.parametrize(
    'make, argument',
    [(sg.map_values, 'value'), (sg.map_gradient, 'cotangent')],
    ids=['map_values', 'map_gradient'],
)
@pytest.mark.parametrize(
    'fn, names',
    [
        (lambda w: w, 'w'),
        (lambda info, w, more: w, 'info, w, more'),
        (lambda *, w: w, 'w'),
        (lambda: 1, ''),
    ],
)
def test_a_function_of_other_arguments_is_refused_at_once(make, argument, fn, names):
    with pytest.raises(
        sg.UsageError,
        match=(
            rf'^{make.__name__}: got <lambda> at test_common_slips.py:\d+ for fn, a callable of '
            rf'\({names}\); expected one of \(info, {argument}\) that returns an array\.$'
        ),
    ):
        make('a', fn)
    make('a', lambda *args: args[1])
    make('a', jnp.multiply)


@pytest.mark.parametrize(
    'fn',
    [
        lambda v: True,
        lambda v, *more: True,
        lambda *args: True,
        lambda v, n=3: True,
        lambda v, *, n=3: True,
        lambda v, **more: True,
        Method().ask,
        Method(),
        'encoding'.__ne__,
        max,
        functools.partial(lambda k, v: True, 1),
    ],
)
def test_a_callable_that_can_be_called_is_taken(fn):
    assert isinstance(sg.where(fn), sg.Filter)


def test_a_bare_decorator_says_what_to_write():
    with pytest.raises(
        sg.PredicateError,
        match=r'^stop_gradient: got the method .*Bare.__call__ '
        r'at .*write @nn.stop_gradient\(True\)',
    ):

        class Bare(nn.Module):
            @nn.stop_gradient
            @nn.compact
            def __call__(self, x):
                return x

    with pytest.raises(sg.PredicateError, match=r'^constant: got the method .*@nn.constant\(True'):

        class Held(nn.Module):
            @nn.constant
            def only(self):
                return 1

    with pytest.raises(
        sg.PredicateError,
        match=r'got the class Whole.* make the transform first: '
        r'stop_gradient\(predicate\)\(ModuleClass\)',
    ):

        @nn.stop_gradient
        class Whole(nn.Module):
            pass


@pytest.mark.parametrize(
    'make, text',
    [
        (
            lambda: sg.from_haiku(lambda v: True),
            r'from_haiku: got <lambda> at .*, a callable of \(v\); '
            r'expected one of \(module_name, name, value\). Fix its arguments.',
        ),
        (
            lambda: sg.from_nnx(lambda v: True),
            r'from_nnx: got <lambda> at .*, a callable of \(v\); '
            r'expected one of \(path, value\). Fix its arguments.',
        ),
    ],
)
def test_adaptors_refuse_callables_of_other_arguments(make, text):
    with pytest.raises(sg.PredicateError, match=text):
        make()


# What a callable selects.

NEVER = {
    'callable': lambda v: v.name.startswith('gln'),
    'where': sg.where(lambda v: v.name.startswith('gln')),
    'haiku': sg.from_haiku(lambda module_name, name, value: module_name == 'gln'),
    'nnx': sg.from_nnx(lambda path, value: path[0] == 'gln'),
}


@pytest.mark.parametrize('kind', NEVER)
@pytest.mark.parametrize(
    'combine',
    [
        lambda p: p,
        lambda p: [p, 'encoding'],
        lambda p: sg.path('encoding') & ~sg.path('**/w') | p,
        lambda p: sg.everything & ~(p if isinstance(p, sg.Filter) else sg.where(p)),
    ],
)
@pytest.mark.parametrize(
    'use, of',
    [
        (lambda p, **kw: sg.stop_gradient(p, **kw)(TREE), 'the tree'),
        (
            lambda p, **kw: (
                sg.where(p).mask(TREE, **kw)
                if not isinstance(p, list)
                else sg.labels({'x': p}, TREE, default='y', **kw)
            ),
            'the tree',
        ),
        (lambda p, **kw: sg.labels({'x': p}, TREE, default='y', **kw), 'the tree'),
        (lambda p, **kw: Net(p, **kw).apply({'params': TREE}, 1.0), "'/'"),
    ],
    ids=['tree', 'mask', 'labels', 'block'],
)
def test_a_callable_that_selects_nothing_is_unmatched(kind, combine, use, of):
    predicate = combine(NEVER[kind])
    with pytest.raises(
        sg.UnmatchedPathError,
        match=rf'{LINE}:\d+\) selects no variable of {of}. '
        "It would select 'gln/w', which is 'encoding/gln/w' here: a level of the "
        'path is missing. Fix the predicate, or pass allow_unmatched=True.',
    ):
        use(predicate)
    use(predicate, allow_unmatched=True)


def test_the_message_of_an_idle_callable_lists_what_there_is():
    with pytest.raises(sg.UnmatchedPathError) as caught:
        sg.where(lambda v: v.shape == (7,)).mask(TREE)
    line = caught.traceback[0].lineno + 1
    shown = f'where(<lambda> at {LINE}:{line})'
    assert str(caught.value) == (
        f"{shown}.mask: {shown} selects no variable of the tree. There are: 'encoding/gln/w', "
        "'encoding/gln/b', 'head/w'. Fix the predicate, or pass allow_unmatched=True."
    )
    with pytest.raises(sg.UnmatchedPathError, match=r"There are: 'w0', 'w1', 'w2', 'w3', 'w4', .."):
        sg.where(lambda v: False).mask({f'w{i}': ONE for i in range(9)})
    with pytest.raises(sg.UnmatchedPathError, match='There are no variables.'):
        sg.where(lambda v: True).mask({})


def test_a_callable_that_breaks_on_other_names_is_only_asked_about_those_there_are():
    with pytest.raises(sg.UnmatchedPathError, match="There are: 'encoding/gln/w'"):
        sg.where(
            lambda v: {'encoding/gln/w': False, 'encoding/gln/b': False, 'head/w': False}[v.name]
        ).mask(TREE)


@pytest.mark.parametrize(
    'predicate',
    [
        False,
        sg.nothing,
        ~sg.everything,
        [False, False],
        sg.from_nnx(False),
        sg.from_nnx(None),
        sg.from_nnx(...),
    ],
)
def test_bools_are_never_unmatched(predicate):
    sg.stop_gradient(predicate)(TREE)
    Net(predicate).apply(VARIABLES, 1.0)


@pytest.mark.parametrize(
    'pattern, text',
    [
        ('gln', r"Perhaps '\*\*/gln': there is 'encoding/gln/w'."),
        ('b', r"Perhaps '\*\*/b': there is 'encoding/gln/b'."),
        ('/gln/w', r"Perhaps '/\*\*/gln/w': there is 'encoding/gln/w'."),
        (re.compile('^gln'), "It would select 'gln/w', which is 'encoding/gln/w' here"),
        ('encodin', "Close: 'encoding/...'."),
    ],
)
def test_a_pattern_that_lacks_a_level_of_the_path_says_so(pattern, text):
    with pytest.raises(sg.UnmatchedPathError, match=f'no variable of the tree matches .*{text}'):
        sg.stop_gradient(pattern)(TREE)


@pytest.mark.parametrize(
    'predicate', ['encoding', 'encoding/gln/w', re.compile('^head'), lambda v: v.path[0] == 'head']
)
@pytest.mark.parametrize(
    'use',
    [
        lambda p: sg.stop_gradient(p)({'params': TREE}),
        lambda p: sg.labels({'x': p}, {'params': TREE}),
        lambda p: sg.map_values(p, lambda info, value: value)({'params': TREE, 'batch_stats': {}}),
    ],
)
def test_the_whole_dict_of_variables_is_no_tree_of_parameters(predicate, use):
    with pytest.raises(
        sg.UnmatchedPathError,
        match='This is the whole dict of variables: pass '
        r"variables\['params'\]. Fix the p",
    ):
        use(predicate)


# What is no predicate.


@flax.struct.dataclass
class Trained:
    params: dict


class Graph(nnx.Module):
    def __call__(self, x):
        return x


STATE = nnx.State({'a': nnx.Param(ONE)})


@pytest.mark.parametrize(
    'wrong, text',
    [
        (
            sg.stop_gradient('a'),
            r"^stop_gradient: got an object of type StopGradient. stop_gradient\('a"
            r"'\) is a transform, no predicate. Pass what it selects, its .filter; "
            r'to have both, nest th',
        ),
        (
            sg.scale_gradient('a', 2.0),
            r"type ScaleGradient. scale_gradient\('a', 2.0\) is a transform",
        ),
        (
            Scale,
            r'got the class Scale. .*make the transform first: stop_gradient\(predicate\)\(Module',
        ),
        (Graph, 'got the class Graph'),
        (
            Scale(),
            r'got an object of type Scale. A predicate says which variables; make the transform '
            r'first: stop_gradient\(predicate\)\(module\). To select a submodule '
            r'name its path, such as ',
        ),
        (
            ONE,
            r'type ArrayImpl. .*first: stop_gradient\(predicate\)\(tree\). For a single array use '
            r'jax.lax.stop_gradient\(array\).',
        ),
        (np.ones(2), r'got an object of type ndarray. .* use jax.lax.stop_gradient\(array\)'),
        (np.float32(2), r'got an object of type float32. .* use jax.lax.stop_gradient\(array\)'),
        ([np.ones(2)], r'got an object of type ndarray. .* use jax.lax.stop_gradient\(array\)'),
        (TREE, r'type dict. .* make the transform first: stop_gradient\(predicate\)\(tree\)\.'),
        (STATE, r'type State. .* make the transform first: stop_gradient\(predicate\)\(tree\)\.'),
        (
            Scale().bind({'params': {'w': ONE}}).scope,
            'type Scope. .*A scope is no module: open a bloc',
        ),
        (Trained(TREE), r'type Trained. .*\(predicate\)\(tree\), with a nested dict as tree'),
        (None, r'got an object of type NoneType; expected a string \(a glob\)'),
        (2, 'got an object of type int; expected a string'),
    ],
)
def test_what_is_no_predicate_says_the_way_out(wrong, text):
    for predicate in (wrong, ['a', wrong]):
        with pytest.raises(sg.PredicateError, match=text):
            sg.stop_gradient(predicate)
    with pytest.raises(sg.PredicateError):
        sg.path('a') | wrong


def test_a_traced_array_as_predicate():
    with pytest.raises(sg.PredicateError, match=r'use jax.lax.stop_gradient\(array\)'):
        jax.grad(lambda x: sg.stop_gradient(x) * x)(1.0)


@pytest.mark.parametrize('flag', [np.True_, True])
def test_a_bool_of_numpy_is_a_bool(flag):
    assert sg.stop_gradient(flag) == sg.stop_gradient(True)


@pytest.mark.parametrize(
    'make, error, text',
    [
        (
            lambda: sg.scale_gradient(0.5, 'a'),
            sg.UsageError,
            r"factor='a'; expected a real number.* "
            r'The predicate comes first: scale_gradient\(predicate, factor\).',
        ),
        (
            lambda: sg.scale_gradient(0.5, 2.0),
            sg.PredicateError,
            r'scale_gradient: got an object of '
            r'type float; .* The predicate comes first: scale_gradient\(predicate, factor\).',
        ),
        (
            lambda: sg.scale_gradient(-1.0, True),
            sg.PredicateError,
            'The predicate comes first: scale_',
        ),
        (
            lambda: sg.map_values(lambda info, value: value, 'a'),
            sg.UsageError,
            r'map_values: got an '
            r'object of type str for fn; .* The predicate comes first: '
            r'map_values\(predicate, fn\).',
        ),
        (
            lambda: sg.map_gradient(lambda info, ct: ct, re.compile('a')),
            sg.UsageError,
            r'The predicate comes first: map_gradient\(predicate, fn\).',
        ),
        (
            lambda: sg.map_gradient(lambda info, ct: ct, True),
            sg.UsageError,
            'The predicate comes firs',
        ),
        (
            lambda: sg.map_values(lambda info, value: value, lambda info: True),
            sg.PredicateError,
            r'map_values: got <lambda> at .*, a callable of \(info, value\); .* The '
            r'predicate comes firs',
        ),
        (
            lambda: sg.map_values(lambda info, value: value, sg.path('a')),
            sg.PredicateError,
            r'map_values: got <lambda> at .*The predicate comes first: '
            r'map_values\(predicate, fn\).',
        ),
        (
            lambda: sg.replace_values(TREE, 'a'),
            sg.UsageError,
            r'replace_values: got an object of type '
            r'dict as predicate; expected one. The predicate comes first: '
            r'replace_values\(predicate, sou',
        ),
        (
            lambda: sg.replace_values(TREE, sg.path('a')),
            sg.UsageError,
            'as source; .* The predicate c',
        ),
        (lambda: sg.replace_values(STATE, 'a'), sg.UsageError, 'type State as predicate'),
    ],
)
def test_exchanged_arguments(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    'make',
    [
        lambda: sg.map_values('a', 3),
        lambda: sg.scale_gradient('a', 'b'),
        lambda: sg.replace_values('a', 3),
    ],
)
def test_arguments_in_order_are_not_said_to_be_exchanged(make):
    with pytest.raises(sg.UsageError) as caught:
        make()
    assert 'comes first' not in str(caught.value)


# Masks, labels, and what a transform is called on.


@pytest.mark.parametrize(
    'make',
    [
        lambda: optax.masked(optax.sgd(1.0), sg.path('head')).init(TREE),
        lambda: optax.partition({True: optax.sgd(1.0)}, sg.path('head')).init(TREE),
        lambda: sg.path('head')(TREE),
    ],
)
def test_a_filter_is_no_mask_function(make):
    with pytest.raises(
        sg.PredicateError,
        match=r"^path\('head'\) was called with one argument, as "
        r"optax calls a mask. .* for optax pass path\('head'\).mask, which makes a",
    ):
        make()
    optax.masked(optax.sgd(1.0), sg.path('head').mask).init(TREE)  # the way out


@pytest.mark.parametrize(
    'make, error, text',
    [
        (
            lambda: sg.labels(['head'], TREE),
            sg.PredicateError,
            'labels: got an object of type list as '
            'predicates; expected a dict of a predicate for each label, such as '
            "{'encoder': 'encoder'}.",
        ),
        (
            lambda: sg.labels('head', TREE),
            sg.PredicateError,
            'labels: got an object of type str as pr',
        ),
        (
            lambda: sg.labels(sg.path('a'), TREE),
            sg.PredicateError,
            'labels: got an object of type _Gl',
        ),
        (
            lambda: sg.labels(TREE, {'x': 'head'}),
            sg.PredicateError,
            r'labels: got a tree of values as '
            r'predicates and predicates as the tree; expected labels\(predicates, '
            r'params\). Swap them: '
            r"labels\({'x': ...}, params\).",
        ),
        (lambda: sg.labels({'w': ONE}, {'x': sg.path('w')}), sg.PredicateError, 'Swap them'),
        (
            lambda: sg.labels({'x': True}, ONE),
            sg.UsageError,
            'labels: got an object of type ArrayImpl '
            'as tree; expected a nested mapping of variables. Pass the parameters themselves.',
        ),
        (
            lambda: sg.labels({'x': True}, Trained(TREE)),
            sg.UsageError,
            "Pass the Trained's .params.",
        ),
        (
            lambda: sg.everything.mask(Graph()),
            sg.UsageError,
            r'everything.mask: got an object of type '
            r'Graph as tree; expected a nested mapping of variables. Pass '
            r'nnx.state\(module, nnx.Param\)',
        ),
        (lambda: sg.everything.mask([TREE]), sg.UsageError, 'got an object of type list as tree'),
        (
            lambda: sg.stop_gradient('a')(Trained(TREE)),
            sg.UsageError,
            r'For its parameters write '
            r"stop_gradient\('a'\)\(trained.params\).",
        ),
    ],
)
def test_what_is_no_dict_of_predicates_and_no_tree(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize('name', [name for name in sg.__all__ if name.endswith('Error')])
def test_errors_are_value_errors_but_that_of_a_refused_write(name):
    base = flax.errors.ModifyScopeVariableError if name == 'FrozenVariableError' else ValueError
    assert issubclass(getattr(sg, name), base)
