"""Code that runs again for a block: it sees what it saw, draws what it drew, and changes nothing.

In a block the values that `setup` and cached properties compute are computed again, and a mirror
runs setup itself. All forward values, random numbers and states are those of the plain program.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from flax import struct

import flax_sg as sg
from flax_sg import nn

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
ORDERS = [(plain, plain), *((use, plain) for use in USES[1:]), *((plain, use) for use in USES[1:]),
          (mirror, in_block), (in_block, mirror), (mirror, mirror)]
orders = pytest.mark.parametrize(
    'order', ORDERS, ids=lambda order: ' then '.join(use.__name__ for use in order))


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
        values = [use(self.m, lambda m: m.value) for use in self.order]
        return [*values, draw(self), draw(self.m)]


# A mirror's cached properties are its own, as are those of a clone in Flax.
KINDS = [Own, Child, Field, Elsewhere, Sows]
CASES = [*itertools.product(KINDS, ORDERS),
         *((Cached, order) for order in ORDERS if {*order} <= {plain, in_block, method})]


@pytest.mark.parametrize('of', [lambda cls: cls, nn.jit], ids=['plain', 'jit'])
@pytest.mark.parametrize('kind, order', CASES, ids=lambda case: getattr(case, '__name__', None) or
                         ' then '.join(use.__name__ for use in case))
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
            'scope': lambda: self.scope.variables()['state']['s']}[self.way]()
        self.value = stored * self.w

    def bump(self):
        self.s.value += 10

    @functools.cached_property
    def cached(self):
        return self.s.value * self.w


@orders
@pytest.mark.parametrize('read', ['value', 'cached'])
@pytest.mark.parametrize('way', ['value', 'get_variable', 'variables', 'scope'])
def test_state_is_seen_as_it_was(way, read, order):
    if read == 'cached' and not {*order} <= {plain, in_block, method}:
        return  # a mirror's cached properties are its own
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


@pytest.mark.parametrize('make', [
    lambda w: Pair(w, lambda x: 2 * x),
    lambda w: jax.tree_util.Partial(lambda a, b: 2 * a, w)], ids=['dataclass', 'Partial'])
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
