"""Libraries of modules enter themselves, before or after the first block."""

import jax.numpy as jnp
import pytest

import flax_sg as sg
from internals import front_end_entered


class Toy:
    """A library of modules that are instances of `Toy.Module`."""

    module = 'toy.Module'

    class Module:
        pass

    def __init__(self):
        self.checks, self.running = 0, False

    def check(self):
        self.checks += 1

    def is_running(self):
        return self.running

    def block(self, transform, frame):
        return NotImplemented

    def transformed(self, transform, target):
        return (transform, target) if isinstance(target, Toy.Module) else NotImplemented

    def viewed(self, views, target):
        return (views, target) if isinstance(target, Toy.Module) else NotImplemented

    def viewed_call(self, views, fn, args, kwargs):
        if args and isinstance(args[0], Toy.Module):
            return views.named([fn(*args, **kwargs)] * len(views.entries))
        return NotImplemented


@pytest.fixture
def toy():
    with sg.stop_gradient(sg.nothing, allow_unmatched=True):
        pass  # the first block, and with it the check of what was there
    with front_end_entered(Toy()) as toy:
        yield toy


def test_one_that_enters_late_is_checked_once(toy):
    for _ in range(2):
        with sg.stop_gradient(sg.nothing, allow_unmatched=True):
            pass
    assert toy.checks == 1


def test_its_targets_are_its_own(toy):
    module, t, views = Toy.Module(), sg.stop_gradient('a'), sg.gradient_views({'x': 'a'})
    assert t(module) == (t, module)
    assert views(module) == (views, module)
    assert views(lambda module, x: x + 1)(module, 2) == {'x': 3}
    assert t({'a': jnp.ones(2)})['a'].shape == (2,)


@pytest.mark.parametrize(
    'make', [sg.stop_gradient('a'), sg.gradient_views({'x': 'a'})], ids=['transform', 'views']
)
def test_messages_name_the_modules_of_all(toy, make):
    with pytest.raises(
        sg.UsageError,
        match=r'expected a flax\.linen\.Module( or flax\.nnx\.Module)? or toy\.Module class',
    ):
        make(3)
