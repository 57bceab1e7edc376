"""Blocks as such: nesting, paths, exceptions, threads, random streams, writes, and their errors."""

import contextlib
import functools
import gc
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors
from flax.core import freeze, unfreeze
from flax.core.scope import DenyList

import flax_sg as sg
from flax_sg import nn
from internals import nothing_is_open

ones = nn.initializers.ones


class Two(nn.Module):
    """a * x and b * x, from setup and from a compact child."""

    def setup(self):
        self.a = self.param('a', ones, ())
        self.sub = Child()

    def __call__(self, x):
        return self.a * x, self.sub(x)


class Child(nn.Module):
    @nn.compact
    def __call__(self, x):
        return self.param('b', ones, ()) * x


PARAMS = {'params': {'a': jnp.ones(()), 'sub': {'b': jnp.ones(())}}}


def live(f, params=PARAMS, **kwargs):
    """Return the names of the parameters that have a gradient."""
    grads = jax.grad(lambda p: jnp.sum(f(p), **kwargs))(params)['params']
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    return ' '.join(
        jax.tree_util.keystr(k, simple=True, separator='/') for k, g in leaves if g != 0
    )


class Model(nn.Module):
    """One module whose method is a function given by the test."""

    body: object

    def setup(self):
        self.one, self.two = Two(), Two()

    def __call__(self, x=1.0):
        return self.body(self, x)


MODEL = {'params': {'one': PARAMS['params'], 'two': PARAMS['params']}}


def in_model(body):
    return live(Model(body).apply, MODEL)


def test_nested_blocks_stop_the_union():
    def body(m, x):
        with sg.stop_gradient('one/a'):
            with sg.stop_gradient('**/b'):
                inner = sum(m.one(x)) + sum(m.two(x))
        return inner

    assert in_model(body) == 'two/a'


def test_a_block_inside_a_block_ends_alone():
    def body(m, x):
        with sg.stop_gradient('one'):
            with sg.stop_gradient('two'):
                pass
            return sum(m.one(x)) + sum(m.two(x))

    assert in_model(body) == 'two/a two/sub/b'


def test_values_keep_what_they_were_when_read():
    def before(m, x):
        a = m.one.a
        with sg.stop_gradient(True):
            return a * x + m.two.a

    def inside(m, x):
        with sg.stop_gradient(True):
            a = m.one.a
        return a * x + m.two.a

    assert in_model(before) == 'one/a'
    assert in_model(inside) == 'two/a'


def test_inputs_and_activations_stay_differentiable():
    def f(x):
        with sg.stop_gradient(True):
            return sum(Two().apply(PARAMS, x**2))

    assert jax.grad(f)(3.0) == 12.0
    assert jax.jvp(f, (3.0,), (1.0,)) == (18.0, 12.0)
    assert jax.hessian(f)(3.0) == 4.0


def test_derivatives_of_every_order_and_mode():
    # L = a² b² with a stopped in one of two factors: L = a · ⊥(a) · b².
    class Square(nn.Module):
        @nn.compact
        def __call__(self):
            child = Pair(name='p')
            with sg.stop_gradient('p/a'):
                stopped = child()
            return child() * stopped

    class Pair(nn.Module):
        @nn.compact
        def __call__(self):
            return self.param('a', ones, ()) * self.param('b', ones, ())

    def masked(ab):
        return Square().apply({'params': {'p': {'a': ab[0], 'b': ab[1]}}})

    def two_copies(ab, ab_bar):
        return ab[0] * ab[1] * ab_bar[0] * ab[1]

    at = jnp.array([2.0, 3.0])
    by_hand = lambda ab: two_copies(ab, jax.lax.stop_gradient(ab))
    for derive in (
        jax.grad,
        jax.jacfwd,
        jax.hessian,
        lambda f: jax.jacrev(jax.jacfwd(f)),
        lambda f: jax.jacfwd(jax.hessian(f)),
        lambda f: jax.grad(lambda x: jax.vmap(jax.grad(f))(x[None] * jnp.ones((3, 1))).sum()),
    ):
        for run in (lambda f: f, jax.jit):
            np.testing.assert_allclose(run(derive(masked))(at), run(derive(by_hand))(at), rtol=1e-6)
    assert jax.grad(masked)(at)[0] == 2 * 9  # ∂a: b² ⊥(a)
    assert jax.hessian(masked)(at)[0, 0] == 0  # the plain a² b² has 18 here


def test_an_explicit_derivative_inside_sees_a_constant_handed_in():
    def body(m, x):
        with sg.stop_gradient(True):
            y, pullback = nn.vjp(lambda m, x: sum(m(x)), m.one, x)
            grads, _ = pullback(1.0)
            inner = jax.grad(lambda w: w**2)(m.one.a)
        return jnp.stack([y, grads['params']['a'], inner]).sum() + m.two.a

    assert in_model(body) == 'two/a'
    model = Model(lambda m, x: body(m, x) - m.two.a)
    assert model.apply(MODEL) == 2 + 1 + 2


# Paths --------------------------------------------------------------------------------------------


class Opener(nn.Module):
    """Opens a block of its own around whatever it is handed."""

    block: object

    @nn.compact
    def __call__(self, f):
        w = Child(name='w')
        with self.block:
            return f() + w(1.0)


class Deep(nn.Module):
    block: object
    depth: int

    @nn.compact
    def __call__(self, f):
        if self.depth:
            return Deep(self.block, self.depth - 1, name='d')(f)
        return Opener(self.block, name='o')(f)


class Outside(nn.Module):
    block: object
    depth: int = 0

    @nn.compact
    def __call__(self):
        other = Child(name='other')
        return Deep(self.block, self.depth, name='d')(lambda: other(1.0))


@pytest.mark.parametrize('depth', [0, 2])
@pytest.mark.parametrize(
    'predicate, stopped',
    [
        ('w', 'w'),
        ('w/b', 'w'),
        ('../../{up}other', 'other'),
        ('/other', 'other'),
        ('/d/{down}o/w', 'w'),
        ('**/b', 'w other'),
        (True, 'w other'),
        ('*', 'w'),
        ('..', 'other'),
        (~sg.path('w'), 'other'),
        (lambda v: v.name == 'w/b', 'w'),
        (lambda v: v.path[0] == '..', 'other'),
        (lambda v: v.absolute_name == 'other/b', 'other'),
    ],
)
def test_paths_are_relative_to_the_opener(predicate, stopped, depth):
    if isinstance(predicate, str):
        predicate = predicate.format(up='../' * depth, down='d/' * depth)
    model = Outside(sg.stop_gradient(predicate), depth)
    params = model.init(jax.random.key(0))
    got = live(lambda p: model.apply(p), jax.tree.map(jnp.ones_like, params))
    want = ' '.join(
        filter(
            None,
            [
                'd/' * (depth + 1) + 'o/w/b' if 'w' not in stopped else '',
                'other/b' if 'other' not in stopped else '',
            ],
        )
    )
    assert got == want


def test_a_block_around_apply_has_paths_from_the_root():
    def f(p):
        with sg.stop_gradient('sub'):
            return sum(Two().apply(p, 1.0))

    assert live(f) == 'a'


def test_a_module_block_does_not_reach_another_root():
    def body(m, x):
        with sg.stop_gradient(True):
            return sum(Two(parent=None).apply({'params': other}, x)) + sum(m.one(x))

    other = PARAMS['params']

    def loss(p, q):
        nonlocal other
        other = q
        return Model(body).apply(p)

    grads, others = jax.grad(loss, (0, 1))(MODEL, PARAMS['params'])
    assert others == {'a': 1.0, 'sub': {'b': 1.0}} and not jax.tree.leaves(grads)[0]


def test_an_outer_block_reaches_every_root_applied_inside():
    def loss(p, q):
        with sg.stop_gradient('a'):
            return sum(Two().apply(p, 1.0)) + sum(Two().apply(q, 1.0))

    for grads in jax.grad(loss, (0, 1))(PARAMS, PARAMS):
        assert grads['params'] == {'a': 0, 'sub': {'b': 1}}


def test_a_bound_module_read_by_attribute_alone():
    def loss(p):
        bound = Two().bind(p)
        before = bound.a
        with sg.stop_gradient(True):
            inside = bound.a
        return 1 * before + 10 * inside + 100 * bound.a

    assert jax.grad(loss)(PARAMS)['params']['a'] == 101

    def first_inside(p):
        bound = Two().bind(p)
        with sg.stop_gradient(True):
            inside = bound.a
        return inside + 10 * bound.a

    assert jax.grad(first_inside)(PARAMS)['params']['a'] == 10


def test_the_requests_own_snippet():
    class Encoding(nn.Module):
        @nn.compact
        def __call__(self, x):
            gln, code = Child(name='gln_net'), Child(name='code')
            with nn.stop_gradient(lambda c: c.name.startswith('gln')):
                return gln(x) + code(x)

    params = Encoding().init(jax.random.key(0), 1.0)
    assert live(lambda p: Encoding().apply(p, 1.0), params) == 'code/b'


# Collections --------------------------------------------------------------------------------------


class Stateful(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param('w', ones, ())
        s = self.variable('state', 's', lambda: jnp.ones(()))
        y = w * x + s.value * x
        s.value = s.value * 2
        return y + s.value


STATE = {'params': {'w': 1.0}, 'state': {'s': 1.0}}


@pytest.mark.parametrize(
    'collections, want',
    [
        ('params', (0, 3)),
        ('state', (1, 0)),
        (('params', 'state'), (0, 0)),
        (True, (0, 0)),
        (False, (1, 3)),
        (DenyList('params'), (1, 0)),
    ],
)
def test_collections(collections, want):
    def loss(variables):
        with sg.stop_gradient(True, collections=collections):
            return Stateful().apply(variables, 1.0, mutable=['state'])[0]

    grads = jax.grad(loss)(STATE)
    assert (grads['params']['w'], grads['state']['s']) == want


@pytest.mark.parametrize('mutable', [['state'], ['params', 'state'], True])
def test_writes_are_kept_and_the_rest_comes_out_live(mutable):
    def loss(variables, masked):
        with sg.stop_gradient(masked, collections=True):
            _, new = Stateful().apply(variables, 1.0, mutable=mutable)
        return new['state']['s'] + sum(jax.tree.leaves(new.get('params', 0.0)))

    value = loss(STATE, True)
    assert value == loss(STATE, False)
    grads = jax.grad(loss)(STATE, True)
    assert grads['state']['s'] == 0  # what was written came from a masked read
    assert grads['params']['w'] == (0 if mutable == ['state'] else 1)  # what was not is untouched


def test_mutable_params_keep_their_gradients_after_a_block():
    def loss(params, lift):
        def body(m, x):
            with sg.stop_gradient(True):
                stopped = lift(Two)(name='lifted')(x) if lift else m.one(x)
            return sum(stopped) + 10 * sum(m.one(x))

        class Compact(nn.Module):
            @nn.compact
            def __call__(self, x):
                two = (lift or (lambda c: c))(Two)(name='one')
                with sg.stop_gradient(True):
                    stopped = two(x)
                return sum(stopped) + 10 * sum(two(x))

        out, new = Compact().apply(params, 1.0, mutable=['params'])
        return out + 100 * new['params']['one']['a']

    params = {'params': {'one': PARAMS['params']}}
    for lift in (None, nn.jit, nn.remat):
        grads = jax.grad(loss)(params, lift)['params']['one']
        assert grads == {'a': 110, 'sub': {'b': 10}}


def test_batch_norm_statistics():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = nn.BatchNorm(use_running_average=False, momentum=0.5)
            with sg.stop_gradient('BatchNorm_0/scale'):
                return norm(x)

    x = jnp.arange(6.0).reshape(3, 2)
    variables = Net().init(jax.random.key(0), x)
    plain = nn.BatchNorm(use_running_average=False, momentum=0.5)
    _, want = plain.apply(
        {c: v['BatchNorm_0'] for c, v in variables.items()}, x, mutable=['batch_stats']
    )
    y, new = Net().apply(variables, x, mutable=['batch_stats'])
    jax.tree.map(
        np.testing.assert_array_equal, new['batch_stats']['BatchNorm_0'], want['batch_stats']
    )
    grads = jax.grad(
        lambda p: (Net().apply({**variables, 'params': p}, x, mutable=['batch_stats'])[0] * x).sum()
    )(variables['params'])['BatchNorm_0']
    assert (grads['scale'] == 0).all() and grads['bias'].tolist() == [6, 9]  # sums of x


def test_sown_values_are_kept_and_live():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            child = Child(name='child')
            self.sow('intermediates', 'y', child(x))
            with sg.stop_gradient(True):
                self.sow('intermediates', 'y', child(x))
            self.sow('intermediates', 'y', 10 * child(x))
            return x

    def loss(p):
        _, new = Net().apply({'params': p}, 1.0, mutable=['intermediates'])
        assert len(new['intermediates']['y']) == 3
        return sum(new['intermediates']['y'])

    value, grads = jax.value_and_grad(loss)({'child': {'b': 1.0}})
    assert value == 12 and grads['child']['b'] == 11


def test_capture_intermediates_and_tabulate():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            with sg.stop_gradient('d'):
                return nn.Dense(2, name='d')(x)

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name='d')(x)

    x = jnp.ones((1, 2))
    params = Net().init(jax.random.key(0), x)
    _, got = Net().apply(params, x, capture_intermediates=True)
    _, want = Plain().apply(params, x, capture_intermediates=True)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    key = jax.random.key(0)
    table = Net().tabulate(key, x)
    assert table.replace('Net', 'Plain').split() == Plain().tabulate(key, x).split()
    with sg.stop_gradient('d'):
        assert Plain().tabulate(key, x).split() == table.replace('Net', 'Plain').split()


def test_perturbations_keep_their_gradient():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            with sg.stop_gradient(True):
                return self.perturb('p', Child(name='c')(x)) * 2

    variables = Net().init(jax.random.key(0), jnp.ones(()))
    grads = jax.grad(lambda v: Net().apply(v, jnp.ones(())))(variables)
    assert grads['perturbations']['p'] == 2 and grads['params']['c']['b'] == 0


# Random streams -----------------------------------------------------------------------------------


def test_random_streams_and_init_are_those_of_the_plain_program():
    class Net(nn.Module):
        predicate: object

        def setup(self):
            self.noise = jax.random.normal(self.make_rng('noise'), ()) * self.param(
                'w', nn.initializers.normal(), ()
            )
            self.drop = nn.Dropout(0.5, deterministic=False)
            self.dense = nn.Dense(3)

        def __call__(self, x):
            out = [self.drop(self.dense(x)) + self.noise]
            with sg.stop_gradient(self.predicate):
                out.append(self.drop(self.dense(x)) + self.noise)
                out.append(jax.random.normal(self.make_rng('noise'), (3,)))
            out.append(self.drop(self.dense(x)) + self.noise)
            return jnp.stack(out)

    keys = {name: jax.random.key(i) for i, name in enumerate(['params', 'dropout', 'noise'])}
    trees = [Net(p).init(keys, jnp.ones(3)) for p in (False, True, 'dense')]
    for tree in trees[1:]:
        jax.tree.map(np.testing.assert_array_equal, tree, trees[0])
    del keys['params']
    outs = [Net(p).apply(trees[0], jnp.ones(3), rngs=keys) for p in (False, True, 'dense')]
    for out in outs[1:]:
        np.testing.assert_array_equal(out, outs[0])


# Exceptions, threads, re-entry --------------------------------------------------------------------


def test_an_exception_leaves_everything_as_it_was():
    bound = Two().bind(PARAMS)
    before = dict(vars(bound)), bound.a
    with pytest.raises(KeyError, match='mine'):
        with sg.stop_gradient('no such name'):
            bound.a  # noqa: B018
            raise KeyError('mine')
    assert nothing_is_open()
    assert bound.a is before[1]

    def body(m, x):
        try:
            with sg.stop_gradient(True):
                m.one(x)
                raise KeyError
        except KeyError:
            pass
        return sum(m.one(x)) + m.two.a

    assert in_model(body) == 'one/a one/sub/b two/a'


def test_an_exception_in_setup_under_a_block():
    class Bad(nn.Module):
        def setup(self):
            self.w = self.param('w', ones, ())
            raise KeyError('mine')

        def __call__(self):
            return self.w

    with pytest.raises(KeyError, match='mine'):
        with sg.stop_gradient(True):
            Bad().apply({'params': {'w': 1.0}})
    assert nothing_is_open()


def test_a_setup_that_is_not_the_same_twice_is_an_error():
    runs = []

    class Fickle(nn.Module):
        def setup(self):
            w = self.param('w', ones, ())
            if not runs:
                self.w = jnp.exp(w)
            runs.append(w)

        def __call__(self):
            with sg.stop_gradient(True):
                return self.w

    params = {'params': {'w': jnp.ones(())}}

    def first_outside(p):
        bound = Fickle().bind(p)
        return bound.w + bound()

    with pytest.raises(
        sg.UsageError,
        match=(
            "setup of '/' set 'w' when it first ran, and not when it ran again inside a flax_sg "
            "block. Let setup depend on nothing but the module's fields, variables and random"
        ),
    ):
        jax.grad(first_outside)(params)


def test_a_replay_of_setup_has_no_effects():
    """Setup counts, draws and sows; a block reads what it computed, and runs it again."""

    class Busy(nn.Module):
        def setup(self):
            n = self.variable('state', 'n', lambda: jnp.zeros(()))
            n.value = n.value + 1
            self.w = self.param('w', ones, ()) * n.value
            self.noise = jax.random.normal(self.make_rng('noise'), ()) * self.w
            self.sow('intermediates', 'w', self.w)

        def __call__(self, masked):
            live = self.w + self.noise
            self.put_variable('state', 'n', self.get_variable('state', 'n') + 10)
            with sg.stop_gradient(masked):
                return live + self.w + self.noise + self.get_variable('state', 'n')

    variables = {'params': {'w': 2.0}, 'state': {'n': 5.0}}

    def run(p, masked):
        return Busy().apply(
            {**variables, 'params': p},
            masked,
            rngs={'noise': jax.random.key(0)},
            mutable=['state', 'intermediates'],
        )

    (plain, plain_state), (masked, masked_state) = (
        run(variables['params'], m) for m in (False, True)
    )
    assert plain == masked and plain_state['state']['n'] == 16
    jax.tree.map(np.testing.assert_array_equal, plain_state, masked_state)
    grads = [jax.grad(lambda p, m=m: run(p, m)[0])(variables['params'])['w'] for m in (True, False)]
    assert grads[0] * 2 == grads[1] != 0


class Named(nn.Module):
    """A w of its own, which others have too."""

    def setup(self):
        self.w = self.param('w', ones, ())


def test_a_replay_tells_variables_of_one_name_apart():
    """Setup reads a w of two roots, of two modules and of two collections, all writable."""

    class Many(nn.Module):
        def setup(self):
            self.sub = Named()
            w, state = self.param('w', ones, ()), self.variable('state', 'w', jnp.zeros, ())
            far = other.get_variable('params', 'w')
            self.sum = w + 10 * state.value + 100 * self.sub.w + 1000 * far

        def __call__(self, masked):
            before = self.sum
            with sg.stop_gradient(masked):
                return before, self.sum

    variables = jax.tree.map(jnp.float32, {'params': {'w': 2, 'sub': {'w': 5}}, 'state': {'w': 3}})
    other = Named().bind({'params': {'w': jnp.float32(7)}}, mutable=['params'])
    run = lambda variables, masked: Many().apply(variables, masked, mutable=['params', 'state'])[0]
    for masked in (False, True, 'sub'):
        assert run(variables, masked) == (7532, 7532)
    grads = jax.grad(lambda v: run(v, 'sub')[1])(variables)
    assert grads == {'params': {'w': 1, 'sub': {'w': 0}}, 'state': {'w': 10}}


class Counts(nn.Module):
    def setup(self):
        n = self.variable('state', 'n', lambda: jnp.zeros(()))
        n.value = n.value + 1
        self.w = self.param('w', ones, ()) * n.value


class Twice(nn.Module):
    counts: nn.Module | None = None
    mask: object = None

    def setup(self):
        self.sub = self.counts or Counts()
        self.twice = 2 * self.sub.w

    def __call__(self):
        before = self.twice
        with self.mask:
            return before + 10 * self.twice + 100 * self.sub.w


class HandsOver(nn.Module):
    """The module is set up by then, and the run of its setup is one of its own."""

    mask: object

    @nn.compact
    def __call__(self):
        counts = Counts(name='sub')
        return 0 * counts.w + Twice(counts, self.mask)()


@pytest.mark.parametrize('cls', [lambda mask: Twice(mask=mask), HandsOver], ids=['own', 'handed'])
def test_a_replay_inside_another_sees_its_own_writes(cls):
    def run(w, mask):
        state = {'sub': {'n': jnp.float32(4)}}
        return cls(mask).apply({'params': {'sub': {'w': w}}, 'state': state}, mutable=['state'])

    for predicate in (sg.nothing, True):
        mask = sg.stop_gradient(predicate)
        value, state = run(jnp.ones(()), mask)
        # The count is 5, once and for all: 10 + 100 + 500 for each w, of which 10 before the block.
        assert value == 610 and state['state']['sub']['n'] == 5
        grad = jax.grad(lambda w, mask=mask: run(w, mask)[0])(1.0)
        assert grad == (10 if predicate is True else 610)


@pytest.mark.parametrize('order', ['inside outside', 'outside inside', 'inside inside outside'])
def test_what_setup_read_in_a_trace_is_not_kept_for_another(order):
    """A block around a jitted function and around reads beside it."""

    def loss(p):
        bound, total = Two().bind(p), 0.0
        bound.a  # noqa: B018
        with sg.scale_gradient(True, 2.0):
            for where in order.split():
                read = lambda x: bound.a * x
                total += jax.jit(read)(1.0) if where == 'inside' else read(10.0)
        return total + 100 * bound.a

    inside = order.count('inside')
    assert jax.grad(loss)(PARAMS)['params']['a'] == 2 * (inside + 10) + 100


class Base(nn.Module):
    gain = 3.0

    def scaled(self, x):
        return self.gain * x


class Learns(Base):
    """Setup gives some instances values of names that are the class's for others."""

    learned: bool = True

    def setup(self):
        if self.learned:
            w = self.param('w', ones, ())
            self.gain = w
            self.scaled = lambda x: 10 * w * x

    def __call__(self, x):
        with sg.stop_gradient(True):
            held = self.scaled(x) + 100 * self.gain
        return held + 1000 * self.gain


def test_instances_whose_setup_does_not_set_a_name_have_the_class_s():
    assert Learns().apply({'params': {'w': jnp.float32(5)}}, 2.0) == 100 + 500 + 5000
    assert jax.grad(lambda w: Learns().apply({'params': {'w': w}}, 2.0))(5.0) == 1000
    for module in (Learns(learned=False), Base()):  # after one that did
        assert type(module).gain == module.gain == module.bind({}).gain == 3
        assert module.bind({}).scaled(2.0) == type(module).scaled(module, 2.0) == 6
    assert Learns(learned=False).apply({}, 2.0) == 6 + 300 + 3000


class Kept(nn.Module):
    def setup(self):
        self.w = self.param('w', ones, ())

    @functools.cached_property
    def twice(self):
        """Two of them."""
        return 2 * self.w

    @functools.cached_property
    def size(self):
        return 7


@pytest.mark.parametrize(
    'read',
    [
        lambda m: m.variables['params']['w'],
        lambda m: m.get_variable('params', 'w'),
        lambda m: m.variable('params', 'w', None).value,
        lambda m: m.param('w', ones, ()),
        lambda m: m.scope.get_variable('params', 'w'),
        lambda m: m.scope.variables()['params']['w'],
    ],
    ids=['variables', 'get_variable', 'variable', 'param', 'scope', 'scope.variables'],
)
def test_setup_may_read_a_variable_in_any_way(read):
    class Net(nn.Module):
        def setup(self):
            self.twice = 2 * read(self)

        def __call__(self):
            before = self.twice
            with sg.stop_gradient(True):
                return before + 10 * self.twice

    loss = lambda w: Net().apply({'params': {'w': w}})
    assert jax.value_and_grad(loss)(1.0) == (22, 2)


@pytest.mark.parametrize('name, value', [('w', 1), ('twice', 2)])
def test_setup_takes_values_of_a_module_that_is_set_up_already(name, value):
    """It reads no variable then; what it computes is masked all the same."""

    class Takes(nn.Module):
        kept: nn.Module

        def setup(self):
            self.own = 10 * getattr(self.kept, name)

        def __call__(self):
            before = self.own
            with sg.stop_gradient('../kept'):
                return before + 10 * self.own + 100 * getattr(self.kept, name)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self):
            kept = Kept(name='kept')
            return getattr(kept, name) + getattr(kept, name) + Takes(kept, name='takes')()

    loss = lambda w: Outer().apply({'params': {'kept': {'w': w}}})
    assert jax.value_and_grad(loss)(1.0) == (212 * value, 12 * value)


def test_cached_properties_are_kept_and_inherited():
    class Sub(Kept):
        pass

    bound = Sub().bind({'params': {'w': jnp.ones(())}})
    with sg.map_values('w', lambda info, v: v + 1):
        assert (bound.twice, bound.size) == (4, 7)
    assert bound.twice == 2
    bound = Sub().bind({'params': {'w': jnp.ones(())}})
    assert bound.twice is bound.twice and bound.twice == 2 and bound.size == 7
    assert Sub().size == 7 and Sub.twice.__doc__ == 'Two of them.'


def test_blocks_are_reentrant_and_reusable():
    t = sg.stop_gradient('one')

    def body(m, x):
        with t, t:
            with t:
                y = m.one.a
            y = y + m.one.a + m.two.a
        return y + 10 * m.one.sub(x)

    assert in_model(body) == in_model(body) == 'one/sub/b two/a'


def test_blocks_left_in_the_wrong_order():
    a, b = sg.stop_gradient('a'), sg.stop_gradient('b', allow_unmatched=True)

    def generator():
        with a:
            yield

    paused = generator()
    next(paused)
    with pytest.raises(
        sg.UsageError,
        match=(
            r"stop_gradient\('a'\) was left while stop_gradient\('b', allow_unmatched=True\) "
            r'was still open inside of it; both are closed now\. Leave blocks in the reverse '
            'order of entry: a generator that yields inside a block must be finished before'
        ),
    ):
        with b:
            next(paused, None)
    assert nothing_is_open()
    with pytest.raises(
        sg.UsageError,
        match=r"stop_gradient\('a'\) was left without being open in "
        r'this thread\. Leave a block once, where it was entered\.',
    ):
        a.__exit__(None, None, None)


def test_threads_do_not_see_each_others_blocks():
    bound = Two().bind(PARAMS)
    inside, done, seen = threading.Event(), threading.Event(), []

    def other():
        inside.wait(60)
        seen.append(live(lambda p: sum(Two().apply(p, 1.0))))
        seen.append(nothing_is_open())
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with sg.stop_gradient(True):
        inside.set()
        assert done.wait(60)
        assert live(lambda p: sum(Two().apply(p, 1.0))) == ''
        assert bound.a == 1
    thread.join()
    assert seen == ['a sub/b', True]


def test_many_threads_with_blocks_of_their_own():
    wrong, model = [], Two()
    grad = jax.jit(jax.grad(lambda p: sum(model.apply(p, 1.0))))

    def work(name, want):
        for _ in range(50):
            with sg.stop_gradient(name):
                got = grad(PARAMS)['params']
            if (got['a'], got['sub']['b']) != want:
                wrong.append((name, got))

    jobs = [('a', (0, 1)), ('sub', (1, 0)), (True, (0, 0)), (False, (1, 1))]
    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_nothing_outlives_a_block(no_leaks):
    bound = Two().bind(PARAMS)
    f = jax.jit(lambda x: bound.a * x + bound.sub(x))
    with sg.stop_gradient(True):
        f(1.0)
        jax.jit(Two().apply)(PARAMS, 1.0)
        jax.lax.scan(lambda c, x: (c * bound.a, bound.sub(x)), 1.0, jnp.ones(3))
    jax.jit(jax.grad(lambda p: sum(Two().apply(p, 1.0))))(PARAMS)
    with sg.stop_gradient('a'):
        jax.jit(jax.grad(lambda p: sum(Two().apply(p, 1.0))))(PARAMS)
        jax.grad(jax.checkpoint(lambda p: sum(Two().apply(p, 1.0))))(PARAMS)


def test_a_block_keeps_no_module_alive():
    class Thing(Two):
        pass

    module = Thing()
    bound = module.bind(PARAMS)
    t = sg.stop_gradient(True)
    with t:
        bound.a, t(bound)(1.0), jax.jit(module.apply)(PARAMS, 1.0)
    gone = weakref.ref(bound.scope)
    del bound
    gc.collect()
    assert gone() is None


# Unmatched patterns -------------------------------------------------------------------------------


def test_a_pattern_that_selects_nothing_is_an_error_at_the_end_of_the_block():
    reached = []

    def body(m, x):
        with sg.stop_gradient('on/a'):
            reached.append(m.one(x))
        return x

    with pytest.raises(sg.UnmatchedPathError) as caught:
        Model(body).apply(MODEL)
    assert len(reached) == 1
    assert str(caught.value) == (
        "stop_gradient('on/a'): no variable of '/' matches 'on/a'. Close: 'one/a', 'two/a', "
        "'one/...'. Fix the pattern, or pass allow_unmatched=True."
    )
    assert nothing_is_open()


def test_the_error_names_the_module_that_opened_the_block():
    model = Outside(sg.stop_gradient('v'))
    params = Outside(sg.stop_gradient('w')).init(jax.random.key(0))
    with pytest.raises(
        sg.UnmatchedPathError, match=(r"no variable of '/d/o' matches 'v'. There are")
    ):
        model.apply(params)


def test_a_variable_need_not_be_read_to_be_matched():
    def body(m, x):
        with sg.stop_gradient('two'):
            y = m.one.a
        with sg.stop_gradient(sg.path('two') | sg.path('one/a')):
            return y + m.one.sub(x)

    assert in_model(body) == 'one/a one/sub/b'
    with sg.stop_gradient('sub'):
        assert Two().bind(PARAMS).a == 1


def test_unmatched_around_apply():
    with pytest.raises(
        sg.UnmatchedPathError, match="no variable of '/' matches 'subs'. Close: 'sub"
    ):
        with sg.stop_gradient('subs'):
            Two().apply(PARAMS, 1.0)
    for read in (lambda m: m.variables, lambda m: m.get_variable('params', 'a'), lambda m: m.a):
        with pytest.raises(
            sg.UnmatchedPathError, match="no variable of '/' matches 'subs'. Close: '"
        ):
            with sg.stop_gradient('subs'):
                read(Two().bind(PARAMS))
        with sg.stop_gradient('sub'):
            read(Two().bind(PARAMS))
    with sg.stop_gradient('subs', allow_unmatched=True):
        Two().apply(PARAMS, 1.0)
    with pytest.warns(sg.UnreadBlockWarning, match=r"stop_gradient\('anything'\): no variable of"):
        with sg.stop_gradient('anything'):
            pass


def test_unmatched_around_init_but_not_inside_it():
    with pytest.raises(sg.UnmatchedPathError, match="matches 'subs'"):
        with sg.stop_gradient('subs'):
            Two().init(jax.random.key(0), 1.0)

    class Late(nn.Module):
        @nn.compact
        def __call__(self, x):
            with sg.stop_gradient('late'):
                x = Child(name='early')(x)
            return Child(name='late')(x)

    params = Late().init(jax.random.key(0), 1.0)
    assert set(params['params']) == {'early', 'late'}
    Late().apply(params, 1.0)


def test_unmatched_counts_in_the_selected_collections():
    with pytest.raises(
        sg.UnmatchedPathError,
        match="'/' has no collection 'batch_stats'. There are"
        ": 'params'. Fix collections=, or pass allow_unmatched=True",
    ):
        with sg.stop_gradient('a', collections='batch_stats'):
            Two().apply(PARAMS, 1.0)
    with pytest.raises(sg.UnmatchedPathError, match="matches 'a'. There are: 's'."):
        with sg.stop_gradient('a', collections='state'):
            Stateful().apply(STATE, 1.0, mutable=['state'])


def test_shared_scopes_do_not_misfire():
    class Lora(nn.Module):
        base: nn.Module

        def setup(self):
            nn.share_scope(self, self.base)

        @nn.compact
        def __call__(self, x):
            with sg.stop_gradient(['b', '**/b']):
                y = self.base(x)
            return y + self.param('lora', ones, ()) * x

    params = Lora(Child()).init(jax.random.key(0), 1.0)
    assert set(params['params']) == {'b', 'lora'}
    assert live(lambda p: Lora(Child()).apply(p, 1.0), params) == 'lora'


def test_frozen_dict_variables_stay_frozen_dicts():
    class Net(nn.Module):
        def setup(self):
            self.child = Child()

        def __call__(self, x):
            with sg.stop_gradient('child'):
                tree = self.variables
                sub = self.get_variable('params', 'child')
            params = tree['params']
            return params['child']['b'] * x + sub['b'], type(tree), type(params), type(sub)

    for tree in ({'params': {'child': {'b': 1.0}}}, freeze({'params': {'child': {'b': 1.0}}})):
        _, *kinds = Net().apply(tree, 1.0)

        class Plain(Net):
            def __call__(self, x):
                return (
                    None,
                    type(self.variables),
                    type(self.variables['params']),
                    type(self.get_variable('params', 'child')),
                )

        assert Plain().apply(tree, 1.0)[1:] == tuple(kinds)
        assert live(lambda p: Net().apply(p, 1.0)[0], unfreeze(tree)) == ''


def test_a_missing_variable_is_what_it_is_without_a_block():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            with sg.stop_gradient(True):
                assert self.get_variable('params', 'none') is None
                assert self.get_variable('params', 'none', 3) == 3
                assert not self.has_variable('params', 'none')
                return Child(name='c')(x)

    with pytest.raises(errors.ScopeParamNotFoundError):
        Net().apply({'params': {'other': 1.0}}, 1.0)
    assert Net().apply({'params': {'c': {'b': 2.0}}}, 1.0) == 2.0


def test_unusual_leaves():
    class Net(nn.Module):
        held: bool = True

        @nn.compact
        def __call__(self):
            get = lambda name: self.get_variable('params', name)
            with sg.stop_gradient(self.held):
                return {n: get(n) for n in ('i', 'k', 'n', 't', 'np', 'box', 'x/y', 'z')}

    box = nn.Partitioned(jnp.ones(2), names=('x',))
    tree = {
        'i': jnp.arange(2),
        'k': jax.random.key(0),
        'n': None,
        't': (jnp.ones(2), 'text'),
        'np': np.ones(2),
        'box': box,
        'x/y': jnp.ones(()),
        'z': jnp.complex64(1j),
    }
    out = Net().apply({'params': tree})
    assert out['n'] is None and out['t'][1] == 'text' and out['np'] is tree['np']
    assert out['box'].names == ('x',) and out['k'] is tree['k']

    def loss(floats, held):
        out = Net(held).apply({'params': {**tree, **floats}})
        return out['t'][0].sum() + out['box'].value.sum() + out['x/y'] + out['z'].real

    floats = {'t': (jnp.ones(2),), 'box': box, 'x/y': jnp.ones(()), 'z': tree['z']}
    assert not any(leaf.any() for leaf in jax.tree.leaves(jax.grad(loss)(floats, True)))
    assert all(leaf.all() for leaf in jax.tree.leaves(jax.grad(loss)(floats, False)))


# Which module opens a block: the one whose code does ----------------------------------------------


class Mixin:
    """No module."""

    @property
    def by_mixin(self):
        with nn.stop_gradient('w'):
            return self.w

    def method_of_a_mixin(self):
        with nn.stop_gradient('w'):
            return self.w


class Lazy:
    """A descriptor of a user's own."""

    def __init__(self, fn):
        self.fn = fn

    def __get__(self, module, owner):
        return self if module is None else self.fn(module)


def unwrapped(fn):
    return lambda *args: fn(*args)


@contextlib.contextmanager
def frozen(name):
    with nn.stop_gradient(name):
        yield


class Opens(Mixin, nn.Module):
    """Opens a block in members of which Flax does not note that they run."""

    @property
    def by_helper(self):
        with frozen('w'):
            return self.w

    @property
    def by_nested(self):
        def nested():
            with nn.stop_gradient('w'):
                return self.w

        return nested()

    @property
    @unwrapped
    def by_decorated(self):
        with nn.stop_gradient('w'):
            return self.w

    @Lazy
    def by_descriptor(self):
        with nn.stop_gradient('w'):
            return self.w

    def setup(self):
        self.w = self.param('w', nn.initializers.ones, ())

    @property
    def by_property(self):
        with nn.stop_gradient('w'):
            return self.w

    @functools.cached_property
    def by_cached_property(self):
        with nn.stop_gradient('w'):
            return self.w

    @nn.nowrap
    def unwrapped(self):
        with nn.stop_gradient('w'):
            return self.w

    def _read(self, name):
        with nn.stop_gradient(name):
            return self.w

    partial = functools.partialmethod(_read, 'w')

    @functools.singledispatchmethod
    def dispatched(self, name):
        raise TypeError

    @dispatched.register
    def _(self, name: str):
        with nn.stop_gradient(name):
            return self.w

    def steps(self):
        with nn.stop_gradient('w'):
            yield self.w

    @contextlib.contextmanager
    def around(self):
        with nn.stop_gradient('w'):
            yield self

    def in_a_stack(self):
        with contextlib.ExitStack() as stack:
            stack.enter_context(nn.stop_gradient('w'))
            return self.w


def read_around(m):
    with m.around():
        return m.w


PLAIN = lambda cls: cls
OPENS = {
    'property': lambda m: m.by_property,
    'cached property': lambda m: m.by_cached_property,
    'nowrap': lambda m: m.unwrapped(),
    'partialmethod': lambda m: m.partial(),
    'singledispatchmethod': lambda m: m.dispatched('w'),
    'generator': lambda m: sum(m.steps()),
    'contextmanager': read_around,
    'stack': lambda m: m.in_a_stack(),
    'mixin': lambda m: m.by_mixin,
    'method of a mixin': lambda m: m.method_of_a_mixin(),
    'helper': lambda m: m.by_helper,
    'nested': lambda m: m.by_nested,
    'decorated': lambda m: m.by_decorated,
    'descriptor': lambda m: m.by_descriptor,
}


@pytest.mark.parametrize('of', [PLAIN, sg.stop_gradient(sg.nothing)], ids=['plain', 'lifted'])
@pytest.mark.parametrize('namesake', [False, True])
@pytest.mark.parametrize('read', OPENS.values(), ids=OPENS)
def test_names_in_a_block_are_those_of_the_module_whose_code_opens_it(read, namesake, of):
    class Root(nn.Module):
        def setup(self):
            if namesake:  # names are not those of the module that is running
                self.w = self.param('w', nn.initializers.ones, ())
            self.sub = of(Opens)()

        def __call__(self):
            return read(self.sub) + 2 * self.sub.w + (3 * self.w if namesake else 0)

    params = {'sub': {'w': jnp.ones(())}} | ({'w': jnp.ones(())} if namesake else {})
    run = jax.grad(lambda p: Root().apply({'params': p}))
    later = {
        OPENS['generator']: 'in the reverse order of entry',
        OPENS['contextmanager']: 'which runs after the block',
    }.get(read)
    if of is not PLAIN and later:
        with pytest.raises(sg.UsageError, match=later):
            run(params)
        of = PLAIN
    grads = run(params)
    assert grads['sub']['w'] == 2 and grads.get('w', 3) == 3


def test_names_in_a_function_that_is_handed_a_module_are_those_of_its_caller():
    def read_stopped(module):
        with nn.stop_gradient('sub/w'):
            return module.w

    class Root(nn.Module):
        def setup(self):
            self.sub = Opens()

        def __call__(self):
            return read_stopped(self.sub) + 2 * self.sub.w

    grads = jax.grad(lambda p: Root().apply({'params': p}))({'sub': {'w': jnp.ones(())}})
    assert grads['sub']['w'] == 2
