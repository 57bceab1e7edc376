"""Sharded parameters stay as they are: on one host with eight devices, and across processes.

Each masked step is compared with the same step written by hand with `jax.lax.stop_gradient`: bits,
shardings, and every instruction of the compiled program, the collectives among them.
"""

import functools
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_sg as sg
import sharded_programs as programs
from flax_sg import nn
from sharded_programs import ByHand, Case, Layer, Masked, Stack


@functools.cache
def mesh():
    assert jax.device_count() == 8, 'run with XLA_FLAGS=--xla_force_host_platform_device_count=8'
    return Mesh(np.array(jax.devices()).reshape(2, 4), ('data', 'model'))


@functools.cache
def case_of(encoder_cls, style):
    return Case(mesh(), encoder_cls, style)


@functools.cache
def step_by_hand(encoder_cls, style, passes, kernels=False):
    use = next(use for use, stopped in programs.PASSES.items() if stopped == passes)
    return case_of(encoder_cls, style).step(ByHand(encoder_cls, style, use, kernels))


# Compiled steps ----------------------------------------------------------------------------------


@pytest.mark.thinned(4)
@pytest.mark.parametrize(
    'encoder_cls, style, use, kernels',
    [
        *((Layer, 'plain', use, False) for use in programs.USES),
        (Layer, 'plain', 'class', True),
        *((Layer, 'partitioned', use, False) for use in ('block', 'instance', 'around jit')),
        (Layer, 'logical', 'block', False),
        *((Stack, 'partitioned', use, False) for use in ('block', 'around apply')),
    ],
)
def test_step_is_the_one_written_by_hand(encoder_cls, style, use, kernels):
    case = case_of(encoder_cls, style)
    by_hand = step_by_hand(encoder_cls, style, programs.PASSES[use], kernels)
    masked = case.step(Masked(encoder_cls, style, use, kernels))
    compared = programs.compare_steps(masked, by_hand)
    # Every kernel is in eight parts, and the step does move data between devices.
    assert compared == 8 * len(jax.tree.leaves((case.variables, case.data[0])))
    counts = programs.collective_counts(masked[0])
    assert counts['all-gather'] and counts['all-reduce']
    for path, leaf in jax.tree_util.tree_leaves_with_path(case.variables['params']['encoder']):
        if "'kernel'" in jax.tree_util.keystr(path):
            assert leaf.addressable_shards[0].data.size == leaf.size // 8


@jax.custom_vjp
def doubled(v):
    return v


doubled.defvjp(lambda v: (v, None), lambda _, cotangent: (2 * cotangent,))

SIBLINGS = {
    'scale': (lambda p: sg.scale_gradient(p, 2), doubled),
    'map_gradient': (lambda p: sg.map_gradient(p, lambda info, ct: 2 * ct), doubled),
    'map_values': (lambda p: sg.map_values(p, lambda info, v: 1.5 * v), lambda v: 1.5 * v),
    'constant': (sg.constant, jax.lax.stop_gradient),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize('encoder_cls', [Layer, Stack])
@pytest.mark.parametrize('sibling', SIBLINGS)
def test_siblings_move_no_data_that_programs_by_hand_do_not(sibling, encoder_cls):
    make, change = SIBLINGS[sibling]
    case = case_of(encoder_cls, 'partitioned')
    masked = case.step(Masked(encoder_cls, 'partitioned', 'block', make=make))
    by_hand = case.step(ByHand(encoder_cls, 'partitioned', 'block', change=change))
    assert programs.compare_steps(masked, by_hand)
    assert programs.collective_counts(masked[0])['all-gather']


def test_comparison_sees_a_resharded_parameter():
    """Gather stopped parameters on every device: the same bits, more collectives."""

    def gather(leaf):
        held = jax.lax.stop_gradient(leaf)
        return jax.lax.with_sharding_constraint(held, NamedSharding(mesh(), P()))

    by_hand = step_by_hand(Layer, 'plain', (True, False))
    worse = case_of(Layer, 'plain').step(ByHand(Layer, 'plain', 'block', change=gather))
    assert (
        programs.collective_counts(worse[0])['all-gather']
        > programs.collective_counts(by_hand[0])['all-gather']
    )
    with pytest.raises(AssertionError, match='collective_counts: .* of all-gather'):
        programs.compare_steps(worse, by_hand)


def test_comparison_sees_a_live_parameter():
    """Leave out the mask: the gradients of its parameters are summed over the data axis too."""
    by_hand = step_by_hand(Layer, 'plain', (True, True))
    live = case_of(Layer, 'plain').step(Masked(Layer, 'plain', 'none'))
    assert programs.collectives(live[0]) != programs.collectives(by_hand[0])
    with pytest.raises(AssertionError, match=' != '):
        programs.assert_same_bits(live[1], by_hand[1])


@pytest.mark.parametrize('use', ['block', 'around jit'])
def test_init_places_the_same_parameters(use):
    case = case_of(Layer, 'partitioned')

    def init(program):
        with programs.environment(mesh()), program.around('jit'):
            make = jax.jit(
                lambda key: program.net.init(key, programs.BLANK), out_shardings=case.shardings
            )
            return make(jax.random.key(1))

    masked, plain = (init(Masked(Layer, 'partitioned', u)) for u in (use, 'none'))
    programs.assert_same_shardings(masked, case.variables)
    assert programs.assert_same_bits(masked, plain) == 8 * len(jax.tree.leaves(plain))


# Explicit shardings: part of an array's type -----------------------------------------------------


class Columns(nn.Module):
    """A dense layer and a scale, split over the model axis."""

    transform: sg.Transform
    see: Callable

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(16)
        h = dense(x)
        with self.transform:
            h = h + dense(x) * 2
            self.see(dense.variables['params'])
        return h


def types_of(tree):
    return jax.tree.map(jax.typeof, tree)


def test_explicit_shardings_keep_their_types():
    explicit = jax.make_mesh((2, 4), ('data', 'model'), axis_types=(AxisType.Explicit,) * 2)
    place = lambda value, *axes: jax.device_put(
        jnp.asarray(value, jnp.float32), NamedSharding(explicit, P(*axes))
    )
    rng = np.random.default_rng(0)
    dense = {
        'bias': place(rng.standard_normal(16), 'model'),
        'kernel': place(rng.standard_normal((8, 16)), None, 'model'),
    }
    params, x = {'Dense_0': dense}, place(rng.standard_normal((4, 8)), 'data', None)
    seen = []

    def masked(params, x):
        net = Columns(sg.stop_gradient('Dense_0/kernel'), lambda v: seen.append(types_of(v)))
        return net.apply({'params': params}, x)

    def by_hand(params, x):
        p = params['Dense_0']
        held = {'bias': p['bias'], 'kernel': jax.lax.stop_gradient(p['kernel'])}
        apply = lambda p: nn.Dense(16).apply({'params': p}, x)
        return apply(p) + apply(held) * 2

    def step(fn):
        with jax.set_mesh(explicit):
            compiled = (
                jax.jit(jax.grad(lambda *args: jnp.sum(jnp.sin(fn(*args))), (0, 1)))
                .lower(params, x)
                .compile()
            )
            return compiled, compiled(params, x)

    ours = step(masked)
    assert programs.compare_steps(ours, step(by_hand)) == 8 * 3
    assert seen == [types_of(dense)]
    assert seen[0]['kernel'].sharding.spec == P(None, 'model')
    programs.assert_same_shardings(ours[1][0], params)


# shard_map ---------------------------------------------------------------------------------------


class Part(nn.Module):
    """What one device does of a dense part whose width is split over the model axis."""

    transform: sg.Transform | None = None

    def setup(self):
        self.up, self.down = nn.Dense(4), nn.Dense(8, use_bias=False)

    def __call__(self, x):
        return jax.lax.psum(self.down(jnp.tanh(self.up(x))), 'model')

    def masked(self, x):
        with self.transform:
            return self(x)


@pytest.mark.parametrize('use', ['around shard_map', 'around apply', 'inside'])
def test_shard_map(use):
    transform = sg.stop_gradient('up')
    specs = {'up': {'kernel': P(None, 'model'), 'bias': P('model')}, 'down': {'kernel': P('model')}}
    shapes = {'up': {'kernel': (8, 16), 'bias': (16,)}, 'down': {'kernel': (16, 8)}}
    rng = np.random.default_rng(0)
    place = lambda shape, spec: jax.device_put(
        rng.standard_normal(shape).astype(np.float32), NamedSharding(mesh(), spec)
    )
    params = jax.tree.map(place, shapes, specs, is_leaf=lambda x: isinstance(x, tuple))
    x = place((4, 8), P('data'))

    def first(params, x):
        if use == 'inside':
            return Part(transform).apply({'params': params}, x, method='masked')
        with transform:
            return Part().apply({'params': params}, x)

    def first_by_hand(params, x):
        return Part().apply({'params': {**params, 'up': jax.lax.stop_gradient(params['up'])}}, x)

    def loss(first, second):
        def body(params, x):
            h = second(params, first(params, x))
            return jax.lax.pmean(jnp.mean(h**2), 'data')

        return jax.shard_map(body, mesh=mesh(), in_specs=(specs, P('data')), out_specs=P())

    live = lambda params, x: Part().apply({'params': params}, x)
    if use == 'around shard_map':

        def masked(params, x):
            with transform:
                return loss(live, live)(params, x)

        by_hand = loss(first_by_hand, first_by_hand)
    else:
        masked, by_hand = loss(first, live), loss(first_by_hand, live)

    def step(fn):
        compiled = jax.jit(jax.grad(fn, (0, 1))).lower(params, x).compile()
        return compiled, compiled(params, x)

    ours = step(masked)
    assert programs.compare_steps(ours, step(by_hand)) == 8 * 4
    assert programs.collective_counts(ours[0])['all-reduce'] > 1
    up_is_zero = not np.any(ours[1][0]['up']['kernel'])
    assert up_is_zero == (use == 'around shard_map') and np.any(ours[1][0]['down']['kernel'])


# Eager -------------------------------------------------------------------------------------------


def test_eager_read_is_the_stored_buffer():
    names = set()
    for name, got, stored in programs.masked_reads(mesh()):
        assert len(set(programs.buffers(stored))) == 8
        assert got is stored or name.endswith('differentiated'), name
        programs.assert_same_buffers(got, stored)
        names.add(name)
    assert len(names) == 2 * 6


class Affine(nn.Module):
    """A layer of few operations: run one by one, each of them is compiled."""

    style: str

    @nn.compact
    def __call__(self, x):
        init = programs.split(self.style, nn.initializers.lecun_normal(), 'embed', 'mlp')
        return jnp.tanh(nn.Dense(8, kernel_init=init)(x))


def test_eager_gradients():
    case = Case(mesh(), Affine, 'plain')

    def gradients(program):
        return jax.grad(program.loss)(case.variables, *case.data)

    masked, by_hand = (gradients(kind(Affine, 'plain', 'block')) for kind in (Masked, ByHand))
    programs.assert_same_shardings(masked, by_hand)
    assert programs.assert_same_bits(masked, by_hand) == 8 * len(jax.tree.leaves(masked))


# Two processes -----------------------------------------------------------------------------------

SECONDS = 150


def worker_environment():
    """Give a worker two devices, this process's library, and no proxy between it and its peer."""
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith('_proxy')}
    flags = re.sub(r'--xla_force_host_platform_device_count=\d+', '', env.get('XLA_FLAGS', ''))
    library = pathlib.Path(sg.__file__).parents[1]
    return {
        **env,
        'XLA_FLAGS': f'{flags} --xla_force_host_platform_device_count=2',
        'JAX_PLATFORMS': 'cpu',
        'PYTHONPATH': str(library),
    }


def run_processes(folder, count=2):
    """Run the workers to their end, or kill them all as soon as one of them fails."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{s.getsockname()[1]}'
    outputs = [folder / f'{i}.txt' for i in range(count)]
    workers = []
    try:
        for i, output in enumerate(outputs):
            with output.open('w') as f:
                workers.append(
                    subprocess.Popen(
                        [
                            sys.executable,
                            '-W',
                            'error',
                            programs.__file__,
                            address,
                            str(count),
                            str(i),
                        ],
                        stdin=subprocess.DEVNULL,
                        stdout=f,
                        stderr=subprocess.STDOUT,
                        env=worker_environment(),
                    )
                )
        end = time.monotonic() + SECONDS
        while any(w.poll() is None for w in workers) and not any(w.poll() for w in workers):
            if time.monotonic() > end:
                break
            time.sleep(0.05)
        return [w.poll() for w in workers], [output.read_text() for output in outputs]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def test_two_processes(tmp_path):
    for _ in range(3):
        codes, outputs = run_processes(tmp_path)
        # Another program may take the free port before the first worker does.
        if 'Failed to start RPC server' not in outputs[0]:
            break
    assert codes == [0, 0], '\n\n'.join(outputs)
    # Gloo writes on the same stream.
    first, second = (json.loads(re.findall(r'^{.*}$', output, re.M)[-1]) for output in outputs)
    assert (first.pop('process'), second.pop('process')) == (0, 1)
    assert first == second
    assert (first['processes'], first['devices']) == (2, 4)
    # Six uses, five of which read in three ways; each of them differentiated too.
    assert first['reads'] == 2 * (5 * 3 + 1)
    for step in first['steps'].values():
        # 11 gradients (10 parameters, all of them on both processes, and the input), two devices.
        assert (step['shards'], step['spread']) == (22, 10)
        assert step['collectives']['all-gather'] and step['collectives']['all-reduce']
