"""Views of rematerialised models: memory as by hand, and each step computed again once.

By hand it is one `jax.vjp` and a pruned pullback for each loss, each of which computes the
residuals again.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import jaxprs_in_params

import flax_sg as sg
from flax_sg import nn

WIDTH, NAMES = 32, 'abc'
POLICIES = {
    'none': None,
    'nothing': jax.checkpoint_policies.nothing_saveable,
    'everything': jax.checkpoint_policies.everything_saveable,
    'dots': jax.checkpoint_policies.dots_saveable,
    'no batch dims': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    'names': jax.checkpoint_policies.save_only_these_names('b'),
    'all but names': jax.checkpoint_policies.save_any_names_but_these('b'),
}


class Cell(nn.Module):
    @nn.compact
    def __call__(self, c, _=None):
        for name in NAMES:
            c = jnp.tanh(nn.Dense(WIDTH, name=name, use_bias=False)(c))
            c = checkpoint_name(c, name)
        return c, None


class Twice(nn.Module):
    """A rematerialised module in a rematerialised one."""

    policy: object
    prevent_cse: bool

    @nn.compact
    def __call__(self, c, _=None):
        cell = nn.remat(Cell, policy=self.policy, prevent_cse=self.prevent_cse)(name='cell')
        return cell(cell(c)[0])


class Model(nn.Module):
    form: str
    steps: int = 16
    policy: object = None
    prevent_cse: bool = False

    @nn.compact
    def __call__(self, x):
        remat = functools.partial(nn.remat, policy=self.policy, prevent_cse=self.prevent_cse)
        scan = functools.partial(nn.scan, length=self.steps)
        if self.form == 'loop':
            for i in range(self.steps // 4):
                x = remat(Cell)(name=f'cell_{i}')(x)[0]
            return x
        if self.form == 'nested':
            return scan(remat(Twice), variable_broadcast='params', split_rngs={'params': False})(
                self.policy, self.prevent_cse, name='cell'
            )(x, None)[0]
        if self.form == 'remat_scan':
            return nn.remat_scan(Inner, lengths=(4, self.steps // 4))(name='cell')(x)
        if self.form == 'broadcast':
            return scan(remat(Cell), variable_broadcast='params', split_rngs={'params': False})(
                name='cell'
            )(x, None)[0]
        if self.form == 'split':
            return scan(remat(Cell), variable_axes={'params': 0}, split_rngs={'params': True})(
                name='cell'
            )(x, None)[0]
        assert self.form == 'cond'
        cell = remat(Cell)(name='cell')
        if self.is_initializing():
            return cell(x)[0]
        return nn.cond(x.sum() > -1e9, lambda m, x: m(m(x)[0])[0], lambda m, x: x, cell, x)


class Inner(nn.Module):
    @nn.compact
    def __call__(self, c):
        return Cell(name='cell')(c)[0]


FORMS = ['broadcast', 'split', 'loop', 'nested', 'remat_scan', 'cond']


def programs(model, order=1):
    x = jnp.linspace(0, 1, 8 * WIDTH).reshape(8, WIDTH)
    params = model.init(jax.random.key(0), x)['params']
    run = lambda p: model.apply({'params': p}, x)
    loss = lambda i, out: jnp.sin((i + 1.0) * out).sum()
    views = sg.gradient_views({name: f'**/{name}' for name in NAMES})
    masks = [sg.path(f'**/{name}').mask(params) for name in NAMES]

    def viewed(p):
        return sum(loss(i, out) for i, out in enumerate(views(run)(p).values()))

    def by_hand(p):
        out, pull = jax.vjp(run, p)
        grads = [pull(jax.grad(functools.partial(loss, i))(out))[0] for i in range(len(NAMES))]
        pick = lambda *leaves: next(
            g for mask, g in zip(leaves[:3], leaves[3:], strict=True) if mask
        )
        return jax.tree.map(pick, *masks, *grads)

    return params, jax.grad(viewed), by_hand


def figures(step, params):
    """Temporary bytes, matrix products and loops of the compiled step."""
    compiled = jax.jit(step).lower(params).compile()
    text = compiled.as_text()
    return (
        compiled.memory_analysis().temp_size_in_bytes,
        len(re.findall(r' dot\(', text)),
        len(re.findall(r' while\(', text)),
    )


# One backward loop holds the cotangents of all entries at a time, and where a scan stands in a
# rematerialised one, the gradients of one of its steps; pullbacks one by one hold those of one.
IN_FLIGHT = {'nested': 12 * 1024, 'remat_scan': 3 * 4 * 4 * WIDTH * WIDTH}


@pytest.mark.thinned(13)
@pytest.mark.parametrize('prevent_cse', [False, True])
@pytest.mark.parametrize('policy', POLICIES)
@pytest.mark.parametrize('form', FORMS)
def test_memory_of_the_program_by_hand(form, policy, prevent_cse):
    model = Model(form, policy=POLICIES[policy], prevent_cse=prevent_cse)
    params, viewed, by_hand = programs(model)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        jax.jit(viewed)(params),
        jax.jit(by_hand)(params),
    )
    (size, products, loops), (size_by_hand, products_by_hand, loops_by_hand) = (
        figures(step, params) for step in (viewed, by_hand)
    )
    assert size <= 1.05 * size_by_hand + IN_FLIGHT.get(form, 4 * 1024)
    assert products <= products_by_hand and loops <= loops_by_hand


@pytest.mark.parametrize('form', ['loop', 'broadcast'])
@pytest.mark.parametrize('prevent_cse', [False, True])
def test_barriers_are_those_of_the_model(form, prevent_cse):
    params, viewed, by_hand = programs(Model(form, prevent_cse=prevent_cse))
    barriers = [
        jax.jit(step).lower(params).as_text().count('optimization_barrier')
        for step in (viewed, by_hand)
    ]
    assert all(barriers) == any(barriers) == prevent_cse


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason='one flag for all operands')
def test_barriers_for_some_operands():
    def barred(flags):
        target = jax.checkpoint(
            lambda p, x: jnp.sin(p['a'] * p['b'] * jnp.sin(x)), prevent_cse=flags
        )
        views = sg.gradient_views({'a': 'a', 'b': 'b'})(lambda p: jnp.sin(target(p, 2.0)))
        step = jax.grad(lambda p: sum(views(p).values()))
        text = jax.jit(step).lower({'a': 1.0, 'b': 1.0}).as_text()
        return sum(line.count('%') for line in text.splitlines() if 'optimization_barrier' in line)

    assert barred((False, False)) < barred((True, False)) < barred((True, True)) == barred(True)


@pytest.mark.parametrize(
    'form, products, loops, again',
    [('broadcast', 18, 2, 3), ('split', 18, 2, 3), ('loop', 66, 0, 12)],
)
def test_each_step_is_computed_again_once(form, products, loops, again):
    """Of 3 products in a step: 3 forward, 3 again, 3 for parameters, 9 for activations.

    By hand they are computed again for each entry. In front of the first layer of a loop nothing
    is differentiated. XLA may find a layer's first residuals among what is there already.
    """
    params, viewed, by_hand = programs(Model(form, prevent_cse=form == 'loop'))
    found = figures(viewed, params)[1:]
    assert found == (products, loops) or form == 'loop' and found[0] < products
    if found == (products, loops):
        assert figures(by_hand, params)[1] == products + 2 * again


@pytest.mark.thinned(5)
@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize(
    'order',
    [
        lambda f: jax.grad(
            lambda p: sum(jnp.sin(g).sum() for g in jax.tree.leaves(jax.grad(f)(p)))
        ),
        lambda f: lambda p: jax.jvp(jax.grad(f), (p,), (p,))[1],
        lambda f: lambda p: jax.grad(lambda q: jax.jvp(f, (q,), (p,))[1])(p),
    ],
    ids=['reverse over reverse', 'forward over reverse', 'reverse over forward'],
)
def test_higher_orders(form, order):
    x = jnp.linspace(0, 1, 8 * WIDTH).reshape(8, WIDTH)
    model = Model(form, steps=4)
    params = model.init(jax.random.key(0), x)['params']
    run = lambda p: model.apply({'params': p}, x)
    views = sg.gradient_views({name: f'**/{name}' for name in NAMES})
    stopped = lambda p, name: sg.stop_gradient(~sg.path(f'**/{name}'))(p)
    total = lambda outs: sum(jnp.sin((i + 1.0) * out).sum() for i, out in enumerate(outs))
    ours = order(lambda p: total(views(run)(p).values()))
    hand = order(lambda p: total(run(stopped(p, name)) for name in NAMES))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4),
        jax.jit(ours)(params),
        jax.jit(hand)(params),
    )


def placed(jaxpr):
    """The jitted functions in a jaxpr that say how their operands are sharded."""
    found = 0
    for eqn in jaxpr.eqns:
        found += any(
            isinstance(sharding, jax.sharding.Sharding)
            for sharding in eqn.params.get('in_shardings', ())
        )
        found += sum(map(placed, jaxprs_in_params(eqn.params)))
    return found


@pytest.mark.parametrize('is_placed', [False, True])
def test_a_jitted_function_around_a_checkpoint_keeps_its_shardings(is_placed):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), 'x')
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('x'))
    f = jax.checkpoint(lambda a, b: jnp.sin(jnp.sin(a) * b))
    run = jax.jit(f, in_shardings=(rows, rows), out_shardings=rows) if is_placed else jax.jit(f)
    params = {'a': jnp.arange(4.0), 'b': jnp.arange(4.0) + 1}
    views = sg.gradient_views({'a': 'a', 'b': 'b'})

    def loss(p):
        out = views(lambda p: run(p['a'], p['b']))(p)
        return (out['a'] ** 2).sum() + (3 * out['b']).sum()

    def by_hand(p):
        f = lambda a, b: jnp.sin(jnp.sin(a) * b)
        stop = jax.lax.stop_gradient
        return (f(p['a'], stop(p['b'])) ** 2).sum() + (3 * f(stop(p['a']), p['b'])).sum()

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5),
        jax.jit(jax.grad(loss))(params),
        jax.jit(jax.grad(by_hand))(params),
    )
    found = placed(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)
    assert found == 0 if not is_placed else found >= 3  # forward, and a pullback for each entry
