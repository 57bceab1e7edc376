"""Truth for gradient_flow: small programs with verdicts, operations and lines worked out by hand.

A comment ``# <- name`` marks the line that a record must give. `check_gradients` proves the table
itself without the library: what is not reached has a gradient of exactly zero wherever it is tried,
what is reached has another one somewhere.
"""

import dataclasses
import inspect
import os
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_sg as sg
from flax_sg import nn

X = jnp.array([0.3, -0.7, 1.1])
XS = jnp.array([[0.3, -0.7, 1.1], [0.9, 0.2, -0.4], [-1.3, 0.5, 0.6]])


class Truth(NamedTuple):
    """A verdict, its operation, the marks of its line and of the first live use.

    A mark may be several: of a line in a jitted helper and of the calls that lead to it.
    """

    verdict: str
    operation: str | None = None
    line: str | tuple[str, ...] | None = None
    used_at: str | None = None


def live(line=None):
    return Truth('REACHED', None, line)


def partly(operation, line=None, used_at=None):
    return Truth('REACHED_PARTLY', operation, line, used_at)


def masked(line=None, operation='stop_gradient'):
    return Truth('MASKED', operation, line)


def flat(operation, line=None):
    return Truth('PIECEWISE_CONSTANT', operation, line)


def rule(operation, line=None):
    return Truth('CUSTOM_ZERO', operation, line)


def unknown(operation, line=None):
    return Truth('UNKNOWN', operation, line)


def zero(line=None):
    return Truth('NUMERIC_ZERO', None, line)


unused = Truth('UNUSED')


@dataclasses.dataclass
class Program:
    fn: object
    params: object
    args: tuple
    truth: dict
    norms: bool = False
    reverse: bool = True
    vanishes: bool = False
    reason: str = ''


class Programs(dict):
    """A table of programs by name."""

    def program(self, params, *args, norms=False, reverse=True, vanishes=False, reason='', **truth):
        """Enter a function into the table.

        Args:
          params: a tree, a function that makes one, or names of vectors of 3.
          norms: whether gradient_flow runs the loss too.
          reverse: False where `jax.grad` raises.
          vanishes: the path is there, and its gradient zero all the same.
          reason: what the record's reason holds.
          **truth: by the parameter's name, after the loss's and a colon if there are several.
        """
        if isinstance(params, str):
            params = {k: jnp.cos(jnp.arange(3.0) + i) for i, k in enumerate(params.split())}

        def enter(fn):
            assert fn.__name__ not in self
            self[fn.__name__] = Program(
                fn, params, args or (X,), truth, norms, reverse, vanishes, reason
            )
            return fn

        return enter


def params_of(program):
    return program.params() if callable(program.params) else program.params


def names(params):
    """Flatten a tree to ``{name: array}``, with the boxes of Flax opened."""
    is_box = lambda v: isinstance(v, nn.meta.AxisMetadata)
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_box)
    return {
        jax.tree_util.keystr(path, simple=True, separator='/'): nn.unbox(v) for path, v in leaves
    }


def marks(fn):
    """Find the marked lines of a function, or of the whole file, as ``{mark: line}``."""

    def scan(lines, first):
        return {
            mark: first + i
            for i, line in enumerate(lines)
            for mark in re.sub(r'.*?(# <- |$)', '', line, count=1).split()
        }

    module = inspect.getmodule(fn)
    return scan(inspect.getsource(module).splitlines(), 1) | scan(*inspect.getsourcelines(fn))


def lines_of(source, fn):
    """Return the lines of ``'file:line (function), called at file:line (function)'``."""
    places = [re.fullmatch(r'(.*):(\d+) \(.+\)', s) for s in source.split(', called at ')]
    file = os.path.basename(inspect.getfile(fn))
    assert all(places) and {os.path.basename(m[1]) for m in places} == {file}, source
    return [int(m[2]) for m in places]


def same_operation(operation, expected):
    """Compare operations, or primitives; a star at the end stands for anything."""
    if expected and expected.endswith('*'):
        return operation.startswith(expected[:-1])
    return operation == expected or bool(operation) and operation.endswith(f' ({expected})')


def check_lines(source, mark, fn):
    if mark:
        assert source, f'no line, and not that of {mark}'
        several = isinstance(mark, tuple)
        lines = lines_of(source, fn) if several else lines_of(source, fn)[:1]
        assert lines == [marks(fn)[m] for m in (mark if several else (mark,))], source


def check_record(case):
    """Compare what gradient_flow says of a program with its truth."""
    params = params_of(case)
    flow = sg.gradient_flow(case.fn, norms=case.norms)(params, *case.args)
    assert {r.name for r in flow} == set(names(params))
    for record in flow:
        several = f'{record.loss}:{record.name}'
        truth = case.truth[several if several in case.truth else record.name]
        assert record.verdict == truth.verdict, (several, record)
        if truth.operation or truth.verdict in ('REACHED', 'UNUSED'):
            assert same_operation(record.operation, truth.operation), (several, record)
        check_lines(record.source, truth.line, case.fn)
        check_lines(record.used_at, truth.used_at, case.fn)
        assert case.reason in record.reason or not record.reached, (several, record)
        assert case.reason or not record.reason or not record.reached, (several, record)
    assert len(flow) == len(case.truth)


def points(params, count=4):
    """Make trees like ``params`` with random floats."""
    rng = np.random.default_rng(0)

    def draw(v):
        v = jnp.asarray(v)
        if jnp.issubdtype(v.dtype, jnp.complexfloating):
            return jnp.asarray(rng.normal(size=v.shape) + 1j * rng.normal(size=v.shape), v.dtype)
        if jnp.issubdtype(v.dtype, jnp.floating):
            return jnp.asarray(rng.normal(size=v.shape), v.dtype)
        return v

    return [params, *(jax.tree.map(draw, params) for _ in range(count - 1))]


def check_gradients(case):
    """Compare the truth of a program with its gradients, without the library."""
    params = params_of(case)
    losses = jax.eval_shape(case.fn, params, *case.args)
    for loss in losses if isinstance(losses, dict) else [None]:
        truth = {
            k.split(':')[-1]: t
            for k, t in case.truth.items()
            if k.startswith(f'{loss}:') or ':' not in k
        }
        pick = (lambda out: out) if loss is None else lambda out, loss=loss: out[loss]
        seen = dict.fromkeys(names(params), False)
        for point in points(params):
            for key, g in gradients(case, pick, point, truth).items():
                seen[key] |= bool((np.asarray(g) != 0).any())
        for key, t in truth.items():
            reached = t.verdict in ('REACHED', 'REACHED_PARTLY')
            if t.verdict != 'UNKNOWN':
                assert seen[key] == (reached and not case.vanishes), (loss, key, t.verdict)


def gradients(case, pick, params, truth):
    """Return the gradients of what is known; in forward mode where reverse mode is an error."""
    grad = jax.jit(jax.grad(lambda p, *args: pick(case.fn(p, *args)), allow_int=True))
    if case.reverse:
        grads = names(grad(params, *case.args))
        return {k: g for k, g in grads.items() if g.dtype != jax.dtypes.float0}
    refusal = '^(Reverse-mode differentiation does not work|Pure callbacks do not support JVP)'
    with pytest.raises(ValueError, match=refusal):
        grad(params, *case.args)
    known = {k: v for k, v in params.items() if truth[k].verdict != 'UNKNOWN'}
    push = jax.jit(jax.jacfwd(lambda known, *args: pick(case.fn(params | known, *args))))
    return push(known, *case.args)
