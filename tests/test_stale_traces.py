"""JAX caches traces by function object; a block must never meet the trace of another one.

Each test runs the same objects masked, unmasked and differently masked, in every order. The loss is
2a + 3b with a, b = 1, so that the gradients are 2 and 3 where they are live and 0 where stopped.
"""

import itertools
import random
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_sg as sg
from flax_sg import nn
from internals import context, fresh_contexts, owned_contexts

MASKS = {'live': None, 'a': sg.stop_gradient('a'), 'b': sg.stop_gradient(lambda v: v.name == 'b')}
WANT = {'live': (2, 3), 'a': (0, 3), 'b': (2, 0)}
ORDERS = list(itertools.permutations(MASKS)) + [('a', 'live', 'a', 'b', 'live', 'b', 'a')]
PARAMS = {'a': jnp.ones(()), 'b': jnp.ones(())}


class Two(nn.Module):
    def setup(self):
        self.a = self.param('a', nn.initializers.ones, ())
        self.b = self.param('b', nn.initializers.ones, ())

    def __call__(self, x):
        return (2 * self.a + 3 * self.b) * x


class JitTwo(nn.Module):
    """As above, in methods that Flax traces and caches itself."""

    @nn.jit
    @nn.compact
    def __call__(self, x):
        a = self.param('a', nn.initializers.ones, ())
        return (2 * a + 3 * self.param('b', nn.initializers.ones, ())) * x


def run_in(mask, f, *args):
    if MASKS[mask] is None:
        return f(*args)
    with MASKS[mask]:
        return f(*args)


def through_scan(body):
    return lambda x: jax.lax.scan(body, x * 0, jnp.ones(1))[0] * x


# Each makes one function object that reads the bound module, to be called under several masks.
TRACERS = {
    'jit': lambda m: jax.jit(lambda x: m(x)),
    'checkpoint': lambda m: jax.checkpoint(lambda x: m(x)),
    'scan': lambda m: through_scan(lambda c, x: (c + m(x), None)),
    'cond': lambda m: (lambda yes, no: lambda x: jax.lax.cond(x > 0, yes, no, x))(
        lambda x: m(x), lambda x: x * 0
    ),
    'while': lambda m: (lambda body: lambda x: jax.lax.fori_loop(0, 1, body, x * 0) * x)(
        lambda i, c: c + m(jnp.ones(()))
    ),
    'vmap of jit': lambda m: (lambda f: lambda x: jax.vmap(f)(x[None])[0])(jax.jit(lambda x: m(x))),
    'custom_jvp': lambda m: m,
    'method': lambda m: m.__call__,
}


@pytest.mark.thinned(6)
@pytest.mark.parametrize('order', ORDERS, ids=' '.join)
@pytest.mark.parametrize('name', TRACERS)
@pytest.mark.parametrize('module', [Two, JitTwo])
def test_a_function_of_a_bound_module(module, name, order):
    def loss(params):
        f = TRACERS[name](module().bind({'params': params}))
        return jnp.stack([run_in(mask, f, jnp.ones(())) for mask in order])

    jacobian = jax.jacrev(loss)(PARAMS)
    got = list(zip(jacobian['a'].tolist(), jacobian['b'].tolist(), strict=True))
    assert got == [WANT[mask] for mask in order]


@pytest.mark.parametrize('order', ORDERS, ids=' '.join)
@pytest.mark.parametrize('name', [n for n in TRACERS if n != 'custom_jvp'])
def test_blocks_inside_a_module(name, order):
    class Model(nn.Module):
        def setup(self):
            self.two = Two()

        def __call__(self, x):
            f = TRACERS[name](self.two)
            held = {
                'a': sg.stop_gradient('two/a'),
                'b': sg.stop_gradient(lambda v: v.name[-1] == 'b'),
            }
            out = []
            for mask in order:
                if mask == 'live':
                    out.append(f(x))
                else:
                    with held[mask]:
                        out.append(f(x))
            return jnp.stack(out)

    jacobian = jax.jit(jax.jacrev(Model().apply))({'params': {'two': PARAMS}}, jnp.ones(()))
    two = jacobian['params']['two']
    got = list(zip(two['a'].tolist(), two['b'].tolist(), strict=True))
    assert got == [WANT[mask] for mask in order]


BLOCKS = {
    '': sg.stop_gradient(sg.nothing),
    'a': sg.stop_gradient('two/a'),
    'b': sg.stop_gradient(lambda v: v.name == 'two/b'),
    'ab': sg.stop_gradient('two'),
}


def plans(rng, depth=0):
    """Make a random list of calls of functions and of blocks that hold such a list."""
    plan = []
    for _ in range(rng.randint(1, 4)):
        if depth < 2 and rng.random() < 0.6:
            plan.append((rng.choice(list(BLOCKS)), plans(rng, depth + 1)))
        else:
            plan.append(rng.randrange(5))
    return plan


class Nest(nn.Module):
    """Runs cached functions of a submodule in the blocks of a plan, or lets its caller do so."""

    plans: tuple = ()

    def setup(self):
        self.two = Two()
        self.attribute = jnp.sin(self.two.a)

    def functions(self):
        helper = jax.jit(lambda x: x * self.two(jnp.ones(())))

        def opens(x):
            with BLOCKS['a']:
                inside = helper(x)
            return inside + helper(x)

        return [
            jax.jit(lambda x: self.two(x)),
            jax.checkpoint(lambda x: self.two.a * x),
            helper,
            through_scan(lambda c, x: (c + self.two.b * x, None)),
            jax.jit(opens),
        ]

    def __call__(self, x):
        return run_plans(self, self.plans, x)


def run_plans(nest, plans, x):
    fs, out = nest.functions(), []

    def run(plan):
        for item in plan:
            if isinstance(item, int):
                out.append(fs[item](x))
            else:
                with BLOCKS[item[0]]:
                    run(item[1])

    for plan in plans:
        run(plan)
    return jnp.stack(out)


def meant(plan, held):
    """Yield the derivatives with respect to a and b of each call of a plan."""
    for item in plan:
        if isinstance(item, int):
            weights = [(2, 3), (1, 0), (2, 3), (0, 1), (2, 6)][item]
            # The last function calls another twice, once in a block that holds a.
            yield tuple(w * (name not in held) for w, name in zip(weights, 'ab', strict=True))
        else:
            yield from meant(item[1], held | set(item[0]))


@pytest.fixture(params=['unclaimed', 'claimed'])
def shared_key(request):
    """Begin with a shared key that no earlier test has claimed, or that is another's for good."""
    fresh_contexts()
    if request.param == 'claimed':
        with sg.stop_gradient('a'):
            jax.vmap(lambda x: Two().bind({'params': PARAMS})(x))(jnp.ones(1))
        jax.grad(lambda p: run_in('a', jax.jit(lambda: Two().apply({'params': p}, 1.0))))(PARAMS)
        assert owned_contexts()


@pytest.mark.thinned(6)
@pytest.mark.parametrize('seed, jit', [(0, True), (1, True), (1, False)])
@pytest.mark.parametrize('blocks', ['inside', 'around'])
def test_random_nests_of_blocks_around_cached_functions(seed, blocks, jit, shared_key):
    """Blocks share a key of JAX's caches until a trace depends on one; no order may show that."""
    rng = random.Random(seed)
    one, two = (plans(rng) for _ in range(2))
    check_nest((one, two, one), blocks, jit)


@pytest.mark.parametrize('blocks', ['inside', 'around'])
def test_a_block_inside_a_traced_function_does_not_claim_for_it(blocks, shared_key):
    """The last function's trace depends on the block around it, and not on the one it opens."""
    check_nest(([('', [4, ('a', [4]), 4])],), blocks, jit=True)


def check_nest(order, blocks, jit):
    def loss(variables, x):
        if blocks == 'inside':
            return Nest(order).apply(variables, x)
        return run_plans(Nest().bind(variables), order, x)

    for outer in ('', 'a', ''):
        with BLOCKS[outer]:
            f = jax.jacrev(jax.jit(loss) if jit else loss)
            got = f({'params': {'two': PARAMS}}, jnp.ones(()))['params']['two']
        want = [pair for plan in order for pair in meant(plan, set(outer))]
        assert list(zip(got['a'].tolist(), got['b'].tolist(), strict=True)) == want


def test_a_trace_that_depends_on_a_block_through_one_inside_it(shared_key):
    """g opens a block and calls f in it: g's trace, too, depends on the block around g."""

    class Model(nn.Module):
        def setup(self):
            self.two = Two()

        def __call__(self, x):
            f = jax.jit(lambda x: self.two(x))

            def g(x):
                with BLOCKS['']:
                    return f(x)

            g, out = jax.jit(g), []
            for name in ('a', 'b', '', 'ab', 'a'):
                with BLOCKS[name]:
                    out.append(g(x))
            return jnp.stack(out)

    two = jax.jacrev(Model().apply)({'params': {'two': PARAMS}}, jnp.ones(()))['params']['two']
    assert two['a'].tolist() == [0, 2, 2, 0, 0] and two['b'].tolist() == [3, 0, 3, 0, 3]


@pytest.mark.parametrize('order', ORDERS, ids=' '.join)
@pytest.mark.parametrize('module', [Two, JitTwo])
def test_one_jitted_apply(module, order):
    jitted = jax.jit(module().apply)
    grads = jax.jit(jax.grad(module().apply))
    for mask in order:
        want = dict(zip('ab', WANT[mask], strict=True))
        assert run_in(mask, jax.grad(jitted), {'params': PARAMS}, jnp.ones(()))['params'] == want
        assert run_in(mask, grads, {'params': PARAMS}, jnp.ones(()))['params'] == want


class Layer(nn.Module):
    """Blocks in here name variables by where they are: nn.jit shares traces among such layers."""

    predicate: object

    @nn.jit
    @nn.compact
    def __call__(self, x):
        with sg.stop_gradient(self.predicate, allow_unmatched=True):
            return x * self.param('w', nn.initializers.ones, ())


@pytest.mark.parametrize(
    'predicate',
    ['/one', sg.where(lambda v: v.absolute_name.startswith('one')), sg.regex('^w$') & '/one'],
    ids=repr,
)
@pytest.mark.parametrize('order', ['one two', 'two one', 'one two one two'])
def test_equal_layers_at_other_paths_under_nn_jit(predicate, order):
    class Model(nn.Module):
        def setup(self):
            self.one, self.two = Layer(predicate), Layer(predicate)

        def __call__(self, x):
            return sum(getattr(self, name)(x) for name in order.split())

    params = {'params': {'one': {'w': jnp.ones(())}, 'two': {'w': jnp.ones(())}}}
    grads = jax.grad(Model().apply)(params, jnp.ones(()))['params']
    assert grads['one']['w'] == 0 and grads['two']['w'] == order.count('two')


@pytest.mark.parametrize('order', ['one two', 'two one'])
def test_a_block_around_equal_layers_with_writable_parameters(order):
    class Plain(nn.Module):
        @nn.jit
        @nn.compact
        def __call__(self, x):
            return x * self.param('w', nn.initializers.ones, ())

    class Model(nn.Module):
        def setup(self):
            self.one, self.two = Plain(), Plain()

        def __call__(self, x):
            with sg.stop_gradient('one'):
                return sum(getattr(self, name)(x) for name in order.split())

    params = {'one': {'w': jnp.ones(())}, 'two': {'w': jnp.ones(())}}
    for mutable in (False, ['params']):

        def loss(params, mutable=mutable):
            out = Model().apply({'params': params}, jnp.ones(()), mutable=mutable)
            return out[0] if mutable else out

        grads = jax.grad(loss)(params)
        assert grads['one']['w'] == 0 and grads['two']['w'] == 1


def masks(prefix):
    return sg.stop_gradient(lambda v: v.name.startswith(prefix))


@pytest.mark.parametrize(
    'make',
    [
        lambda: sg.stop_gradient('a'),
        lambda: sg.stop_gradient(sg.path('a') & ~sg.path('b')),
        lambda: masks('a'),
        lambda: sg.stop_gradient(lambda v: v.name == 'a'),
    ],
    ids=['glob', 'combination', 'closure', 'lambda'],
)
def test_an_equal_filter_does_not_trace_again(make):
    traces = []

    class Counted(nn.Module):
        @nn.compact
        def __call__(self, x):
            traces.append(x)
            return x * self.param('a', nn.initializers.ones, ()) + self.param(
                'b', nn.initializers.ones, ()
            )

    jitted = jax.jit(Counted().apply)
    grad = jax.jit(jax.grad(Counted().apply))
    for f in (jitted, grad):
        traces.clear()
        for _ in range(3):
            with make():
                f({'params': PARAMS}, 1.0)
        assert len(traces) == 1
        f({'params': PARAMS}, 1.0)
        with sg.stop_gradient('b'):
            f({'params': PARAMS}, 1.0)
        assert len(traces) == 3
        with make(), make():
            f({'params': PARAMS}, 1.0)
        with make():
            f({'params': PARAMS}, 1.0)
        f({'params': PARAMS}, 1.0)
        assert len(traces) == 4


def test_an_equal_filter_does_not_trace_again_inside_a_module_run_eagerly():
    traces = []

    class Inner(nn.Module):
        @nn.jit
        @nn.compact
        def __call__(self, x):
            traces.append(x)
            return x * self.param('w', nn.initializers.ones, ())

    body = lambda x: (traces.append(x), x * 2)[1]
    helper = jax.jit(body)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            with sg.stop_gradient(lambda v: v.name.startswith('inner')):
                return Inner(name='inner')(helper(x))

    params = Outer().init(jax.random.key(0), jnp.ones(()))
    model = Outer()
    model.apply(params, jnp.ones(()))
    traces.clear()
    for _ in range(3):
        model.apply(params, jnp.ones(()))
    assert traces == []


@pytest.mark.parametrize('blocks', ['inside', 'around'])
def test_blocks_share_the_traces_of_helpers(blocks):
    """JAX's own jitted helpers must not be traced once more for each block."""
    fresh_contexts()
    traces = []
    helper = jax.jit(lambda x: (traces.append(x), x * 2)[1])

    def run(two, x):
        total = 0.0
        for name in ('a', 'b', 'a'):
            with MASKS[name]:
                total += helper(two(x))
        return total

    class Model(nn.Module):
        def setup(self):
            self.two = Two()
            nn.share_scope(self, self.two)

        def __call__(self, x):
            return run(self.two, x)

    def loss(params):
        if blocks == 'inside':
            return Model().apply({'params': params}, 1.0)
        return run(lambda x: Two().apply({'params': params}, x), 1.0)

    assert jax.jit(jax.grad(loss))(PARAMS) == {'a': 4, 'b': 12}
    assert len(traces) == 1


def test_a_thread_takes_over_the_shared_key_of_one_that_has_ended():
    """A server that starts a thread for each request does not trace anew for each."""
    traces, keys = [], set()
    helper = jax.jit(lambda x: (traces.append(x), x * 2)[1])

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            with sg.stop_gradient('a'):
                keys.add(context())
                return helper(Two(name='a')(x))

    def request():
        Model().apply({'params': {'a': PARAMS}}, jnp.ones(()))

    for _ in range(5):
        thread = threading.Thread(target=request)
        thread.start()
        thread.join()
    assert len(traces) == len(keys) == 1


def test_a_shared_trace_of_equal_layers_stays_shared():
    """Twelve equal nn.jit layers are traced once; a block around them does not change that."""
    traces = []

    class Inner(nn.Module):
        @nn.jit
        @nn.compact
        def __call__(self, x):
            traces.append(x)
            return x * self.param('w', nn.initializers.ones, ())

    class Outer(nn.Module):
        masked: bool

        @nn.compact
        def __call__(self, x):
            def layers(x):
                for _ in range(12):
                    x = Inner()(x)
                return x

            if not self.masked:
                return layers(x)
            with sg.stop_gradient('*/w'):
                return layers(x)

    params = Outer(False).init(jax.random.key(0), jnp.ones(()))
    counts = []
    for masked in (False, True):
        traces.clear()
        jax.grad(Outer(masked).apply)(params, jnp.ones(()))
        counts.append(len(traces))
    assert counts == [1, 1]


def test_the_backward_of_a_custom_vjp_is_traced_after_the_block():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            def forward(mdl, x):
                return nn.vjp(lambda mdl, x: mdl(x), mdl, x)

            def backward(pullback, ct):
                params, x = pullback(ct)
                return jax.tree.map(lambda g: 10 * g, params), x

            return nn.custom_vjp(lambda mdl, x: mdl(x), forward, backward)(Two(name='two'), x)

    def loss(params, x, predicate):
        with sg.stop_gradient(predicate):
            return Model().apply({'params': {'two': params}}, x)

    for mask, want in [(False, (20, 30)), ('two/a', (0, 30)), (False, (20, 30))]:
        grads, gx = jax.grad(loss, (0, 1))(PARAMS, jnp.ones(()), mask)
        assert (grads['a'], grads['b']) == want and gx == 5


@pytest.mark.parametrize('jit', [False, True])
@pytest.mark.parametrize('mutable', [False, ['params']])
def test_the_rules_of_a_custom_vjp_are_traced_after_the_block(mutable, jit):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            def forward(mdl, x):
                return nn.vjp(lambda mdl, x: mdl(x), mdl, x)

            f = nn.custom_vjp(lambda mdl, x: mdl(x), forward, lambda pullback, ct: pullback(ct))
            with sg.stop_gradient('two/a'):
                return f(Two(name='two'), x)

    def loss(params, x):
        out = Model().apply({'params': {'two': params}}, x, mutable=mutable)
        return out[0] if mutable else out

    grads, gx = jax.grad(jax.jit(loss) if jit else loss, (0, 1))(PARAMS, jnp.ones(()))
    assert (grads['a'], grads['b']) == (0, 3) and gx == 5


def test_a_trace_made_in_a_block_stays_masked_when_it_is_used_later():
    with sg.stop_gradient('a'):
        forward = jax.jit(Two().apply).trace({'params': PARAMS}, 1.0).lower().compile()
        _, pullback = jax.vjp(lambda p: Two().apply({'params': p}, 1.0), PARAMS)
    assert pullback(jnp.ones(()))[0] == {'a': 0, 'b': 3}
    np.testing.assert_array_equal(forward({'params': PARAMS}, 1.0), 5.0)


# Blocks that methods of mirrors open in the body of a loop ----------------------------------------


class Runs(nn.Module):
    @nn.compact
    def __call__(self):
        return self.param('w', nn.initializers.ones, ())

    def run(self, f, x):
        return f(x)


helper = jax.jit(lambda x: jnp.clip(jnp.sin(x) * x, -2.0, 2.0))
MIRRORS = {
    'held': (sg.stop_gradient('w'), 0.0),
    'scaled': (sg.scale_gradient('w', 3.0), 3.0),
    'also scaled': (sg.scale_gradient('w', 5.0), 5.0),
    'live': (None, 1.0),
}
LOOPS = {
    'eager': lambda f, x: f(x),
    'scan': lambda f, x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=1)[0],
    'checkpoint': lambda f, x: jax.checkpoint(f)(x),
    'cond': lambda f, x: jax.lax.cond(x > 0, f, lambda x: 0 * x, x),
    'jit': lambda f, x: jax.jit(f)(x),
}


@pytest.mark.thinned(7)
@pytest.mark.parametrize('inner', ['plain', 'helper before', 'helper after'])
@pytest.mark.parametrize('loop', LOOPS)
@pytest.mark.parametrize(
    'order',
    [
        ('held', 'scaled', 'live'),
        ('live', 'held', 'also scaled'),
        ('scaled', 'also scaled', 'scaled'),
        ('scaled', 'live', 'held', 'live', 'scaled'),
    ],
    ids=' '.join,
)
def test_one_jitted_function_read_by_methods_of_mirrors_in_loops(order, loop, inner):
    """It reads a module that it captured, in the block that the method opens in the body."""

    def total(w):
        module = Runs().bind({'params': {'w': w}})
        read = jax.jit(lambda x: x * module.get_variable('params', 'w'))
        f = {
            'plain': read,
            'helper before': lambda x: read(helper(x)),
            'helper after': lambda x: helper(read(x)),
        }[inner]
        out = []
        for name in order:
            t, _ = MIRRORS[name]
            mirror = module if t is None else t(module)
            out.append(LOOPS[loop](lambda x, mirror=mirror: mirror.run(f, x), 1.0))
        return jnp.stack(out)

    slope = float(jax.grad(helper)(1.0)) if inner != 'plain' else 1.0
    value = float(helper(1.0)) if inner == 'helper before' else slope
    want = [value * MIRRORS[name][1] for name in order]
    np.testing.assert_allclose(jax.jacrev(total)(1.0), want, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.jacrev(total))(1.0), want, rtol=1e-5)


@pytest.mark.parametrize('loop', LOOPS)
def test_methods_of_mirrors_in_loops_do_not_trace_helpers_again(loop):
    traced = []

    @jax.jit
    def counted(x):
        traced.append(x)
        return jnp.sin(x)

    def total(w):
        module = Runs().bind({'params': {'w': w}})
        # Blocks that others have claimed a context for have helpers of their own.
        factor = 11.0 + 0.1 * [*LOOPS].index(loop)
        mirrors = [sg.scale_gradient('w', factor + i)(module) for i in range(3)]
        run = lambda m: lambda x: m.run(lambda x: counted(x) * m(), x)
        return sum(LOOPS[loop](run(m), 1.0) for m in (module, *mirrors))

    jax.jit(jax.grad(total))(1.0)
    assert len(traced) <= 2  # without a block, and in all of them
