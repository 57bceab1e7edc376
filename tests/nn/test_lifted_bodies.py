"""Blocks in the bodies of Flax's lifted transforms and of RNN cells, against programs by hand.

The cell is c' = tanh(w ⊙ c + ⊥(w) + v ⊙ x), with one read of w outside a block and one inside.
"""

import contextlib

import jax
import jax.numpy as jnp
import pytest

import flax_sg as sg
from flax_sg import nn
from oracle import compare

N = 3
X = jnp.array([0.3, -0.7])
PARAMS = {'w': jnp.array([0.5, -1.5]), 'v': jnp.array([2.0, 0.25])}
NAMES = [('params', 'w'), ('params', 'v')]


class Cell(nn.Module):
    """One step; reads w as a live module attribute and, in a block, of the variable."""

    def setup(self):
        self.w = self.param('w', nn.initializers.ones, (2,))
        self.v = self.param('v', nn.initializers.ones, (2,))

    def __call__(self, c, x):
        live = self.w * c
        with sg.stop_gradient('w'):
            held = self.w + 0 * self.get_variable('params', 'w')
        c = jnp.tanh(live + held + self.v * x)
        return c, c * x


def step(p, bar, c, x):
    c = jnp.tanh(p['w'] * c + (bar['w'] + 0 * bar['w']) + p['v'] * x)
    return c, c * x


def apply(module, **kwargs):
    return lambda params, *args: module.apply({'params': params}, *args, **kwargs)


def model(fn, **fields):
    """Make a module with a compact method."""
    return type('Model', (nn.Module,), {'__call__': nn.compact(fn)})(**fields)


def unrolled(p, bar, c, xs, lengths):
    ys = []
    for i in range(lengths):
        c, y = step(p(i), bar(i), c, xs[i])
        ys.append(y)
    return c, jnp.stack(ys)


XS = jnp.stack([X, 2 * X, -X])


def test_scan_with_broadcast_parameters():
    def call(self, c, xs):
        return nn.scan(Cell, variable_broadcast='params', split_rngs={'params': False})(
            name='cell'
        )(c, xs)

    compare(
        apply(model(call)),
        lambda p, bar, c, xs: unrolled(lambda i: p['cell'], lambda i: bar['cell'], c, xs, N),
        {'cell': PARAMS},
        X,
        XS,
        exact=False,
    )


def test_scan_with_split_parameters():
    def call(self, c, xs):
        return nn.scan(Cell, variable_axes={'params': 0}, split_rngs={'params': True})(name='cell')(
            c, xs
        )

    params = {'cell': jax.tree.map(lambda p: jnp.stack([p, 2 * p, -p]), PARAMS)}
    at = lambda tree: lambda i: jax.tree.map(lambda p: p[i], tree['cell'])
    compare(
        apply(model(call)),
        lambda p, bar, c, xs: unrolled(at(p), at(bar), c, xs, N),
        params,
        X,
        XS,
        exact=False,
    )


@pytest.mark.thinned(2)
@pytest.mark.parametrize('around', [False, True])
def test_a_raw_scan_over_a_bound_module(around):
    def call(self, c, xs):
        cell = Cell(name='cell')
        with sg.stop_gradient(around):
            return jax.lax.scan(lambda c, x: cell(c, x), c, xs)

    compare(
        apply(model(call)),
        lambda p, bar, c, xs: unrolled(
            lambda i: (bar if around else p)['cell'], lambda i: bar['cell'], c, xs, N
        ),
        {'cell': PARAMS},
        X,
        XS,
        exact=False,
    )


@pytest.mark.parametrize('axis', [None, 0])
def test_vmap(axis):
    def call(self, c, x):
        lifted = nn.vmap(Cell, variable_axes={'params': axis}, split_rngs={'params': axis == 0})
        return lifted(name='cell')(jnp.stack([c, -c]), jnp.stack([x, x]))

    params = PARAMS if axis is None else jax.tree.map(lambda p: jnp.stack([p, 3 * p]), PARAMS)

    def two_copies(p, bar, c, x):
        one = lambda i: lambda t: jax.tree.map(lambda a: a if axis is None else a[i], t['cell'])
        outs = [step(one(i)(p), one(i)(bar), s * c, x) for i, s in enumerate((1, -1))]
        return jax.tree.map(lambda *a: jnp.stack(a), *outs)

    compare(apply(model(call)), two_copies, {'cell': params}, X, X, exact=False)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    'lift', [nn.jit, nn.remat, lambda cls: nn.remat(nn.jit(cls))], ids=['jit', 'remat', 'remat jit']
)
@pytest.mark.parametrize('around', [False, True])
def test_jit_and_remat(lift, around):
    def call(self, c, x):
        cell = lift(Cell)(name='cell')
        with sg.stop_gradient(around):
            y = cell(c, x)
        return y, cell(c, x)

    compare(
        apply(model(call)),
        lambda p, bar, c, x: (
            step((bar if around else p)['cell'], bar['cell'], c, x),
            step(p['cell'], bar['cell'], c, x),
        ),
        {'cell': PARAMS},
        X,
        X,
        exact=False,
    )


def test_remat_scan():
    class Layer(Cell):
        def __call__(self, c):
            return Cell.__call__(self, c, c)[0]

    def call(self, c):
        return nn.remat_scan(Layer, lengths=(2, 2))(name='layers')(c)

    stack = lambda p: jnp.stack([jnp.stack([p, 2 * p]), jnp.stack([-p, p / 2])])
    layers = jax.tree.map(stack, PARAMS)

    def two_copies(p, bar, c):
        for i in range(4):
            at = lambda t, i=i: jax.tree.map(lambda a: a[i // 2, i % 2], t['layers'])
            c = step(at(p), at(bar), c, c)[0]
        return c

    compare(apply(model(call)), two_copies, {'layers': layers}, X, exact=False)


@pytest.mark.parametrize('masked', ['inside', 'around'])
def test_while_loop(masked):
    """A loop is differentiable in forward mode only; its parameters come in by closure."""

    def call(self, c):
        def body(mdl, carry):
            i, c = carry
            with sg.stop_gradient('cell/w' if masked == 'inside' else False):
                return i + 1, jnp.tanh(c * mdl.get_variable('params', 'cell')['w'])

        Cell(name='cell')(c, c)  # to have the variables
        with sg.stop_gradient('cell/w' if masked == 'around' else False):
            return nn.while_loop(
                lambda mdl, carry: carry[0] < 3, body, self, (0, c), broadcast_variables='params'
            )[1]

    def two_copies(p, bar, c):
        for _ in range(3):
            c = jnp.tanh(c * bar['cell']['w'])
        return c

    compare(apply(model(call)), two_copies, {'cell': PARAMS}, X, orders=('jvp',))


def test_cond_and_switch():
    def call(self, c, x):
        cell = Cell(name='cell')
        if self.is_initializing():
            return cell(c, x)
        yes = lambda mdl, c, x: mdl(c, x)[0]

        def no(mdl, c, x):
            with sg.stop_gradient('v'):  # the body opens it at the module it is given
                return mdl(c, x)[0]

        return (
            nn.cond(x[0] > 0, yes, no, cell, c, x),
            nn.cond(x[0] < 0, yes, no, cell, c, x),
            nn.switch(1, [yes, no, yes], cell, c, x),
        )

    def two_copies(p, bar, c, x):
        p, bar = p['cell'], bar['cell']
        live, held = (step({'w': p['w'], 'v': v}, bar, c, x)[0] for v in (p['v'], bar['v']))
        pick = lambda yes: jnp.where(yes, live, held)
        return pick(x[0] > 0), pick(x[0] < 0), held

    compare(apply(model(call)), two_copies, {'cell': PARAMS}, X, X, exact=False)


def test_custom_vjp():
    def call(self, c, x):
        def forward(mdl, c, x):
            return nn.vjp(lambda mdl, c, x: mdl(c, x)[0], mdl, c, x)

        def backward(pullback, ct):
            params, *inputs = pullback(ct)
            return (jax.tree.map(lambda g: 3 * g, params), *inputs)

        f = nn.custom_vjp(lambda mdl, c, x: mdl(c, x)[0], forward, backward)
        return f(Cell(name='cell'), c, x)

    def two_copies(p, bar, c, x):
        # Three times the parameters' cotangent: 3p - 2⊥(p) has the value of p.
        triple = jax.tree.map(lambda a: 3 * a - 2 * jax.lax.stop_gradient(a), p['cell'])
        return step(triple, bar['cell'], c, x)[0]

    compare(
        apply(model(call)), two_copies, {'cell': PARAMS}, X, X, orders=('grad', 'vmap'), exact=False
    )


class Squared(nn.Module):
    """w² x, and a count of the calls."""

    @nn.compact
    def __call__(self, x):
        count = self.variable('stats', 'count', lambda: jnp.zeros(()))
        if self.is_mutable_collection('stats') and not self.is_initializing():
            count.value += 1
        return x * self.param('w', nn.initializers.ones, ()) ** 2


@pytest.mark.parametrize('mutable', [['stats'], ['params', 'stats'], True])
@pytest.mark.parametrize(
    'mask, value, derivative',
    [
        (sg.stop_gradient('c'), 4, 4),
        (sg.scale_gradient('c', 5.0), 4, 4),
        (sg.map_values('c', lambda info, w: 3 * w), 36, 12),
        (sg.stop_gradient(sg.nothing), 4, 4),
    ],
)
@pytest.mark.parametrize('around', [False, True])
def test_an_explicit_derivative_in_a_block(mask, value, derivative, mutable, around):
    """It is with respect to what the block hands in, whether the body may write that or not."""

    def call(self, x):
        def run():
            c = Squared(name='c')
            y, pullback = nn.vjp(lambda c, x: c(x), c, x)
            if self.is_initializing():
                return y
            tangent = {'params': {'w': jnp.ones(())}}
            _, jvp = nn.jvp(lambda c, x: c(x), c, (x,), (jnp.zeros(()),), variable_tangents=tangent)
            return y, pullback(jnp.ones(()))[0]['params']['w'], jvp

        if around:
            return run()
        with mask:
            return run()

    one = model(call)
    variables = one.init(jax.random.key(0), jnp.ones(()))
    variables = jax.tree.map(lambda v: v * 2 if v == 1 else v, variables)  # w is 2
    with mask if around else contextlib.nullcontext():
        out, new = one.apply(variables, jnp.ones(()), mutable=mutable)
    assert out == (value, derivative, derivative)
    assert new['stats']['c']['count'] == 2
    if mutable != ['stats']:
        assert new['params'] == variables['params'] == {'c': {'w': 2}}


def test_vjp_and_jvp_inside_a_body():
    def call(self, c, x):
        cell = Cell(name='cell')
        y, pullback = nn.vjp(lambda mdl, c: mdl(c, x)[0], cell, c)
        grads, c_bar = pullback(jnp.ones_like(y))
        if self.is_initializing():
            return y
        tangent = nn.jvp(lambda mdl, c: mdl(c, x)[0], cell, (c,), (x,), {})[1]
        return grads['params']['w'], grads['params']['v'], c_bar, tangent

    def two_copies(p, bar, c, x):
        f = lambda q, c: step(q, bar['cell'], c, x)[0]
        y, pullback = jax.vjp(f, p['cell'], c)
        grads, c_bar = pullback(jnp.ones_like(y))
        return grads['w'], grads['v'], c_bar, jax.jvp(lambda c: f(p['cell'], c), (c,), (x,))[1]

    compare(apply(model(call)), two_copies, {'cell': PARAMS}, X, X, exact=False)


def test_map_variables_stops_what_is_stored_and_not_the_view():
    """The view of w is s·w²: with w stopped, s is still trained through it (trap of WeightNorm)."""

    def call(self, c, x):
        s = self.param('s', nn.initializers.ones, ())
        square = lambda tree: jax.tree.map(lambda a: s * a**2, tree)
        lifted = nn.map_variables(
            lambda m, c, x: m(c, x)[0], 'params', square, init=self.is_initializing()
        )
        cell = Plain(name='cell')
        with sg.stop_gradient('cell'):
            y = lifted(cell, c, x)
        return y, lifted(cell, c, x)

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, c, x):
            w = self.param('w', nn.initializers.ones, (2,))
            return jnp.tanh(w * c + self.param('v', nn.initializers.ones, (2,)) * x), None

    def two_copies(p, bar, c, x):
        def run(cell):
            view = jax.tree.map(lambda a: p['s'] * a**2, cell)
            return jnp.tanh(view['w'] * c + view['v'] * x)

        return run(bar['cell']), run(p['cell'])

    params = {'s': jnp.array(0.7), 'cell': PARAMS}
    grads = compare(apply(model(call)), two_copies, params, X, X, exact=False)
    assert grads['s'] != 0
    only = lambda params, c, x: apply(model(call))(params, c, x)[0]
    grads = compare(only, lambda p, bar, c, x: two_copies(p, bar, c, x)[0], params, X, X)
    assert grads['s'] != 0 and not grads['cell']['w'].any()


def test_weight_norm_keeps_its_scale():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = nn.WeightNorm(nn.Dense(2, name='d'), name='norm')
            with sg.stop_gradient('d'):
                return norm(x)

    variables = Net().init(jax.random.key(0), X)
    grads = jax.grad(lambda p: (Net().apply({'params': p}, X) ** 2).sum())(variables['params'])
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads['d']))
    assert all(leaf.any() for leaf in jax.tree.leaves(grads['norm']))


@pytest.mark.thinned(2)
@pytest.mark.parametrize('reverse', [False, True])
def test_an_rnn_whose_cell_opens_a_block(reverse):
    class Rnn(nn.RNNCellBase):
        def setup(self):
            self.cell = Cell()

        def __call__(self, c, x):
            return self.cell(c, x)

        @nn.nowrap
        def initialize_carry(self, rng, input_shape):
            return jnp.zeros(input_shape)

        @property
        def num_feature_axes(self):
            return 1

    class Net(nn.Module):
        @nn.compact
        def __call__(self, xs):
            return nn.RNN(Rnn(name='rnn'), reverse=reverse)(xs[None])[0]

    def two_copies(p, bar, xs):
        xs = xs[::-1] if reverse else xs
        return unrolled(
            lambda i: p['rnn']['cell'], lambda i: bar['rnn']['cell'], jnp.zeros(2), xs, N
        )[1]

    compare(apply(Net()), two_copies, {'rnn': {'cell': PARAMS}}, XS, exact=False)


def test_a_module_captured_by_the_body_of_a_lifted_function():
    """The captured module is no argument of the lift, and its reads are covered all the same."""

    def call(self, c, x):
        cell, other = Cell(name='cell'), Cell(name='other')
        if self.is_initializing():
            return cell(c, x), other(c, x)

        def body(mdl, c):
            with sg.stop_gradient(True):
                inside = other.w
            return mdl(c, x)[0] + inside * other.v

        with sg.stop_gradient('other/v'):
            y = nn.remat(body)(cell, c)
        return y + other.w

    def two_copies(p, bar, c, x):
        y = step(p['cell'], bar['cell'], c, x)[0] + bar['other']['w'] * bar['other']['v']
        return y + p['other']['w']

    compare(apply(model(call)), two_copies, {'cell': PARAMS, 'other': PARAMS}, X, X, exact=False)


def test_several_modules_in_one_lifted_function():
    def call(self, c, x):
        one, two = Cell(name='one'), Cell(name='two')
        if self.is_initializing():
            return one(c, x), two(c, x)

        def body(modules, c):
            a, b = modules
            with sg.stop_gradient(['w', '../two/v']):
                return a(c, x)[0] + b(c, x)[0]

        return nn.remat(lambda a, c, b: body((a, b), c))(one, c, two)

    def two_copies(p, bar, c, x):
        one, two = {**p['one'], 'w': bar['one']['w']}, {**p['two'], 'v': bar['two']['v']}
        return step(one, bar['one'], c, x)[0] + step(two, bar['two'], c, x)[0]

    compare(apply(model(call)), two_copies, {'one': PARAMS, 'two': PARAMS}, X, X, exact=False)


class Counting(nn.Module):
    """A step with a state that it may update."""

    @nn.compact
    def __call__(self, c, x):
        s = self.variable('state', 's', lambda: jnp.ones(2))
        w = self.param('w', nn.initializers.ones, (2,))
        c = w * c + s.value * x
        if self.is_mutable_collection('state'):
            s.value = s.value + w * x
        return c, None


class Unrolled(nn.Module):
    @nn.remat
    @nn.compact
    def __call__(self, c, xs):
        step = nn.jit(Counting)(name='n')
        for x in xs:
            c, _ = step(c, x)
        return c, None


@pytest.mark.thinned(4)
@pytest.mark.parametrize('collections', ['params', 'state', ('params', 'state')])
@pytest.mark.parametrize(
    'how, mutable',
    [
        ('scan', ['state']),
        ('unrolled', ['state']),
        ('unrolled', False),
        ('unrolled', ['params']),
        ('unrolled', True),
    ],
)
def test_a_block_around_a_lift_with_writable_collections(how, mutable, collections):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, c, xs):
            counting = (
                Unrolled(name='u')
                if how == 'unrolled'
                else nn.scan(
                    Counting,
                    variable_broadcast='params',
                    variable_carry='state',
                    split_rngs={'params': False},
                )(name='u')
            )
            with sg.stop_gradient('u', collections=collections):
                held = counting(c, xs)[0]
            return held + counting(c, xs)[0]

    wrap = (lambda tree: {'u': {'n': tree}}) if how == 'unrolled' else lambda tree: {'u': tree}

    def masked(p, c, xs):
        out = Net().apply(
            {'params': wrap({'w': p['w']}), 'state': wrap({'s': p['s']})}, c, xs, mutable=mutable
        )
        return (out[0], jax.tree.leaves(out[1].get('state'))) if mutable else (out, [])

    def two_copies(p, bar, c, xs):
        def run(w, s, read, c):
            for x in xs:
                c, new = w * c + read(s) * x, read(s) + w * x
                s = new if mutable in (['state'], True) else s
            return c, s

        hold = lambda name: jax.lax.stop_gradient if name in collections else (lambda a: a)
        held, s = run(hold('params')(p['w']), p['s'], hold('state'), c)
        live, s = run(p['w'], s, lambda s: s, c)
        return held + live, [s] if mutable in (['state'], True) else []

    params = {'w': jnp.array([0.5, -1.5]), 's': jnp.array([1.0, 2.0])}
    compare(masked, two_copies, params, X, XS, orders=('grad',), exact=False)
