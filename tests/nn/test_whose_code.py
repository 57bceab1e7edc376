"""Names in a block are those of the module in whose code it stands, whoever calls that code."""

import functools

import jax
import jax.numpy as jnp
import pytest

from flax_sg import nn

ones = nn.initializers.ones


class Caller(nn.Module):
    """Has a variable of the same name, and calls what it is given in several ways."""

    def setup(self):
        self.w = self.param('w', ones, ())

    @nn.nowrap
    def unwrapped(self, f, x):
        return f(x)

    def wrapped(self, f, x):
        return f(x)

    def generator(self, f, x):
        yield f(x)

    @property
    def calls(self):
        return lambda f, x: f(x)

    @nn.nowrap
    def nested(self, f, x):
        def call(x):
            return [f(x) for _ in range(1)][0]

        return call(x)


CALLS = {
    'unwrapped': lambda s, f, x: s.unwrapped(f, x),
    'wrapped': lambda s, f, x: s.wrapped(f, x),
    'generator': lambda s, f, x: next(s.generator(f, x)),
    'property': lambda s, f, x: s.calls(f, x),
    'nested': lambda s, f, x: s.nested(f, x),
    'lambda': lambda s, f, x: s.unwrapped(lambda x: f(x), x),
    'partial': lambda s, f, x: s.wrapped(functools.partial(lambda a, x: f(x), 1), x),
    'jit': lambda s, f, x: s.unwrapped(jax.jit(f), x),
    'map': lambda s, f, x: s.wrapped(jax.jit(jax.vmap(f)), x[None])[0],
    'scan': lambda s, f, x: s.wrapped(
        lambda x: jax.lax.scan(lambda c, _: (c, f(x)), x, None, length=1)[1][0], x
    ),
    'twice': lambda s, f, x: s.wrapped(lambda x: s.unwrapped(f, x), x),
}
WRITTEN = ['in the method', 'in setup', 'in a nested function', 'in a property']


class Writer(nn.Module):
    where: str
    call: str

    def setup(self):
        self.s, self.w = Caller(), self.param('w', ones, ())

        def block(x):
            with nn.stop_gradient('w'):
                return self.w * x

        self.of_setup = lambda x: block(x)

    @property
    def of_property(self):
        def block(x):
            with nn.stop_gradient('w'):
                return self.w * x

        return block

    def __call__(self, x):
        def in_method(x):
            with nn.stop_gradient('w'):
                return self.w * x

        def outer(x):
            def inner(x):
                with nn.stop_gradient('w'):
                    return self.w * x

            return inner(x)

        f = dict(zip(WRITTEN, (in_method, self.of_setup, outer, self.of_property), strict=True))
        called = CALLS[self.call](self.s, f[self.where], x)
        return called + self.s.wrapped(lambda x: self.s.w * x, x)


@pytest.mark.parametrize('call', CALLS)
@pytest.mark.thinned(2)
@pytest.mark.parametrize('where', WRITTEN)
def test_a_function_that_another_module_calls(where, call):
    params = {'w': jnp.array(1.0), 's': {'w': jnp.array(1.0)}}
    grads = jax.grad(lambda p: Writer(where, call).apply({'params': p}, jnp.array(2.0)))(params)
    assert (grads['w'], grads['s']['w']) == (0, 2)


def test_it_may_be_called_without_the_module_that_wrote_it():
    """Then there is none whose names could be meant but the one that is running."""

    class Maker(nn.Module):
        def setup(self):
            self.s, self.w = Caller(), self.param('w', ones, ())

        def make(self):
            def f(x):
                with nn.stop_gradient('w'):
                    return self.w * x

            return f

        def __call__(self, x):
            return self.make()(x) + self.s.w * x

    grads = jax.grad(lambda p: Maker().apply({'params': p}, 2.0))(
        {'w': jnp.array(1.0), 's': {'w': jnp.array(1.0)}}
    )
    assert (grads['w'], grads['s']['w']) == (0, 2)


class Deep(nn.Module):
    kind: str

    def setup(self):
        self.w = self.param('w', ones, ())

    @nn.nowrap
    def curvature(self, xs):
        def f(x):
            with nn.stop_gradient('w'):
                return self.w * x**3

        def down(x, depth):
            return f(x) if depth == 0 else down(x, depth - 1)

        return {
            'hessian': lambda: jax.vmap(jax.hessian(f))(xs),
            'jitted': lambda: jax.jit(jax.vmap(jax.hessian(f)))(xs),
            'map': lambda: jax.lax.map(jax.hessian(f), xs),
            'recursion': lambda: down(xs, 60),
        }[self.kind]().sum()

    @property
    def in_property(self):
        return self.curvature(jnp.ones(1))


class Top(nn.Module):
    kind: str
    named: bool

    def setup(self):
        self.s = Deep(self.kind)
        if self.named:
            self.w = self.param('w', ones, ())

    def __call__(self):
        return self.s.curvature(jnp.ones(1)) + self.s.in_property


@pytest.mark.parametrize('named', [False, True])
@pytest.mark.parametrize('kind', ['hessian', 'jitted', 'map', 'recursion'])
def test_however_deep_in_calls_the_block_is(kind, named):
    params = {'s': {'w': jnp.array(1.0)}, **({'w': jnp.array(1.0)} if named else {})}
    grads = jax.grad(lambda p: Top(kind, named).apply({'params': p}))(params)
    assert grads['s']['w'] == 0


# Which module it is, where several could be meant -------------------------------------------------


class Node(nn.Module):
    """One class, at two places: the parent's function is called by the child."""

    child: nn.Module | None = None

    def setup(self):
        self.w = self.param('w', ones, ())

        def of_setup(x):
            with nn.stop_gradient('w'):
                return self.w * x

        self.of_setup = of_setup

    def __call__(self, x, f=None):
        if f is not None:
            return f(x)

        def block(x):
            with nn.stop_gradient('w'):
                return self.w * x + 3 * self.child.w

        return self.child(x, block)

    def the_childs(self, x):
        return self.child.of_setup(x) + 3 * self.w


@pytest.mark.parametrize('method, want', [('__call__', (0, 3)), ('the_childs', (3, 0))])
def test_among_instances_of_one_class_it_is_that_of_the_closure(method, want):
    params = {'w': jnp.array(1.0), 'child': {'w': jnp.array(1.0)}}
    grads = jax.grad(lambda p: Node(child=Node()).apply({'params': p}, 2.0, method=method))(params)
    assert (grads['w'], grads['child']['w']) == want


def held(fn):
    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        with nn.stop_gradient('w'):
            return fn(*args, **kwargs)

    return wrapper


class HeldAttribute:
    """A descriptor of the user's own."""

    def __get__(self, module, owner):
        if module is None:
            return self
        with nn.stop_gradient('w'):
            return 1.0 * module.w


class Part(nn.Module):
    def setup(self):
        self.w = self.param('w', ones, ())

    @property
    @held
    def decorated_property(self):
        return self.w

    @nn.nowrap
    @held
    def decorated(self):
        return self.w

    @nn.nowrap
    def several(*args):
        with nn.stop_gradient('w'):
            return 1.0 * args[0].w

    descriptor = HeldAttribute()

    @nn.nowrap
    def by_a_class(self):
        class Reads:
            def instance(this):
                with nn.stop_gradient('w'):
                    return 1.0 * self.w

            @staticmethod
            def static():
                with nn.stop_gradient('w'):
                    return 0.0 * self.w

        return Reads().instance() + Reads.static()


READS = {
    'property': lambda p: p.decorated_property,
    'decorated': lambda p: p.decorated(),
    'arguments': lambda p: p.several(),
    'descriptor': lambda p: p.descriptor,
    'class': lambda p: p.by_a_class(),
}


class Whole(nn.Module):
    read: str

    def setup(self):
        self.p, self.w = Part(), self.param('w', ones, ())

    def __call__(self, x):
        return READS[self.read](self.p) * x + 3 * self.w


@pytest.mark.parametrize('read', READS)
def test_members_of_a_part_in_whatever_form(read):
    params = {'w': jnp.array(1.0), 'p': {'w': jnp.array(1.0)}}
    grads = jax.grad(lambda p: Whole(read).apply({'params': p}, 2.0))(params)
    assert (grads['p']['w'], grads['w']) == (0, 3)


class InAClass(nn.Module):
    """A part calls a class that a method defines, or a function of setup."""

    kind: str

    def setup(self):
        self.s, self.w = Caller(), self.param('w', ones, ())

        def of_setup(x, w=self.w):  # no `self` in its closure
            with nn.stop_gradient('w'):
                return self_of_setup[0].w * x

        self_of_setup = [self]
        self.of_setup = of_setup

    def __call__(self, x):
        class Static:
            @staticmethod
            def f(x):
                with nn.stop_gradient('w'):
                    return self.w * x

        f = {'static': Static.f, 'setup': self.of_setup}[self.kind]
        return self.s.wrapped(f, x) + 3 * self.s.w


@pytest.mark.parametrize('kind', ['static', 'setup'])
def test_a_class_or_a_setup_wrote_it(kind):
    params = {'w': jnp.array(1.0), 's': {'w': jnp.array(1.0)}}
    grads = jax.grad(lambda p: InAClass(kind).apply({'params': p}, 2.0))(params)
    assert (grads['w'], grads['s']['w']) == (0, 3)


def test_a_module_class_that_a_method_defines_has_names_of_its_own():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            class Inner(nn.Module):
                @nn.compact
                def __call__(self, x):
                    def f(x):
                        with nn.stop_gradient('w'):
                            return self.param('w', ones, ()) * x

                    return f(x)

            return Inner(name='inner')(x) * self.param('w', ones, ())

    grads = jax.grad(lambda p: Outer().apply({'params': p}, 2.0))(
        {'w': jnp.array(1.0), 'inner': {'w': jnp.array(1.0)}}
    )
    assert (grads['w'], grads['inner']['w']) == (2, 0)


def checked(fn):
    """A decorator that methods and helpers share, as of a library that checks types."""

    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        return fn(*args, **kwargs)

    return wrapper


@checked
def helper(part, x):
    with nn.stop_gradient('w'):
        return part.w * x


class Checked(nn.Module):
    def setup(self):
        self.w = self.param('w', ones, ())

    @nn.nowrap
    @checked
    def of_its_own(self):
        with nn.stop_gradient('w'):
            return 1.0 * self.w


class Helped(nn.Module):
    """Calls a helper: the block stands in nobody's code, and is that of the running module."""

    own: bool

    def setup(self):
        self.p, self.w = Checked(), self.param('w', ones, ())

    def __call__(self, x):
        held = self.p.of_its_own() if self.own else helper(self.p, x) + 0 * self.w
        return held + 3 * self.w


@pytest.mark.parametrize('own, want', [(False, (2, 3)), (True, (0, 3))])
def test_a_decorator_that_a_helper_shares_with_a_part(own, want):
    params = {'w': jnp.array(1.0), 'p': {'w': jnp.array(1.0)}}
    grads = jax.grad(lambda p: Helped(own).apply({'params': p}, 2.0))(params)
    assert (grads['p']['w'], grads['w']) == want
