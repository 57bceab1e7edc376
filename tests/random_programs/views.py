"""Gradient views of random programs compared with their meaning."""

from __future__ import annotations

import jax

from oracle import assert_same, scalar
from random_programs.checks import KEYS, X, application, around, blocks
from random_programs.evaluation import traced
from random_programs.filters import Bool, Combine
from random_programs.machine import meaning
from random_programs.masks import Mask
from random_programs.operations import NAMES, build
from random_programs.orders import check_other_orders, check_second_order, gradients
from random_programs.source import report
from random_programs.syntax import Program


def check_views(program: Program, filters: dict[str, Mask], *, second: bool = False) -> bool:
    """Compare gradient views of the program's root with their meaning, as `check` does.

    Entry k is the program in one more block, which stops what its predicate does not select. What
    the program writes is that of a block which stops all parameters.
    """
    model, plain = build(program, plain=False), build(program, plain=True)
    source, masks = report(program), program.runs[0]
    forward = 'map_gradient' not in source
    variables = traced(lambda x: plain.init(KEYS, x))(X)
    args = (variables.get('params', {}), variables.get('batch_stats', {}), X)
    _, (_, noise) = traced(application(program, plain, []))(*args)
    entries = ', '.join(f'{k!r}: {m.predicate()}' for k, m in filters.items())
    collections = next(iter(filters.values())).collections
    views = eval(
        f'sg.gradient_views({{{entries}}}, collections={collections!r}, allow_unmatched=True)',
        dict(NAMES),
    )
    with blocks(masks):
        assert set(views(model).init(KEYS, X)) == set(variables)
    fn = application(program, model, masks, views)
    stop = lambda f: [*masks, Mask(Combine('~', (f.filter,)), f.collections)]  # noqa: E731

    def two_copies(params, stats, x, bar):
        args = (params, bar, stats, x, noise)
        out = {k: meaning(program, stop(f), *args)['y'] for k, f in filters.items()}
        rest = meaning(program, [*masks, Mask(Bool(True), collections)], *args)
        out = {**rest, 'y': out}
        return scalar(lambda: out)(), (out, ())

    inside = around(program, masks, lambda f: f())
    grads, (out, _) = inside(lambda: traced(gradients(fn))(*args))
    wanted, (meant, _) = traced(gradients(two_copies))(*args, args[0])
    assert_same(out, meant, 'value', rtol=1e-3)
    assert_same(grads, wanted, 'gradient', rtol=1e-3)
    if second and forward:
        check_second_order(fn, two_copies, args, inside)
        check_other_orders(fn, two_copies, args, inside)
    return any(bool((g == 0).all()) for g in jax.tree.leaves(grads[0]))
