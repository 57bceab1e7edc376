"""constant: what stop_gradient does, and writes that are refused, however they are written."""

import pickle

import jax
import jax.numpy as jnp
import pytest
from flax.core import freeze
from flax.errors import ModifyScopeVariableError

import flax_sg as sg
from flax_sg import nn
from internals import nothing_is_open
from oracle import assert_same

X = jnp.array([[1.0, -2.0], [0.5, 3.0]])
BOTH = ['params', 'stats', 'batch_stats']


class Counter(nn.Module):
    """Counts its calls; ``how`` says which way it writes."""

    how: str = 'value'

    @nn.compact
    def __call__(self, x=1.0):
        n = self.variable('stats', 'n', lambda: jnp.zeros(()))
        w = self.param('w', nn.initializers.ones, ())
        if not self.is_initializing() and self.is_mutable_collection('stats'):
            if self.how == 'value':
                n.value = n.value + x
            elif self.how == 'put':
                self.put_variable('stats', 'n', n.value + x)
            elif self.how == 'scope':
                self.scope.put_variable('stats', 'n', n.value + x)
            elif self.how == 'sow':
                self.sow('stats', 'n', x, reduce_fn=lambda a, b: a + b, init_fn=lambda: 0.0)
        return w * x


VARIABLES = Counter().init(jax.random.key(0))


def scanned(cls, **kwargs):
    return nn.scan(
        cls,
        variable_broadcast='params',
        variable_carry='stats',
        split_rngs={'params': False},
        length=3,
        **kwargs,
    )


class Model(nn.Module):
    """A counter under one lift, called in the mask or out of it."""

    lift: object = None
    mask: object = None
    how: str = 'value'

    @nn.compact
    def __call__(self, x=1.0):
        def body(counter, x, _=None):
            return counter(x), None

        def run(x):
            counter = Counter(self.how, name='c')
            if self.lift is None or self.is_initializing():
                return counter(x)
            return self.lift(body)(counter, x)

        if self.mask is None:
            return run(x)
        with self.mask:
            return run(x)


LIFTS = {
    'none': None,
    'scan': lambda body: lambda m, x: scanned(body)(m, x, None)[0],
    'remat': lambda body: lambda m, x: nn.remat(body)(m, x)[0],
    'jit': lambda body: lambda m, x: nn.jit(body)(m, x)[0],
    'remat of scan': lambda body: (
        lambda m, x: nn.remat(lambda m, x: scanned(body)(m, x, None)[0])(m, x)
    ),
    'while': lambda body: (
        lambda m, x: nn.while_loop(
            lambda m, c: c[0] < 2,
            lambda m, c: (c[0] + 1, body(m, c[1])[0]),
            m,
            (0, x),
            carry_variables='stats',
        )[1]
    ),
    'cond': lambda body: (
        lambda m, x: nn.cond(True, lambda m, x: body(m, x)[0], lambda m, x: body(m, 2 * x)[0], m, x)
    ),
    'vmap': lambda body: (
        lambda m, x: nn.vmap(
            lambda m, x: body(m, x)[0],
            variable_axes={'params': None, 'stats': None},
            split_rngs={'params': False},
        )(m, jnp.ones(2) * x).sum()
    ),
}


def counted(model, variables, **kwargs):
    return model.apply(variables, mutable=['stats'], **kwargs)


@pytest.mark.parametrize('around', [False, True])
@pytest.mark.parametrize('how', ['value', 'put', 'scope', 'sow'])
@pytest.mark.parametrize('lift', LIFTS)
def test_a_write_is_refused(lift, how, around):
    mask, variables = (
        sg.constant('c', collections='stats'),
        {'params': {'c': VARIABLES['params']}, 'stats': {'c': {'n': jnp.float32(7)}}},
    )
    model = Model(LIFTS[lift], None if around else mask, how)
    path = "constant('c', collections='stats'): 'n' of module '/c' (collection 'stats')"

    def run():
        if not around:
            return counted(model, variables)
        with mask:
            return counted(model, variables)

    for _ in range(2):  # no cached trace comes in between
        with pytest.raises(sg.FrozenVariableError) as error:
            run()
        text = str(error.value)
        assert text.startswith(path) and 'Write it outside of the block' in text
        assert str(pickle.loads(pickle.dumps(error.value))) == text
        assert isinstance(error.value, ModifyScopeVariableError)
        assert nothing_is_open()
        assert variables['stats'] == {'c': {'n': 7}}


@pytest.mark.parametrize(
    'predicate, collections',
    [
        ('c', 'params'),
        (sg.nothing, True),
        ('c/w', True),
        (~sg.path('c/n'), True),
        (lambda v: v.collection == 'params', True),
    ],
)
@pytest.mark.parametrize('lift', [name for name in LIFTS if name != 'vmap'])
def test_other_writes_are_kept(lift, predicate, collections):
    """What a lifted transform hands back is no write of what its body did not change."""
    mask = sg.constant(predicate, collections=collections)
    variables = {'params': {'c': VARIABLES['params']}, 'stats': {'c': {'n': jnp.float32(7)}}}
    for model in (Model(LIFTS[lift], mask), Model(LIFTS[lift])):
        with mask:
            _, out = model.apply(variables, mutable=['params', 'stats'])
        writes = 3 if 'scan' in lift else 2 if lift == 'while' else 1
        assert float(out['stats']['c']['n']) == 7 + writes
        assert_same(out['params'], variables['params'], 'params')


@pytest.mark.parametrize('lift', [name for name in LIFTS if name != 'vmap'])
def test_a_frozen_variable_that_a_body_only_reads_passes_through(lift):
    """Nothing is written here; Flax still publishes all that the body might have written."""
    variables = {'params': {'c': VARIABLES['params']}, 'stats': {'c': {'n': jnp.float32(7)}}}
    with sg.constant(True, collections=True):
        _, out = Model(LIFTS[lift], how='read').apply(variables, mutable=['params', 'stats'])
    assert_same(out['stats'], variables['stats'], 'stats')


def test_nothing_is_changed_by_a_failed_write():
    bound = Counter().bind({**VARIABLES, 'stats': {'n': jnp.float32(7)}}, mutable=['stats'])
    with pytest.raises(sg.FrozenVariableError), sg.constant('n', collections='stats'):
        bound()
    assert bound.variables['stats'] == {'n': 7}
    bound()
    assert bound.variables['stats'] == {'n': 8}


def test_statistics_of_a_submodule():
    class Net(nn.Module):
        mask: object = None

        @nn.compact
        def __call__(self, x):
            norm, drop = nn.BatchNorm(use_running_average=False, name='norm'), nn.Dense(2, name='d')
            if self.mask is None:
                return drop(norm(x))
            with self.mask:
                return drop(norm(x))

    variables = Net().init(jax.random.key(0), X)
    frozen = Net(sg.constant('norm', collections=BOTH, allow_unmatched=True))
    assert_same(frozen.init(jax.random.key(0), X), variables, 'init')
    with pytest.raises(
        sg.FrozenVariableError, match="'mean' of module '/norm' .collection 'batch_s"
    ):
        frozen.apply(variables, X, mutable=['batch_stats'])
    _, out = Net(sg.constant('norm')).apply(variables, X, mutable=['batch_stats'])
    assert float(out['batch_stats']['norm']['mean'][0]) != 0  # params alone are constant


@pytest.mark.parametrize('use', ['class', 'instance', 'unbound', 'method'])
def test_every_use_refuses(use):
    mask, variables = (
        sg.constant('n', collections='stats'),
        {'params': {'c': VARIABLES['params']}, 'stats': {'c': {'n': jnp.float32(7)}}},
    )

    class Outer(nn.Module):
        def setup(self):
            self.c = {'class': mask(Counter), 'unbound': lambda: mask(Counter())}.get(
                use, Counter
            )()

        def live(self):
            return self.c()

        def __call__(self):
            if use == 'instance':
                return mask(self.c)()
            return held(self) if use == 'method' else self.c()

    held = sg.constant('c/n', collections='stats')(Outer.live)
    with pytest.raises(sg.FrozenVariableError, match="^constant.*'n' of module '/c'"):
        counted(Outer(), variables)
    if use in ('instance', 'method'):
        assert counted(Outer(), variables, method='live')[1]['stats']['c']['n'] == 8


def test_reads_are_constant_and_creation_is_no_write():
    for frozen in (dict, freeze):
        variables = frozen({'params': VARIABLES['params'], 'stats': {'n': jnp.float32(7)}})

        def loss(variables):
            with sg.constant(True, collections=True):
                bound = Counter().bind(variables)
                return Counter().apply(variables) + bound.variables['stats']['n']

        assert all(g == 0 for g in jax.tree.leaves(jax.grad(loss)(variables)))
    with sg.constant(True, collections=True):
        assert_same(Counter().init(jax.random.key(0)), VARIABLES, 'init')
        _, out = Counter('read').apply({'params': VARIABLES['params']}, mutable=['stats'])
        assert out['stats'] == {'n': 0}  # created, and not there before


def test_a_jitted_function_that_wrote_before_is_refused_in_a_block():
    variables = {'params': VARIABLES['params'], 'stats': {'n': jnp.float32(7)}}
    f, mask = jax.jit(lambda v: counted(Counter(), v)), sg.constant('n', collections='stats')
    for _ in range(2):
        assert f(variables)[1]['stats']['n'] == 8
        with pytest.raises(sg.FrozenVariableError), mask:
            f(variables)
        with mask, sg.constant('w'):
            with pytest.raises(sg.FrozenVariableError):
                f(variables)
