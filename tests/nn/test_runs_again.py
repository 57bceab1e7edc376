"""Code that runs again for a block: it sees what it saw, draws what it drew, and changes nothing.

In a block the values that `setup` and cached properties compute are computed again, and a mirror
runs setup itself. All forward values, random numbers and states are those of the plain program.
"""

import collections
import functools
import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

import flax_sg as sg
from flax_sg import nn
from internals import is_watched_by_setup, names_of_flax

ones, one = nn.initializers.ones, jnp.ones(())
held = sg.stop_gradient(True)
KEYS = {'noise': jax.random.key(1)}


def draw(module):
    return jax.random.normal(module.make_rng('noise'))


def plain(module, read):
    return read(module)


def in_block(module, read):
    with held:
        return read(module)


def mirror(module, read):
    return read(held(module))


def mirror_of_a_mirror(module, read):
    return read(held(held(module)))


def method(module, read):
    return held(lambda m: read(m))(module)


USES = [plain, in_block, mirror, mirror_of_a_mirror, method]
ORDERS = [
    (plain, plain),
    *((use, plain) for use in USES[1:]),
    *((plain, use) for use in USES[1:]),
    (mirror, in_block),
    (in_block, mirror),
    (mirror, mirror),
]
orders = pytest.mark.parametrize(
    'order', ORDERS, ids=lambda order: ' then '.join(use.__name__ for use in order)
)


class Own(nn.Module):
    """Draws in setup."""

    def setup(self):
        self.w = self.param('w', ones, ())
        self.value = self.w + draw(self)


class Child(nn.Module):
    """A child draws in its setup, when it is first used."""

    def setup(self):
        self.child = Own()

    @property
    def value(self):
        return self.child.value


class Field(nn.Module):
    """So does a module that was handed in."""

    child: nn.Module

    @property
    def value(self):
        return self.child.value


class Elsewhere(nn.Module):
    """Draws from the streams of a module that is not below it."""

    source: nn.Module

    def setup(self):
        self.value = self.param('w', ones, ()) + self.source.draw()


class Source(nn.Module):
    def draw(self):
        return draw(self)


class Cached(nn.Module):
    """A cached property draws and sows."""

    def setup(self):
        self.w = self.param('w', ones, ())

    @functools.cached_property
    def value(self):
        self.sow('intermediates', 'seen', self.w)
        return self.w + draw(self)


class Sows(nn.Module):
    """Setup draws and sows."""

    def setup(self):
        self.w = self.param('w', ones, ())
        self.sow('intermediates', 'seen', self.w)
        self.value = self.w + draw(self)


class Root(nn.Module):
    kind: type
    of: object
    order: tuple

    def setup(self):
        if self.kind is Elsewhere:
            self.source = Source()
            self.m = self.of(Elsewhere)(self.source)
        elif self.kind is Field:
            self.m = self.of(Field)(Own())
        else:
            self.m = self.of(self.kind)()

    def __call__(self):
        values, draws = [], []
        for use in self.order:  # what is drawn meanwhile goes on from where it was
            values.append(use(self.m, lambda m: m.value))
            draws += [draw(self), draw(self.m)]
        return [*values, *draws]


KINDS = [Own, Child, Field, Elsewhere, Sows, Cached]


@pytest.mark.thinned(5)
@pytest.mark.parametrize('of', [lambda cls: cls, nn.jit], ids=['plain', 'jit'])
@orders
@pytest.mark.parametrize('kind', KINDS)
def test_random_numbers_and_state_are_those_of_the_plain_program(kind, order, of):
    variables = Root(kind, of, ORDERS[0]).init({'params': jax.random.key(0), **KEYS})
    variables.pop('intermediates', None)

    def run(order):
        model = Root(kind, of, order)
        return model.apply(variables, rngs=KEYS, mutable=['intermediates'])

    (values, state), (wanted, wanted_state) = run(order), run(ORDERS[0])
    assert values == wanted and values[0] == values[1]
    assert state == wanted_state


class State(nn.Module):
    way: str

    def setup(self):
        self.w = self.param('w', ones, ())
        self.s = self.variable('state', 's', lambda: one)
        stored = {
            'value': lambda: self.s.value,
            'get_variable': lambda: self.get_variable('state', 's'),
            'variables': lambda: self.variables['state']['s'],
            'scope': lambda: self.scope.variables()['state']['s'],
        }[self.way]()
        self.value = stored * self.w

    def bump(self):
        self.s.value += 10

    @functools.cached_property
    def cached(self):
        return self.s.value * self.w


@pytest.mark.thinned(5)
@orders
@pytest.mark.parametrize('read', ['value', 'cached'])
@pytest.mark.parametrize('way', ['value', 'get_variable', 'variables', 'scope'])
def test_state_is_seen_as_it_was(way, read, order):
    variables = {'params': {'w': one}, 'state': {'s': one}}
    module = State(way).bind(variables, mutable=['state'])
    first = order[0](module, lambda m: getattr(m, read))
    module.bump()
    assert first == order[1](module, lambda m: getattr(m, read)) == 1
    assert module.s.value == 11


class Unread(nn.Module):
    """Has cached properties and no setup."""

    @functools.cached_property
    def by_get_variable(self):
        return self.get_variable('params', 'w')

    @functools.cached_property
    def by_variables(self):
        return self.variables['params']['w']


@pytest.mark.parametrize('name', ['by_get_variable', 'by_variables'])
@pytest.mark.parametrize('first', [False, True])
def test_a_cached_property_of_a_module_that_has_no_setup(first, name):
    def loss(params):
        module = Unread().bind(params)
        if first:
            getattr(module, name)
        return 10 * in_block(module, lambda m: getattr(m, name)) + getattr(module, name)

    assert jax.grad(loss)({'params': {'w': one}})['params']['w'] == 1


def test_the_first_instance_of_a_class_computes_its_cached_property_once():
    class Fresh(nn.Module):
        def setup(self):
            self.w = self.param('w', ones, ())

        @functools.cached_property
        def value(self):
            calls.append(None)
            return self.w + draw(self)

    calls = []
    module = Fresh().bind({'params': {'w': one}}, rngs=KEYS)
    assert module.value == module.value and len(calls) == 1


class Pair(struct.PyTreeNode):
    value: jax.Array
    fn: object = struct.field(pytree_node=False)


@pytest.mark.parametrize(
    'make',
    [lambda w: Pair(w, lambda x: 2 * x), lambda w: jax.tree_util.Partial(lambda a, b: 2 * a, w)],
    ids=['dataclass', 'Partial'],
)
def test_setup_makes_a_tree_whose_structure_is_new_in_each_run(make):
    class Holds(nn.Module):
        def setup(self):
            self.made = make(self.param('w', ones, ()))

        def __call__(self):
            return self.made.fn(self.made.value) if isinstance(self.made, Pair) else self.made(1)

    def loss(params):
        module = Holds().bind(params)
        return 10 * module() + 100 * in_block(module, lambda m: m()) + mirror(module, lambda m: m())

    value, grads = jax.value_and_grad(loss)({'params': {'w': one}})
    assert value == 222 and grads['params']['w'] == 20


# What does not exist yet, and what is written, in a run again -------------------------------------


class HasVariable(nn.Module):
    """As BatchNorm and SpectralNorm do."""

    def setup(self):
        w, there = self.param('w', ones, ()), self.has_variable('state', 's')
        s = self.variable('state', 's', lambda: one)
        if there:
            s.value += 1
        self.value = s.value * w


class Draws(nn.Module):
    def setup(self):
        w = self.param('w', ones, ())
        self.variable('state', 's', lambda: draw(self))
        self.value = draw(self) * w


class Default(nn.Module):
    def setup(self):
        w, before = self.param('w', ones, ()), self.get_variable('state', 's', 1.0)
        self.variable('state', 's', lambda: 7 * one)
        self.value = before * w


class Whole(nn.Module):
    def setup(self):
        w, before = self.param('w', ones, ()), len(self.variables.get('state', {}))
        self.variable('state', 's', lambda: one)
        self.value = before * w


class Tree(nn.Module):
    """A variable whose value is a dict."""

    def setup(self):
        w, s = self.param('w', ones, ()), self.variable('state', 's', lambda: {'n': one})
        s.value = {'n': s.value['n'] + 1}
        self.value = s.value['n'] * w


class Counts(nn.Module):
    @nn.compact
    def __call__(self):
        s = self.variable('state', 's', lambda: one)
        s.value += 1
        return s.value


class InJit(nn.Module):
    lift: object = nn.jit

    def setup(self):
        self.counts = self.lift(Counts)()
        self.value = self.counts() * self.param('w', ones, ())


class InRemat(InJit):
    lift: object = nn.remat


class Once(nn.Module):
    kind: type
    order: tuple

    def setup(self):
        self.m = self.kind()

    def __call__(self):
        return [use(self.m, lambda m: m.value) for use in self.order]


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    'order',
    [
        (plain, in_block, plain),
        (in_block, plain, in_block),
        (plain, mirror, plain),
        (mirror, plain, mirror),
        (mirror, in_block, plain),
    ],
    ids=lambda order: ' then '.join(use.__name__ for use in order),
)
@pytest.mark.parametrize('stored', [False, True])
@pytest.mark.parametrize('kind', [HasVariable, Draws, Default, Whole, Tree, InJit, InRemat])
def test_setup_sees_what_there_was_and_what_it_wrote(kind, stored, order):
    keys = {'params': jax.random.key(0), **KEYS}
    variables = Once(kind, (plain,)).init(keys)
    if not stored:
        variables = {'params': variables['params']}
    run = lambda order: Once(kind, order).apply(variables, rngs=KEYS, mutable=['state'])
    (values, state), ((want, *_), wanted) = run(order), run((plain, plain))
    assert values == [want] * 3 and state == wanted
    (values, made), ((want, *_), wanted) = (
        Once(kind, order).init_with_output(keys) for order in (order, (plain, plain))
    )
    assert values == [want] * 3 and made == wanted


class Numbered(nn.Module):
    i: int = 0

    def setup(self):
        self.w = self.param(f'w{self.i}', nn.initializers.normal(), ())
        self.n = self.variable('state', 'n', lambda: 0 * one)
        self.n.value += 1
        self.noise = draw(self)

    def __call__(self):
        return self.n.value, self.noise


class Makes(nn.Module):
    """Makes a new part, of the same name, in each call."""

    lift: object

    @nn.compact
    def __call__(self, i):
        return self.lift(Numbered(i))()


class Calls(nn.Module):
    lift: object
    around: object

    def setup(self):
        self.makes = Makes(self.lift)

    def __call__(self, i):
        return self.makes(0), self.around(self.makes)(i)


@pytest.mark.parametrize('mirror', ['part', 'whole'])
def test_parts_made_anew_in_each_call_are_not_one_another(mirror):
    keys, itself = {'params': jax.random.key(0), **KEYS}, lambda m: m
    same = Calls(itself, itself)
    mirrored = Calls(held, itself) if mirror == 'part' else Calls(itself, held)
    wanted, made = (model.init_with_output(keys, 1) for model in (same, mirrored))
    assert wanted == made and made[1]['params']['makes']['Numbered_0'].keys() == {'w0', 'w1'}
    run = lambda model: model.apply(made[1], 0, rngs=KEYS, mutable=['state'])
    assert run(same) == run(mirrored) and run(same)[0][0] != run(same)[0][1]


# Programs without blocks are as they are without the library --------------------------------------


class Mixin:
    """No module."""

    @functools.cached_property
    def cached(self):
        return 2 * self.number

    @functools.cached_property
    def read(self):
        return self.get_variable('params', 'w')


class NoModule(Mixin):
    number = 5


class Mixed(Mixin, nn.Module):
    number: int = 3

    def __call__(self):
        return self.cached


def test_cached_properties_are_what_they_were():
    assert Mixed().apply({}) == 6 and NoModule().cached == 10
    other = NoModule()
    other.cached = 4
    assert other.cached == 4
    del other.cached
    assert other.cached == 10
    bound = Mixed().bind({})
    assert bound.cached == 6
    vars(bound)['cached'] = 9
    assert bound.cached == 9
    del vars(bound)['cached']
    assert bound.cached == 6 and not hasattr(bound, 'other')


def test_a_cached_value_that_was_put_in_place_of_the_first():
    module = Unread().bind({'params': {'w': one}})
    assert module.by_variables == 1
    vars(module)['by_variables'] = 9 * one
    assert in_block(module, lambda m: m.by_variables + 0 * m.get_variable('params', 'w')) == 9
    assert module.by_variables == 9


def test_a_cached_property_of_a_mixin_in_a_block():
    def loss(params):
        module = Mixed().bind(params)
        return 10 * in_block(module, lambda m: m.read) + module.read

    assert jax.grad(loss)({'params': {'w': one}})['params']['w'] == 1


def test_what_a_cached_property_holds_that_read_nothing_is_one_object():
    class Logs(nn.Module):
        @functools.cached_property
        def log(self):
            return []

        @functools.cached_property
        def part(self):
            return nn.Dense(1)

        @nn.compact
        def __call__(self, x):
            first = in_block(self, lambda m: m.log.append(1) or m.part(x))
            self.log.append(2)
            return first - self.part(x), self.log

    (difference, log), variables = Logs().init_with_output(jax.random.key(0), jnp.ones((1, 1)))
    assert difference == 0 and log == [1, 2] and variables['params'].keys() == {'Dense_0'}


def test_setup_that_first_ran_in_a_trace_and_made_no_tracer_does_not_run_again():
    class Host(nn.Module):
        def setup(self):
            self.w = self.param('w', ones, ())
            self.noise = np.random.default_rng().normal(size=1)

        def __call__(self):
            return self.w * self.noise

    class Maps(nn.Module):
        def setup(self):
            self.host = Host()

        def __call__(self):
            return jax.vmap(lambda x: self.host() * x)(jnp.ones(1))[0], self.host()

    first, second = Maps().apply({'params': {'host': {'w': one}}})
    assert first == second


def test_a_module_that_was_bound_before_the_library_was_imported():
    module = Own().bind({'params': {'w': one}}, rngs=KEYS)
    scope = module.scope
    scope.flags = scope.flags.pop('flax_sg_application')[0]
    assert jax.grad(lambda w: in_block(module, lambda m: m.value) * w)(1.0) == module.value


class Registry:
    """An object that several modules may hold."""

    count = 0

    def __init__(self):
        self.queue = collections.deque()


def _attribute(registry, w):
    registry.found = w


def _deeper(registry, w):
    registry.items = {'one': [w, 2 * w]}


def _namespace(registry, w):
    registry.found = types.SimpleNamespace(w=w)


def _deque(registry, w):
    registry.queue.append(w)


def _closure(registry, w):
    registry.found = lambda: w


@pytest.mark.parametrize('first', ['live', 'held'])
@pytest.mark.parametrize('put', [_attribute, _deeper, _namespace, _deque, _closure])
def test_setup_that_puts_a_value_into_an_object_of_a_field(put, first):
    class Registers(nn.Module):
        registry: Registry

        def setup(self):
            self.w = self.param('w', ones, ())
            put(self.registry, self.w)

        def __call__(self):
            return 1 * self.w

    def run(p):
        module = Registers(Registry()).bind({'params': p})
        if first == 'live':
            module()
        with held:
            return module()

    with pytest.raises(sg.UsageError) as error:
        jax.grad(run)({'w': one})
    assert str(error.value) == (
        "setup of '/' put what it reads inside a flax_sg block into the object in field 'registry'"
        ": code that holds the object would see the block's values after it. Set attributes of the "
        'module itself.'
    )


def test_setup_that_changes_an_object_of_a_field_without_what_it_reads():
    class Rotates(nn.Module):
        registry: Registry

        def setup(self):
            self.w = self.param('w', ones, ())
            self.registry.count += 1
            if not hasattr(self.registry, 'table'):
                self.registry.table = np.arange(3.0)

        def __call__(self):
            return (self.w * self.registry.table).sum()

    for first in ('live', 'held'):

        def run(p, first=first):
            module = Rotates(Registry()).bind({'params': p})
            live = module() if first == 'live' else 0
            with held:
                stopped = module()
            return live + 10 * stopped + 100 * module()

        assert jax.grad(run)({'w': one})['w'] == (303 if first == 'live' else 300)


FIELDS = {
    'function': (nn.relu,),
    'numbers': (3, 4),
    'dict': {'a': 1},
    'list': [jnp.tanh],
    'module': (nn.Dense(3), nn.relu),
    'array': (np.ones(2),),
    'object': Registry(),
    'objects': (Registry(),),
    'jitted': (jax.jit(nn.relu),),
    'nested': ((1, 2), (3,)),
    'enum': (jax.lax.Precision.HIGHEST,),
}


@pytest.mark.parametrize('field', FIELDS)
def test_fields_stay_what_they_are(field):
    field = FIELDS[field]

    class Layer(nn.Module):
        field: object

        def setup(self):
            self.w = self.param('w', ones, ())

        def __call__(self, x):
            assert repr(self) and self.clone(parent=None).field is not None
            return self.w * x

    class Net(nn.Module):
        def setup(self):
            self.layer = Layer(field)

        def __call__(self, x):
            y = self.layer(x)
            with nn.stop_gradient('layer'):
                return y + 10 * self.layer(x)

    run = lambda p: Net().apply({'params': p}, 1.0)
    params = Net().init(jax.random.key(0), 1.0)['params']
    for mode in (lambda f: f, jax.jit):
        assert mode(jax.grad(run))(params)['layer']['w'] == 1


@pytest.mark.parametrize('first', ['live', 'replaced'])
def test_numbers_that_setup_makes_of_a_variable(first):
    class Numbers(nn.Module):
        def setup(self):
            v = self.variable('c', 'v', lambda: one)
            self.numbers = {'float': float(v.value), 'int': int(v.value), 'name': 'v'}
            self.positive, self.fixed = bool(v.value > 0), 3

        def __call__(self):
            return (*self.numbers.values(), self.positive, self.fixed)

        def both(self):
            if first == 'live':
                assert self() == (1.0, 1, 'v', True, 3)
            with nn.replace_values('v', {'v': -5 * one}, collections='c'):
                replaced = self()
            return replaced, self()

    assert Numbers().apply({'c': {'v': one}}, method='both') == (
        (-5.0, -5, 'v', False, 3),
        (1.0, 1, 'v', True, 3),
    )


def test_attributes_that_flax_gives_a_module_are_none_of_setups():
    """Flax's own hold the parts that setup makes, and so what the parts were made with."""
    runs = []

    class Part(nn.Module):
        w: jax.Array

        def __call__(self):
            return self.w * 1

    class Whole(nn.Module):
        def setup(self):
            runs.append(self)
            self.w = self.param('w', ones, ())
            self.parts = [Part(self.w), Part(2 * self.w)]

        def __call__(self):
            return self.w + self.parts[0]() + self.parts[1]()

    def run(p):
        module = Whole().bind({'params': p})
        live = module()
        with held:
            return live + 10 * module() + 10 * module()

    assert jax.grad(run)({'w': one})['w'] == 4
    assert len(runs) == 2  # and once in the block
    names = {'_state', '_id', '_parent_ref', 'name', 'parent', 'scope'}
    assert names <= names_of_flax()
    assert not any(is_watched_by_setup(inspect.getattr_static(Whole, name, None)) for name in names)
