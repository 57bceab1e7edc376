"""Random programs with obstacles in them: what gradient_flow says is alone in the way, by probes.

An obstacle is one of a kind in its program, so that its operation names it. The probe is the same
program with that obstacle differentiated straight through.
"""

import random

import jax
import jax.numpy as jnp
import pytest

import flax_sg as sg

stop = jax.lax.stop_gradient
X = jnp.array([0.31, -0.72, 1.13])
OBSTACLES = {
    'stop_gradient': stop,
    'round': lambda x: jnp.round(3 * x) / 3,
    'floor': lambda x: jnp.floor(2 * x) / 2 + 0.2,
    'ceil': lambda x: jnp.ceil(4 * x) / 4 - 0.1,
    'sign': jnp.sign,
}
SMOOTH = {
    'tanh': jnp.tanh,
    'scaled': lambda x: 1.3 * x,
    'softmax': jax.nn.softmax,
    'normed': lambda x: x / jnp.sqrt(1 + (x**2).mean()),
}
JOINT = {
    'add': lambda x, y: 0.7 * x + y,
    'mul': lambda x, y: x * y + 0.3 * x,
    'concatenate': lambda x, y: jnp.concatenate([x, y])[::2] + 0.2 * y,
}
CALLS = {
    'jit': jax.jit,
    'remat': jax.checkpoint,
    'loop': lambda f: lambda x: jax.lax.fori_loop(0, 5, lambda i, c: 0.6 * f(c), x),
    'scan': lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), c), x, None, length=2)[1].sum(0),
}


def drawn(rng, depth, left):
    """Return a program: a parameter, or what is done to some."""
    kind = rng.random()
    if depth == 0 or kind < 0.12:
        return rng.choice('ab')
    if kind < 0.45 and left:
        return 'obstacle', left.pop(rng.randrange(len(left))), drawn(rng, depth - 1, left)
    if kind < 0.6:
        return 'smooth', rng.choice([*SMOOTH]), drawn(rng, depth - 1, left)
    if kind < 0.72:
        inner = drawn(rng, rng.randint(1, 2), left)
        return 'call', rng.choice([*CALLS]), inner, drawn(rng, depth - 1, left)
    parts = drawn(rng, depth - 1, left), drawn(rng, depth - 1, left)
    return 'joint', rng.choice([*JOINT]), *parts


def run(program, values, through):
    """Run a program, with some obstacles differentiated straight through."""
    if isinstance(program, str):
        return values[program]
    kind, name, *operands = program
    if kind == 'call':
        inner, x = operands
        body = lambda x: run(inner, dict.fromkeys('ab', x), through)
        return CALLS[name](body)(run(x, values, through))
    operands = [run(operand, values, through) for operand in operands]
    if kind == 'obstacle':
        (x,) = operands
        out = OBSTACLES[name](x)
        return x + stop(out - x) if name in through else out
    return (SMOOTH if kind == 'smooth' else JOINT)[name](*operands)


def obstacles_in(program):
    if isinstance(program, str):
        return []
    kind, name, *operands = program
    return [name] * (kind == 'obstacle') + [o for each in operands for o in obstacles_in(each)]


def is_there(program, param, through=()):
    def loss(value, rest):
        return (run(program, {**rest, param: value}, through) * X).sum()

    points = [dict(zip('ab', (k * X, X[::-1] - k), strict=True)) for k in (0.9, -0.4)]
    return any(bool(jax.grad(loss)(point[param], point).any()) for point in points)


def check_seed(seed):
    program = drawn(random.Random(seed), 4, [*OBSTACLES])
    names = obstacles_in(program)
    flow = sg.gradient_flow(lambda p: (run(program, p, ()) * X).sum())({'a': X, 'b': X})
    for record in flow:
        live = is_there(program, record.name)
        assert record.reached is live, (seed, program, record)
        if live or record.verdict == 'UNUSED':
            continue
        alone = {name for name in names if is_there(program, record.name, (name,))}
        said = {o.operation for o in record.obstacles if o.alone}
        assert said == alone, (seed, program, record)
        if alone:
            assert record.operation in alone and not record.reason
        else:
            row = {o.operation for o in record.obstacles}
            assert is_there(program, record.name, row), (seed, program, record)
            assert record.reason.startswith('in a row with'), (seed, program, record)
    return sum(record.verdict not in ('REACHED', 'REACHED_PARTLY', 'UNUSED') for record in flow)


@pytest.mark.thinned(4)
@pytest.mark.parametrize('part', range(8))
def test_what_is_alone_in_the_way(part):
    assert sum(map(check_seed, range(part, 160, 8))) >= 5
