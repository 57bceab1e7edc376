"""scale_gradient, map_gradient, map_values and replace_values, against programs by hand.

By hand means: the part of the model that is in the block is applied with a tree of parameters that
was transformed leaf by leaf, and the rest with the tree as it is. Flax alone runs both.
"""

import contextlib
import functools
import gc
import threading

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_sg as sg
from flax_sg import nn
from internals import nothing_is_open, reads_kept
from oracle import assert_same, scalar, tangents_of
from random_programs import traced

X = jnp.array([[0.3, -0.7, 0.2], [1.1, 0.4, -0.5]])


class Layer(nn.Module):
    @nn.compact
    def __call__(self, h, _=None):
        gain = self.param('gain', nn.initializers.normal(1.0), (3,))
        return jnp.tanh(nn.Dense(3, name='dense')(h) * gain), None


class Part(nn.Module):
    """Every kind of read: attributes, derived ones, the same twice, tied, scanned, in remat."""

    def setup(self):
        self.w = self.param('w', nn.initializers.normal(1.0), (3,))
        self.scale = jnp.exp(0.1 * self.w)
        self.embed = nn.Embed(4, 3)
        self.dense = nn.Dense(3)
        self.split = nn.scan(
            Layer, variable_axes={'params': 0}, split_rngs={'params': True}, length=2
        )()
        self.loop = nn.scan(
            Layer, variable_broadcast='params', split_rngs={'params': False}, length=3
        )()
        self.again = nn.remat(nn.jit(Layer))()

    def __call__(self, x):
        h = self.dense(self.dense(x)) * self.scale + self.w
        h = h @ self.embed.embedding.T @ self.embed(jnp.arange(4))
        h = self.loop(self.split(h, None)[0], None)[0]
        return self.again(h)[0] + self.get_variable('params', 'w')


class Whole(nn.Module):
    """The part in the block, and again outside of it."""

    mask: object = None
    use: str = ''

    def setup(self):
        cls = self.mask(Part) if self.use == 'class' else Part
        self.part = cls()
        self.head = nn.Dense(3)

    def inside(self, x):
        return self.part(x)

    def outside(self, h, x):
        part = 0 if self.use == 'class' else self.part(x)  # a class is masked everywhere
        return self.head(h) + part

    def __call__(self, x):
        if self.use == 'block':
            with self.mask:
                h = self.inside(x)
        elif self.use == 'instance':
            h = self.mask(self.part)(x)
        elif self.use == 'method':
            h = masked_method(self.mask)(self, x)
        else:
            h = self.inside(x)
        return self.outside(h, x)


@functools.cache
def masked_method(mask):
    return mask(Whole.inside)


PARAMS = jax.tree.map(
    lambda p: p + 0.1, Whole().init(jax.random.key(0), X, method='__call__')['params']
)
OTHER = jax.tree.map(lambda p: 0.5 * p - 0.2, PARAMS['part'])


def rescaled(v, factor):
    return v + (factor - 1) * (v - jax.lax.stop_gradient(v))


@jax.custom_vjp
def clipped(v):
    return v


clipped.defvjp(lambda v: (clipped(v), None), lambda _, ct: (jnp.clip(ct, -0.05, 0.05),))


def bent(v):
    return 1.5 * v + jnp.sin(v)


def at(tree, names):
    for name in names:
        tree = tree[name]
    return tree


# How each transform is made, given a predicate, and what it does to the leaf at some names by hand.
KINDS = {
    'scale': (lambda p: sg.scale_gradient(p, 0.5), lambda v, _: rescaled(v, 0.5)),
    'reverse': (lambda p: sg.scale_gradient(p, jnp.float32(-2)), lambda v, _: rescaled(v, -2.0)),
    'zero': (lambda p: sg.scale_gradient(p, 0), lambda v, _: jax.lax.stop_gradient(v)),
    'clip': (
        lambda p: sg.map_gradient(p, lambda info, ct: jnp.clip(ct, -0.05, 0.05)),
        lambda v, _: clipped(v),
    ),
    'bend': (lambda p: sg.map_values(p, lambda info, v: bent(v)), lambda v, _: bent(v)),
    'replace': (None, lambda v, names: at(OTHER, names)),
    'constant': (sg.constant, lambda v, _: jax.lax.stop_gradient(v)),
}
PREDICATES = {
    'all': (True, lambda names: True),
    'some': (
        ['part/w', 'part/*/dense', 'part/embed'],
        lambda names: names[0] in ('w', 'embed') or 'dense' in names[1:],
    ),
    'callable': (lambda v: v.path[-1] in ('w', 'gain'), lambda names: names[-1] in ('w', 'gain')),
}
USES = ['block', 'around', 'method', 'instance', 'class', 'tree']


def by_hand(kind, selected, use):
    def change(keys, v):
        part, *names = (k.key for k in keys)
        return KINDS[kind][1](v, names) if part == 'part' and selected(names) else v

    def f(params, x):
        plain = Whole(lambda cls: cls, 'class') if use == 'class' else Whole()
        copy = jax.tree_util.tree_map_with_path(change, params)
        h = Whole().apply({'params': copy}, x, method='inside')
        return plain.apply({'params': params}, h, x, method='outside')

    return f


def masked(kind, predicate, use):
    if kind == 'replace':
        tree = OTHER if use in ('instance', 'class') else {'part': OTHER}
        mask = sg.replace_values(predicate, tree)
    else:
        mask = KINDS[kind][0](predicate)
    if use == 'around':

        def f(params, x):
            with mask:
                h = Whole().apply({'params': params}, x, method='inside')
            return Whole().apply({'params': params}, h, x, method='outside')
    elif use == 'tree':

        def f(params, x):
            h = Whole().apply({'params': mask(params)}, x, method='inside')
            return Whole().apply({'params': params}, h, x, method='outside')
    else:

        def f(params, x):
            return Whole(mask, use).apply({'params': params}, x)

    return f


def relative(predicate, use):
    """Write the paths as the module that is masked sees them."""
    if use in ('instance', 'class') and isinstance(predicate, list):
        return [p.removeprefix('part/') for p in predicate]
    return predicate


def derivatives(f, forward):
    """Return the value and the gradient and, forward, a derivative of each in one direction."""
    loss = lambda *xs: (scalar(f)(*xs), f(*xs))
    first = lambda *xs: jax.value_and_grad(loss, (0, 1), has_aux=True)(*xs)
    if not forward:
        return first
    return lambda *xs: (jax.jvp(f, xs, tangents_of(xs)), jax.jvp(first, xs, tangents_of(xs)))


def check(kind, use, which, run=traced):
    predicate, selected = PREDICATES[which]
    if which == 'all' and use not in ('instance', 'class'):
        predicate = 'part'
    f, hand = masked(kind, relative(predicate, use), use), by_hand(kind, selected, use)
    forward = kind != 'clip' and (use, which) == ('block', 'some')  # the others take long
    order = functools.partial(derivatives, forward=forward)
    assert_same(run(order(f))(PARAMS, X), run(order(hand))(PARAMS, X), kind, rtol=1e-5)
    plain = masked(kind, sg.nothing, use) if use not in ('instance', 'class') else None
    if plain:
        # What is compared does depend on the transform.
        with pytest.raises(AssertionError, match=f'^{kind}.*: got\n'):
            assert_same(run(order(f))(PARAMS, X), run(order(plain))(PARAMS, X), kind, rtol=1e-3)


@pytest.mark.thinned(11)
@pytest.mark.parametrize(
    'kind, use',
    [
        *((kind, use) for kind in ('scale', 'clip', 'bend', 'replace') for use in USES),
        *((kind, use) for kind in ('reverse', 'zero', 'constant') for use in ('block', 'tree')),
    ],
)
def test_each_use(kind, use):
    check(kind, use, 'some')


@pytest.mark.thinned(5)
@pytest.mark.parametrize('which', ['all', 'callable'])
@pytest.mark.parametrize('kind', KINDS)
def test_each_kind_of_predicate(kind, which):
    check(kind, 'block', which)
    check(kind, 'class', which)


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    'kind, run', [('scale', jax.jit), ('replace', jax.jit), ('clip', lambda f: f)]
)
def test_as_jax_runs_it(kind, run):
    check(kind, 'block', 'some', run)


@pytest.mark.thinned(4)
@pytest.mark.parametrize('kind', KINDS)
def test_init_is_that_of_the_plain_model(kind):
    tree = {'part': OTHER}
    mask = sg.replace_values('part', tree) if kind == 'replace' else KINDS[kind][0]('part')
    init = lambda model: traced(lambda: model.init(jax.random.key(3), X))()
    want = init(Whole())
    assert_same(init(Whole(mask, 'block')), want, 'init')
    with mask:
        assert_same(init(Whole()), want, 'init in a block')


@pytest.mark.thinned(4)
@pytest.mark.parametrize('kind', KINDS)
def test_nothing_is_stored_back(kind):
    # A lifted body that may write the parameters of layers sees each layer's, as a tree does not.
    mask = (
        sg.replace_values(['part/w', 'part/loop'], {'part': OTHER})
        if kind == 'replace'
        else KINDS[kind][0]('part')
    )
    for model in (Whole(mask, 'block'), Whole()):
        with mask:
            _, out = model.apply({'params': PARAMS}, X, mutable=['params'])
        assert_same(out['params'], PARAMS, kind)


# Values worked out by hand -----------------------------------------------------------------------


class Reads(nn.Module):
    """2a + 3b + a: reads a twice."""

    def setup(self):
        self.a = self.param('a', nn.initializers.ones, ())
        self.b = self.param('b', nn.initializers.ones, ())

    def __call__(self, x=1.0):
        return (2 * self.a + 3 * self.get_variable('params', 'b') + self.a) * x


AB = {'a': jnp.ones(()), 'b': jnp.ones(())}


def grads_of(mask, apply=None, params=AB):
    def loss(params):
        with mask:
            return (apply or (lambda p: Reads().apply({'params': p})))(params)

    return {k: float(g) for k, g in jax.grad(loss)(params).items()}


@pytest.mark.parametrize(
    'factor', [-1, 0.5, np.float64(2), np.int32(3), np.array(3), jnp.float32(0.25), jnp.bfloat16(2)]
)
def test_scaled(factor):
    assert grads_of(sg.scale_gradient('a', factor)) == {'a': 3 * float(factor), 'b': 3}


def test_a_traced_factor_under_jit_vmap_and_scan():
    def grad(factor):
        with sg.scale_gradient('a', factor):
            return jax.grad(lambda p: jax.jit(lambda p: Reads().apply({'params': p}))(p))(AB)['a']

    assert jax.jit(grad)(2.0) == 6
    assert jax.vmap(grad)(jnp.arange(3.0)).tolist() == [0, 3, 6]
    assert jax.lax.scan(lambda c, f: (c, grad(f)), 0, jnp.arange(3.0))[1].tolist() == [0, 3, 6]
    vector = lambda w, f: jax.grad(
        lambda w: (sg.scale_gradient(True, f)({'w': w})['w'] ** 2).sum()
    )(w)
    for axes in ((None, 0), (1, 0), (1, None)):  # of weights (3, 2), and of factors
        w, f = jnp.ones((3, 2) if axes[0] else 3), jnp.arange(2.0) if axes[1] == 0 else 2.0
        want = 2 * jnp.ones((2, 3)) * jnp.reshape(jnp.asarray(f), (-1, 1))
        assert jnp.array_equal(jax.vmap(vector, axes)(w, f), want)
    outside = jax.grad(
        lambda w: jax.vmap(lambda f: (sg.scale_gradient(True, f)({'w': w})['w'] ** 2).sum())(
            jnp.arange(3.0)
        ).sum()
    )
    assert outside(jnp.ones(4)).tolist() == [6] * 4


def test_a_traced_factor_leaves_no_tracer_behind(no_leaks):
    def grad(factor, params):
        with sg.scale_gradient('a', factor):
            return jax.grad(lambda p: Reads().apply({'params': p}))(params)['a']

    assert jax.jit(grad)(2.0, AB) == 6


def ratios(loss, plain, params, *args):
    """Return what each gradient is over that of the plain program."""
    got, want = jax.grad(loss)(params, *args), jax.grad(plain)(params, *args)
    return jax.tree.map(lambda a, b: np.round(np.mean(a / b), 4), got, want)


TRIPLE = sg.scale_gradient(True, 3.0)


@pytest.mark.parametrize('predicate, d, scale', [(True, 3, 3), ('d', 3, 1), ('wn', 1, 3)])
def test_a_derived_view_of_parameters_is_not_scaled_again(predicate, d, scale):
    """nn.WeightNorm shows a derived kernel under the stored one's path."""

    class Model(nn.Module):
        mask: object

        @nn.compact
        def __call__(self, x):
            norm = nn.WeightNorm(nn.Dense(2, name='d'), name='wn')
            with self.mask:
                return (norm(x) ** 2).sum()

    plain = Model(contextlib.nullcontext())
    params = plain.init(jax.random.key(0), X)
    got = ratios(Model(sg.scale_gradient(predicate, 3.0)).apply, plain.apply, params, X)['params']
    assert got == {'d': {'kernel': d, 'bias': d}, 'wn': {'d/kernel/scale': scale}}


class Mirrors(nn.Module):
    def setup(self):
        self.d = nn.Dense(2)

    def plain(self, x):
        return self.d(x).sum()

    def mirror(self, x):
        return TRIPLE(self.d)(x).sum()

    def mirror_of_mirror(self, x):
        return TRIPLE(TRIPLE(self.d))(x).sum()

    def mirror_in_block(self, x):
        with TRIPLE:
            return TRIPLE(self.d)(x).sum()

    @TRIPLE
    def method_of_mirror(self, x):
        mirror = TRIPLE(self.d)
        return mirror(x).sum() + 0 * mirror.variables['params']['kernel'].sum()

    def class_of_class(self, x):
        return TRIPLE(TRIPLE(nn.Dense))(2, parent=None).bind(self.d.variables)(x).sum()


@pytest.mark.parametrize(
    'method, times',
    [
        ('mirror', 3),
        ('mirror_of_mirror', 9),
        ('mirror_in_block', 9),
        ('method_of_mirror', 9),
        ('class_of_class', 9),
    ],
)
def test_each_transform_applies_once(method, times):
    params = Mirrors().init(jax.random.key(0), X, method='plain')
    apply = lambda name: functools.partial(Mirrors().apply, method=name)
    got = ratios(apply(method), apply('plain'), params, X)
    assert got == {'params': {'d': {'kernel': times, 'bias': times}}}


class Shared(nn.Module):
    def setup(self):
        self.d = nn.Dense(2)
        nn.share_scope(self, self.d)

    def __call__(self, x):
        return self.d(x).sum()


class Rule(nn.Module):
    """A custom_vjp whose rule doubles the parameters' cotangents."""

    @nn.compact
    def __call__(self, x):
        def backward(pullback, ct):
            params, x_bar = pullback(ct)
            return jax.tree.map(lambda g: 2 * g, params), x_bar

        run = lambda d, x: d(x).sum()
        rule = nn.custom_vjp(run, lambda d, x: nn.vjp(run, d, x), backward)
        return rule(nn.Dense(2, name='d'), x)


@pytest.mark.parametrize('mutable', [False, ['params']])
@pytest.mark.parametrize('cls, times', [(Shared, 3), (Rule, 6)])
def test_shared_scopes_and_custom_rules_are_scaled_once(cls, times, mutable):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, mask):
            inner = cls(name='c')
            with mask:
                return inner(x)

    def loss(mask):
        def loss(params, x):
            out = Model().apply(params, x, mask, mutable=mutable)
            return out[0] if mutable else out

        return loss

    params = Model().init(jax.random.key(0), X, TRIPLE)
    plain = lambda params, x: Shared().apply(
        {'params': jax.tree.leaves(params, is_leaf=lambda t: 'kernel' in t)[0]}, x
    )
    assert {float(r) for r in jax.tree.leaves(ratios(loss(TRIPLE), plain, params, X))} == {times}


BODY_LIFTS = {
    'jit': nn.jit,
    'remat': nn.remat,
    'scan': lambda cls: nn.scan(
        cls, variable_broadcast='params', split_rngs={'params': False}, length=2
    ),
    'split': lambda cls: nn.scan(
        cls, variable_axes={'params': 0}, split_rngs={'params': True}, length=2
    ),
    'vmap': lambda cls: nn.vmap(cls, variable_axes={'params': None}, split_rngs={'params': False}),
}


@pytest.mark.parametrize('mutable', [False, ['params']])
@pytest.mark.parametrize('lift', BODY_LIFTS)
def test_traced_arguments_reach_into_lifted_bodies(lift, mutable):
    """Once in each body, whether it may write the parameters or not."""

    class Cell(nn.Module):
        @nn.compact
        def __call__(self, c, _=None):
            c = c * self.param('w', nn.initializers.ones, ())
            return (c, None) if lift in ('scan', 'split') else c

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, factor):
            cell = BODY_LIFTS[lift](Cell)(name='cell')
            with sg.scale_gradient('cell', factor):
                with sg.map_gradient(True, lambda info, ct: ct * factor):
                    return jnp.sum(jax.tree.leaves(cell(x))[0])

    params = Model().init(jax.random.key(0), jnp.ones(3), 1.0)

    def grad(params, factor):
        def loss(params):
            out = Model().apply(params, jnp.ones(3), factor, mutable=mutable)
            return out[0] if mutable else out

        return jax.grad(loss)(params)['params']['cell']['w']

    one = grad(params, 1.0)
    assert jnp.array_equal(grad(params, 2.0), 4 * one)
    assert jnp.array_equal(jax.jit(grad)(params, 2.0), 4 * one)
    many = jax.vmap(grad, (None, 0))(params, jnp.array([2.0, 3.0]))
    assert jnp.array_equal(many, jnp.stack([4 * one, 9 * one]))


@pytest.mark.parametrize('zero', [0, -0.0, np.float32(0), np.int32(0), np.array(0.0)])
def test_zero_stops_what_a_product_would_not(zero):
    mask = sg.scale_gradient('a', zero)
    assert float(jax.grad(lambda p: jnp.log(mask(p)['a']))({'a': 0.0})['a']) == 0  # not 0 * inf


def test_the_cotangent_of_the_sum_of_a_blocks_reads():
    clip = sg.map_gradient(True, lambda info, ct: jnp.clip(ct, -1, 1))
    assert grads_of(clip) == {'a': 1, 'b': 1}  # of 3 and 3; each read by itself would give 2 for a

    def twice(params):  # two blocks, or two applications in one, are clipped by themselves
        return Reads().apply({'params': params}) + Reads().apply({'params': params})

    assert grads_of(clip, twice) == {'a': 2, 'b': 2}
    add = sg.map_gradient(True, lambda info, ct: ct + 1)
    with add, add:
        assert grads_of(clip) == {'a': 3, 'b': 3}  # the inner block's comes first


def test_a_lifted_transform_hands_on_one_read():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            body = nn.scan(
                lambda reads, c, _: (c + reads(x), None),
                variable_broadcast='params',
                split_rngs={'params': False},
                length=5,
            )
            return body(Reads(name='reads'), x, None)[0]

    clip = sg.map_gradient(True, lambda info, ct: jnp.clip(ct, -4, 4))
    with clip:
        grads = jax.grad(Model().apply)({'params': {'reads': AB}}, 1.0)['params']['reads']
    assert grads == {'a': 4, 'b': 4}  # of 15


# Under vmap the parameters are read once for the whole batch, whose cotangents add up.
@pytest.mark.parametrize(
    'wrap, times',
    [
        (lambda f: f, 1),
        (jax.jit, 1),
        (jax.checkpoint, 1),
        (lambda f: lambda p: jax.vmap(lambda x: f(p) * x)(jnp.ones(3)).sum(), 1),
        (
            lambda f: lambda p: jax.lax.scan(lambda c, _: (c + f(p), None), 0.0, None, length=3)[0],
            3,
        ),
    ],
    ids=['plain', 'jit', 'checkpoint', 'vmap', 'scan'],
)
def test_a_stored_cotangent_in_place_of_a_variables_own(wrap, times):
    """The request's third wish. Each application of the model passes it on once."""
    stored = {'a': jnp.float32(10), 'b': jnp.float32(20)}

    def step(params, stored):
        def loss(params):
            with sg.map_gradient(True, lambda info, ct: stored[info.name]):
                return Reads().apply({'params': params})

        return jax.grad(wrap(loss))(params)

    for run in (step, jax.jit(step)):
        assert run(AB, stored) == {'a': 10 * times, 'b': 20 * times}


@pytest.mark.parametrize(
    'mask',
    [
        sg.scale_gradient(True, 3.0),
        sg.scale_gradient(True, jnp.float32(3)),
        sg.map_gradient(True, lambda info, ct: 3 * ct),
    ],
)
def test_a_second_derivative_through_the_body_of_a_scan(mask):
    """jax 0.10 loses the rule of a custom_jvp there."""

    def loss(read):
        def run(p):
            def body(c, w):
                return jnp.tanh(c * read(w) + read(w) ** 2), None

            return jax.lax.scan(body, 1.0, p)[0]

        return run

    got, want = (
        jax.jacrev(jax.grad(loss(read)))(jnp.array([0.5, 0.7, 0.9]))
        for read in (lambda w: mask({'w': w})['w'], lambda w: rescaled(w, 3.0))
    )
    assert_same(got, want, 'second', rtol=1e-5)


@pytest.mark.parametrize('typed', [True, False])
def test_noise_added_to_a_cotangent(typed):
    """The function closes over a traced key, of either kind."""

    def step(params, key):
        with sg.map_gradient('a', lambda info, ct: ct + jax.random.normal(key, ct.shape)):
            return jax.grad(lambda p: jax.checkpoint(Reads().apply)({'params': p}))(params)

    key = jax.random.key(1) if typed else jax.random.PRNGKey(1)
    want = {'a': 3 + jax.random.normal(key, ()), 'b': 3}
    assert step(AB, key) == jax.jit(step)(AB, key) == want


def test_another_variables_cotangent_in_place_of_its_own():
    def loss(params):
        return Reads().apply({'params': params}) + params['b'] * 4

    def step(params):
        own = jax.grad(loss)(params)
        with sg.map_gradient('a', lambda info, ct: own['b']):
            return jax.grad(loss)(params)

    assert step(AB) == jax.jit(step)(AB) == {'a': 7, 'b': 7}


def test_a_gradient_of_the_gradient_goes_through_the_function():
    mask = sg.map_gradient(True, lambda info, ct: ct**2)
    first = lambda p: jax.grad(lambda p: mask(p)['w'] ** 3)(p)['w']  # (3w²)²
    assert first({'w': 2.0}) == 144
    # By hand, with w̄ = mask(w): d/dw of (3 w̄²)² is 2 · 3w² · 6w, and w̄ squares that cotangent.
    assert jax.grad(first)({'w': 2.0})['w'] == (2 * 12 * 12) ** 2


def test_map_gradient_is_for_reverse_mode():
    mask = sg.map_gradient(True, lambda info, ct: ct)
    for run in (lambda f: f, jax.jit):
        with pytest.raises(sg.UsageError, match="map_gradient of '/a': .* forward-mode"):
            run(lambda p: jax.jvp(lambda p: mask(p)['a'] ** 2, (p,), (p,)))(AB)
    with pytest.raises(sg.UsageError, match='Use reverse mode, or scale_gradient'):
        jax.hessian(lambda p: mask(p)['a'] ** 2)(AB)


def test_values_are_mapped_where_they_are_used():
    noisy = sg.map_values('a', lambda info, v: v + 10)
    assert Reads().apply({'params': noisy(AB)}) == 33 + 3
    with noisy:
        assert Reads().apply({'params': AB}) == 36
        assert Reads().bind({'params': AB}).a == 11
    assert Reads().bind({'params': AB}).a == 1


def test_a_cast_to_bfloat16():
    model, x = nn.Sequential([nn.Dense(4), nn.gelu, nn.Dense(2)]), X.astype(jnp.bfloat16)
    params = model.init(jax.random.key(0), X)
    cast = sg.map_values(True, lambda info, v: v.astype(jnp.bfloat16))
    low = jax.tree.map(lambda v: v.astype(jnp.bfloat16), params)

    def loss(params, x):
        with cast:
            return model.apply(params, x).sum()

    assert_same(loss(params, x), model.apply(low, x).sum(), 'value')
    grads = jax.grad(loss)(params, x)
    want = jax.grad(lambda p: model.apply(p, x).sum())(low)
    assert_same(grads, jax.tree.map(lambda g: g.astype(jnp.float32), want), 'grad')


def quantised(v):
    return v + jax.lax.stop_gradient(jnp.round(8 * v) / 8 - v)


def test_parity_with_haikus_custom_getter():
    """Fake quantisation with a straight-through gradient, of the weights and not of the biases."""

    def forward(x):
        def getter(next_getter, value, context):
            value = next_getter(value)
            return quantised(value) if context.name == 'w' else value

        with hk.custom_getter(getter):
            return hk.nets.MLP([5, 2], activation=jnp.tanh)(x)

    class MLP(nn.Module):
        @nn.compact
        def __call__(self, x):
            with sg.map_values('*/kernel', lambda info, v: quantised(v)):
                return nn.Dense(2, name='last')(jnp.tanh(nn.Dense(5, name='first')(x)))

    theirs = hk.without_apply_rng(hk.transform(forward))
    params = theirs.init(jax.random.key(0), X)
    names = {'mlp/~/linear_0': 'first', 'mlp/~/linear_1': 'last'}
    params = jax.tree.map(lambda v: v + 0.1, params)
    ours = {
        ours: {'kernel': params[name]['w'], 'bias': params[name]['b']}
        for name, ours in names.items()
    }
    value, grads = jax.value_and_grad(lambda p: MLP().apply({'params': p}, X).sum())(ours)
    want, theirs = jax.value_and_grad(lambda p: theirs.apply(p, X).sum())(params)
    assert_same(value, want, 'value')
    for name, mine in names.items():
        assert_same(grads[mine], {'kernel': theirs[name]['w'], 'bias': theirs[name]['b']}, name)
    plain = nn.Sequential([nn.Dense(5), jnp.tanh, nn.Dense(2)]).apply(
        {'params': {'layers_0': ours['first'], 'layers_2': ours['last']}}, X
    )
    assert float(value) != float(plain.sum())


def test_weight_noise_is_drawn_once_for_a_block():
    def loss(params, key):
        def noise(info, v):
            return v + jax.random.normal(jax.random.fold_in(key, hash(info.path) % 97), v.shape)

        with sg.map_values(True, noise):
            reads = Reads().bind({'params': params})
            return reads.a, reads.get_variable('params', 'a')

    one, same = jax.jit(loss)(AB, jax.random.key(1))
    other, _ = jax.jit(loss)(AB, jax.random.key(2))
    assert one == same != other


def test_replaced_values_and_where_gradients_go():
    def loss(params, other):
        with sg.replace_values('a', other):
            return Reads().apply({'params': params})

    value, (grads, source) = jax.value_and_grad(loss, (0, 1))(AB, {'a': 5.0})
    assert value == 18 and grads == {'a': 0, 'b': 3} and source == {'a': 3}


@pytest.mark.parametrize(
    'apply',
    [
        lambda variables: Reads().apply(variables),
        jax.jit(lambda v: Reads().apply(v)),
        lambda v: Reads().bind(v)(1.0),
    ],
    ids=['apply', 'jit', 'bind'],
)
def test_values_of_another_collection(apply):
    """Evaluation with averaged parameters, in two lines."""
    average = sg.replace_values(True, 'average')

    def loss(variables):
        with average:
            return apply(variables)

    value, grads = jax.value_and_grad(loss)(
        {'params': AB, 'average': {'a': jnp.float32(5), 'b': jnp.float32(7)}}
    )
    assert value == 36
    assert grads == {'params': {'a': 0, 'b': 0}, 'average': {'a': 3, 'b': 3}}


def test_values_of_a_collection_that_a_block_around_maps():
    """What is read instead is what a read of it would give there."""
    variables = {'params': AB, 'average': {'a': jnp.float32(5), 'b': jnp.float32(7)}}
    more = sg.map_values('a', lambda info, v: v + 1, collections='average')
    replaced = sg.replace_values('a', 'average')
    with more, replaced:
        assert Reads().apply(variables) == 3 * (5 + 1) + 3
    with replaced, more:
        assert Reads().apply(variables) == 3 * 5 + 3


class InLoop(nn.Module):
    broadcast: tuple = ('params', 'average')

    @nn.compact
    def __call__(self, x):
        def step(reads, c, _):
            with sg.replace_values('a', 'average'):
                return c + reads(x), None

        loop = nn.scan(
            step, variable_broadcast=self.broadcast, split_rngs={'params': False}, length=2
        )
        reads = Reads(name='reads')
        return loop(reads, reads(x), None)[0]


def test_a_collection_in_the_body_of_a_scan():
    average = {'reads': {'a': jnp.float32(5), 'b': jnp.float32(7)}}
    value, grads = jax.value_and_grad(InLoop().apply)(
        {'params': {'reads': AB}, 'average': average}, 1.0
    )
    assert value == 6 + 2 * 18
    assert grads['params']['reads'] == {'a': 3, 'b': 9}
    assert grads['average']['reads'] == {'a': 6, 'b': 0}


def test_a_collection_that_a_scan_does_not_hand_on():
    with pytest.raises(
        sg.UsageError,
        match=(
            r"replace_values\('a', 'average'\): the source has no variable '/reads/a' to read "
            r"instead of '/reads/a'\. Pass a collection 'average'"
        ),
    ):
        InLoop(('params',)).apply({'params': {'reads': AB}, 'average': {'reads': AB}}, 1.0)


def test_a_target_network():
    """The critic's own target holds the parameters of a while ago; it gets no gradient."""

    def loss(params, target):
        reads = Reads().bind({'params': params})
        with sg.replace_values(True, target), sg.stop_gradient(True):
            goal = reads(1.0)
        return (reads(1.0) - goal) ** 2

    (grads, held) = jax.grad(loss, (0, 1))(AB, {'a': jnp.float32(2), 'b': jnp.float32(2)})
    assert grads == {'a': -36, 'b': -36} and held == {'a': 0, 'b': 0}  # 2 (6 - 12) 3


def test_replaced_boxes_keep_their_names():
    model = nn.Dense(2, kernel_init=nn.with_partitioning(nn.initializers.ones, ('in', 'out')))
    params = model.init(jax.random.key(0), X)
    for other in (
        jax.tree.map(jnp.zeros_like, params['params']),
        {'kernel': jnp.zeros((3, 2)), 'bias': np.zeros(2)},
    ):
        mask = sg.replace_values(True, other)
        with mask:
            assert float(abs(model.apply(params, X)).sum()) == 0
            kernel = model.bind(params).get_variable('params', 'kernel')
        assert isinstance(kernel, nn.Partitioned) and kernel.names == ('in', 'out')
        assert mask(params['params'])['kernel'].names == ('in', 'out')


def test_what_is_no_float_passes_through():
    class Odd(nn.Module):
        @nn.compact
        def __call__(self):
            return [self.variable('state', name, lambda v=v: v).value for name, v in values.items()]

    values = {
        'count': jnp.arange(3),
        'key': jax.random.key(0),
        'none': None,
        'text': 'x',
        'both': (jnp.ones(2), jnp.arange(2)),
    }
    for mask in (
        sg.scale_gradient(True, 2.0, collections='state'),
        sg.map_gradient(True, lambda i, ct: 2 * ct, collections='state'),
        sg.map_values(True, lambda i, v: v + 1, collections='state'),
    ):
        with mask:
            count, key, none, text, both = Odd().apply({'state': values})
        assert none is None and text == 'x' and (count == jnp.arange(3)).all()
        assert jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        assert (both[1] == jnp.arange(2)).all()
    assert (both[0] == 2).all()


# Composition: outer blocks first ------------------------------------------------------------------

INSTEAD = {'a': jnp.float32(0.7), 'b': jnp.float32(0.2)}
STEPS = {
    'stop': (sg.stop_gradient(True), jax.lax.stop_gradient),
    'constant': (sg.constant(True), jax.lax.stop_gradient),
    'scale': (sg.scale_gradient(True, -2.0), lambda v: rescaled(v, -2.0)),
    'clip': (sg.map_gradient(True, lambda i, ct: jnp.clip(ct, -0.05, 0.05)), clipped),
    'bend': (sg.map_values(True, lambda i, v: bent(v)), bent),
    'square': (sg.map_values(True, lambda i, v: v * v), lambda v: v * v),
    'tree': (sg.replace_values(True, INSTEAD), None),
    'average': (sg.replace_values(True, 'average', collections=['params', 'average']), None),
}


@pytest.mark.parametrize('jit', [False, True])
@pytest.mark.parametrize('seed', range(8))
def test_random_nests_against_functions_by_hand(seed, jit):
    rng = np.random.default_rng(seed)
    names = list(rng.choice(list(STEPS), size=rng.integers(2, 5)))
    if seed % 2:
        names.insert(int(rng.integers(len(names))), str(rng.choice(['tree', 'average'])))
    variables = {
        'params': {'a': jnp.float32(0.3), 'b': jnp.float32(-0.4)},
        'average': {'a': jnp.float32(1.1), 'b': jnp.float32(0.9)},
    }

    def through(names, variables, collection, name):
        """Return what a read gives: each block takes what the one around it gives."""
        v = variables[collection][name]
        for i, step in enumerate(names):
            if step == 'tree':
                v = INSTEAD[name] if collection == 'params' else v
            elif step == 'average':
                v = through([s for s in names[:i] if s == 'average'], variables, 'average', name)
            elif collection == 'params':
                v = STEPS[step][1](v)
        return v

    def hand(variables):
        v = {name: through(names, variables, 'params', name) for name in 'ab'}
        return 2 * v['a'] + 3 * v['b'] + v['a'] + variables['params']['a']

    def ours(variables):
        def inside(reads, left):
            if not left:
                return reads(1.0)
            with STEPS[left[0]][0]:
                return inside(reads, left[1:])

        return inside(Reads().bind(variables), names) + variables['params']['a']

    run = jax.jit if jit else lambda f: f
    assert_same(
        run(jax.value_and_grad(ours))(variables),
        run(jax.value_and_grad(hand))(variables),
        str(names),
        rtol=1e-6,
    )


# Caches, threads, exceptions ----------------------------------------------------------------------


def test_each_argument_has_its_own_trace_and_an_equal_one_that_of_the_first():
    traces = []

    @jax.jit
    def f(params):
        traces.append(params)
        return jax.grad(lambda p: Reads().apply({'params': p}))(params)

    def masks():
        return [
            sg.scale_gradient('a', 2.0),
            sg.scale_gradient('a', 3.0),
            sg.map_gradient('a', lambda info, ct: ct * 4),
            sg.map_gradient('a', lambda info, ct: ct * 5),
            sg.map_values('a', lambda info, v: v * 6),
            sg.map_values('a', lambda info, v: v * 7),
            sg.replace_values('a', TREE),
            sg.constant('a'),
            sg.stop_gradient('a'),
            *(sg.map_values('a', lambda info, v, k=k: v * k) for k in (8, 9)),
            sg.scale_gradient('a', np.float32(0.5)),
        ]

    want = [6, 9, 12, 15, 18, 21, 0, 0, 0, 24, 27, 1.5]
    for _ in range(3):
        got = []
        for mask in masks():
            with mask:
                got.append(float(f(AB)['a']))
        assert got == want
    assert len(traces) == len(want)


TREE = {'a': jnp.float32(4)}


def test_a_new_source_is_never_mistaken_for_an_old_one():
    f, got = jax.jit(lambda params: Reads().apply({'params': params})), []
    for value in range(20):  # trees are made and dropped: their addresses come again
        with sg.replace_values('a', {'a': jnp.float32(value)}):
            got.append(float(f(AB)))
    assert got == [3 * value + 3 for value in range(20)]


def test_a_source_of_the_same_arrays_at_other_paths():
    f = jax.jit(lambda variables: Reads().apply(variables))
    one, two = jnp.float32(5), jnp.float32(7)
    old, new = {'a': one, 'b': two}, {'a': two, 'b': one}
    variables = {'params': AB, 'old': old, 'new': new}
    for _ in range(2):  # 3 a + 3 b, of which a alone is replaced
        for source, want in ((old, 18), (new, 24), ('old', 18), ('new', 24)):
            with sg.replace_values('a', source):
                assert f(variables) == want
        with sg.replace_values('a', {'a': one}):
            assert f(variables) == 18
        with pytest.raises(sg.UsageError, match="the source has no variable 'a'"):
            with sg.replace_values('a', {'c': one}):  # the leaves are those of before
                f(variables)


def test_a_lifted_class_is_kept_only_while_it_is_used(no_leaks):
    class Own(Reads):
        pass

    class Net(nn.Module):
        @nn.compact
        def __call__(self, factor):
            return sg.scale_gradient(True, factor)(Own(name='reads'))()

    for _ in range(3):
        loss = lambda p, factor: Net().apply({'params': {'reads': p}}, factor)
        assert jax.jit(jax.grad(loss))(AB, 2.0) == {'a': 6, 'b': 6}
    gc.collect()
    assert not Own.__subclasses__()
    mask = sg.stop_gradient('a')
    assert mask(Own) is mask(Own)  # an equal one, while there is one: caches stay warm


def test_threads_do_not_see_each_other():
    barrier, out = threading.Barrier(3), {}

    def run(factor):
        with sg.scale_gradient('a', factor):
            barrier.wait()
            out[factor] = grads_of(sg.stop_gradient(sg.nothing))['a']
            barrier.wait()

    threads = [threading.Thread(target=run, args=(f,)) for f in (1.0, 2.0, 3.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert out == {1.0: 3, 2.0: 6, 3.0: 9}


def test_an_error_of_the_function_leaves_nothing_open():
    def fail(info, v):
        raise RuntimeError(info.name)

    with pytest.raises(RuntimeError, match='^a'), sg.map_values('a', fail):
        Reads().apply({'params': AB})
    with pytest.raises(RuntimeError, match='^a'):
        grads_of(sg.map_gradient('a', fail))
    assert nothing_is_open()
    assert grads_of(sg.stop_gradient(sg.nothing)) == {'a': 3, 'b': 3}


def test_reads_are_not_kept_beyond_a_block_or_an_application():
    reads, mask = Reads().bind({'params': AB}), sg.map_values('a', lambda info, v: v + 1)
    for _ in range(3):
        with mask:
            reads(1.0)
    assert nothing_is_open()
    with mask:
        for _ in range(3):
            Reads().apply({'params': AB})
        assert reads_kept() == [0]
        reads(1.0)
        assert reads_kept() == [1]


def test_no_tracer_is_left_behind(no_leaks):
    for mask in (
        sg.scale_gradient('a', 2.0),
        sg.map_gradient('a', lambda i, ct: 2 * ct),
        sg.map_values('a', lambda i, v: v),
        sg.constant('a'),
        sg.replace_values('a', TREE),
    ):
        with mask:  # longer than the trace
            jax.make_jaxpr(jax.grad(lambda p: Reads().apply({'params': p})))(AB)

    def step(p, factor):
        with sg.map_gradient('a', lambda i, ct: ct * factor):
            return jax.grad(lambda p: Reads().apply({'params': p}))(p)

    assert jax.jit(step)(AB, 2.0) == {'a': 6, 'b': 3}


# Cost ---------------------------------------------------------------------------------------------


def test_a_scaled_step_costs_what_it_costs_by_hand():
    @jax.custom_vjp
    def hand_scaled(v):
        return v

    hand_scaled.defvjp(lambda v: (v, None), lambda _, ct: (ct * jnp.float32(-0.5),))

    def ours(params, x):
        with sg.scale_gradient(True, -0.5):
            return Part().apply({'params': params}, x).sum()

    def theirs(params, x):
        return Part().apply({'params': jax.tree.map(hand_scaled, params)}, x).sum()

    a, b = (jax.jit(jax.grad(f)).lower(PARAMS['part'], X).compile() for f in (ours, theirs))
    assert a.cost_analysis()['flops'] == b.cost_analysis()['flops']
    assert a.memory_analysis().temp_size_in_bytes == b.memory_analysis().temp_size_in_bytes


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'make, text',
    [
        (lambda: sg.scale_gradient('a', 'x'), "scale_gradient: factor='x'; expected a real number"),
        (
            lambda: sg.scale_gradient('a', None),
            'scale_gradient: factor=None; expected a real number',
        ),
        (lambda: sg.scale_gradient('a', float('nan')), 'factor=nan'),
        (lambda: sg.scale_gradient('a', 10**400), 'factor=1000.*; expected a real number'),
        (
            lambda: sg.scale_gradient('a', np.ones(2)),
            r'factor=array\(\[1., 1.\]\); expected a real',
        ),
        (lambda: sg.scale_gradient('a', 1j), 'expected a real number'),
        (lambda: sg.scale_gradient('a', jnp.complex64(1)), 'expected a real number'),
        (
            lambda: sg.map_gradient('a', 3),
            r'map_gradient: got an object of type int for fn; expected a '
            r'callable fn\(info, cotangent\)',
        ),
        (
            lambda: sg.map_values('a', None),
            r'map_values: got an object of type NoneType for fn; '
            r'expected a callable fn\(info, value\)',
        ),
        (lambda: sg.replace_values('a', 3), 'replace_values: got an object of type int as source'),
        (
            lambda: sg.map_values('a', lambda i, v: None)(AB),
            r"map_values\('a', <lambda> at test_siblings.py:\d+\): the function "
            r"returned .* for '/a'; "
            'expected one array',
        ),
        (lambda: sg.map_values('a', lambda i, v: (v, v))(AB), "for '/a'; expected one array"),
        (
            lambda: grads_of(sg.map_gradient('a', lambda i, ct: None)),
            r"returned an object of type NoneType for the cotangent of '/a'; expected float32\[\]",
        ),
        (
            lambda: grads_of(sg.map_gradient('a', lambda i, ct: jnp.ones(2))),
            r"returned float32\[2\] for the cotangent of '/a'; expected float32\[\]",
        ),
        (
            lambda: grads_of(sg.map_gradient('a', lambda i, ct: ct.astype(jnp.float16))),
            r"returned float16\[\] for the cotangent of '/a'",
        ),
        (
            lambda: sg.replace_values('a', {'b': 1.0})(AB),
            r"replace_values\('a', <tree>\): the source has no variable 'a' to read "
            r"instead of '/a'. It "
            "has: 'b'. Its paths are those of the module",
        ),
        (lambda: sg.replace_values('a', {'params': AB})(AB), "It has: 'params'"),
        (lambda: sg.replace_values('a', {'a': {'x': 1.0}})(AB), "the source has no variable 'a'"),
        (
            lambda: sg.replace_values('a', {'a': jnp.ones(2)})(AB),
            r"the source has shape \(2,\) for 'a'; expected shape \(\), as '/a' is",
        ),
        (lambda: sg.replace_values('a', 'average')(AB), "Pass a collection 'average' with it"),
        (
            lambda: grads_of(sg.replace_values('a', 'average')),
            "no variable '/a' to read instead of '/a'",
        ),
    ],
)
def test_errors(make, text):
    with pytest.raises(sg.UsageError, match=text):
        make()
    assert nothing_is_open()


@pytest.mark.parametrize(
    'make',
    [
        lambda p, **k: sg.scale_gradient(p, 2.0, **k),
        lambda p, **k: sg.map_gradient(p, min, **k),
        lambda p, **k: sg.map_values(p, min, **k),
        lambda p, **k: sg.replace_values(p, 'x', **k),
        sg.constant,
    ],
)
def test_errors_that_all_transforms_share(make):
    with pytest.raises(sg.PredicateError, match='expected a string'):
        make(3)
    with pytest.raises(sg.PredicateError, match='collections=3'):
        make('a', collections=3)
    with pytest.raises(sg.UnmatchedPathError, match=r"matches 'c'\. There are: "):
        make('c')(AB)
    with pytest.raises(
        sg.UsageError, match='expected a flax.linen.Module( or flax.nnx.Module)? class or instance'
    ):
        make('a')(3)
    assert make('c', allow_unmatched=True)(AB) == AB


def test_repr_shows_what_was_written():
    def f(info, v):
        return v

    line = f.__code__.co_firstlineno
    assert repr(sg.scale_gradient('a', -1)) == "scale_gradient('a', -1.0)"
    assert repr(sg.map_values('a', f)) == f"map_values('a', f at test_siblings.py:{line})"
    assert repr(sg.replace_values(True, 'ema')) == "replace_values(everything, 'ema')"
    assert repr(sg.constant('a', collections=True)) == "constant('a', collections=True)"


def test_an_optimiser_step_with_a_reversed_part():
    """Two players of one game: gradient descent for one, ascent for the other, by one optimiser."""

    def game(params):
        return params['x'] ** 2 - params['y'] ** 2 + params['x'] * params['y']

    params, optimiser = {'x': 1.0, 'y': 1.0}, optax.sgd(0.1)
    state, reverse = optimiser.init(params), sg.scale_gradient('y', -1)
    for _ in range(100):
        grads = jax.grad(lambda p: game(reverse(p)))(params)
        updates, state = optimiser.update(grads, state)
        params = optax.apply_updates(params, updates)
    assert all(abs(v) < 1e-3 for v in params.values())


@pytest.mark.parametrize('rule', [jnp.zeros_like, lambda ct: jnp.array(3.0), lambda ct: 3.0 * 0])
def test_a_cotangent_that_is_a_constant_is_an_array(rule):
    t = sg.map_gradient('w', lambda info, ct: jnp.broadcast_to(rule(ct), ct.shape))
    for shape in ((), (2,)):
        grads = jax.grad(lambda p: 5 * t(p)['w'].sum())({'w': jnp.ones(shape)})
        assert isinstance(grads['w'], jax.Array) and grads['w'].shape == shape
