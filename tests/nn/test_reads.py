"""Every form of read, under a block and after it.

Each form is a module that reads its variables in one way. Each host uses a form several times, some
of them inside a block, and reaches it in one way. The oracle knows neither blocks nor hosts: it
applies the form by itself, with plain Flax, once for each use, to the parameters or to a copy that
`jax.lax.stop_gradient` went over.
"""

import collections
import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_sg as sg
from flax_sg import nn

X = jnp.array([[0.5, -1.0, 2.0]])
ones = nn.initializers.ones


def near_one(key, shape, dtype=None):
    return 1 + 0.1 * jax.random.normal(key, shape)


# Forms -------------------------------------------------------------------------------------------


class Param(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x * self.param('w', near_one, (3,))


class Variable(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = lambda: near_one(self.make_rng('params'), (3,))
        return x * self.variable('params', 'w', init).value


class GetVariable(nn.Module):
    def setup(self):
        self.param('w', near_one, (3,))

    def __call__(self, x):
        return x * self.get_variable('params', 'w')


class Variables(nn.Module):
    def setup(self):
        self.dense = nn.Dense(3, bias_init=near_one)

    def __call__(self, x):
        return self.dense(x) * self.variables['params']['dense']['bias']


class SubTree(nn.Module):
    def setup(self):
        self.dense = nn.Dense(3, bias_init=near_one)

    def __call__(self, x):
        return self.dense(x) * self.get_variable('params', 'dense')['bias']


class SetupParam(nn.Module):
    def setup(self):
        self.w = self.param('w', near_one, (3,))

    def __call__(self, x):
        return x * self.w


class SetupDerived(nn.Module):
    def setup(self):
        self.w = self.param('w', near_one, (3,))
        self.both = {'exp': jnp.exp(self.w), 'parts': [self.w * 2, nn.Dense(3)]}

    def __call__(self, x):
        return self.both['parts'][1](x) * self.both['exp'] + self.both['parts'][0]


def times(x, w):
    return x * w


class Held:
    """An object of the user's, which nothing can look into."""

    def __init__(self, w):
        self.w = w

    def times(self, x):
        return x * self.w


class SetupClosure(nn.Module):
    """A callable may hold what was read in setup in one of these places, and in no other."""

    def setup(self):
        w = self.param('w', near_one, (3,))

        def only(x, *, w=jnp.sin(w)):  # noqa: B008
            return x * w

        def power(x, n=2):
            return power(x, n - 1) * w if n else x

        self.closure = lambda x: x * w
        self.default = lambda x, w=w: x * w
        self.keyword_only = only
        self.method = Held(jnp.cos(w)).times
        self.argument = functools.partial(times, jnp.exp(w))
        self.keyword = functools.partial(times, w=w**2)
        self.function = functools.partial(lambda x, scale: x * w**3 * scale, scale=2.0)
        self.recursive = power

    def __call__(self, x):
        return (
            self.closure(x)
            + self.default(x)
            + self.keyword_only(x)
            + self.method(x)
            + self.argument(x)
            + self.keyword(x)
            + self.function(x)
            + self.recursive(x)
        )


class SetupBuiltins(nn.Module):
    """What was read in setup is held by methods of Python's own objects, and by a function's."""

    def setup(self):
        w = self.param('w', near_one, (3,))

        def attribute(x):
            return x * attribute.w

        attribute.w = jnp.sin(w)
        self.look, self.item, self.attribute = {'w': w}.get, [jnp.exp(w)].__getitem__, attribute

    def __call__(self, x):
        return x * self.look('w') + self.item(0) + self.attribute(x)


class SetupClasses(nn.Module):
    """What was read in setup is in the closure of a class that was defined there."""

    def setup(self):
        w = self.param('w', near_one, (3,))

        class Times(nn.Module):
            def __call__(self, x):
                return x * w

        class Sine(nn.Module):
            @property
            def w(self):
                return jnp.sin(w)

        class Below(Times):
            def __call__(self, x):
                return super().__call__(x) + 1

        class Kept(nn.Module):
            @functools.cached_property
            def twice(self):
                return w * 2

            part = functools.partialmethod(lambda self, w: w, w=jnp.exp(w))

        class Holds:
            cube = w**3

        class One:
            def __call__(self, x):
                return Other.times(x)

        class Other:
            one = One

            @staticmethod
            def times(x):
                return x * w

        box = Held(jnp.tanh(w))
        self.times, self.chain = Times(), nn.Sequential([Below(), lambda x: x])
        self.several, self.holds = {'sine': Sine()}, Holds
        self.other, self.one, self.kept = Other, One, Kept()
        self.boxed = type(
            'Boxed',
            (nn.Module,),
            {'__call__': lambda self, x: box.times(x), '__module__': __name__},
        )()

    def __call__(self, x):
        return (
            self.times(x)
            + self.chain(x) * self.several['sine'].w
            + self.holds.cube
            + self.one()(x) * self.kept.twice
            + self.kept.part()
            + self.other.times(x)
            + self.boxed(x)
        )


class SetupFills(nn.Module):
    """Attributes that there were before setup: it sets them anew, or fills them."""

    items: list = dataclasses.field(default_factory=list, init=False)

    def __post_init__(self):
        self.w, self.none, self.store = None, None, {'w': jnp.ones(3)}
        object.__setattr__(self, 'queue', collections.deque())
        object.__setattr__(self, 'box', Held(None))
        super().__post_init__()

    def setup(self):
        self.w = self.param('w', near_one, (3,))
        self.none = jnp.exp(self.w)
        self.store['w'] = jnp.sin(self.w)
        self.items = [self.w**2]
        self.queue.append(jnp.tanh(self.w))
        self.box.w = self.w**3

    def __call__(self, x):
        return (
            x * self.w
            + self.none * self.store['w'] * x
            + self.items[0]
            + self.queue[0] * x
            + self.box.times(x)
        )


class Times(nn.Module):
    w: jax.Array

    @nn.compact
    def __call__(self, x):
        return x * self.w * self.param('v', near_one, (3,))


class SetupPassesOn(nn.Module):
    """What was read in setup goes into fields of submodules, and into closures over self."""

    def setup(self):
        self.w = self.param('w', near_one, (3,))
        self.times = Times(self.w)
        self.chain = nn.Sequential([nn.Dense(3), lambda x, w=self.w: x * w])
        self.method = lambda x: self.times(x) * self.w

    def __call__(self, x):
        return self.times(x) + self.chain(x) + self.method(x)


class SetupDerivedBelow(nn.Module):
    def setup(self):
        self.sub = SetupDerived()
        self.own = jnp.sin(self.sub.w)

    def __call__(self, x):
        return self.sub(x) + self.own + self.sub.both['exp']


class SetupShadowsDefault(nn.Module):
    w = None

    def setup(self):
        self.w = self.param('w', near_one, (3,))

    def __call__(self, x):
        return x * self.w


class Embed(nn.Module):
    def setup(self):
        self.embed = nn.Embed(5, 3)

    def __call__(self, x):
        return self.embed(jnp.array([1])) * x + self.embed.embedding[2] + self.embed.attend(x).sum()


class LocalAttribute(nn.Module):
    @nn.compact
    def __call__(self, x):
        embed = nn.Embed(5, 3)
        return embed(jnp.array([0])) * x + embed.embedding[1]


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, bias_init=near_one)(nn.tanh(nn.Dense(4, bias_init=near_one)(x)))


class Containers(nn.Module):
    def setup(self):
        self.layers = [nn.Dense(3), nn.Dense(3)]
        self.named = {'a': nn.Dense(3), 'b': (nn.Dense(3),)}
        self.chain = nn.Sequential([nn.Dense(3), nn.tanh, nn.Dense(3)])

    def __call__(self, x):
        for layer in (*self.layers, self.named['a'], self.named['b'][0], self.chain):
            x = nn.tanh(layer(x))
        return x


class Deep(nn.Module):
    depth: int = 3

    @nn.compact
    def __call__(self, x):
        x = x * self.param('w', near_one, (3,))
        return Deep(self.depth - 1)(x) if self.depth else SetupDerived()(x)


class Lora(nn.Module):
    base: nn.Module

    def setup(self):
        nn.share_scope(self, self.base)

    @nn.compact
    def __call__(self, x):
        return self.base(x) + x * self.param('a', near_one, (3,))


class LoraChild(nn.Module):
    def setup(self):
        self.child = Dense()
        nn.share_scope(self, self.child)

    @nn.compact
    def __call__(self, x):
        return self.child(x) + x * self.param('a', near_one, (3,))


class LoraHost(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Lora(nn.Dense(3))(x)


class NoWrap(nn.Module):
    def setup(self):
        self.w = self.param('w', near_one, (3,))
        self.dense = nn.Dense(3)

    @nn.nowrap
    def helper(self, x):
        return self.dense(x) * self.w

    def __call__(self, x):
        return self.helper(x)


class NameScope(nn.Module):
    @nn.compact_name_scope
    def up(self, x):
        return nn.Dense(3)(x)

    def __call__(self, x):
        return self.up(x)


class Property(nn.Module):
    def setup(self):
        self.raw = self.param('raw', near_one, (3,))

    @property
    def w(self):
        return jnp.exp(self.raw)

    def __call__(self, x):
        return x * self.w


class CachedBase(nn.Module):
    def setup(self):
        self.raw = self.param('raw', near_one, (3,))

    @functools.cached_property
    def w(self):
        return jnp.exp(self.raw)


class CachedProperty(CachedBase):
    @functools.cached_property
    def v(self):
        return jnp.sin(self.raw)

    def __call__(self, x):
        return x * self.w + self.v


class Share(nn.Module):
    dense: nn.Module

    def __call__(self, x):
        return self.dense(x)


class Field(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(3)
        return Share(dense)(x) + dense(x)


class ByArgument(nn.Module):
    def setup(self):
        self.dense = SetupDerived()

    def __call__(self, x):
        return self.use(self.dense, x)

    def use(self, dense, x):
        return dense(x) + dense.w


class Body(nn.Module):
    @nn.compact
    def __call__(self, c, x):
        c = nn.tanh(nn.Dense(3)(c) * self.param('w', near_one, (3,)) + x)
        return c, c.sum()


def scan(**kwargs):
    class Scan(nn.Module):
        @nn.compact
        def __call__(self, x):
            c, ys = nn.scan(Body, length=3, in_axes=nn.broadcast, **kwargs)()(x, x)
            return c + ys.sum()

    return Scan()


class LayerScan(nn.Module):
    """A scan over layers, whose body is a method with values from setup."""

    def setup(self):
        self.w = self.param('w', near_one, (3,))
        self.dense = nn.Dense(3)

    @functools.partial(nn.scan, variable_broadcast='params', split_rngs={'params': False}, length=2)
    def step(self, c, _):
        return nn.tanh(self.dense(c) * self.w), None

    def __call__(self, x):
        return self.step(x, None)[0]


class Vmap(nn.Module):
    axis: int | None

    @nn.compact
    def __call__(self, x):
        lifted = nn.vmap(
            Dense,
            variable_axes={'params': self.axis},
            in_axes=0,
            split_rngs={'params': self.axis is not None},
        )
        return lifted()(jnp.stack([x, 2 * x])).sum(0)


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(SetupDerived)()(x) + nn.remat(Dense)()(x)


class Jit(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.jit(SetupDerived)()(x) + nn.jit(Dense)()(x) + nn.jit(Dense)()(x)


class JitMethod(nn.Module):
    def setup(self):
        self.w = self.param('w', near_one, (3,))

    @nn.jit
    def __call__(self, x):
        return x * self.w


class RematScan(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat_scan(Dense, lengths=(2, 2))()(x)


class WhileLoop(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param('w', near_one, (3,))
        self.variable('state', 'n', lambda: 0)
        step = lambda mdl, c: jax.lax.stop_gradient(c * mdl.get_variable('params', 'w'))
        if not self.is_initializing():
            start = jnp.abs(jax.lax.stop_gradient(x))
            c = nn.while_loop(
                lambda mdl, c: c.sum() < 5, step, self, start, broadcast_variables='params'
            )
        else:
            c = x
        return x * w + c


class Cond(nn.Module):
    def setup(self):
        self.a, self.b = nn.Dense(3), SetupDerived()

    def __call__(self, x):
        if self.is_initializing():
            return self.a(x) + self.b(x)
        yes = lambda mdl, x: mdl.a(x)
        no = lambda mdl, x: mdl.b(x)
        return (
            nn.cond(x.sum() > 0, yes, no, self, x)
            + nn.cond(x.sum() < 0, yes, no, self, x)
            + (nn.switch(1, [yes, no], self, x))
        )


class CustomVjp(nn.Module):
    @nn.compact
    def __call__(self, x):
        def forward(mdl, x):
            return nn.vjp(lambda mdl, x: mdl(x), mdl, x)

        def backward(pullback, ct):
            params, x = pullback(ct)
            return jax.tree.map(lambda g: 2 * g, params), x

        f = nn.custom_vjp(lambda mdl, x: mdl(x), forward, backward)
        return f(nn.Dense(3), x)


class VjpInput(nn.Module):
    """A derivative with respect to the input, inside the form."""

    @nn.compact
    def __call__(self, x):
        y, pullback = nn.vjp(lambda mdl, x: nn.tanh(mdl(x)), nn.Dense(3), x)
        return pullback(jnp.ones_like(y))[1]


class Jvp(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(3)
        if self.is_initializing():
            return dense(x)
        return nn.jvp(lambda mdl, x: nn.tanh(mdl(x)), dense, (x,), (x,), {})[1]


class Grad(nn.Module):
    @nn.compact
    def __call__(self, x):
        grads = nn.grad(lambda mdl, x: nn.tanh(mdl(x)).sum(), nn.Dense(3), x)
        return grads[0] if isinstance(grads, tuple) else grads


class MapVariables(nn.Module):
    @nn.compact
    def __call__(self, x):
        squared = nn.map_variables(
            Dense, 'params', lambda v: jax.tree.map(jnp.square, v), init=self.is_initializing()
        )
        return squared()(x)


class Norms(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.WeightNorm(nn.Dense(3))(x)
        return nn.SpectralNorm(nn.Dense(3))(x, update_stats=False)


class BatchNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        rows = jnp.concatenate([x, 2 * x, x**2])
        return nn.BatchNorm(use_running_average=False)(rows) * jnp.array([[1.0], [2], [4]]) + x


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        xs = jnp.stack([x, 2 * x], axis=1)
        return nn.RNN(nn.LSTMCell(3))(xs).sum(1) + nn.RNN(nn.GRUCell(3), reverse=True)(xs).sum(1)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.stack([x[0], x[0] ** 2])[None]
        # A softmax is the same whatever the bias of the keys is.
        attend = nn.MultiHeadDotProductAttention(num_heads=1, use_bias=False)
        return attend(nn.LayerNorm()(x)).sum((0, 1))[None]


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(near_one, ('model',))
        logical = nn.with_logical_partitioning(near_one, ('embed',))
        return x * self.param('w', init, (3,)) + self.param('v', logical, (3,))


class Dropout(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.5, deterministic=False)(nn.Dense(3)(x))
        return x + jax.random.normal(self.make_rng('dropout'), x.shape)


class RandomSetup(nn.Module):
    def setup(self):
        self.noise = jax.random.normal(self.make_rng('dropout'), (3,)) * self.param('w', ones, (3,))

    def __call__(self, x):
        return x * self.noise + jax.random.normal(self.make_rng('dropout'), (3,))


def named(*forms):
    return {type(form).__name__: form for form in forms}


# Forms that are nothing but reads, and forms with a control flow or a size worth compiling once.
SMALL = named(
    Param(),
    Variable(),
    GetVariable(),
    Variables(),
    SubTree(),
    SetupParam(),
    SetupDerived(),
    SetupClosure(),
    SetupBuiltins(),
    SetupClasses(),
    SetupFills(),
    SetupPassesOn(),
    SetupDerivedBelow(),
    SetupShadowsDefault(),
    Embed(),
    LocalAttribute(),
    Dense(),
    Containers(),
    Deep(),
    LoraHost(),
    LoraChild(),
    NoWrap(),
    Property(),
    CachedProperty(),
    Field(),
    ByArgument(),
    MapVariables(),
    Norms(),
    BatchNorm(),
    Boxed(),
    Dropout(),
    RandomSetup(),
    VjpInput(),
    Jvp(),
    Grad(),
    JitMethod(),
)
LARGE = named(
    LayerScan(),
    Remat(),
    Jit(),
    RematScan(),
    WhileLoop(),
    Cond(),
    CustomVjp(),
    Recurrent(),
    Attention(),
)
LARGE |= {
    'ScanBroadcast': scan(variable_broadcast='params', split_rngs={'params': False}),
    'ScanSplit': scan(variable_axes={'params': 0}, split_rngs={'params': True}),
    'VmapShared': Vmap(None),
    'VmapSplit': Vmap(0),
}


# Hosts -------------------------------------------------------------------------------------------
# `uses` is a string: M is a use inside the block, L one outside. Outputs are summed with weights.


def add_up(uses, weights, live, masked):
    calls = {'L': live, 'M': masked}
    return sum(w * calls[use]() for use, w in zip(uses, weights, strict=True))


class Host(nn.Module):
    form: nn.Module
    block: object
    uses: str

    def in_block(self, f):
        with self.block:
            return f()

    def both(self, f, weights):
        return add_up(self.uses, weights, f, lambda: self.in_block(f))


class SetupHost(Host):
    def setup(self):
        self.f = self.form.copy(name=None, parent=None)

    def __call__(self, x, weights):
        return self.both(lambda: self.f(x), weights)


class LocalHost(Host):
    """The module is a local made before the block, called by a method kept from then."""

    @nn.compact
    def __call__(self, x, weights):
        kept = self.form.copy(name='f').__call__
        return self.both(lambda: kept(x), weights)


class FirstUseHost(Host):
    """The module is made where it is first used, in the block or not."""

    @nn.compact
    def __call__(self, x, weights):
        made = []

        def call():
            if not made:
                made.append(self.form.copy(name='f'))
            return made[0](x)

        return self.both(call, weights)


class User(Host):
    def __call__(self, f, x, weights):
        return self.both(lambda: f(x), weights)


class ArgumentHost(Host):
    """The module is handed to another one, which opens the block."""

    @nn.compact
    def __call__(self, x, weights):
        f = self.form.copy(name='f')
        return User(None, self.block, self.uses)(f, x, weights)


class FieldHost(Host):
    """The module is a field of another one, which is used in the block."""

    @nn.compact
    def __call__(self, x, weights):
        f = self.form.copy(name='f')
        shares = {'L': Share(f), 'M': Share(f)}
        return add_up(
            self.uses,
            weights,
            lambda: shares['L'](x),
            lambda: self.in_block(lambda: shares['M'](x)),
        )


class MirrorHost(Host):
    """The masked uses are of a mirror of the live module."""

    def setup(self):
        self.f = self.form.copy(name=None, parent=None)
        self.frozen = self.block(self.f)

    def __call__(self, x, weights):
        return add_up(self.uses, weights, lambda: self.f(x), lambda: self.frozen(x))


class MethodHost(Host):
    """The masked uses are by a decorated method."""

    def setup(self):
        self.f = self.form.copy(name=None, parent=None)

    def __call__(self, x, weights):
        held = self.block(type(self).use)
        return add_up(self.uses, weights, lambda: self.use(x), lambda: held(self, x))

    def use(self, x):
        return self.f(x)


class NestedHost(Host):
    """The form is two modules below the one that opens the block."""

    @nn.compact
    def __call__(self, x, weights):
        f = Share(Share(self.form.copy(name=None, parent=None)))
        return self.both(lambda: f(x), weights)


class ClosureHost(Host):
    """The module is captured by one function object that JAX traces and caches."""

    def setup(self):
        self.f = self.form.copy(name=None, parent=None)

    def __call__(self, x, weights):
        run = lambda x: self.f(x)
        run = run if self.is_initializing() else jax.checkpoint(run)
        return self.both(lambda: run(x), weights)


class Applied:
    """Blocks outside all modules: around apply, jitted apply, and calls of a bound module."""

    def __init__(self, form, block, uses, how):
        self.form, self.block, self.uses, self.how = form, block, uses, how

    def init(self, rngs, x, weights):
        with self.block:
            return self.form.init(rngs, x)

    def apply(self, variables, x, weights, **kwargs):
        apply = functools.partial(self.form.apply, **kwargs)
        if self.how == 'bind':
            run = self.form.bind(variables, **kwargs)
        elif self.how == 'jit':
            jitted = jax.jit(apply)
            run = lambda x: jitted(variables, x)[0]
        else:
            run = lambda x: apply(variables, x)[0]

        def masked():
            with self.block:
                return run(x)

        return add_up(self.uses, weights, lambda: run(x), masked), None


HOSTS = {
    host.__name__: host
    for host in (
        SetupHost,
        LocalHost,
        FirstUseHost,
        ArgumentHost,
        FieldHost,
        MirrorHost,
        MethodHost,
        NestedHost,
        ClosureHost,
    )
}
HOSTS |= {how: functools.partial(Applied, how=how) for how in ('apply', 'jit', 'bind')}


class NoBlock:
    """What stands for the block in the oracle, which is plain Flax."""

    def __call__(self, target):
        return target

    def __enter__(self):
        pass

    def __exit__(self, *error):
        pass


# The oracle --------------------------------------------------------------------------------------
# The output is a weighted sum of uses, so the two-copy meaning comes out of the unmasked program:
# where a variable is selected, its derivative is that of the program with weight 0 on uses inside
# blocks; elsewhere, and for the input, it is that of the unmasked program.


def rngs():
    return {'params': jax.random.key(0), 'dropout': jax.random.key(1)}


def derivatives(host, others, jit):
    """Return a function of (params, x, weights) that gives the output and its gradient."""

    def loss(params, x, weights):
        out, _ = host.apply(
            {'params': params, **others},
            x,
            weights,
            rngs={'dropout': rngs()['dropout']},
            mutable=[*others, 'none'],
        )
        return out.sum()

    run = jax.value_and_grad(loss, (0, 1))
    return jax.jit(run) if jit else run


def check(form, host, uses, predicate=True, selects=lambda names: True, *, jit=False):
    weights = [float(i + 1) for i in range(len(uses))]
    only_live = [w if use == 'L' else 0.0 for w, use in zip(weights, uses, strict=True)]
    plain, masked = host(form, NoBlock(), uses), host(form, sg.stop_gradient(predicate), uses)

    variables = plain.init(rngs(), X, weights)
    jax.tree.map(np.testing.assert_array_equal, variables, masked.init(rngs(), X, weights))
    params = variables['params']
    others = {name: tree for name, tree in variables.items() if name != 'params'}

    value, (got, got_x) = derivatives(masked, others, jit)(params, X, weights)
    oracle = derivatives(plain, others, jit)
    full_value, (full, full_x) = oracle(params, X, weights)
    _, (live, _) = oracle(params, X, only_live)
    if jit:
        np.testing.assert_allclose(value, full_value, rtol=1e-6)
    else:
        np.testing.assert_array_equal(value, full_value)
    np.testing.assert_allclose(got_x, full_x, rtol=1e-5, atol=1e-6)

    def compare(path, got, full, live):
        names = [str(key.key) for key in path if hasattr(key, 'key')]
        want = live if selects(names) else full
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg='/'.join(names))
        if selects(names) and 'L' not in uses:
            np.testing.assert_array_equal(got, 0)
        # What is compared must be able to differ, in each variable.
        assert np.abs(full).max() > 1e-3 and np.abs(full - live).max() > 1e-3, names

    jax.tree_util.tree_map_with_path(compare, got, full, live)
    assert np.abs(full_x).max() > 1e-3


# Every form with these, and with some of the other hosts in turn: all pairs take too long.
ALWAYS = ('SetupHost', 'FirstUseHost', 'MirrorHost', 'apply')
IN_TURN = [host for host in HOSTS if host not in ALWAYS]


# Drawing keys in a cached trace repeats them, with and without blocks.
CANNOT = [(form, 'ClosureHost') for form in ('Dropout', 'RandomSetup')]
PAIRS = [
    (form, host)
    for i, form in enumerate(SMALL)
    for host in (*ALWAYS, *(IN_TURN[(2 * i + k) % len(IN_TURN)] for k in range(2)))
]


@pytest.mark.thinned(10)
@pytest.mark.parametrize('form, host', [pair for pair in PAIRS if pair not in CANNOT])
def test_reads_inside_are_stopped_and_reads_outside_are_live(form, host):
    check(SMALL[form], HOSTS[host], 'MLM')
    if host == 'FirstUseHost':
        check(SMALL[form], HOSTS[host], 'LM')


@pytest.mark.thinned(7)
@pytest.mark.parametrize(
    'form, host',
    [
        *((form, host) for i, form in enumerate(LARGE) for host in ('SetupHost', 'apply')[i % 2 :]),
        *((form, 'MirrorHost') for form in ('LayerScan', 'ScanSplit')),
    ],
)
def test_reads_of_lifted_and_large_modules(form, host):
    check(LARGE[form], HOSTS[host], 'MLM', jit=True)


@pytest.mark.thinned(4)
@pytest.mark.parametrize('host', ['SetupHost', 'bind', 'MirrorHost'])
@pytest.mark.parametrize('form', ['SetupDerivedBelow', 'Embed', 'Dense', 'Boxed', 'JitMethod'])
def test_alternating_three_times(form, host):
    check(SMALL[form], HOSTS[host], 'M')
    check(SMALL[form], HOSTS[host], 'MLMLML')
    check(SMALL[form], HOSTS[host], 'LMLMLM')


@pytest.mark.thinned(5)
@pytest.mark.parametrize('host', HOSTS)
@pytest.mark.parametrize('form', ['SetupDerivedBelow', 'Norms'])
def test_what_is_not_selected_stays_live(form, host):
    ends = ('w', 'kernel', 'scale')
    check(
        SMALL[form],
        HOSTS[host],
        'MLM',
        lambda v: v.path[-1].endswith(ends),
        lambda names: names[-1].endswith(ends),
    )


@pytest.mark.parametrize('first', ['live', 'held'])
@pytest.mark.parametrize('form', [name for name in SMALL if name.startswith('Setup')])
def test_what_setup_makes_is_live_then_held_then_live(form, first):
    model, x = SMALL[form], jnp.linspace(0.5, 1, 3).reshape(1, 3)
    params = model.init(jax.random.key(0), x)['params']

    def run(p):
        module = model.bind({'params': p})
        live = module(x).sum() if first == 'live' else 0
        with sg.stop_gradient(True):
            held = module(x).sum()
        return live + 10 * held + 100 * module(x).sum()

    once = jax.grad(lambda p: model.apply({'params': p}, x).sum())(params)
    times = 101 if first == 'live' else 100
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, times * b, rtol=1e-4, atol=1e-4),
        jax.grad(run)(params),
        once,
    )


def by_class(w):
    class Local(nn.Module):
        def __call__(self, x):
            return x * w

    return Local()


def by_base(w):
    class Base(nn.Module):
        def __call__(self, x):
            return x * w

    return type('Below', (Base,), {'__module__': __name__})()


def by_default(w):
    return lambda x, w=w: x * w


def by_keyword(w):
    return lambda x, *, w=w: x * w


def by_attribute(w):
    def f(x):
        return x * f.w

    f.w = w
    return f


HOLDERS = {
    'a field': lambda w: Times(w),
    'a class': by_class,
    'a base class': by_base,
    'a default': by_default,
    'a keyword': by_keyword,
    'an attribute': by_attribute,
    'a closure': lambda w: lambda x: x * w,
    'a method': lambda w: Held(w).times,
    'a method of Python': lambda w: (lambda get: lambda x: x * get('w'))({'w': w}.get),
    'a partial': lambda w: functools.partial(jnp.multiply, w),
}


class Fills(nn.Module):
    """setup fills a list that was there before with what holds a variable in some way."""

    by: str

    def __post_init__(self):
        object.__setattr__(self, 'queue', collections.deque())
        super().__post_init__()

    def setup(self):
        self.queue.clear()
        self.queue.append(HOLDERS[self.by](self.param('w', near_one, (3,))))

    def __call__(self, x):
        held = self.queue[0]
        return x * held.w if isinstance(held, Times) else held(x)


@pytest.mark.parametrize('order', ['held', 'live held live'])
@pytest.mark.parametrize('by', HOLDERS)
def test_what_setup_fills_a_list_with(by, order):
    def run(p):
        module, total = Fills(by).bind({'params': {'w': p}}), 0
        for way in order.split():
            with sg.stop_gradient(True) if way == 'held' else contextlib.nullcontext():
                total += module(jnp.ones(3)).sum()
        return total

    np.testing.assert_array_equal(
        jax.grad(run)(jnp.ones(3)), order.split().count('live') * jnp.ones(3)
    )


@pytest.mark.parametrize(
    't',
    [
        sg.replace_values('w', {'w': jnp.ones(3)}),
        sg.map_gradient('w', lambda i, ct: ct * jnp.ones(3)),
    ],
)
def test_a_part_of_a_lifted_class_stays_the_same_module_in_a_block(t):
    class Whole(nn.Module):
        def setup(self):
            self.w = self.param('w', near_one, (3,))
            self.parts = [t(Param)()]

    whole = Whole().bind({'params': {'w': jnp.ones(3), 'parts_0': {'w': 2 * jnp.ones(3)}}})
    part = whole.parts[0]
    with sg.stop_gradient(True):
        assert whole.parts[0] is part and whole.w.shape == (3,)


def test_what_flax_keeps_in_a_module_is_not_what_setup_makes():
    class Fresh(nn.Module):
        def setup(self):
            self.w = self.param('w', near_one, (3,))
            self.times = Times(self.w)

        def __call__(self, x):
            return self.times(x)

    def run(params):
        module = Fresh().bind(params)
        live = module(X).sum()
        with sg.stop_gradient(True):
            return live + module(X).sum()

    jax.grad(run)(Fresh().init(jax.random.key(0), X))
    ours = type(vars(Fresh)['w'])
    assert {n for n, member in vars(Fresh).items() if type(member) is ours} == {'w', 'times'}
