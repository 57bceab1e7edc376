"""Code that runs after a block was left, or while another one is: masked while it runs, or refused.

Every program ends with a look at a plain model: nothing may be open any more.
"""

import asyncio
import contextlib
import gc
import itertools
import threading

import jax
import pytest

import flax_sg as sg
from flax_sg import nn
from models import Scale


def slope():
    """The gradient of w now: 1 where nothing is open."""
    return float(jax.grad(lambda p: Scale().apply({'params': p}, 1.0))({'w': 1.0})['w'])


@pytest.fixture(autouse=True)
def nothing_is_open_afterwards():
    yield
    gc.collect()
    assert slope() == 1


def grads(net, params=('a', 'b')):
    found = jax.grad(lambda p: net.apply({'params': p}, 1.0))({n: {'w': 1.0} for n in params})
    return [float(found[n]['w']) for n in params]


class Base(nn.Module):
    def setup(self):
        self.a, self.b = Scale(), Scale()


def test_each_step_of_a_generator_method_runs_in_the_block():
    class Net(Base):
        @sg.stop_gradient('a')
        def steps(self, x):
            yield self.a(x)
            got = yield self.b(x)
            yield self.a(got)

        def __call__(self, x):
            steps = self.steps(x)
            first = next(steps) + 2 * self.a(x)  # live between the steps
            second = next(steps)
            return first + second + steps.send(self.b(x))

    assert grads(Net()) == [2, 2]


def test_a_generator_method_of_a_lifted_class():
    class Net(Base):
        def steps(self, x):
            yield self.a(x)
            yield self.b(x)

        def __call__(self, x):
            return sum(self.steps(x))

    assert grads(sg.stop_gradient('a')(Net)()) == [0, 1]
    assert grads(Net()) == [1, 1]


def test_a_generator_is_closed_and_thrown_into_and_returns():
    log = []

    class Net(Base):
        @sg.stop_gradient('a')
        def steps(self, x):
            try:
                yield self.a(x)
            except KeyError:
                log.append('caught')
                yield 3 * self.a(x)
            finally:
                log.append(float(jax.grad(lambda w: self.a(w))(1.0)))  # the input stays live
            return 'end'

        def __call__(self, x):
            steps = self.steps(x)
            out = next(steps) + steps.throw(KeyError('mine'))
            with pytest.raises(StopIteration, match='end'):
                next(steps)
            steps = self.steps(x)
            out += next(steps)
            steps.close()
            return out

    assert grads(Net(), 'a') == [0]
    assert log == ['caught', 1, 1]


def test_a_generator_that_a_method_returns():
    class Net(Base):
        @sg.stop_gradient('a')
        def steps(self, x):
            return (self.a(v) for v in [x, x])

        def __call__(self, x):
            return sum(self.steps(x)) + self.a(x)

    assert grads(Net(), 'a') == [1]


LATER = {
    'zip': lambda module, x: zip([module.a(x)], (module.a(v) for v in [x]), strict=True),
    'chain': lambda module, x: itertools.chain([module.a(x)], (module.a(v) for v in [x])),
    'enumerate': lambda module, x: enumerate(module.a(v) for v in [x]),
    'in a tuple': lambda module, x: ((module.a(v) for v in [x]), {'aux': x}),
    'map': lambda module, x: map(module.a, [x]),
    'filter': lambda module, x: filter(module.a, [x]),
    'starmap': lambda module, x: itertools.starmap(module.a, [(x,)]),
    'context manager': contextlib.contextmanager(lambda module, x: iter([module.a(x)])),
}


@pytest.mark.thinned(5)
@pytest.mark.parametrize('kind', LATER)
@pytest.mark.parametrize('use', ['method', 'class', 'mirror'])
def test_what_is_returned_and_runs_later_is_refused(kind, use):
    t = sg.stop_gradient('a')

    class Net(Base):
        later = LATER[kind]

        if use == 'method':
            later = t(later)

        def __call__(self, x):
            return (t(self) if use == 'mirror' else self).later(x)

    net = t(Net)() if use == 'class' else Net()
    with pytest.raises(
        sg.UsageError,
        match='returned an object of type .*, which runs after the bl'
        'ock around the function was left. Return a list or a generator.',
    ):
        net.apply({'params': {'a': {'w': 1.0}, 'b': {'w': 1.0}}}, 1.0)


@pytest.mark.parametrize('out', [iter([1]), iter({'a': 1}.items()), reversed([1]), [1], {'a': 1}])
def test_an_iterator_over_what_is_there_is_no_matter(out):
    method = sg.stop_gradient('w')(lambda module: out)
    assert method(Scale().bind({'params': {'w': 1.0}})) is out


@pytest.mark.parametrize('kind', ['coroutine', 'async generator'])
def test_a_coroutine_function_is_refused_when_it_is_decorated(kind):
    async def coroutine(module, x):
        return module.a(x)

    async def generator(module, x):
        yield module.a(x)

    fn = coroutine if kind == 'coroutine' else generator
    with pytest.raises(
        sg.UsageError, match='is a coroutine function: its body would run after the'
    ):
        sg.stop_gradient('a')(fn)
    with pytest.raises(sg.UsageError, match='is a coroutine function'):
        sg.stop_gradient('a')(type('Net', (Base,), {'later': fn, '__module__': __name__}))


# Blocks that are left in the wrong order ---------------------------------------------------------

OUTER, INNER = sg.stop_gradient('w'), sg.scale_gradient('w', 2.0)


def waits(t):
    with t:
        yield
    yield


@pytest.mark.thinned(5)
@pytest.mark.parametrize('inner', [INNER, OUTER], ids=['another', 'the same'])
@pytest.mark.parametrize('end', ['close', 'next', 'drop', 'throw'])
@pytest.mark.parametrize('outer', ['with', 'stack', 'method'])
def test_a_generator_that_waits_in_a_block_when_the_one_around_it_ends(outer, end, inner):
    generator = waits(inner)

    @OUTER
    def method(module):
        next(generator)

    with pytest.raises(
        sg.UsageError,
        match='was left while .* was still open inside of it; both ar'
        'e closed now. Leave blocks in the reverse order of entry',
    ):
        if outer == 'with':
            with OUTER:
                next(generator)
        elif outer == 'stack':
            with contextlib.ExitStack() as stack:
                stack.enter_context(OUTER)
                next(generator)
        else:
            method(Scale().bind({'params': {'w': 1.0}}))
    assert slope() == 1
    if end == 'throw':
        with pytest.raises(KeyError, match='mine'):
            generator.throw(KeyError('mine'))
    elif end == 'drop':
        del generator
    elif end == 'close':
        generator.close()
    else:
        with pytest.raises(
            sg.UsageError, match='was closed before its end, with a block around it '
        ):
            next(generator)
    assert slope() == 1


def test_a_block_opened_again_is_not_closed_by_one_that_was_left_with_another():
    generator = waits(OUTER)
    with pytest.raises(sg.UsageError, match='was left while'):
        with INNER:
            next(generator)
    with OUTER:
        with pytest.raises(sg.UsageError, match='was closed before its end'):
            next(generator)
        assert slope() == 0


def test_each_generator_leaves_its_own_opening_of_one_transform():
    first, second = waits(OUTER), waits(OUTER)
    next(first), next(second)
    assert slope() == 0
    with pytest.raises(sg.UsageError, match='was left while'):
        next(first)  # out of order: both are closed, and it says so
    assert slope() == 1
    with pytest.raises(sg.UsageError, match='was closed before its end'):
        next(second)
    assert slope() == 1


def test_a_block_that_a_generator_around_it_has_closed_says_so():
    generator = waits(INNER)
    next(generator)
    with pytest.raises(sg.UsageError, match=r"stop_gradient\('w'\) was closed before its end"):
        with OUTER:
            with pytest.raises(sg.UsageError, match='was left while'):
                next(generator)
            assert slope() == 1


def test_an_error_in_the_body_goes_first_and_leaves_nothing_open():
    generator = waits(INNER)
    with pytest.raises(KeyError, match='mine'):
        with OUTER:
            next(generator)
            raise KeyError('mine')
    assert slope() == 1
    generator.close()


def test_context_managers_that_open_a_block_keep_working():
    @contextlib.contextmanager
    def held():
        with OUTER:
            yield

    @contextlib.contextmanager
    def twice():
        with held(), INNER:
            yield

    for _ in range(2):
        with held():
            assert slope() == 0
            with twice():
                assert slope() == 0
            assert slope() == 0
        assert slope() == 1
    with contextlib.ExitStack() as stack:
        for t in (OUTER, OUTER, INNER):
            stack.enter_context(t)
        assert slope() == 0


def test_a_block_is_left_once_and_where_it_was_entered():
    with pytest.raises(sg.UsageError, match='was left without being open in this thread'):
        OUTER.__exit__(None, None, None)
    errors = []

    def leave():
        try:
            OUTER.__exit__(None, None, None)
        except sg.UsageError as error:
            errors.append(str(error))

    with OUTER:
        thread = threading.Thread(target=leave)
        thread.start()
        thread.join()
        assert slope() == 0
    assert len(errors) == 1 and 'without being open in this thread' in errors[0]


# asyncio -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def opens():
    with OUTER:
        yield


def ways_to_open():
    async def directly():
        with OUTER:
            await asyncio.sleep(0)

    async def by_a_context_manager():
        with opens():
            await asyncio.sleep(0)

    async def by_a_stack():
        with contextlib.ExitStack() as stack:
            stack.enter_context(OUTER)
            await asyncio.sleep(0)

    async def in_an_async_generator():
        async def steps():
            with OUTER:
                yield

        async for _ in steps():
            pass

    return [directly, by_a_context_manager, by_a_stack, in_an_async_generator]


@pytest.mark.parametrize('way', ways_to_open(), ids=lambda f: f.__name__)
def test_a_block_that_could_stay_open_while_another_task_runs_is_an_error(way):
    seen = []

    async def other():
        seen.append(slope())

    async def main():
        await asyncio.gather(way(), other())

    with pytest.raises(
        sg.UsageError,
        match=r"stop_gradient\('w'\) was to be opened in the "
        'coroutine .*: while it waits, other tasks of the thread would run inside '
        'of the block',
    ):
        asyncio.run(main())
    assert set(seen) <= {1.0}


def test_blocks_around_a_loop_and_in_functions_that_a_coroutine_calls():
    def masked():
        with OUTER:
            return slope()

    async def task():
        before = slope()
        await asyncio.sleep(0)
        return before, masked()

    async def main():
        return await asyncio.gather(task(), task())

    assert asyncio.run(main()) == [(1, 0), (1, 0)]
    with OUTER:
        assert asyncio.run(main()) == [(0, 0), (0, 0)]
