"""Roots that a running module applies by itself: what they are handed was read, and transformed.

The oracle is the tree: a block around apply, the lifted class and ``t(params)`` mean the same.
"""

import copy as copying
import gc
import pickle
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_sg as sg
from flax_sg import nn
from models import Scale

IDS = jnp.arange(5)


class ByApply(nn.Module):
    """Ties its head as T5, BART and GPT-2 of Hugging Face do."""

    def setup(self):
        self.shared, self.lm_head = nn.Embed(7, 4), nn.Dense(7, use_bias=False)

    def __call__(self, ids):
        h = self.shared(ids)
        w = self.shared.variables['params']['embedding']
        return (self.lm_head.apply({'params': {'kernel': w.T}}, h) ** 2).mean()


class InScan(ByApply):
    """The same in the body of a scan."""

    def __call__(self, ids):
        h = self.shared(ids)
        head = nn.Dense(7, use_bias=False, parent=None)

        def step(total, row):
            w = self.shared.embedding
            return total + (head.apply({'params': {'kernel': w.T}}, row) ** 2).sum(), None

        return jax.lax.scan(step, 0.0, h)[0]


class InJit(nn.Module):
    """An inner model, applied under nn.jit, with parameters that the outer one keeps as one."""

    @nn.jit
    @nn.compact
    def __call__(self, ids):
        inner = nn.Dense(2, parent=None)
        x = jnp.ones((1, 3)) * ids.size
        p = self.param('inner', lambda key: inner.init(key, x)['params'])
        shared = self.param('shared', nn.initializers.ones, ())
        return (inner.apply({'params': p}, x * shared) ** 2).sum()


class ByBind(ByApply):
    def __call__(self, ids):
        h = self.shared(ids)
        w = self.shared.variables['params']['embedding']
        return (
            nn.Dense(7, use_bias=False, parent=None).bind({'params': {'kernel': w.T}})(h) ** 2
        ).mean()


class ByDerivative(ByApply):
    """The inner model is applied in a function that the module differentiates."""

    def __call__(self, ids):
        h = self.shared(ids)
        w = self.shared.variables['params']['embedding']
        head = nn.Dense(7, use_bias=False, parent=None)
        inner = lambda h: (head.apply({'params': {'kernel': w.T}}, h) ** 2).mean()
        return (jax.grad(inner)(h) ** 2).sum()


class ByRule(ByApply):
    """The inner model is applied by a rule of a derivative, after the module has returned."""

    def __call__(self, ids):
        h = self.shared(ids)
        w = self.shared.variables['params']['embedding']
        head = nn.Dense(7, use_bias=False, parent=None)
        run = lambda w, h: head.apply({'params': {'kernel': w.T}}, h)
        f = jax.custom_vjp(run)
        f.defvjp(lambda w, h: (run(w, h), (w, h)), lambda res, ct: jax.vjp(run, *res)[1](ct))
        return (f(w, h) ** 2).mean()


class ByClone(ByApply):
    """The inner model is a copy of the module itself."""

    def logits(self, ids):
        return self.lm_head(self.shared(ids))

    def __call__(self, ids):
        out = self.logits(ids)
        if self.is_initializing():
            return (out**2).mean()
        copy = self.clone(parent=None)
        return (copy.apply(self.variables, ids, method='logits') * out).mean()


class ByUnbind(ByClone):
    def __call__(self, ids):
        out = self.logits(ids)
        if self.is_initializing():
            return (out**2).mean()
        model, variables = self.unbind()
        again = model.bind(variables)
        return (model.apply(variables, ids, method='logits') * again.logits(ids) * out).mean()


class ByProperty(ByClone):
    """A property applies the copy, in code that Flax does not know to run."""

    @property
    def again(self):
        return self.clone(parent=None).apply(self.variables, IDS, method='logits')

    def __call__(self, ids):
        out = self.logits(ids)
        return (out * (out if self.is_initializing() else self.again)).mean()


MODELS = [ByApply, InScan, InJit, ByBind, ByDerivative, ByRule, ByClone, ByUnbind, ByProperty]
TRANSFORMS = [
    sg.stop_gradient(~sg.path('shared')),
    sg.stop_gradient('shared'),
    sg.stop_gradient(True),
    sg.scale_gradient(True, 2.0),
    sg.map_values(True, lambda info, w: w * 0.5),
    sg.map_gradient(True, lambda info, ct: 2 * ct),
    sg.constant('shared'),
]


@pytest.mark.thinned(4)
@pytest.mark.parametrize('t', TRANSFORMS, ids=repr)
@pytest.mark.parametrize(
    'model',
    [
        pytest.param(model, marks=[pytest.mark.long] * (model in (InScan, ByBind, ByDerivative)))
        for model in MODELS
    ],
)
def test_block_class_and_tree_agree(model, t):
    params = model().init(jax.random.key(0), IDS)['params']
    loss = lambda model, p: model.apply({'params': p}, IDS)

    def around(p):
        with t:
            return loss(model(), p)

    want = jax.value_and_grad(lambda p: loss(model(), t(p)))(params)
    for way in (
        around,
        jax.jit(around),
        lambda p: loss(t(model)(), p),
        lambda p: loss(t(model()), p),
        lambda p: t(model().bind({'params': p}))(IDS),
    ):
        got = jax.value_and_grad(way)(params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.parametrize('model', MODELS)
def test_replaced_values(model):
    params = model().init(jax.random.key(0), IDS)['params']
    target = jax.tree.map(lambda w: 2 * w, params)
    with sg.replace_values(True, target):
        got = model().apply({'params': params}, IDS)
    np.testing.assert_allclose(got, model().apply({'params': target}, IDS), rtol=1e-6)


def test_a_block_that_a_module_opens_does_not_reach_the_root_it_applies():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param('w', nn.initializers.ones, ())
            with nn.stop_gradient(True):
                return Scale(parent=None).apply({'params': {'w': w}}, x)

    assert jax.grad(lambda p: Net().apply({'params': p}, 1.0))({'w': 1.0})['w'] == 1


class Copies(nn.Module):
    """It makes copies of itself, which its users apply."""

    train: bool = True

    @nn.nowrap
    def evaluating(self):
        return self.clone(train=False, parent=None)

    def evaluating_too(self):
        return self.clone(train=False, parent=None)

    @property
    def other(self):
        return self.clone(parent=None)

    def unbound(self):
        return self.unbind()[0]

    @nn.compact
    def __call__(self, x=1.0):
        return self.param('w', nn.initializers.ones, ()) * x


class LiftedBelow(sg.scale_gradient('w', 3.0)(Copies)):
    """A user's subclass of a lifted class."""

    @nn.compact
    def __call__(self, x=1.0, deep=True):
        w = self.param('w', nn.initializers.ones, ())
        copy = self.clone(parent=None)
        return w * x + (copy.apply({'params': {'w': w}}, x, deep=False) if deep else 0)


@pytest.mark.parametrize(
    'copy',
    [
        lambda m, p: m.evaluating(),
        lambda m, p: m.evaluating_too(),
        lambda m, p: m.other,
        lambda m, p: m.unbound(),
        lambda m, p: m.clone(parent=None),
        lambda m, p: m.copy(parent=None),
        lambda m, p: type(m)().apply(p, method='evaluating_too'),
        lambda m, p: m.evaluating_too().clone(),
        lambda m, p: m.evaluating_too().copy(train=True),
    ],
)
@pytest.mark.parametrize(
    'use',
    [
        lambda t, p: t(Copies)().bind(p),
        lambda t, p: t(Copies().bind(p)),
        lambda t, p: t(type('Below', (t(Copies),), {'__module__': __name__})().bind(p)),
        lambda t, p: type('Below', (t(Copies),), {'__module__': __name__})().bind(p),
    ],
    ids=['class', 'mirror', 'mirror of a subclass', 'subclass'],
)
def test_a_copy_that_a_lifted_module_hands_out_stays_lifted(use, copy, request):
    t, twice = sg.scale_gradient('w', 3.0), 'mirror of a subclass' in request.node.name
    run = lambda p: copy(use(t, p), p).apply(p)
    assert jax.grad(run)({'params': {'w': 1.0}})['params']['w'] == (9 if twice else 3)
    held = lambda p: copy(use(sg.stop_gradient('w'), p), p).bind(p)()
    assert jax.grad(held)({'params': {'w': 1.0}})['params']['w'] == 0


def test_a_copy_of_a_lifted_module_is_copied_and_pickled():
    class Net(Copies):
        how: object = None

        @nn.compact
        def __call__(self, deep=True):
            w = self.param('w', nn.initializers.ones, ())
            if not deep:
                return w
            return w + self.how(self.clone(parent=None)).apply({'params': {'w': w}}, False)

    for how in (copying.copy, copying.deepcopy, lambda m: m.clone().copy()):
        net = sg.scale_gradient('w', 3.0)(Net)(how=how)
        assert jax.grad(net.apply)({'params': {'w': 1.0}})['params']['w'] == 6
    copy = sg.scale_gradient('w', 3.0)(Copies)().bind({'params': {'w': 1.0}}).evaluating_too()
    again = pickle.loads(pickle.dumps(copy))
    assert again == copy and not again.train
    assert jax.grad(again.apply)({'params': {'w': 1.0}})['params']['w'] == 3


def test_a_copy_of_a_lifted_module_keeps_nothing_of_the_application_it_was_made_in():
    values = jnp.array(2.0)
    gone, kept = weakref.ref(values), []

    def run(w):
        module = sg.map_gradient('w', lambda info, ct: 2 * ct)(Copies)().bind({'params': {'w': w}})
        kept.append(module.evaluating_too())
        return module()

    with jax.checking_leaks():
        jax.jit(jax.grad(run))(values)
    run(values)
    del values
    gc.collect()
    assert gone() is None and not any(copy.train for copy in kept)


def test_one_jitted_function_that_applies_a_copy_while_its_module_runs_and_after():
    class Below(sg.scale_gradient('w', 3.0)(Copies)):
        @nn.compact
        def __call__(self, run=None):
            w = self.param('w', nn.initializers.ones, ())
            return w if run is None else w + run(self.clone(parent=None))(w)

    for order in ('while', 'after'), ('after', 'while'), ('while', 'after', 'while'):
        kept = {}

        def jitted(copy, kept=kept):
            if 'f' not in kept:
                kept['f'] = jax.jit(lambda w: copy.apply({'params': {'w': w}}))
            return kept['f']

        ways = {
            'while': (lambda w: Below().apply({'params': {'w': w}}, jitted), 6),
            'after': (lambda w: jitted(Below().bind({'params': {'w': w}}).evaluating_too())(w), 3),
        }
        for name in order:
            f, want = ways[name]
            if order[0] == 'after' and name == 'while':
                want = 12  # the function has the copy that was handed out, which is lifted
            assert jax.grad(f)(1.0) == want


def test_a_user_may_have_a_clone_of_other_arguments():
    class Net(Copies):
        def clone(self, train=True, **kwargs):
            return super().clone(train=train, **kwargs)

    bound = sg.scale_gradient('w', 3.0)(Net)().bind({'params': {'w': 1.0}})
    assert not bound.clone(False).train
    assert jax.grad(lambda w: bound.clone(False).apply({'params': {'w': w}}))(1.0) == 3


def test_a_property_that_applies_a_copy_is_read_from_outside():
    params = ByProperty().init(jax.random.key(0), IDS)['params']
    t = sg.scale_gradient('shared', 3.0)
    grads = lambda use: jax.grad(lambda p: (use(p).again ** 2).sum())(params)
    plain, class_, mirror = map(
        grads,
        (
            lambda p: ByProperty().bind({'params': p}),
            lambda p: t(ByProperty)().bind({'params': p}),
            lambda p: t(ByProperty().bind({'params': p})),
        ),
    )
    for got in (class_, mirror):
        np.testing.assert_allclose(
            got['shared']['embedding'], 3 * plain['shared']['embedding'], 1e-5
        )


def test_a_copy_of_a_module_of_a_subclass_of_a_lifted_class():
    assert jax.grad(lambda w: LiftedBelow().apply({'params': {'w': w}}))(1.0) == 6
    bound = lambda w: LiftedBelow().bind({'params': {'w': w}})
    assert jax.grad(lambda w: bound(w)())(1.0) == 6
    assert jax.grad(lambda w: sg.scale_gradient('w', 5.0)(bound(w))())(1.0) == 30


def test_a_module_of_a_lifted_class_that_the_running_one_is_handed_is_masked():
    """It is no copy of the running module, though of its class: a student and its teacher."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, teacher=None, values=None):
            y = self.param('w', nn.initializers.ones, ()) * x
            return y if teacher is None else y + teacher.apply(values, x)

    held = sg.scale_gradient('w', 3.0)(Net)
    loss = lambda p, q: held().apply({'params': p}, 1.0, held(), {'params': q})
    assert jax.grad(loss, argnums=(0, 1))({'w': 1.0}, {'w': 1.0}) == ({'w': 3.0}, {'w': 3.0})


def test_a_lifted_class_applied_by_a_module_is_its_own_affair_and_masked():
    held = sg.stop_gradient('w')(Scale)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param('w', nn.initializers.ones, ())
            return held(parent=None).apply({'params': {'w': w}}, x) + 3 * w

    assert jax.grad(lambda p: Net().apply({'params': p}, 1.0))({'w': 1.0})['w'] == 3


@pytest.mark.parametrize('bound', [False, True], ids=['applied', 'bound'])
def test_models_applied_from_outside_are_covered_though_a_module_ran_before(bound):
    def loss(p):
        with sg.stop_gradient(True):
            a = Scale().apply({'params': p}, 1.0)
            if bound:
                return a + Scale().bind({'params': p})(1.0)
            return a + Scale().apply({'params': p}, 1.0)

    assert jax.grad(loss)({'w': 1.0})['w'] == 0


def test_a_model_bound_outside_and_used_by_a_module_is_covered():
    class Student(nn.Module):
        @nn.compact
        def __call__(self, x, teacher):
            return Scale(name='d')(x) + teacher(x)

    def loss(p, q):
        teacher = Scale().bind({'params': q})
        with sg.stop_gradient('w', allow_unmatched=True):
            return Student().apply({'params': p}, 1.0, teacher)

    grads = jax.grad(loss, (0, 1))({'d': {'w': 1.0}}, {'w': 1.0})
    assert grads[0]['d']['w'] == 1 and grads[1]['w'] == 0


@pytest.mark.parametrize('order', ['ab', 'ba', 'aba', 'bab'])
@pytest.mark.parametrize('mutable', [False, ['params']])
def test_one_jitted_function_applies_a_model_from_outside_and_from_a_module(order, mutable):
    g = jax.jit(lambda p: Scale().apply({'params': p}, 1.0))

    class Net(nn.Module):
        @nn.compact
        def __call__(self):
            return g({'w': self.param('v', nn.initializers.ones, ())})

    def inner(p):
        out = Net().apply({'params': {'v': p['v']}}, mutable=mutable)
        return 3 * (out if mutable is False else out[0])

    calls = {'a': lambda p: g({'w': p['w']}), 'b': inner}
    count = {name: order.count(name) for name in 'ab'}

    def loss(p):
        with sg.stop_gradient('w', allow_unmatched=True):
            return sum(calls[name](p) for name in order)

    for f in (loss, jax.jit(loss)):
        grads = jax.grad(f)({'w': 1.0, 'v': 1.0})
        assert float(grads['w']) == 0 and float(grads['v']) == 3 * count['b']


# Code of a module that Flax does not know to run.


def tied(module, x=1.0):
    w = module.a.variables['params']['w']
    return Scale(parent=None).apply({'params': {'w': w}}, x)


def tied_by_rule(module, x=1.0):
    run = lambda w, x: Scale(parent=None).apply({'params': {'w': w}}, x)
    f = jax.custom_vjp(run)
    f.defvjp(lambda w, x: (run(w, x), (w, x)), lambda res, ct: jax.vjp(run, *res)[1](ct))
    return f(module.a.variables['params']['w'], x)


class Tied(nn.Module):
    def setup(self):
        self.a = Scale()

    def __call__(self, x=1.0):
        return tied(self, x)

    @nn.nowrap
    def unwrapped(self, x=1.0):
        return tied(self, x)

    @property
    def value(self):
        return tied(self)

    def values(self):
        yield tied(self)


BY = {
    'a function as method': lambda p: Tied().apply({'params': p}, method=tied),
    'a rule in such a function': lambda p: Tied().apply({'params': p}, method=tied_by_rule),
    'nowrap as method': lambda p: Tied().apply({'params': p}, method=Tied.unwrapped),
    'nn.apply': lambda p: nn.apply(tied, Tied())({'params': p}),
    'jit in a function': lambda p: Tied().apply(
        {'params': p}, method=lambda m: jax.jit(lambda x: tied(m, x))(1.0)
    ),
    'a bound nowrap method': lambda p: Tied().bind({'params': p}).unwrapped(),
    'a bound property': lambda p: Tied().bind({'params': p}).value,
    'a bound generator': lambda p: next(Tied().bind({'params': p}).values()),
}


@pytest.mark.parametrize('by', BY)
def test_code_of_a_module_that_flax_does_not_know_to_run(by):
    params = {'a': {'w': jnp.array(1.0)}}

    def run(p, t):
        with t:
            return BY[by](p)

    for t, value, grad in (
        (sg.scale_gradient(True, 3.0), 1, 3),
        (sg.stop_gradient('a'), 1, 0),
        (sg.map_values(True, lambda info, w: 5 * w), 5, 5),
        (sg.replace_values(True, {'a': {'w': 7.0}}), 7, 0),
    ):
        got = jax.value_and_grad(run)(params, t)
        assert (got[0], got[1]['a']['w']) == (value, grad), t


@pytest.mark.parametrize('order', ['from outside', 'in a function', 'from outside again'])
def test_one_jitted_function_from_outside_and_in_a_function_that_is_applied(order):
    apply = jax.jit(lambda w: Scale(parent=None).apply({'params': {'w': w}}, 1.0))
    t = sg.scale_gradient(True, 3.0)

    def outside(w):
        with t:
            return apply(w)

    def inside(w):
        with t:
            return Tied().apply(
                {'params': {'a': {'w': w}}}, method=lambda m: apply(m.a.variables['params']['w'])
            )

    inside_first = order == 'in a function'
    for run in (inside, outside, inside) if inside_first else (outside, inside, outside):
        assert jax.grad(run)(1.0) == 3


def test_a_model_applied_from_outside_after_a_failed_application_is_covered():
    def fails(module):
        raise KeyError('planted')

    with sg.scale_gradient(True, 3.0):
        with pytest.raises(KeyError, match='planted'):
            Tied().apply({'params': {'a': {'w': 1.0}}}, method=fails)
        grad = jax.grad(lambda w: Scale().apply({'params': {'w': w}}, 1.0))(1.0)
    assert grad == 3


@pytest.mark.parametrize('inside_first', [False, True])
@pytest.mark.parametrize('bound', [False, True], ids=['apply', 'bind'])
@pytest.mark.parametrize('closed', [False, True], ids=['no block', 'after a block in it'])
def test_a_trace_of_what_a_module_applies_is_not_that_of_what_is_applied_outside(
    closed, bound, inside_first
):
    """The same jitted function, in one block: its model is the module's own affair, or it is not.

    By hand: w of the inner model is held outside, 3 w there is live inside.
    """

    class Inner(nn.Module):
        @nn.compact
        def __call__(self):
            return self.param('w', lambda _: jnp.float32(2))

    applied = jax.jit(lambda w: Inner().apply({'params': {'w': w}}))

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, w):
            if closed:
                with sg.stop_gradient('v'):
                    self.param('v', lambda _: jnp.float32(1))
            return 3 * applied(w)

    def inside(w):
        variables = {'params': {'v': jnp.float32(1)}}
        return Outer().bind(variables)(w) if bound else Outer().apply(variables, w)

    def gradients(w):
        with sg.stop_gradient('w', allow_unmatched=True):
            runs = [inside, applied] if inside_first else [applied, inside]
            return {run: float(jax.grad(run)(w)) for run in runs}

    found = gradients(jnp.float32(2))
    assert (found[inside], found[applied]) == (3, 0)


@pytest.mark.parametrize('bound', [False, True], ids=['apply', 'bind'])
def test_a_rule_of_a_function_that_a_module_calls_is_the_modules_affair(bound):
    """The backward rule applies a model that is handed w: 3 w by hand, live."""

    class Inner(nn.Module):
        @nn.compact
        def __call__(self):
            return self.param('w', lambda _: jnp.float32(2))

    def run(w):
        return Inner(parent=None).apply({'params': {'w': w}})

    @jax.custom_vjp
    def ruled(w):
        return run(w)

    ruled.defvjp(lambda w: (run(w), w), lambda w, ct: (ct * jax.grad(run)(w),))

    class Outer(nn.Module):
        def __call__(self, w):
            return 3 * ruled(w)

    def loss(w):
        with sg.stop_gradient('w', allow_unmatched=True):
            return Outer().bind({})(w) if bound else Outer().apply({}, w)

    assert jax.grad(loss)(jnp.float32(2)) == 3
