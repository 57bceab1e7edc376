"""An experiment: one backward loop for all entries of gradient_views, in place of one for each.

The linear map of a scan is a scan. Here those of all entries go in step: one scan that carries a
tangent for each entry and reads the shared residuals once, whose transpose is one backward loop.
It does not compute what an entry does not need, as a vmapped pullback would. The library does not
do so: what is measured here says why.

    python benchmarks/one_backward_loop.py [--quick]
"""

from __future__ import annotations

import argparse
import functools
from typing import Any
from unittest import mock

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from flax_sg._marks import of_lane
from measure import cost_of, ratio_of, table, take_turns
from views import Shape, data_of, seconds, step_of


def in_step(push: ClosedJaxpr, level: int, operands: dict[int, list]) -> list[list]:
    """Apply a linear map to the operands of each lane, scans in step."""
    jaxprs = [of_lane(push.jaxpr, level, lane) for lane in operands]
    return _evaluate(jaxprs, push.consts, list(operands.values()))


def _evaluate(jaxprs: list[Jaxpr], consts: list, operands: list[list]) -> list[list]:
    """Run jaxprs that differ in parameters of their equations alone, each with its own values."""
    envs: list[dict] = []
    for jaxpr, values in zip(jaxprs, operands, strict=True):
        names = getattr(jaxpr, 'all_invars', None) or [*jaxpr.constvars, *jaxpr.invars]
        envs.append(dict(zip(names, [*consts, *values], strict=True)))

    def read(env: dict, var: Any) -> Any:
        return var.val if isinstance(var, Literal) else env[var]

    for eqns in zip(*(jaxpr.eqns for jaxpr in jaxprs), strict=True):
        values = [[read(env, v) for v in eqn.invars] for eqn, env in zip(eqns, envs, strict=True)]
        if eqns[0].primitive.name == 'scan':
            outs = _scan(eqns, values)
        else:
            outs = []
            for eqn, operands in zip(eqns, values, strict=True):
                out = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
                outs.append(out if eqn.primitive.multiple_results else [out])
        for eqn, env, out in zip(eqns, envs, outs, strict=True):
            env.update(zip(eqn.outvars, out, strict=True))
    return [[read(env, v) for v in jaxpr.outvars] for jaxpr, env in zip(jaxprs, envs, strict=True)]


def _scan(eqns: tuple, values: list[list]) -> list[list]:
    params = eqns[0].params
    if 'num_consts' in params:  # jax 0.10
        consts, carry = params['num_consts'], params['num_carry']
    else:
        consts, carry = (len(part) for part in params['ft_in'].unpack()[:2])
    bodies = [getattr(eqn.params['jaxpr'], 'jaxpr', eqn.params['jaxpr']) for eqn in eqns]

    def body(carries: list, xs: list) -> tuple[list, list]:
        operands = [[*v[:consts], *c, *x] for v, c, x in zip(values, carries, xs, strict=True)]
        outs = _evaluate(bodies, params['jaxpr'].consts, operands)
        return [out[:carry] for out in outs], [out[carry:] for out in outs]

    carries, ys = jax.lax.scan(
        body, [v[consts:consts + carry] for v in values], [v[consts + carry:] for v in values],
        params['length'], params['reverse'], params['unroll'])
    return [[*c, *y] for c, y in zip(carries, ys, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--quick', action='store_true', help='fewer repetitions')
    repeats = 5 if parser.parse_args().quick else 15
    print(f'jax {jax.__version__}, {jax.devices()[0].device_kind}\n')
    rows = []
    for width, batch, length in [(8, 1, 512), (16, 8, 256), (64, 32, 64), (256, 32, 32)]:
        for entries in (2, 3, 8):
            shape = Shape(entries, length, batch, width)
            args, each = data_of(shape), step_of('views', shape)
            with mock.patch('flax_sg._lanes._pushed', in_step):
                together = step_of('views', shape)
            costs = cost_of(each), cost_of(together)
            same = jax.tree.map(lambda a, b: abs(a - b).max() <= 1e-4 * abs(a).max(),
                                each(*args), together(*args))
            assert all(jax.tree.leaves(same)), same
            run = lambda step: functools.partial(seconds(step), args)  # noqa: B023
            times = take_turns({'each': run(each), 'together': run(together)}, repeats + 1)
            rows.append([width, batch, length, entries, f'{costs[0].loops} / {costs[1].loops}',
                         f'{costs[1].flops / costs[0].flops:.2f}',
                         f'{costs[1].temp_bytes / costs[0].temp_bytes:.2f}',
                         ratio_of(times['each'][1:], times['together'][1:])])
            print(*rows[-1], flush=True)
    print('\n' + table('One backward loop against one for each entry', [
        'width', 'batch', 'steps', 'entries', 'loops, each / together', 'flops', 'temporary bytes',
        'times as fast'], rows))


if __name__ == '__main__':
    main()
