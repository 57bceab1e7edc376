"""What may be written, what is written back, and what a block's functions see of it."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import core
from flax.core import meta

import flax_sg as sg
from flax_sg import nn
from models import Scale

ones, one, S = nn.initializers.ones, jnp.ones(()), jax.lax.stop_gradient
MUTABLE = [False, True, ['params'], ['intermediates']]


def output(model, variables, *args, mutable=False, **kwargs):
    out = model.apply(variables, *args, mutable=mutable, **kwargs)
    return out if mutable is False else out[0]


# Two roots in one lifted call --------------------------------------------------------------------

LIFTS = {
    'remat': lambda f: nn.remat(f),
    'jit': lambda f: nn.jit(f),
    'vmap': lambda f: nn.vmap(
        f, variable_axes={'params': None}, split_rngs={}, in_axes=(None, None), axis_size=1
    ),
    'cond': lambda f: (
        lambda d, t, x: nn.cond(x > 0, lambda m, x: f(*m, x), lambda m, x: 0 * x, (d, t), x)
    ),
}


@pytest.mark.parametrize('student', MUTABLE)
@pytest.mark.parametrize('teacher', [False, ['params'], pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize('lift', ['remat', 'jit', 'vmap'])
def test_two_roots_with_different_mutable_collections(lift, teacher, student):
    class Student(nn.Module):
        @nn.compact
        def __call__(self, x, other):
            return jnp.sum(LIFTS[lift](lambda d, t, x: d(x) + t(x))(Scale(name='d'), other, x))

    def loss(p, q, t):
        other = Scale().bind({'params': q}, mutable=teacher)
        with t:
            return output(Student(), {'params': p}, 1.0, other, mutable=student)

    for t, want in (
        (sg.stop_gradient(True), (0, 0)),
        (sg.scale_gradient(True, 5.0), (5, 5)),
        (sg.stop_gradient('d', allow_unmatched=True), (0, 1)),
        (sg.stop_gradient('w', allow_unmatched=True), (1, 0)),
    ):
        grads = jax.grad(loss, (0, 1))({'d': {'w': one}}, {'w': one}, t)
        assert (float(grads[0]['d']['w']), float(grads[1]['w'])) == want


# A stack of layers, and a function or a predicate that looks at all of it -------------------------


class Layer(nn.Module):
    boxed: bool = False

    @nn.compact
    def __call__(self, h, _):
        init = nn.initializers.normal()
        init = nn.with_partitioning(init, (None, None)) if self.boxed else init
        kernel = self.param('kernel', init, (4, 4))
        self.sow('intermediates', 'h', h)
        return h + nn.tanh(h @ kernel + self.param('bias', nn.initializers.zeros, (4,))), None


HELD = np.arange(6) < 2
INNER = {
    'scan': lambda boxed: nn.scan(
        Layer,
        variable_axes={'params': 0, 'intermediates': 0},
        length=6,
        split_rngs={'params': True},
        metadata_params={nn.PARTITION_NAME: None},
    )(boxed, name='layers'),
    'remat scan': lambda boxed: nn.scan(
        nn.remat(Layer, prevent_cse=False),
        variable_axes={'params': 0, 'intermediates': 0},
        length=6,
        split_rngs={'params': True},
        metadata_params={nn.PARTITION_NAME: None},
    )(boxed, name='layers'),
}
HOLD = {
    'map_values': sg.map_values('layers', lambda info, w: jnp.where(by_layer(w), S(w), w)),
    'map_gradient': sg.map_gradient('layers', lambda info, ct: jnp.where(by_layer(ct), 0, ct)),
    'shape': sg.stop_gradient(lambda v: v.shape == (6, 4), allow_unmatched=True),
    'replace': sg.replace_values(
        'layers',
        {'layers': {'kernel': jnp.ones((6, 4, 4)), 'bias': jnp.arange(24.0).reshape(6, 4)}},
    ),
}


def by_layer(w):
    return HELD.reshape(-1, *[1] * (w.ndim - 1))


class Stack(nn.Module):
    kind: str = 'scan'
    boxed: bool = False

    @nn.compact
    def __call__(self, x):
        return (INNER[self.kind](self.boxed)(x, None)[0] ** 2).sum()


class Inside(Stack):
    hold: str = 'map_values'

    @nn.compact
    def __call__(self, x):
        with HOLD[self.hold]:
            return Stack.__call__.__wrapped__(self, x)


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    'boxed',
    [pytest.param(False, id='plain'), pytest.param(True, id='boxed', marks=pytest.mark.long)],
)
@pytest.mark.parametrize('kind', ['scan', pytest.param('remat scan', marks=pytest.mark.long)])
@pytest.mark.parametrize('hold', HOLD)
def test_a_stack_is_seen_whole_whatever_may_be_written(hold, kind, boxed):
    if hold == 'replace' and boxed:
        pytest.skip('the source has no boxes')
    x = jnp.linspace(-1, 1, 20).reshape(5, 4)
    plain, inside = Stack(kind, boxed), Inside(kind, boxed, hold)
    variables = {'params': plain.init(jax.random.key(0), x)['params']}

    def by_hand(v):
        tree = meta.unbox(v['params'])

        def layer(name, w):
            if hold == 'map_values':
                return jnp.where(by_layer(w), S(w), w)
            if hold == 'shape':
                return S(w) if w.shape == (6, 4) else w
            if hold == 'replace':
                return HOLD['replace'].source['layers'][name]
            return w

        tree = {'layers': {k: layer(k, w) for k, w in tree['layers'].items()}}
        return Stack(kind).apply({'params': tree}, x)

    want = meta.unbox(jax.value_and_grad(by_hand)(variables))
    if hold == 'map_gradient':
        want = want[0], jax.tree.map(lambda g: jnp.where(by_layer(g), 0, g), want[1])
    for mutable in MUTABLE:

        def around(v, mutable=mutable):
            with HOLD[hold]:
                return output(plain, v, x, mutable=mutable)

        for way in (around, lambda v, mutable=mutable: output(inside, v, x, mutable=mutable)):
            got = meta.unbox(jax.value_and_grad(way)(variables))
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want
            )


@pytest.mark.thinned(2)
@pytest.mark.parametrize('kind', INNER)
@pytest.mark.parametrize('hold', HOLD)
def test_init_does_not_break_and_makes_the_same(hold, kind):
    x = jnp.ones((5, 4))
    want = Stack(kind).init(jax.random.key(0), x)
    got = Inside(kind, False, hold).init(jax.random.key(0), x)
    with HOLD[hold]:
        around = Stack(kind).init(jax.random.key(0), x)
    for tree in (got, around):
        jax.tree.map(np.testing.assert_array_equal, tree, want)


@pytest.mark.parametrize('mutable', [['params'], True])
def test_a_step_that_writes_reads_what_it_wrote(mutable):
    class Writes(nn.Module):
        @nn.compact
        def __call__(self, c, _):
            w = self.variable('params', 'w', lambda: one)
            before = w.value
            w.value = 10 * c
            return c + before * w.value, before

    model = nn.scan(Writes, variable_axes={'params': 0}, split_rngs={'params': True}, length=3)

    def loss(p, c, t):
        with t:
            (out, _), new = model().apply({'params': p}, c, None, mutable=mutable)
        return out + new['params']['w'].sum()

    def by_hand(p, c, hold):
        total = 0
        for i in range(3):
            w = hold(p['w'][i])
            total, c = total + 10 * c, c + w * hold(10 * c)
        return c + total

    p = {'w': jnp.array([1.0, 2.0, 3.0])}
    for t, hold in ((sg.stop_gradient('w'), S), (sg.stop_gradient(sg.nothing), lambda w: w)):
        got, want = (jax.grad(f, (0, 1))(p, 0.5, h) for f, h in ((loss, t), (by_hand, hold)))
        jax.tree.map(np.testing.assert_allclose, got, want)


# What is written back -----------------------------------------------------------------------------


class Norm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False, momentum=0.9, name='bn')(x)


def stacked(cls):
    return nn.scan(
        cls, variable_axes={'params': 0, 'batch_stats': 0}, length=2, split_rngs={'params': True}
    )


class Carried(nn.Module):
    """The statistics of one layer, which each step of a loop reads and updates."""

    @nn.compact
    def __call__(self, x):
        norm = Norm(name='norm')
        if self.is_initializing():
            return norm(x)
        body = lambda norm, c: (c[0] + 1, norm(c[1]))
        return nn.while_loop(
            lambda norm, c: c[0] < 2, body, norm, (0, x), carry_variables='batch_stats'
        )[1]


class NormLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return Norm(name='norm')(x), None


STATISTICS = {'mean': jnp.full(1, 100.0), 'var': jnp.ones(1)}


@pytest.mark.parametrize('lift', [None, nn.remat, nn.jit, 'scan', 'carry'])
@pytest.mark.parametrize(
    't',
    [
        sg.replace_values('**/mean', 'other', collections='batch_stats', allow_unmatched=True),
        sg.map_values('**/mean', lambda info, v: v + 100, collections='batch_stats'),
    ],
    ids=repr,
)
def test_statistics_made_of_replaced_ones_are_not_written(lift, t):
    x = jnp.linspace(-1, 1, 8).reshape(8, 1)
    model = {'scan': stacked(NormLayer), 'carry': Carried, None: Norm}.get(
        lift, lift if isinstance(lift, (str, type(None))) else lift(Norm)
    )()
    args = (x, None) if lift == 'scan' else (x,)
    variables = model.init(jax.random.key(0), *args)
    if t.name == 'replace_values' and lift == 'scan':
        pytest.skip('the scan does not hand on another collection')
    if t.name == 'replace_values':
        variables['other'] = jax.tree.map(lambda v: v + 100, variables['batch_stats'])
    with pytest.raises(
        sg.UsageError,
        match=(
            r"'mean' of module '/.*bn' \(collection 'batch_stats'\) was to be written in this "
            'block, which reads something else in its place: what was made of that would replace '
            'what is stored. Write it outside'
        ),
    ):
        with t:
            model.apply(variables, *args, mutable=['batch_stats'])
    model.apply(variables, *args, mutable=['batch_stats'])


def test_a_value_that_was_not_read_may_be_written():
    class Net(nn.Module):
        @nn.compact
        def __call__(self):
            v = self.variable('state', 'v', lambda: one)
            with nn.map_values(True, lambda info, v: v + 100, collections='state'):
                v.value = 3 * one
                return v.value

    out, new = Net().apply({'state': {'v': one}}, mutable='state')
    assert out == 103 and new['state']['v'] == 3


@pytest.mark.parametrize(
    't',
    [
        sg.stop_gradient(True, collections=True),
        sg.map_values(True, lambda i, v: v * 2, collections=True),
        sg.scale_gradient(True, 2.0, collections=True),
        sg.constant(True, collections=True),
    ],
    ids=repr,
)
@pytest.mark.parametrize('lift', [lambda f: f, nn.remat, nn.jit])
@pytest.mark.parametrize('boxed', [False, True])
def test_what_is_written_back_as_it_was_read_is_not_changed(t, lift, boxed):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(ones, ('x',)) if boxed else ones
            self.param('w', init, (2,))

            def body(self, x):
                for name, value in self.variables['params'].items():
                    self.put_variable('params', name, value)
                value = self.get_variable('params', 'w')
                self.put_variable('params', 'w', value)
                return jax.tree.leaves(value)[0].sum() * x

            with t:
                inside = lift(body)(self, x)
            return (
                inside + self.get_variable('params', 'w', None).unbox().sum()
                if boxed
                else (inside + self.get_variable('params', 'w').sum())
            )

    params = Net().init(jax.random.key(0), 1.0)

    def loss(p):
        out, new = Net().apply(p, 1.0, mutable=['params'])
        return 0 * out + jax.tree.leaves(new)[0].sum()

    grads = jax.tree.leaves(jax.grad(loss)(params))[0]
    assert grads.tolist() == [1, 1]
    out, new = Net().apply(params, 1.0, mutable=['params'])
    assert jax.tree.leaves(new)[0].tolist() == [1, 1]


@pytest.mark.parametrize('reduce', [None, lambda old, new: old + new], ids=['tuple', 'sum'])
@pytest.mark.parametrize(
    't',
    [
        sg.stop_gradient(True, collections=True),
        sg.scale_gradient(True, 5.0, collections=True),
        sg.map_values(True, lambda info, v: v * 7, collections=True),
    ],
    ids=repr,
)
@pytest.mark.parametrize('lift', [None, nn.remat, nn.jit])
def test_sow_in_a_block_leaves_alone_what_was_sown_before(lift, t, reduce):
    more = {} if reduce is None else {'reduce_fn': reduce, 'init_fn': lambda: 0.0}

    class Sows(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow('losses', 'l', 0.0 * x, **more)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param('w', ones, ())
            self.sow('losses', 'l', w * x, **more)
            with t:
                self.sow('losses', 'l', 3.0 * x, **more)
            self.sow('losses', 'l', 2 * w * x, **more)

    model = (lift(Net) if lift else Net)()

    def total(p):
        sown = model.apply({'params': p}, 1.0, mutable=['losses'])[1]['losses']['l']
        return sum(sown) if reduce is None else sown

    assert jax.value_and_grad(total)({'w': one}) == (6, {'w': 3})


def test_a_value_replaced_from_a_collection_follows_writes_in_nested_blocks():
    class Net(nn.Module):
        @nn.compact
        def __call__(self):
            ema = self.variable('ema', 'w', lambda: one)
            read = lambda: self.get_variable('params', 'w')
            out = []
            with nn.map_values('w', lambda info, v: v + 1, collections='ema'):
                with nn.replace_values('w', 'ema'):
                    out += [read(), read()]
                    with nn.scale_gradient('w', 2.0):
                        out.append(read())
            with nn.replace_values('w', 'ema'):
                out.append(read())
                ema.value = ema.value * 10
                out += [read(), read()]
            return jnp.stack(out)

    variables = {'params': {'w': one}, 'ema': {'w': 2 * one}}
    assert Net().apply(variables, mutable=['ema'])[0].tolist() == [3, 3, 3, 2, 20, 20]


# Scopes that modules share ------------------------------------------------------------------------

T = sg.scale_gradient(True, 0.5)


@pytest.mark.parametrize('how', ['two classes', 'one class', 'mirror', 'remat', 'jit', 'subclass'])
def test_equal_transforms_on_both_sides_of_share_scope_count_twice(how):
    inner = T(Scale)

    class Outer(nn.Module):
        leaf: bool = False

        def setup(self):
            if self.leaf:
                self.w = self.param('w', ones, ())
                return
            if how == 'one class':
                self.i = T(Outer)(leaf=True)
            elif how == 'mirror':
                self.i = T(Scale(parent=self, name='i'))
            elif how in ('remat', 'jit'):
                self.i = getattr(nn, how)(inner)()
            elif how == 'subclass':
                self.i = type('Sub', (inner,), {'__module__': __name__})()
            else:
                self.i = inner()
            nn.share_scope(self, self.i)

        def __call__(self, x):
            return self.w * x if self.leaf else self.i(x)

    grads = jax.grad(lambda p: T(Outer)().apply({'params': p}, 1.0))({'w': one})
    assert float(grads['w']) == 0.25


def test_a_linen_module_made_of_an_nnx_one():
    from flax import nnx

    x = jnp.ones((1, 1))

    class Net(nn.Module):
        t: object

        @nn.compact
        def __call__(self, x):
            lin = nnx.bridge.to_linen(
                nnx.Linear, 1, 1, use_bias=False, kernel_init=ones, name='lin'
            )
            with self.t:
                a = lin(x)
            return (a + 3 * lin(x)).sum()

    variables = Net(sg.stop_gradient('lin')).init(jax.random.key(0), x)
    for t, want in (
        (sg.stop_gradient('lin'), 3),
        (sg.scale_gradient('lin', 5.0), 8),
        (sg.map_values('lin', lambda i, w: w * 2), 5),
        (sg.constant('lin'), 3),
    ):
        for mutable in (False, True, ['params']):
            grads = jax.grad(
                lambda p, t=t, mutable=mutable: output(Net(t), {'params': p}, x, mutable=mutable)
            )(variables['params'])
            assert float(jax.tree.leaves(grads)[0].sum()) == want


@pytest.mark.parametrize('mutable', [False, ['params']])
@pytest.mark.parametrize('lift', [lambda f: f, nn.remat, nn.jit])
def test_a_mirror_made_in_the_body_of_a_mirrors_method_counts_too(lift, mutable):
    plus = sg.map_values('w', lambda info, w: w + 1)

    class Reads(nn.Module):
        def setup(self):
            self.w = self.param('w', ones, ())

        def __call__(self):
            return self.w

        def again(self, live):
            return lift(lambda m: plus(m)())(live)

    live = Reads().bind({'params': {'w': 5 * one}}, mutable=mutable)
    assert float(plus(live).again(live)) == 7


@pytest.mark.parametrize('mutable', [False, ['params']])
def test_a_child_handed_in_before_its_parent_with_another_root_between(mutable):
    class Teacher(nn.Module):
        def setup(self):
            self.c, self.o = Scale(), self.param('o', ones, ())

        def __call__(self, x):
            return self.c(x) * self.o

    class Student(nn.Module):
        def setup(self):
            self.l = Scale()

        def __call__(self, x, child, teacher):
            def body(teacher, child, own, x):
                return child(x) + own(x) + teacher.get_variable('params', 'o') * x

            with nn.stop_gradient(True):
                return nn.remat(body)(teacher, child, self.l, x)

    def loss(p, q):
        teacher = Teacher().bind({'params': q})
        return output(Student(), {'params': p}, 1.0, teacher.c, teacher, mutable=mutable)

    grads = jax.grad(loss, (0, 1))({'l': {'w': one}}, {'c': {'w': one}, 'o': one})
    assert jax.tree.leaves(grads) == [0, 1, 1]


@pytest.mark.parametrize('mutable', [False, True, ['params'], ['params', 'batch_stats']])
@pytest.mark.parametrize('update', [False, True])
def test_spectral_norm_in_a_block(update, mutable):
    class Net(nn.Module):
        t: object

        @nn.compact
        def __call__(self, x):
            layer = nn.SpectralNorm(nn.Dense(3, name='d'))
            with self.t:
                return (
                    layer(
                        x,
                        update_stats=update
                        and (mutable is True or bool(mutable) and 'batch_stats' in mutable),
                    )
                    ** 2
                ).sum()

    x = jnp.linspace(-1, 1, 8).reshape(2, 4)
    held, live = Net(sg.stop_gradient(True)), Net(sg.stop_gradient(sg.nothing))
    v = live.init(jax.random.key(0), x)
    loss = lambda model: lambda p: output(model, {**v, 'params': p}, x, mutable=mutable)
    got, want = jax.value_and_grad(loss(held))(v['params']), loss(live)(v['params'])
    np.testing.assert_allclose(got[0], want, rtol=1e-6)
    assert not any(g.any() for g in jax.tree.leaves(got[1]))


def test_a_function_of_map_variables_that_draws_random_numbers_runs_once():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            noise = lambda a: a + jax.random.normal(self.make_rng('noise'), a.shape)
            inner = nn.map_variables(
                Scale, 'params', lambda vs: jax.tree.map(noise, vs), mutable=True
            )(name='s')
            return inner(x) * jax.random.normal(self.make_rng('noise'))

    def loss(w, t):
        with t:
            return Net().apply(
                {'params': {'s': {'w': w}}}, 1.0, mutable=True, rngs={'noise': jax.random.key(1)}
            )[0]

    plain, masked = (
        jax.value_and_grad(loss)(one, t)
        for t in (sg.scale_gradient('s', 1.0), sg.stop_gradient('s'))
    )
    with sg.stop_gradient(sg.nothing):
        want = jax.value_and_grad(lambda w: loss(w, sg.stop_gradient(sg.nothing)))(one)
    assert plain == want and masked == (want[0], 0)


def test_a_derivative_in_a_block_that_does_not_look_at_what_its_body_writes():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            bn = nn.BatchNorm(use_running_average=False, name='bn')
            with sg.stop_gradient('bn'):
                y, pull = nn.vjp(lambda m, x: m(x), bn, x, vjp_variables='params')
                return pull(jnp.ones_like(y))[1]

    x = jnp.linspace(0, 1, 6).reshape(3, 2)
    v = Net().init(jax.random.key(0), x)
    out, new = Net().apply(v, x, mutable=['batch_stats'])
    assert out.shape == x.shape and new['batch_stats']['bn']['mean'].any()


@pytest.mark.parametrize('mutable', [['ema'], ['ema', 'params']])
@pytest.mark.parametrize('lift', [lambda f: f, nn.remat, nn.jit, 'vmap'])
def test_a_value_replaced_from_a_collection_follows_writes_in_a_lifted_body(lift, mutable):
    if lift == 'vmap':
        lift = lambda f: nn.vmap(
            f,
            variable_axes={'params': None, 'ema': None},
            split_rngs={},
            in_axes=(),
            axis_size=1,
            out_axes=None,
        )

    class Net(nn.Module):
        @nn.compact
        def __call__(self):
            self.variable('ema', 'w', lambda: one)

            def body(self):
                before = self.get_variable('params', 'w')
                self.put_variable('ema', 'w', self.get_variable('ema', 'w') * 10)
                return jnp.stack([before, self.get_variable('params', 'w')])

            with nn.replace_values('w', 'ema'):
                return jnp.append(lift(body)(self), self.get_variable('params', 'w'))

    variables = {'params': {'w': one}, 'ema': {'w': 2 * one}}
    assert Net().apply(variables, mutable=mutable)[0].tolist() == [2, 20, 20]


# A layer is lifted once more and may write its parameters, but does not: what is stored, and what a
# block has read it as, stays what it was for the reads that follow.


class Once(nn.Module):
    def setup(self):
        self.k = self.param('k', nn.initializers.normal(1.0), (3,))

    def __call__(self, x):
        return x * self.k


def _by_body(lift):
    return lambda layer, x: layer(x) if layer.is_initializing() else lift(layer, x)


RELIFTED = {
    'remat': (nn.remat(Once), lambda layer, x: layer(x)),
    'jit': (nn.jit(Once), lambda layer, x: layer(x)),
    'jit remat': (nn.jit(nn.remat(Once)), lambda layer, x: layer(x)),
    'vmap': (
        nn.vmap(Once, variable_axes={'params': None}, split_rngs={'params': False}),
        lambda layer, x: layer(x[None])[0],
    ),
    'cond': (
        Once,
        _by_body(
            lambda layer, x: nn.cond(True, lambda m, x: m(x), lambda m, x: 2 * m(x), layer, x)
        ),
    ),
    'scan': (
        Once,
        _by_body(
            lambda layer, x: nn.scan(
                lambda m, x, _: (m(x), None), variable_broadcast='params', length=1
            )(layer, x, None)[0]
        ),
    ),
    'custom_vjp': (
        Once,
        lambda layer, x: nn.custom_vjp(
            lambda m, x: m(x),
            lambda m, x: nn.vjp(lambda m, x: m(x), m, x),
            lambda pull, ct: pull(ct),
        )(layer, x),
    ),
}
AROUND = {
    'nothing': lambda cls: cls,
    'scan': lambda cls: nn.scan(
        cls, variable_axes={'params': 0}, split_rngs={'params': True}, length=2
    ),
    'vmap': lambda cls: nn.vmap(
        cls, variable_axes={'params': 0}, split_rngs={'params': True}, in_axes=None, axis_size=2
    ),
    'remat': nn.remat,
    'jit': nn.jit,
}


def relifted(kind, around):
    layer, call = RELIFTED[kind]

    class Part(nn.Module):
        def setup(self):
            self.a = layer()

        def __call__(self, x, _):
            x = call(self.a, x)
            x = 2 * x * self.a.get_variable('params', 'k')
            return call(self.a, x), None

    class Root(nn.Module):
        def setup(self):
            self.b = AROUND[around](Part)()

        def __call__(self, x):
            return jnp.sin(self.b(x, None)[0]).sum()

    return Root()


@pytest.mark.thinned(9)
@pytest.mark.parametrize('mutable', [['params'], True], ids=str)
@pytest.mark.parametrize('around', AROUND)
@pytest.mark.parametrize('kind', RELIFTED)
def test_what_a_body_may_write_and_does_not_is_read_once(kind, around, mutable):
    model, x = relifted(kind, around), jnp.linspace(0.5, 1, 3)
    params = model.init(jax.random.key(0), x)['params']
    value = lambda w: w * w.ndim + w.mean()  # another one of a stack than of its layers
    unit = lambda g: g / jnp.sqrt((g**2).sum())

    def run(p, *blocks):
        with contextlib.ExitStack() as stack:
            for block in blocks:
                stack.enter_context(block)
            out, written = model.apply({'params': p}, x, mutable=mutable)
        return out, written

    got, written = run(params, sg.map_values('**/k', lambda info, w: value(w)))
    want = model.apply({'params': jax.tree.map(value, params)}, x)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, dict(written)['params'], params)

    block = sg.map_gradient('**/k', lambda info, g: unit(g))
    want = jax.tree.map(unit, jax.grad(lambda p: model.apply({'params': p}, x))(params))
    for _ in range(2):  # JAX has the traces the second time
        got = jax.grad(lambda p: run(p, block)[0])(params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.parametrize(
    'order', [(True, False), (False, True), (True, True, False, False, True)], ids=str
)
@pytest.mark.parametrize('lift', ['jit', 'remat'])
def test_what_a_body_has_written_is_stored_whatever_its_trace_wrote_before(lift, order):
    static = {
        'jit': functools.partial(nn.jit, static_argnames=('write',)),
        'remat': functools.partial(nn.remat, static_argnums=(2,)),
    }[lift]

    class Counter(nn.Module):
        @static
        @nn.compact
        def __call__(self, x, write):
            w = self.param('w', nn.initializers.ones, ())
            n = self.variable('stats', 'n', lambda: jnp.zeros(()))
            if write and not self.is_initializing():
                n.value += 1
            return w * x

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, order):
            counter = Counter()
            for write in order:
                x = counter(x, write=write) if lift == 'jit' else counter(x, write)
            return x * counter.get_variable('stats', 'n')

    model = Net()
    variables = model.init(jax.random.key(0), 1.0, order)
    for masks in (
        (),
        (sg.scale_gradient('**/w', 3.0),),
        (sg.stop_gradient('**/n', collections='stats'),),
    ):
        for some in (order, order[::-1], order):

            def loss(v, masks=masks, some=some):
                with contextlib.ExitStack() as stack:
                    for mask in masks:
                        stack.enter_context(mask)
                    return model.apply(v, 2.0, some, mutable=True)

            (out, written), pull = jax.vjp(loss, variables)
            assert out == 2 * sum(some)
            assert written['stats']['Counter_0']['n'] == sum(some)


def test_what_map_variables_writes_back_is_stored():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            double = nn.map_variables(
                lambda m, x: m(x),
                'params',
                lambda v: jax.tree.map(lambda w: 2 * w, v),
                lambda v: jax.tree.map(lambda w: w / 4, v),
                mutable=True,
                init=True,
            )
            return double(nn.Dense(1, use_bias=False), x)

    x = jnp.ones((1, 1))
    variables = {'params': {'Dense_0': {'kernel': jnp.full((1, 1), 8.0)}}}
    want = Net().apply(variables, x, mutable=['params'])
    with sg.stop_gradient('**/kernel'):
        got = Net().apply(variables, x, mutable=['params'])
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert want[1]['params']['Dense_0']['kernel'] != 8


@pytest.mark.parametrize('lift', ['scan', 'vmap'])
def test_a_variable_that_goes_out_with_another_axis_than_it_came_in(lift):
    class Sum(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            v = self.variable('s', 'v', lambda: jnp.zeros(2)).value
            w = self.variable('t', 'w', lambda: jnp.zeros(2)).value
            return x + (v + w).sum(), None

    axes = {'s': core.lift.In(0), ('s',): core.lift.Out(1), 't': 0}
    lifted = (
        nn.scan(Sum, variable_axes=axes, length=2)
        if lift == 'scan'
        else nn.vmap(Sum, variable_axes=axes, in_axes=None, axis_size=2)
    )

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return lifted(name='l')(x, None)[0].sum()

    square = jnp.arange(4.0).reshape(2, 2)
    variables = {'s': {'l': {'v': square}}, 't': {'l': {'w': square}}}
    want = Net().apply(variables, 1.0, mutable=['s', 't'])
    with sg.stop_gradient(sg.nothing):
        got = Net().apply(variables, 1.0, mutable=['s', 't'])
    jax.tree.map(np.testing.assert_array_equal, got, want)
    np.testing.assert_array_equal(want[1]['s']['l']['v'], square.T)


@pytest.mark.parametrize(
    'value', ['dense', np.int64(3), np.arange(3), 1.0, jnp.arange(3), True], ids=repr
)
@pytest.mark.parametrize(
    'lift',
    [nn.remat, nn.jit, lambda cls: nn.map_variables(cls, 'params', lambda v: v)],
    ids=['remat', 'jit', 'map_variables'],
)
def test_what_comes_out_of_a_body_is_of_the_type_that_it_would_be(lift, value):
    if isinstance(value, str) and lift in (nn.remat, nn.jit):
        pytest.skip('strings do not go into traced functions')

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.variable('meta', 'kind', lambda: value)
            return nn.Dense(1)(x)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return lift(Layer)(name='l')(x)

    x = jnp.ones((1, 1))
    params = nn.Dense(1).init(jax.random.key(0), x)['params']
    variables = {'params': {'l': {'Dense_0': params}}, 'meta': {'l': {'kind': value}}}
    _, want = Net().apply(variables, x, mutable=['meta'])
    with sg.stop_gradient(sg.nothing):
        _, got = Net().apply(variables, x, mutable=['meta'])
    got, want = got['meta']['l']['kind'], want['meta']['l']['kind']
    assert type(got) is type(want) and np.asarray(got).dtype == np.asarray(want).dtype
    np.testing.assert_array_equal(got, want)


@pytest.mark.thinned(2)
@pytest.mark.parametrize('mutable', [False, ['params']], ids=str)
@pytest.mark.parametrize('block', [False, True])
@pytest.mark.parametrize('lift', [nn.remat, nn.jit, lambda cls: nn.remat(nn.jit(cls))])
def test_no_tracer_leaks_from_a_lifted_body(lift, block, mutable):
    layer = lift(Scale)

    def loss(p):
        with sg.scale_gradient('w', 2.0) if block else contextlib.nullcontext():
            return output(layer(), {'params': p}, 1.0, mutable=mutable)

    with jax.checking_leaks():
        assert jax.jit(jax.grad(loss))({'w': jnp.float32(1)})['w'] == 1 + block


@pytest.mark.parametrize('index', [0, 1])
def test_what_one_branch_writes_is_stored(index):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, index):
            self.variable('stats', 'n', lambda: jnp.zeros(()))

            def write(module, x):
                module.put_variable('stats', 'n', module.get_variable('stats', 'n') + 1)
                return x

            if not self.is_initializing():
                x = nn.switch(index, [write, lambda module, x: x], self, x)
            return x * self.get_variable('stats', 'n')

    variables = Net().init(jax.random.key(0), 2.0, 0)
    with sg.stop_gradient('n', collections='stats'):
        out, written = Net().apply(variables, 2.0, index, mutable=True)
    assert (out, written['stats']['n']) == (2.0 * (index == 0), index == 0)
