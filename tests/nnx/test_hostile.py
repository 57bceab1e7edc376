"""Programs that a hostile review found wrong, one table for each root; see test_kinds for others.

The model is a product: of a = 2 and b = 3 the gradients are 3 and 2.
"""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_sg as sg
from flax_sg import nnx


class Net(nnx.Module):
    def __init__(self, a=2.0, b=3.0):
        self.a, self.b = nnx.Param(jnp.float32(a)), nnx.Param(jnp.float32(b))

    def __call__(self, x):
        return self.a[...] * self.b[...] * x


def grads(loss, *models):
    found = nnx.grad(loss, argnums=tuple(range(len(models))))(*models)
    return [float(leaf) for leaf in jax.tree.leaves(found)]


def doubled(info, value):
    return 2 * value


LIFTS = {'plain': lambda fn: fn, 'jit': nnx.jit, 'remat': nnx.remat}
lifts = pytest.mark.parametrize('lift', LIFTS.values(), ids=LIFTS)


# What NNX writes back without having written it is still known for what it is.


@lifts
def test_a_copy_that_a_function_has_read_is_not_read_again(lift):
    def loss(m):
        with sg.scale_gradient(m.a, 0.5):
            copied = nnx.clone(m)
            return lift(lambda m: m(1.0))(copied) + copied(1.0)

    assert grads(loss, Net()) == [3, 4]
    model = Net()
    with sg.map_values(model.a, doubled):
        copied = nnx.clone(model)
        call = lift(lambda m: m(1.0))
        assert [float(fn(copied)) for fn in (lambda m: m(1.0), call, lambda m: m(1.0))] == [12] * 3


@lifts
def test_views_whose_target_calls_a_traced_function_and_reads_on(lift):
    views = sg.gradient_views({'a': 'a', 'b': 'b'})

    def run(m):
        return lift(lambda m: m(1.0))(m) + m(1.0)

    def loss(m):
        with sg.scale_gradient(m.a, 0.5):
            out = views(run)(m)
        return out['a'] + out['b']

    assert grads(loss, Net()) == [3, 4]
    model = Net()
    with sg.map_values(model.a, doubled):
        assert float(views(run)(model)['a']) == 24
    assert float(model.a[...]) == 2


@pytest.mark.parametrize('first', [True, False])
def test_branches_of_which_one_writes(first):
    def loss(m, up):
        with sg.scale_gradient(m.a, 0.5):
            copied = nnx.clone(m)

            def write(m):
                m.b[...] = 2 * m.b[...]
                return m(1.0)

            read = nnx.remat(lambda m: m(1.0))
            if first:
                return nnx.cond(up, write, read, copied) + copied(1.0)
            return nnx.switch(2 * up, [read, read, write], copied) + copied(1.0)

    for up, want in ((True, [6, 8]), (False, [3, 4])):
        assert grads(functools.partial(loss, up=up), Net()) == want


@lifts
def test_functions_alike_of_which_one_writes(lift):
    """JAX compares what they give back, which is the same but for that."""

    def write(m):
        m.a[...] = 1.0 * m.a[...]
        return m(1.0)

    def read(m):
        return m(1.0)

    def loss(m):
        with sg.scale_gradient(m.a, 0.5):
            first, second = nnx.clone(m), nnx.clone(m)
            out = lift(write)(first) + lift(read)(second)
            return out + second(1.0)

    # Of the copy that was written, which is read once more: a quarter. Of the other, half, twice.
    assert grads(loss, Net()) == grads(loss, Net()) == [3 * (0.25 + 0.5 + 0.5), 6]


@pytest.mark.parametrize('graph', [True, False])
@pytest.mark.parametrize('name', ['scan', 'cond'])
def test_loops_that_write_nothing(name, graph):
    mode = {'graph': graph, 'graph_updates': False}

    def run(m):
        if name == 'cond':
            return nnx.cond(True, lambda m: 1.0, lambda m: 0.0, m, **mode)
        axes = {'in_axes': (nnx.Carry, None, 0), 'out_axes': (nnx.Carry, 0)}
        return nnx.scan(lambda c, m, x: (c * x, None), **axes, **mode)(1.0, m, jnp.ones(2))

    model = Net()
    with sg.map_values(model, doubled, allow_unmatched=True):
        run(model)
    assert float(model.a[...]) == 2

    def loss(m):
        with sg.stop_gradient(m, allow_unmatched=True):
            run(m)
        return m(1.0)

    assert grads(loss, Net()) == [3, 2]


# Copies of Variables, in all the ways in which one gets their values.

COPIES = {
    'by item': lambda to, m: [to.a.set_value(m.a[...]), to.b.set_value(m.b[...])],
    'mapped': lambda to, m: nnx.update(to, jax.tree.map(lambda v: v, nnx.state(m))),
    'update': lambda to, m: nnx.update(to, nnx.state(m)),
    'copy_from': lambda to, m: [to.a.copy_from(m.a), to.b.copy_from(m.b)],
    'update_from_state': lambda to, m: [to.a.update_from_state(m.a), to.b.update_from_state(m.b)],
}


@pytest.mark.parametrize('copy_to', COPIES.values(), ids=COPIES)
def test_values_that_another_model_takes_are_read(copy_to):
    def loss(online):
        target = Net(0, 0)
        with nnx.stop_gradient(online, allow_unmatched=True):
            copy_to(target, online)
        return target(1.0) + online(1.0)

    assert grads(loss, Net()) == [3, 2]
    target, mirror = Net(0, 0), sg.map_values(True, doubled)(Net())
    copy_to(target, mirror)
    assert (float(target.a[...]), float(target.b[...])) == (4, 6)


@lifts
def test_a_shallow_copy(lift):
    def loss(m):
        with sg.scale_gradient(m.a, 0.5):
            return lift(lambda m: copy.copy(m.a)[...] * m.b[...])(m)

    assert grads(loss, Net()) == [1.5, 2]
    live = Net()
    copied = copy.copy(sg.map_values('a', doubled)(live).a)
    assert float(live.a[...]) == 2 and float(copied[...]) == 4
    assert float(copy.copy(live.a)[...]) == 2


def test_functions_of_jax_that_compute_with_a_tree():
    def replaced(q, m):
        with sg.replace_values(True, {'a': q, 'b': q}).on(m):
            return jax.lax.stop_gradient(nnx.state(m))['a'][...] * 3.0

    def mapped(q, m):
        with sg.map_values(m, lambda info, v: v * q):
            return jax.lax.stop_gradient(nnx.state(m))['a'][...] * 3.0

    assert jax.grad(replaced)(jnp.float32(5), Net()) == 0
    assert jax.grad(mapped)(jnp.float32(5), Net()) == 0

    def after(m):
        with nnx.stop_gradient(m):
            state = jax.lax.optimization_barrier(nnx.state(m))
        return state['a'][...] * state['b'][...] + 0 * m(1.0)

    assert grads(after, Net()) == [0, 0]


# Names: they are those of now, and belong to a Variable, not to where it lay in memory.


@pytest.mark.parametrize('by', ['module', 'names'])
def test_a_variable_that_is_made_in_the_block(by):
    def loss(m):
        part = nnx.Dict(w=nnx.Param(m.a[...]))
        block = nnx.stop_gradient(part) if by == 'module' else None
        named = nnx.stop_gradient(['w', 'v'], allow_unmatched=True)
        with block or named.on(part):
            y = part.w[...]
            part.v = nnx.Param(2 * m.b[...])
            return y * part.v[...]

    assert grads(loss, Net()) == [0, 0]


def test_a_variable_that_is_put_into_a_list():
    class Stack(nnx.Module, pytree=False):
        def __init__(self):
            self.parts = [nnx.Param(jnp.float32(1))]

    def loss(m):
        stack = Stack()
        with nnx.stop_gradient('parts').on(stack):
            y = stack.parts[0][...]
            stack.parts.append(nnx.Param(2 * m.b[...]))
            return y * stack.parts[1][...]

    assert grads(loss, Net()) == [0, 0]


def test_a_variable_that_goes_in_the_block_leaves_no_name():
    def loss(m):
        holder, b = nnx.Dict(part=Net(), other=Net()), m.b
        with nnx.stop_gradient('part', allow_unmatched=True).on(holder):
            b[...]
            del holder['part']
            made = [nnx.Param(b.get_raw_value()) for _ in range(50)]
            return sum(v[...] for v in made)

    assert [grads(loss, Net()) for _ in range(5)] == [[0, 50]] * 5


def test_variables_outside_of_the_module_of_which_a_predicate_says_different_things():
    def loss(m, other):
        with nnx.stop_gradient(
            nnx.where(lambda v: False) | nnx.within(m.a), allow_unmatched=True
        ).on(other):
            return m(1.0) * other(1.0)

    assert grads(loss, Net(), Net()) == [0, 12, 18, 12]


def test_a_type_that_nnx_has_registered_by_its_own_name():
    class OwnParam(nnx.Param):
        pass

    class Own(nnx.Module):
        def __init__(self, rngs=None):
            self.w = OwnParam(jnp.float32(2))

        def __call__(self, x):
            return self.w[...] * x

    def loss(m):
        with nnx.stop_gradient(m, allow_unmatched=True):
            return m(3.0)

    nnx.bridge.to_linen(Own).init(jax.random.key(0), 1.0)
    assert grads(loss, Own()) == [0]


def test_a_collection_that_does_not_exist():
    model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    typo = sg.constant(collections=['batch_stat'])
    message = "no collection 'batch_stat'. There are: 'batch_stats', 'params'"
    with pytest.raises(sg.UnmatchedPathError, match=message):
        with typo.on(model):
            pass
    with pytest.raises(sg.UnmatchedPathError, match='batch_stat'):
        typo(model)
    with sg.constant(collections=['params', 'batch_stats']).on(nnx.Linear(1, 1, rngs=nnx.Rngs(0))):
        pass


def test_collections_of_a_state():
    model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    zero, state = sg.map_values(True, lambda info, v: 0 * v), nnx.state(model)
    for found in (zero(model).var, zero(state)['var'], zero((state,))[0]['var']):
        assert found[...].sum() == 2


# Gradients.


def test_gradients_are_held_by_later_blocks():
    def loss(m, around):
        with around:
            inner = nnx.grad(lambda m: m(1.0) ** 2)(m)
        with nnx.stop_gradient():
            return inner['a'][...] * m(1.0)

    other = sg.scale_gradient(Net(), 0.5, allow_unmatched=True)
    assert grads(functools.partial(loss, around=other), Net()) == [0, 0]


def test_a_rule_of_the_user_for_derivatives():
    @nnx.custom_vjp
    def f(m, x):
        return m(x)

    f.defvjp(lambda m, x: (f(m, x), None), lambda res, ct: (ct[0][0], ct[1]))
    model = Net()
    for block in (sg.map_values(model.a, doubled), sg.stop_gradient(model.a)):
        with pytest.raises(sg.UsageError, match='nnx.custom_vjp was called with the Param'):
            with block:
                f(model, 1.0)
    assert float(model.a[...]) == 2
    other = Net()
    with sg.stop_gradient(other):
        other(1.0)
        for lift in (nnx.jit, nnx.remat, lambda fn: lambda m: nnx.cond(True, fn, fn, m)):
            assert nnx.grad(lift(lambda m: f(m, 1.0)))(model)['a'][...] == 0  # as the rule says


def test_a_function_that_returns_variables_under_jvp():
    model = Net()
    with nnx.stop_gradient():
        out = jax.jvp(lambda x: (model(x), nnx.state(model)), (1.0,), (1.0,))
    assert float(out[1][0]) == 6


@pytest.mark.parametrize('read', [lambda v: v[...], lambda v: v.T, lambda v: v + 0.0])
def test_a_parameter_that_is_a_python_number(read):
    def loss(m):
        with nnx.stop_gradient(m.w):
            return jnp.sin(read(m.w))

    assert float(nnx.grad(loss)(nnx.Dict(w=nnx.Param(2.0)))['w'][...]) == 0


# Mirrors.


def test_a_mirror_of_a_dict():
    live = nnx.Dict(a=nnx.Param(jnp.float32(2)), b=nnx.Param(jnp.float32(3)))
    mirror = sg.stop_gradient('a')(live)
    live.a[...] = jnp.float32(7)
    assert mirror.b is live.b and float(mirror.a[...]) == 7


@pytest.mark.parametrize('lift', [lambda fn: fn, nnx.jit], ids=['plain', 'jit'])
def test_an_optimiser_of_a_mirror(lift):
    live = Net()
    mirror = sg.scale_gradient('a', 0.5)(live)
    optimizer = nnx.Optimizer(mirror, optax.sgd(1.0), wrt=nnx.Param)

    @lift
    def step(mirror, optimizer):
        optimizer.update(mirror, nnx.grad(lambda m: m(1.0))(mirror))

    step(mirror, optimizer)
    assert (float(live.a[...]), float(live.b[...])) == (0.5, 1)


def plus_one(model):
    nnx.update(model, jax.tree.map(lambda v: v + 1, nnx.state(model)))


def in_grad(mirror):
    def loss(m):
        plus_one(m)
        return m(1.0)

    nnx.grad(loss)(mirror)


def in_scan(mirror):
    def body(m, x):
        plus_one(m)
        return m

    nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(mirror, jnp.ones(1))


@pytest.mark.parametrize('run', [plus_one, nnx.jit(plus_one), in_grad, in_scan])
def test_an_update_of_a_mirror(run):
    live = Net()
    run(sg.stop_gradient('a')(live))
    assert (float(live.a[...]), float(live.b[...])) == (3, 4)


def test_a_function_that_only_reads_a_mirror_writes_nothing():
    live = Net()
    mirror, before = sg.stop_gradient('a')(live), live.a.get_raw_value()
    nnx.jit(lambda m: m(1.0))(mirror)
    assert live.a.get_raw_value() is before


class Pair(nnx.Module):
    def __init__(self):
        self.live = Net()
        self.mirror = sg.scale_gradient(True, 0.5)(self.live)


def test_an_update_of_the_mirror_alone():
    pair = Pair()
    nnx.update(pair, {'mirror': {'a': jnp.float32(9)}})
    assert float(pair.live.a[...]) == 9
    pair, wrt = Pair(), nnx.All(nnx.Param, nnx.PathContains('mirror'))
    optimizer = nnx.Optimizer(pair, optax.sgd(1.0), wrt=wrt)
    optimizer.update(pair, nnx.grad(lambda p: p.mirror(1.0), argnums=nnx.DiffState(0, wrt))(pair))
    assert float(pair.live.a[...]) == 0.5


@lifts
def test_functions_of_a_mirror_and_its_live_model(lift):
    plain = lift is LIFTS['plain']  # where the mirror is written last
    want = {(0, 0): 2, (0, 1): 22, (1, 0): 12, (1, 1): 32 if plain else 12}

    def function(written):
        def run(live, mirror):
            for model, add in zip((live, mirror), written, strict=True):
                if add:
                    nnx.update(model, {'a': model.a[...] + 10 * (1 + (model is mirror))})
            return live(1.0) + mirror(1.0)

        return lift(run)

    for written in ((1, 1), (0, 1), (1, 0), (0, 0), (0, 1)):  # what they give back looks alike
        live, run = Net(), function(written)
        mirror = sg.stop_gradient('a')(live)
        for _ in range(2):  # from a cached trace too
            live.a[...] = jnp.float32(2)
            run(live, mirror)
            assert float(live.a[...]) == float(mirror.a[...]) == want[written]


def test_a_mirror_asks_its_function_and_source_each_time():
    live, rngs = Net(), nnx.Rngs(0)
    noisy = sg.map_values('a', lambda info, v: v + jax.random.normal(rngs(), v.shape))(live)
    assert float(noisy(1.0)) != float(noisy(1.0))
    average = {'a': jnp.float32(10), 'b': jnp.float32(1)}
    averaged = sg.replace_values(True, average)(live)
    before = float(averaged(1.0))
    average['a'] = jnp.float32(20)
    assert (before, float(averaged(1.0))) == (10, 20)


MADE_INSIDE = {
    'live': (lambda m: m, [3, 20]),
    'scaled': (lambda m: sg.scale_gradient(True, 1.0)(m), [3, 20]),
    'other part': (lambda m: sg.stop_gradient('a')(m), [0, 20]),
}


@pytest.mark.parametrize('make, want', MADE_INSIDE.values(), ids=MADE_INSIDE)
def test_a_mirror_that_the_target_of_views_makes(make, want):
    def loss(m):
        out = sg.gradient_views({'a': 'a', 'b': 'b'})(lambda m: make(m)(1.0))(m)
        return out['a'] + 10 * out['b']

    assert grads(loss, Net()) == want


def test_a_mirror_of_a_copy_is_read_once():
    def loss(m):
        with sg.scale_gradient(True, 0.5).on(m):
            return sg.scale_gradient('b', 1.0)(nnx.clone(m))(1.0)

    assert grads(loss, Net()) == [1.5, 1]


def test_gradient_flow_of_a_mirror():
    live = Net()
    flow = sg.gradient_flow(lambda m: m(1.0))(sg.stop_gradient('a')(live))
    assert (flow['loss', 'a'].verdict, flow['loss', 'b'].verdict) == ('MASKED', 'REACHED')
    with sg.stop_gradient('a').on(live):
        flow = sg.gradient_flow(lambda m: m(1.0))(live)
    assert (flow['loss', 'a'].verdict, flow['loss', 'b'].verdict) == ('MASKED', 'REACHED')


# Classes and methods.


@lifts
@pytest.mark.parametrize('name, want', [('scale_gradient', (6, 1.5)), ('map_values', (12, 6))])
def test_a_class_whose_function_replaces_a_variable(lift, name, want):
    t = {'scale_gradient': sg.scale_gradient('w', 0.5), 'map_values': sg.map_values('w', doubled)}[
        name
    ]

    @t
    class Caching(nnx.Module):
        def __init__(self, w):
            self.cache, self.w = nnx.Cache(jnp.float32(0)), nnx.Param(w)

        def hidden(self, x):
            return self.w[...] * x

        def __call__(self, x):
            def body(m, x):
                m.cache = nnx.Cache(x)
                return m.hidden(x)

            return lift(body)(self, x)

    assert jax.value_and_grad(lambda w: Caching(w)(3.0))(jnp.float32(2)) == want


@lifts
def test_instances_of_a_class_that_share_a_variable(lift):
    @sg.stop_gradient('kernel')
    class Layer(nnx.Module):
        def __init__(self, embed, kernel, inner=None):
            self.embed, self.kernel, self.inner = embed, nnx.Param(kernel), inner

        def __call__(self, x):
            y = x * self.embed[...] * self.kernel[...]
            return y if self.inner is None else lift(lambda m, y: m(y))(self.inner, y)

    def loss(values):
        embed = nnx.Param(values[0])
        return Layer(embed, values[1], Layer(embed, values[2]))(1.0)

    assert jax.grad(loss)([jnp.float32(v) for v in (2, 3, 5)]) == [60, 0, 0]


def test_members_of_a_class():
    class Plain(Net):
        add = jnp.add

        def __call__(self, x):
            return self.add(self.a[...] * x, self.b[...])

        @functools.singledispatchmethod
        def run(self, x):
            return self.a[...] * self.b[...] * x

        half = functools.partialmethod(Net.__call__, 0.5)

    Held = sg.stop_gradient('a')(Plain)
    assert grads(lambda m: m.run(1.0), Held()) == [0, 2]
    assert grads(lambda m: m.half(), Held()) == [0, 1]
    np.testing.assert_allclose(Held()(1.0), Plain()(1.0))
    assert grads(lambda m: m(1.0), Held()) == [0, 1]


def test_keywords_of_a_class():
    class Lists(nnx.Module, pytree=False):
        def __init__(self):
            self.parts = [Net(), Net()]

        def __call__(self, x):
            return self.parts[0](x) * self.parts[1](x)

    assert float(sg.stop_gradient('parts/0')(Lists)()(1.0)) == 36

    class Tagged(nnx.Module):
        def __init_subclass__(cls, tag, **kwargs):
            super().__init_subclass__(**kwargs)

    class Model(Tagged, tag='model'):
        pass

    with pytest.raises(sg.UsageError, match='Model cannot be transformed as a class: .*tag'):
        sg.stop_gradient(True)(Model)


def test_a_method_that_nnx_has_bound():
    class Jitted(Net):
        @nnx.jit
        def run(self, x):
            return self(x)

    views = sg.gradient_views({'a': 'a', 'b': 'b'})
    assert grads(lambda m: views(m.run)(1.0)['a'], Jitted()) == [3, 0]
    assert grads(lambda m: sg.stop_gradient('b')(m.run)(1.0), Jitted()) == [3, 0]


class Writing(Net):
    calls = 0

    def attribute(self, x):
        self.calls += 1
        return self(x)

    def part(self, x):
        self.cache = nnx.Dict(k=nnx.Cache(2 * x))
        return self(x)

    def popped(self, x):
        nnx.pop(self, nnx.Intermediate)
        return self(x)


def test_views_of_a_module_that_holds_itself_and_lists():
    class Around(nnx.Module, pytree=False):
        def __init__(self):
            self.parts, self.extra = [Net(), Net()], {'scale': 2.0, 'none': None}
            self.parts[0].parent = self

        def run(self, x):
            return self.parts[0](x) * self.parts[1](x) * self.extra['scale']

    def loss(m):
        return sg.gradient_views({'a': 'parts/0/a', 'b': 'parts/1/b'})(m.run)(1.0)['a']

    assert grads(loss, Around()) == [36, 0, 0, 0]


@pytest.mark.parametrize(
    'method, name', [('attribute', 'calls'), ('part', 'cache'), ('popped', 'h')]
)
def test_what_views_do_not_write_is_an_error(method, name):
    model = Writing()
    model.h = nnx.Intermediate(jnp.float32(1))
    views = sg.gradient_views({'a': 'a', 'b': 'b'})
    with pytest.raises(sg.UsageError, match=f"its target changes '{name}'"):
        views(getattr(model, method))(jnp.float32(1))
    assert model.calls == 0 and hasattr(model, 'h') and not hasattr(model, 'cache')


# Sources and factors.

SOURCES = {
    'module': lambda m: m,
    'State': nnx.state,
    'pure dict': lambda m: nnx.to_pure_dict(nnx.state(m)),
    'pure State': lambda m: nnx.as_pure(nnx.state(m)),
}


@pytest.mark.parametrize('source_of', SOURCES.values(), ids=SOURCES)
def test_sources_of_replaced_values(source_of):
    class Deep(nnx.Module):
        def __init__(self, *values):
            self.layers = nnx.List([Net(*values), Net(*values)])

        def __call__(self, x):
            return self.layers[0](x) * self.layers[1](x)

    online, target = Deep(), Deep(5, 7)
    for predicate, want in ((True, 35 * 35), ('layers/0', 35 * 6), ('**/a', 15 * 15)):
        with sg.replace_values(predicate, source_of(target)).on(online):
            assert float(online(1.0)) == want
            assert float(nnx.jit(lambda m: m(1.0))(online)) == want

    def loss(target):
        with sg.replace_values(True, source_of(target)).on(online):
            return online(1.0)

    found = nnx.grad(loss)(target)
    assert [float(leaf) for leaf in jax.tree.leaves(found)] == [7 * 35, 5 * 35] * 2


def test_a_factor_that_is_a_variable():
    class Reversing(Net):
        def __init__(self):
            super().__init__()
            self.factor = nnx.Variable(jnp.float32(-1))

        def run(self, x):
            with nnx.scale_gradient(self.a, self.factor):
                return self(x)

    assert nnx.jit(nnx.grad(lambda m: m.run(1.0)))(Reversing())['a'][...] == -3


# What is somebody else's.


def test_hijax_variables_outside_of_blocks():
    with nnx.var_defaults(hijax=True):
        hijax, other = Net(), Net(5, 7)
    mirror = sg.stop_gradient('a')(Net())
    nnx.update(hijax, nnx.state(other))
    copy.deepcopy(hijax)
    assert float(hijax(1.0)) == 35 and float(mirror(1.0)) == 6


# What was given to a function, and what is changed in place.


@pytest.mark.filterwarnings('ignore:Some donated buffers were not usable')
def test_donated_arguments():
    model = Net()
    step = nnx.jit(lambda m: m(1.0), donate_argnums=0)
    with sg.scale_gradient(model.a, 0.5):
        assert [float(step(model)) for _ in range(3)] == [6, 6, 6]
    assert float(model(1.0)) == 6


class Noting(Net):
    def __init__(self):
        super().__init__()
        self.seen = nnx.Variable({'n': jnp.float32(0)})
        self.d = nnx.Param({'x': jnp.float32(2)})

    def run(self, x):
        self.seen['n'] = self.seen['n'] + 1
        return self(x)


@lifts
def test_a_dict_that_is_written_in_place(lift):
    model = Noting()
    with sg.stop_gradient(model.a):
        lift(lambda m: m.run(1.0))(model)
        sg.gradient_views({'a': 'a'})(model.run)(1.0)
    assert float(model.seen['n']) == 2


@pytest.mark.parametrize(
    't, want', [(sg.stop_gradient, 0), (lambda p: sg.scale_gradient(p, 0.5), 3)]
)
def test_a_dict_that_is_written_in_a_copy(t, want):
    def loss(m, x):
        with t(True).on(m):
            copied = nnx.clone(m)
            copied.d['x'] = x * x
            return copied.d['x']

    assert float(nnx.grad(loss, argnums=1)(Noting(), jnp.float32(3))) == want


def test_a_source_that_changes_in_the_block():
    model, target = Net(), Net(5, 7)
    with sg.replace_values(True, target).on(model):
        before = float(model(1.0))
        target.a[...] = jnp.float32(1)
        assert (before, float(model(1.0))) == (35, 7)
