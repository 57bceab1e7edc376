"""What a lifted class, its subclasses and mixins have is found as Python finds it, in the block.

By hand: the plain class, whose part's gradient is scaled. The part is a module that the lifted one
is handed: what reads it outside of the block reads it live.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

import jax
import jax.numpy as jnp
import pytest

import flax_sg as sg
from flax_sg import nn

tripled = sg.scale_gradient(True, 3.0)
SELECTS_NOTHING = sg.stop_gradient('none', allow_unmatched=True)
plain = lambda cls: cls
make = lambda *bases, **members: type('Made', bases, {'__module__': __name__, **members})


class Leaf(nn.Module):
    @nn.compact
    def __call__(self):
        return self.param('b', nn.initializers.ones, ())


def value_and_gradient(cls, read):
    class Outer(nn.Module):
        def setup(self):
            self.part = Leaf()
            self.head = cls(self.part)

        def __call__(self):
            return read(self.head)

    value, grads = jax.value_and_grad(Outer().apply)({'params': {'part': {'b': jnp.ones(())}}})
    return float(value), float(grads['params']['part']['b'])


def check(build, read):
    """Compare what is built of a lifted class with what is built of the class itself."""
    value, gradient = value_and_gradient(build(plain), read)
    assert gradient != 0
    assert value_and_gradient(build(SELECTS_NOTHING), read) == (value, gradient)
    assert value_and_gradient(build(tripled), read) == (value, 3 * gradient)


class Part(nn.Module):
    part: Any

    def f(self):
        return self.part()


class Mixin:
    def f(self):
        return 10 * self.part()

    def g(self):
        return self.part()

    annotated: Callable = lambda self: self.part()

    @functools.cached_property
    def cached(self):
        return self.part() + self.f()


class Behind(nn.Module):
    def g(self):
        return self.part()


def added(by):
    def f(self):
        return by + super(f.cls, self).f()

    return f


def overriding(*bases, by, **members):
    f = added(by)
    f.cls = make(*bases, f=f, **members)
    return f.cls


def diamond(lift):
    base = lift(Part)
    return make(overriding(base, by=1), make(Mixin, base))


def mixin_overridden_behind(lift):
    class Own(Mixin):
        def g(self):
            return 7 * self.part()

    return make(make(lift(Part), Mixin), Own)


def super_past_a_mixin(lift):
    class Own(Mixin):
        def g(self):
            return 7 * super().g()

    class Top(make(lift(Part), Mixin), Own):
        def g(self):
            return 1 + super().g()

    return Top


def calls(name):
    return lambda module: getattr(module, name)()


@pytest.mark.parametrize(
    'build, read',
    [
        (lambda lift: make(overriding(Mixin, lift(Part), by=1)), calls('f')),
        (lambda lift: overriding(make(Mixin, lift(Part)), by=1), calls('f')),
        (diamond, calls('f')),
        (mixin_overridden_behind, calls('g')),
        (super_past_a_mixin, calls('g')),
        (lambda lift: make(lift(Part), Mixin), calls('g')),
        (lambda lift: make(lift(Part), Mixin), lambda m: m.cached + m.cached),
        (lambda lift: make(Mixin, lift(Part)), lambda m: m.cached + m.f()),
        (lambda lift: make(lift(Part), Behind), calls('g')),
        (lambda lift: lift(make(Mixin, Part)), calls('annotated')),
        (lambda lift: make(Mixin, lift(Part)), calls('annotated')),
        (
            lambda lift: make(nn.remat(lift(Part), methods=['f']), g=lambda self: self.part()),
            calls('g'),
        ),
        (lambda lift: make(nn.remat(lift(Part), methods=['f'])), calls('f')),
        (
            lambda lift: make(nn.jit(lift(Part), methods=['f']), f=lambda self: 2 * self.part()),
            calls('f'),
        ),
        (
            lambda lift: make(lift(Part), f=nn.remat(lift(Part).f), g=lambda self: self.part()),
            lambda m: m.f() + 10 * m.g(),
        ),
        (
            lambda lift: make(
                lift(Part), f=functools.wraps(lift(Part).f)(lambda self: 2 * self.part())
            ),
            calls('f'),
        ),
        (
            lambda lift: (
                lift(nn.remat(lift(Part), methods=['f']))
                if lift is plain
                else make(nn.remat(lift(Part), methods=['f']))
            ),
            calls('f'),
        ),
    ],
)
def test_members_are_found_as_python_finds_them(build, read):
    check(build, read)


def test_a_subclass_of_two_lifted_classes_runs_the_members_of_both_in_both():
    class Other(nn.Module):
        def g(self):
            return self.part()

    both = make(tripled(Part), sg.scale_gradient(True, 5.0)(Other))
    assert value_and_gradient(both, lambda m: m.f()) == (1, 15)
    assert value_and_gradient(both, lambda m: m.g()) == (1, 15)


class Twice:
    """A descriptor with an attribute that Flax's own has too."""

    def __init__(self, fn):
        self.wrapped = fn

    def __get__(self, module, owner=None):
        return self if module is None else lambda: 2 * self.wrapped(module)


class TwiceProperty(property):
    def __get__(self, module, owner=None):
        return self if module is None else 2 * super().__get__(module, owner)


class TwiceCached(functools.cached_property):
    def __get__(self, module, owner=None):
        return self if module is None else 2 * super().__get__(module, owner)


class OfClass:
    def __init__(self, fn):
        self.fn = fn

    def __get__(self, module, owner):
        return self.fn(owner)


class CallableThatGivesAValue:
    def __get__(self, module, owner=None):
        return self if module is None else module.part()

    def __call__(self):
        raise AssertionError


class Seven:
    def __get__(self, module, owner=None):
        return 7.0


class HasWrapped(nn.Module):
    def wrapped(self):
        return 1.0

    def __call__(self):
        return 5.0


class Valued:
    value = CallableThatGivesAValue()  # Flax would make a method of it, in a module


class Described(Valued, Part):
    Inner = HasWrapped
    twice = Twice(lambda self: self.part())
    twice_property = TwiceProperty(lambda self: self.part())
    of_class = OfClass(lambda cls: 4.0)
    seven = Seven()
    in_class: ClassVar[Callable] = lambda self: self.part()

    def setup(self):
        self.inner = self.Inner()
        self.seven = 2.0

    @TwiceCached
    def twice_cached(self):
        return self.part()

    def perturb(self, *_):
        return self.part()

    def __getattr__(self, name):
        return self.part() if name == 'dynamic' else nn.Module.__getattr__(self, name)

    def __getitem__(self, i):
        return i * self.part()

    def named(self, *, module=1.0, original=1.0, fn=1.0, cls=1.0):
        return module * original * fn * cls * self.part()


@pytest.mark.parametrize(
    'read',
    [
        lambda m: m.twice(),
        lambda m: m.twice_property,
        lambda m: m.twice_cached,
        lambda m: type(m).of_class * m.f(),
        lambda m: m.value,
        lambda m: m.seven * m.f(),
        lambda m: m.in_class(),
        lambda m: m.inner() * m.f(),
        lambda m: m.perturb(),
        lambda m: m.dynamic,
        lambda m: m[2.0],
        lambda m: m.named(module=2.0, original=3.0, fn=4.0, cls=5.0),
    ],
)
@pytest.mark.parametrize(
    'build',
    [
        lambda lift: lift(Described),
        lambda lift: make(lift(Described)),
        lambda lift: lift(make(Described)),
        lambda lift: make(
            Valued,
            lift(Part),
            **{name: member for name, member in vars(Described).items() if name in NAMES},
        ),
    ],
)
def test_descriptors_stay_what_they_are(build, read):
    check(build, read)


NAMES = {
    'Inner',
    'twice',
    'twice_property',
    'of_class',
    'seven',
    'in_class',
    'setup',
    'twice_cached',
    'perturb',
    '__getattr__',
    '__getitem__',
    'named',
    '__annotations__',
}


@pytest.mark.parametrize('fn', ['custom_vjp', 'custom_jvp'])
@pytest.mark.parametrize('name', ['names', 'original', 'fn', 'rules'])
def test_keywords_of_functions_with_rules_are_the_users(fn, name):
    f = getattr(jax, fn)(eval(f'lambda x, {name}=2.0: x * {name}'), nondiff_argnums=(1,))
    if fn == 'custom_vjp':
        f.defvjp(lambda x, k: (x * k, None), lambda k, _, ct: (ct * k,))
    else:
        f.defjvp(lambda k, x, t: (x[0] * k, t[0] * k))
    assert f(3.0) == 6.0 and f(3.0, **{name: 5.0}) == 15.0
    with sg.stop_gradient(True, allow_unmatched=True):
        assert f(3.0, **{name: 5.0}) == 15.0


def test_a_function_with_rules_of_no_module():
    names = {}
    exec('f = lambda x: 2 * x', names)
    f = jax.custom_jvp(names['f'])
    f.defjvp(lambda x, t: (2 * x[0], 2 * t[0]))
    assert names['f'].__module__ is None or names['f'].__module__ == 'builtins'
    names['f'].__module__ = None
    assert jax.grad(f)(1.0) == 2.0


def test_keywords_of_lifted_functions_are_the_users():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            def body(module, x, *, groups=1.0, rngs=1.0):
                return groups * rngs * module.param('w', nn.initializers.ones, ()) * x

            return nn.remat(body)(self, x, groups=2.0, rngs=3.0)

    with sg.stop_gradient('w'):
        assert Net().apply({'params': {'w': 1.0}}, 1.0) == 6

    class Viewed(nn.Module):
        def setup(self):
            self.w = self.param('w', nn.initializers.ones, ())

        def run(self, *, module, fn, body, core):
            return self.w * module * fn * body * core

        def __call__(self):
            views = sg.gradient_views({'w': 'w'})
            return views(self.run)(module=2.0, fn=3.0, body=5.0, core=7.0)['w']

    assert Viewed().apply({'params': {'w': 1.0}}) == 210


# Setup ----------------------------------------------------------------------------------------


class Tied(nn.Module):
    part: Any
    number: int = 2

    def setup(self):
        self.table = self.part() ** 2
        self.leaf = Leaf()
        self.size = self.number

    def f(self):
        return self.table * self.size

    @property
    def doubled(self):
        return 2 * self.table

    def both(self):
        return self.f() + self.table + self.part()


TOUCHES = {
    'nothing': lambda m: None,
    'the table': lambda m: m.table,
    'a submodule': lambda m: m.leaf,
    'a number': lambda m: m.size,
    'what is not there': lambda m: hasattr(m, 'other'),
    'in remat': lambda m: nn.remat(lambda m: m.f())(m),
    'in jit': lambda m: nn.jit(lambda m: m.f())(m),
    'a method': lambda m: m.f(),
    'its variables': lambda m: m.variables,
}
FORMS = {
    'class': lambda lift: lift(Tied),
    'subclass': lambda lift: make(lift(Tied), f=lambda self: 3 * self.table),
    'setup of a subclass': lambda lift: make(
        lift(Part),
        setup=lambda self: vars(Tied)['setup'](self),
        number=2,
        **{name: vars(Tied)[name] for name in ('f', 'doubled', 'both')},
    ),
    'mirror': None,
    'copy': None,
}


@pytest.mark.thinned(7)
@pytest.mark.parametrize(
    'read',
    [
        lambda m: m.f(),
        lambda m: m.table,
        lambda m: m.doubled,
        lambda m: m.both(),
        lambda m: nn.remat(lambda m: m.f())(m),
        lambda m: nn.jit(lambda m: m.both())(m),
    ],
)
@pytest.mark.parametrize('touch', TOUCHES)
@pytest.mark.parametrize('form', FORMS)
def test_setup_of_a_lifted_module_runs_in_its_block(form, touch, read):
    def run(lift):
        class Outer(nn.Module):
            def setup(self):
                self.part = Leaf()
                if form in ('mirror', 'copy'):
                    self.head = (
                        Tied(self.part) if form == 'mirror' else lift(Tied(self.part, parent=None))
                    )
                else:
                    self.head = FORMS[form](lift)(self.part)

            def __call__(self):
                head = lift(self.head) if form == 'mirror' else self.head
                TOUCHES[touch](head)
                return read(head)

        leaf = {'b': jnp.ones(())}
        params = {'params': {'part': leaf, 'head': {'leaf': leaf}}}
        value, grads = jax.value_and_grad(Outer().apply)(params)
        return float(value), float(grads['params']['part']['b'])

    value, gradient = run(plain)
    assert run(tripled) == (value, 3 * gradient) and gradient != 0


# Classes that users make ----------------------------------------------------------------------


def test_a_hook_for_subclasses_is_not_for_lifted_ones():
    seen = []

    class Registered(nn.Module):
        def __init_subclass__(cls, tag, **kwargs):
            super().__init_subclass__(**kwargs)
            cls.tag = tag
            seen.append(tag)

    class First(Registered, tag='a'):
        @nn.compact
        def __call__(self):
            return self.param('w', nn.initializers.ones, ())

    lifted = tripled(tripled(First))

    class Below(lifted, tag='b'):
        pass

    assert (lifted.tag, Below.tag, seen) == ('a', 'b', ['a', 'b'])
    assert jax.grad(Below().apply)({'params': {'w': 1.0}}) == {'params': {'w': 9.0}}


def test_a_generic_class():
    T = TypeVar('T')

    class Of(nn.Module, Generic[T]):
        @nn.compact
        def __call__(self):
            return self.param('w', nn.initializers.ones, ())

    lifted = tripled(Of)
    params = {'params': {'w': 1.0}}
    assert jax.grad(lifted[int]().apply)(params) == {'params': {'w': 3.0}}


# map_variables --------------------------------------------------------------------------------


@pytest.mark.thinned(5)
@pytest.mark.parametrize('mutable', [False, ['params'], True])
@pytest.mark.parametrize('init', [False, True])
@pytest.mark.parametrize(
    't, seen, factor',
    [
        (sg.stop_gradient(True), lambda v: v, 0),
        (sg.scale_gradient(True, 3.0), lambda v: v, 3),
        (sg.map_values(True, lambda info, v: v + 1), lambda v: v + 1, 1),
    ],
    ids=['stop', 'scale', 'map'],
)
@pytest.mark.parametrize('form', ['block', 'class', 'instance'])
def test_map_variables_that_runs_its_body_first(form, t, seen, factor, init, mutable):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return self.param('w', nn.initializers.ones, ()) * x

    mapped = nn.map_variables(
        Net,
        'params',
        lambda v: jax.tree.map(lambda a: 2 * a, v),
        lambda v: jax.tree.map(lambda a: a / 2, v) if mutable else v,
        init=init,
    )
    model = {'block': mapped, 'class': t(mapped), 'instance': mapped}[form]()
    model = t(model) if form == 'instance' else model

    def apply(variables):
        out = model.apply(variables, 1.0, mutable=mutable)
        return out[0] if mutable else out

    def loss(variables):
        if form != 'block':
            return apply(variables)
        with t:
            return apply(variables)

    def by_hand(w):
        once_more = lambda v: v / 2 if init and mutable else v
        return 2 * once_more(seen(w))

    value, grads = jax.value_and_grad(loss)({'params': {'w': 5.0}})
    want = jax.value_and_grad(by_hand)(5.0)
    assert (value, grads['params']['w']) == (want[0], factor * want[1])
