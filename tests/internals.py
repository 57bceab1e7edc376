"""What tests see of the library's private parts, and change there; the names stand here alone."""

import contextlib

from flax_sg._filters import mappings
from flax_sg._flow import tangents
from flax_sg._transforms import answers, cache_keys, contexts, front_ends, matches
from flax_sg._transforms.stop_gradient import StopGradient
from flax_sg._transforms.thread_state import state
from flax_sg._views import masks, pullbacks, shared_primal
from flax_sg.nn import _attributes, _blocks, _self_check


def nothing_is_open():
    """Say whether this thread is in no block, no setup and no views, and keeps nothing of them."""
    tracing = masks.tracing
    blocks = state.stack == () and state.openings == [] and state.left == []
    views = tracing.nestings == 0 and not tracing.told_apart and not tracing.reads_closed
    return blocks and views and state.setups == [] and not state.publishing


def reads_kept():
    """Count the reads that each open block keeps, the outermost first."""
    return [len(block.reads) for block in state.stack]


# Contexts in JAX's caches.


def context():
    """Return what the open blocks mean to JAX's caches."""
    return cache_keys.context()


def owned_contexts():
    """Count the blocks that have contexts of their own."""
    return len(contexts._owned)


def fresh_contexts():
    """Forget which blocks have contexts of JAX's caches of their own."""
    contexts._owned.clear()
    state.contexts = contexts.Contexts()


# What is known of callables.


def remember_few_answers(monkeypatch, size):
    monkeypatch.setattr(matches._Memory, 'size', size)
    monkeypatch.setattr(matches, '_memory', matches._Memory())  # not what other tests have met


def answers_known():
    return len(answers._known)


# Reads, setup and trees.


def stop_nothing(monkeypatch):
    """Let blocks of stop_gradient hand on what is read as it is."""
    monkeypatch.setattr(StopGradient, 'read', lambda self, info, value, other: value)


def names_of_flax():
    """Return the names that setup does not watch."""
    return _attributes._FLAX


def is_watched_by_setup(attribute):
    """Say whether a member of a class is the library's, put there for what setup assigns."""
    return isinstance(attribute, _attributes._SetupAttribute)


def put_together_again(tree):
    """Take a mapping apart and make it of its children."""
    return mappings.rebuilt(tree, mappings.children_of(tree))


# The check before the first block.


def self_check(block):
    _self_check.check(block)


def self_check_of(transform):
    """Check with a transform's block outside of all modules."""
    _self_check.check(lambda: _blocks.open_at(transform, None))


def replace_self_check(monkeypatch, check):
    monkeypatch.setattr(_self_check, 'check', check)


def pass_by(monkeypatch, owner, name):
    """Let reads pass by the library through a method or property of Flax."""
    monkeypatch.setattr(owner, name, getattr(owner, name)._flax_sg_original)


@contextlib.contextmanager
def not_checked_yet():
    """Forget that the check has passed, before and after."""
    front_ends._check.cache_clear()
    try:
        yield
    finally:
        front_ends._check.cache_clear()


@contextlib.contextmanager
def front_end_entered(front_end):
    """Enter a front end, and take it back at the end."""
    front_ends.enter(front_end)
    try:
        yield front_end
    finally:
        front_ends._entered.remove(front_end)


@contextlib.contextmanager
def library_expected(monkeypatch, library, front_end):
    """Expect a library, and its front end."""
    monkeypatch.setattr(front_ends, '_expected', {library: front_end})
    yield


# Views.


def in_views(fun, names):
    return shared_primal.in_views(fun, names)


def mark(x, views):
    """Mark a value for the views that it counts in, at the nesting of the innermost views."""
    return masks.view_mask(x, views, masks.nesting())


def tangent_of_a_mark(x, views):
    return masks._tangent_p.bind(x, views=views, nesting=0)


def watch_transposes(monkeypatch):
    """Return a list that will hold what each transposed map of the views is traced to."""
    traced = []
    original = pullbacks.ViewMaps._trace

    def trace(self, *args):
        traced.append(original(self, *args))
        return traced[-1]

    monkeypatch.setattr(pullbacks.ViewMaps, '_trace', trace)
    return traced


# Gradient flow.


def misjudge(monkeypatch, name):
    """Let gradient_flow think that an operation hands on nothing."""
    ask, nothing = tangents._ask, tangents.Answer((frozenset(),))
    monkeypatch.setattr(
        tangents,
        '_ask',
        lambda eqn, context: nothing if eqn.primitive.name == name else ask(eqn, context),
    )


# flax.nnx.


def self_check_of_nnx(transform):
    """Check with a transform's blocks at the module."""
    from flax_sg.nnx import _self_check

    _self_check.check(transform.on)


def pass_by_value(monkeypatch):
    """Let reads of Variables pass by the library."""
    from flax import nnx

    from flax_sg._compat import nnx as nnx_compat

    monkeypatch.setattr(nnx.Variable, '_raw_value', nnx_compat.slot)
