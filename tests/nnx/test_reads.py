"""Every form in which a Variable of flax.nnx is read, in a block and of a mirror."""

import copy

import jax
import jax.numpy as jnp
import pytest

from flax_sg import nnx
from nnx_programs import FEW, NAMINGS, XS, X, around_and_live, f


def leaves(tree):
    a, b = jax.tree.leaves(tree)
    return f(a, b, X)


def of_state(state):
    return f(state['a']['w'][...], state['b']['w'][...], X)


def merged(graph, state):
    return nnx.merge(graph, state)(X)


FORMS = {
    'item': lambda m: f(m.a.w[...], m.b.w[...], X),
    'get_value': lambda m: f(m.a.w.get_value(), m.b.w.get_value(), X),
    'get_raw_value': lambda m: f(m.a.w.get_raw_value(), m.b.w.get_raw_value(), X),
    'asarray': lambda m: f(jnp.asarray(m.a.w), jnp.asarray(m.b.w), X),
    'jnp function': lambda m: f(jnp.sin(m.a.w), jnp.sin(m.b.w), X),
    'operators': lambda m: jnp.tanh(m.a.w * X) * m.b.w + m.a.w**2,
    'reflected operators': lambda m: jnp.tanh(X * m.a.w) * m.b.w - (0 - m.a.w**2),
    'unary operators': lambda m: f(-(-1 * m.a.w), abs(m.b.w), X),
    'attribute': lambda m: f(m.a.w.T, m.b.w.real, X),
    'method': lambda m: f(m.a.w.reshape(()), m.b.w.astype(jnp.float32), X),
    'module': lambda m: m(X),
    'bound method kept': lambda m: (lambda call: call(X))(m.__call__),
    'leaves of a module': leaves,
    'leaves of a state': lambda m: leaves(nnx.state(m)),
    'map of a module': lambda m: jax.tree.map(lambda v: v, m)(X),
    'map of a state': lambda m: of_state(jax.tree.map(lambda v: v, nnx.state(m))),
    'map of two trees': lambda m: of_state(
        jax.tree.map(lambda v, w: (v + w) / 2, nnx.state(m), nnx.state(m))
    ),
    'reduce': lambda m: f(*jax.tree.reduce(lambda xs, x: (*xs, x), nnx.state(m), ()), X),
    'flatten with path': lambda m: f(
        *(v for _, v in jax.tree_util.tree_flatten_with_path(nnx.state(m))[0]), X
    ),
    'ravel': lambda m: f(*jax.flatten_util.ravel_pytree(nnx.state(m))[0], X),
    'ravel and back': lambda m: (lambda flat, back: of_state(back(flat)))(
        *jax.flatten_util.ravel_pytree(nnx.state(m))
    ),
    'flatten and back': lambda m: (lambda xs, tree: of_state(tree.unflatten(xs)))(
        *jax.tree.flatten(nnx.state(m))
    ),
    'state': lambda m: of_state(nnx.state(m)),
    'state of a type': lambda m: of_state(nnx.state(m, nnx.Param)),
    'split': lambda m: of_state(nnx.split(m)[1]),
    'merge': lambda m: merged(*nnx.split(m)),
    'merge with copies': lambda m: nnx.merge(*nnx.split(m), copy=True)(X),
    'merge in tree mode': lambda m: nnx.merge(*nnx.split(m, graph=False))(X),
    'clone': lambda m: nnx.clone(m)(X),
    'clone with arrays': lambda m: nnx.clone(m, arrays=True)(X),
    'deepcopy': lambda m: copy.deepcopy(m)(X),
    'view': lambda m: nnx.view(m)(X),
    'as_pure': lambda m: (lambda s: f(s['a']['w'], s['b']['w'], X))(nnx.as_pure(nnx.state(m))),
    'pure dict': lambda m: (lambda s: f(s['a']['w'], s['b']['w'], X))(
        nnx.to_pure_dict(nnx.state(m))
    ),
    'flat state': lambda m: f(*(v[...] for _, v in nnx.to_flat_state(nnx.state(m))), X),
    'iter_graph': lambda m: f(
        *(v[...] for _, v in nnx.iter_graph(m) if isinstance(v, nnx.Variable)), X
    ),
    'pop and update': lambda m: (nnx.update(m, nnx.state(m)), m(X))[1],
    'copy of a Variable': lambda m: f(m.a.w.copy()[...], m.b.w.copy()[...], X),
    'replaced Variable': lambda m: f(m.a.w.replace()[...], m.b.w.to_state()[...], X),
    'variable as an argument of jnp': lambda m: f(jnp.stack([m.a.w, m.b.w])[0], m.b.w[...], X),
    'functional call': lambda m: nnx.call(nnx.split(m))(X)[0],
    'captured by jit': lambda m: jax.jit(lambda x: m(x))(X),
    'captured by checkpoint': lambda m: jax.checkpoint(lambda x: m(x))(X),
    'captured by scan': lambda m: jax.lax.scan(lambda c, x: (c, m(x)), 0, XS)[1][0],
    'captured by vmap': lambda m: jax.vmap(lambda x: m(x))(XS)[0],
    'captured by cond': lambda m: jax.lax.cond(True, lambda x: m(x), lambda x: x, X),
    'captured by while': lambda m: jax.lax.fori_loop(0, 1, lambda i, x: m(x), X),
}
BY_HAND = {
    'jnp function': lambda a, b: f(jnp.sin(a), jnp.sin(b), X),
    'unary operators': lambda a, b: f(a, abs(b), X),
}


@pytest.mark.thinned(7)
@pytest.mark.parametrize('naming', NAMINGS)
@pytest.mark.parametrize('form', FORMS)
def test_reads(form, naming):
    by_hand = BY_HAND.get(form, lambda a, b: f(a, b, X))
    around_and_live('stop', naming, FORMS[form], by_hand)


@pytest.mark.thinned(59)
@pytest.mark.parametrize(('kind', 'naming'), FEW)
@pytest.mark.parametrize('form', FORMS)
def test_reads_by_siblings(form, kind, naming):
    by_hand = BY_HAND.get(form, lambda a, b: f(a, b, X))
    around_and_live(kind, naming, FORMS[form], by_hand)
