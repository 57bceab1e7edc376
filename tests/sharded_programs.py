"""A sharded step of a transformer, masked and by hand, and what it moves between devices.

The masked step and the one written by hand with `jax.lax.stop_gradient` are compiled with the same
shardings. They must hold the same instructions, and so the same collectives, and give the same
bits. Run as a script this is one process of several that make the comparison together:
`python sharded_programs.py ADDRESS PROCESSES PROCESS`; the last line it prints is a JSON record.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_sg as sg
from flax_sg import nn

RULES = (('batch', 'data'), ('embed', 'data'), ('heads', 'model'), ('mlp', 'model'))
STYLES = ('plain', 'partitioned', 'logical')
BLANK = np.ones((4, 4, 8), np.float32)

# Programs ----------------------------------------------------------------------------------------


def split(style: str, init: Callable, *names: str) -> Callable:
    """Return an initialiser of a variable that names its axes, in the styles that do."""
    if style == 'partitioned':
        return nn.with_partitioning(init, tuple(dict(RULES)[name] for name in names))
    return nn.with_logical_partitioning(init, names) if style == 'logical' else init


class Layer(nn.Module):
    """Attention and a dense part. Every kernel is split over both axes of the mesh."""

    style: str

    @nn.compact
    def __call__(self, x):
        init = functools.partial(split, self.style, nn.initializers.lecun_normal())
        h = nn.Dense(24, kernel_init=init('embed', 'heads'), name='heads')(x)
        q, k, v = jnp.split(h.reshape(*x.shape[:-1], 4, 6), 3, axis=-1)
        h = nn.dot_product_attention(q, k, v).reshape(x.shape)
        x = x + nn.Dense(8, kernel_init=init('heads', 'embed'), name='mixed')(h)
        bias = split(self.style, nn.initializers.normal(), 'mlp')
        h = nn.Dense(16, kernel_init=init('embed', 'mlp'), bias_init=bias, name='up')(x)
        return x + nn.Dense(8, kernel_init=init('mlp', 'embed'), name='down')(jnp.tanh(h))


class Stack(nn.Module):
    """Two layers as a scan, with their parameters stacked."""

    style: str

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            lambda layer, x, _: (layer(x), None),
            {'params': 0},
            split_rngs={'params': True},
            length=2,
            metadata_params={nn.PARTITION_NAME: None},
        )
        return scan(Layer(self.style, name='layer'), x, None)[0]


class Net(nn.Module):
    """Runs its encoder twice, the first time (in most uses) stopped, the second time live."""

    encoder_cls: type[nn.Module]
    style: str
    use: str
    transform: sg.Transform

    def setup(self):
        lift = self.transform if self.use == 'class' else lambda cls: cls
        self.encoder = lift(self.encoder_cls)(self.style)
        self.head = nn.Dense(4)

    def __call__(self, x):
        return self.head(self.encoder(self.first(x)))

    def first(self, x):
        if self.use == 'block':
            with self.transform:
                return self.encoder(x)
        if self.use == 'method':
            return self.transform(lambda net, x: net.encoder(x))(self, x)
        encoder = self.transform(self.encoder) if self.use == 'instance' else self.encoder
        return encoder(x)


# A predicate from the encoder, and from the net; which leaves of the encoder it means.
KERNELS = {
    False: ('**', 'encoder', lambda path: True),
    True: ('**/kernel', 'encoder/**/kernel', lambda path: "'kernel'" in path),
}
# Which of the two passes each use stops.
PASSES = {
    'none': (False, False),
    'block': (True, False),
    'method': (True, False),
    'instance': (True, False),
    'class': (True, True),
    'around apply': (True, True),
    'around jit': (True, True),
    'tree': (True, True),
}
USES = tuple(use for use in PASSES if use != 'none')


class Masked:
    """The program with a mask, which ``make`` makes of a predicate, in one of its uses."""

    def __init__(
        self,
        encoder_cls: type[nn.Module],
        style: str,
        use: str,
        kernels: bool = False,
        make: Callable = sg.stop_gradient,
    ):
        inner, outer, _ = KERNELS[kernels]
        self.transform = make(inner if use in ('class', 'instance') else outer)
        self.net, self.use = Net(encoder_cls, style, use, self.transform), use

    def around(self, place: str) -> contextlib.AbstractContextManager:
        return self.transform if self.use == f'around {place}' else contextlib.nullcontext()

    def loss(self, variables, x, y):
        if self.use == 'tree':
            variables = {'params': self.transform(variables['params'])}
        with self.around('apply'):
            return jnp.mean((self.net.apply(variables, x) - y) ** 2)


class ByHand:
    """The same program without the library. ``change`` may do worse than stop a parameter."""

    def __init__(
        self,
        encoder_cls: type[nn.Module],
        style: str,
        use: str,
        kernels: bool = False,
        change: Callable = jax.lax.stop_gradient,
    ):
        self.encoder, self.passes = encoder_cls(style), PASSES[use]
        self.stopped, self.change = KERNELS[kernels][2], change

    def around(self, place: str) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def loss(self, variables, x, y):
        params = variables['params']

        def hold(path, leaf):
            return self.change(leaf) if self.stopped(jax.tree_util.keystr(path)) else leaf

        held = jax.tree_util.tree_map_with_path(hold, params['encoder'])
        for stopped in self.passes:
            x = self.encoder.apply({'params': held if stopped else params['encoder']}, x)
        return jnp.mean((nn.Dense(4).apply({'params': params['head']}, x) - y) ** 2)


# Placement and compilation -----------------------------------------------------------------------


@contextlib.contextmanager
def environment(mesh: Mesh) -> Iterator[None]:
    """Make the mesh and the logical rules known, so that boxes constrain their values."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


class Case:
    """Parameters and data on a mesh, and the shardings to compile with."""

    def __init__(self, mesh: Mesh, encoder_cls: type[nn.Module], style: str):
        self.mesh, self.of = mesh, (encoder_cls, style)
        # Plain parameters know no axes: they lie as the boxed ones do.
        nets = {s: Masked(encoder_cls, s, 'none').net for s in STYLES}
        shapes = {s: jax.eval_shape(nets[s].init, jax.random.key(0), BLANK) for s in STYLES}
        if style == 'logical':
            self.shardings = nn.logical_to_mesh_sharding(
                nn.get_partition_spec(shapes[style]), mesh, RULES
            )
        else:
            self.shardings = nn.get_sharding(shapes['partitioned'], mesh)
        rng = np.random.default_rng(0)

        def place(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
            value = 0.3 * rng.standard_normal(shape.shape, np.float32)
            return jax.make_array_from_callback(shape.shape, sharding, lambda index: value[index])

        self.variables = jax.tree.map(
            place, shapes[style], jax.tree.broadcast(self.shardings, shapes[style])
        )
        self.rows = NamedSharding(mesh, P('data'))
        self.data = tuple(
            place(jax.ShapeDtypeStruct((4, 4, n), np.float32), self.rows) for n in (8, 4)
        )

    def step(self, program: Masked | ByHand) -> tuple[jax.stages.Compiled, Any]:
        """Compile the gradients of parameters and inputs, and run them."""
        step = jax.jit(
            lambda *args: jax.grad(program.loss, (0, 1))(*args),
            in_shardings=(self.shardings, self.rows, self.rows),
        )
        with environment(self.mesh), program.around('jit'):
            compiled = step.lower(self.variables, *self.data).compile()
            return compiled, compiled(self.variables, *self.data)


# Comparison --------------------------------------------------------------------------------------

COLLECTIVES = ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute', 'reduce-scatter')
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)$', re.M)
_GROUPS = re.compile(r'(?:replica_groups|source_target_pairs|dimensions)=(?:\{\{.*?\}\}|\S+)')


def instructions(compiled: jax.stages.Compiled) -> collections.Counter[str]:
    """Count a program's instructions by operation, shape, layout and, of collectives, groups."""
    return collections.Counter(
        ' '.join((opcode, shape, *_GROUPS.findall(rest)))
        for shape, opcode, rest in _INSTRUCTION.findall(compiled.as_text())
    )


def collectives(compiled: jax.stages.Compiled) -> collections.Counter[str]:
    """Count what a program moves between devices."""
    return collections.Counter(
        {
            line: n
            for line, n in instructions(compiled).items()
            if line.split(' ', 1)[0].removesuffix('-start') in COLLECTIVES
        }
    )


def collective_counts(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Count a program's collectives by operation."""
    counts = dict.fromkeys(COLLECTIVES, 0)
    for line, n in collectives(compiled).items():
        counts[line.split(' ', 1)[0].removesuffix('-start')] += n
    return counts


def assert_same_shardings(actual: Any, expected: Any) -> None:
    """Check that the arrays of two trees lie on the same devices in the same way."""
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), f'{a.sharding} is not {b.sharding}'


def assert_same_bits(actual: Any, expected: Any) -> int:
    """Compare every shard of this process, and return how many they were."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    count = 0
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        for ours, theirs in zip(a.addressable_shards, b.addressable_shards, strict=True):
            assert (ours.index, ours.device) == (theirs.index, theirs.device)
            got, want = np.asarray(ours.data), np.asarray(theirs.data)
            assert got.dtype == want.dtype and got.tobytes() == want.tobytes(), f'{got} != {want}'
            count += 1
    return count


def compare_steps(masked: tuple, by_hand: tuple) -> int:
    """Compare two compiled steps and their results, and return the number of shards compared."""
    (compiled, grads), (hand_compiled, hand_grads) = masked, by_hand
    for look in (collective_counts, collectives, instructions):
        ours, theirs = look(compiled), look(hand_compiled)
        assert ours == theirs, f'{look.__name__}: {_difference(ours, theirs)}'
    assert_same_shardings(grads, hand_grads)
    return assert_same_bits(grads, hand_grads)


def _difference(ours: dict[str, int], theirs: dict[str, int]) -> str:
    keys = [k for k in {**ours, **theirs} if ours.get(k, 0) != theirs.get(k, 0)]
    return ', '.join(f'{ours.get(k, 0)} and not {theirs.get(k, 0)} of {k}' for k in keys[:8])


# Eager reads -------------------------------------------------------------------------------------


class Weight(nn.Module):
    """Reads one variable, in several ways."""

    transform: sg.Transform

    def setup(self):
        self.kept = self.param('w', nn.initializers.ones, (8, 16))

    def __call__(self):
        box = self.get_variable('params', 'w')
        return self.kept, box.value, self.variables['params']['w'].value

    def inside(self):
        with self.transform:
            return self()


def masked_reads(mesh: Mesh) -> Iterator[tuple[str, jax.Array, jax.Array]]:
    """Yield a name, what a masked read of a sharded array gave, and the array as it is stored."""
    value = np.arange(128, dtype=np.float32).reshape(8, 16)
    sharding = NamedSharding(mesh, P('data', 'model'))
    stored = jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
    variables = {'params': {'w': nn.Partitioned(stored, ('data', 'model'))}}
    transform = sg.stop_gradient('w')
    net, lifted = Weight(transform), transform(Weight)(transform)

    def around(variables):
        with transform:
            return net.apply(variables)

    def of_tree(variables):
        return transform(variables['params'])['w'].value

    reads = {
        'around apply': around,
        'tree': of_tree,
        'class': lifted.apply,
        'block': lambda v: net.apply(v, method='inside'),
        'method': lambda v: net.apply(v, method=transform(Weight.__call__)),
        'instance': lambda v: transform(net.bind(v))(),
    }
    with jax.transfer_guard('disallow_explicit'):
        for name, read in reads.items():
            for got in jax.tree.leaves(read(variables)):
                yield name, got, stored
            # Differentiated, a read is a tracer around the array.
            _, _, seen = jax.vjp(lambda v, read=read: ((), read(v)), variables, has_aux=True)
            for got in jax.tree.leaves(seen):
                yield f'{name}, differentiated', got, stored


def assert_same_buffers(actual: jax.Array, expected: jax.Array) -> None:
    """Check that an array is another one, or shares its sharding and its memory."""
    if actual is not expected:
        assert actual.sharding == expected.sharding
        assert buffers(actual) == buffers(expected), 'the array was copied'


def buffers(array: jax.Array) -> list[int]:
    """Return where this process's shards of an array lie in memory."""
    return [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]


# One process of several --------------------------------------------------------------------------


def run_process(address: str, processes: int, process: int) -> dict[str, Any]:
    """Make the comparison together with other processes, and return what was compared."""
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(
        address, processes, process, initialization_timeout=60, coordinator_bind_address=address
    )
    mesh = Mesh(np.array(jax.devices()).reshape(processes, -1), ('data', 'model'))
    steps = {}
    for style, use in (('plain', 'block'), ('partitioned', 'around jit')):
        case = Case(mesh, Layer, style)
        masked, by_hand = (case.step(kind(*case.of, use)) for kind in (Masked, ByHand))
        spread = sum(not x.is_fully_addressable for x in jax.tree.leaves(case.variables))
        steps[f'{style}, {use}'] = {
            'shards': compare_steps(masked, by_hand),
            'spread': spread,
            'collectives': collective_counts(masked[0]),
            'moved': sorted(collectives(masked[0])),
        }
    reads = 0
    for _, got, stored in masked_reads(mesh):
        assert not stored.is_fully_addressable
        assert_same_buffers(got, stored)
        reads += 1
    record = {
        'process': jax.process_index(),
        'processes': jax.process_count(),
        'devices': jax.device_count(),
        'reads': reads,
        'steps': steps,
    }
    jax.distributed.shutdown()
    return record


if __name__ == '__main__':
    print(json.dumps(run_process(sys.argv[1], *map(int, sys.argv[2:]))))
