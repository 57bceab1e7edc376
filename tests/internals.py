"""What tests see of the library's private parts, and change there; the names stand here alone."""

import contextlib

from flax_sg import (
    _active,
    _answers,
    _contexts,
    _lanes,
    _mappings,
    _marks,
    _met,
    _pull,
    _scope,
    _self_check,
    _setup,
    _survival,
    _transform,
)


def nothing_is_open():
    """Say whether this thread is in no block, no setup and no views, and keeps nothing of them."""
    state, tracing = _active.state, _marks.tracing
    blocks = state.stack == () and state.openings == [] and state.left == []
    views = tracing.levels == 0 and not tracing.told_apart and not tracing.linearizing
    return blocks and views and state.setups == [] and not state.publishing


def reads_kept():
    """Count the reads that each open block keeps, the outermost first."""
    return [len(entry.reads) for entry in _active.state.stack]


# Contexts in JAX's caches.


def context():
    """Return what the open blocks mean to JAX's caches."""
    return _active.context()


def owned_contexts():
    """Count the blocks that have contexts of their own."""
    return len(_contexts._owned)


def fresh_contexts():
    """Forget which blocks have contexts of JAX's caches of their own."""
    _contexts._owned.clear()
    _active.state.contexts = _contexts.Contexts()


# What is known of callables.


def remember_few_answers(monkeypatch, size):
    monkeypatch.setattr(_met._Memory, 'size', size)


def answers_known():
    return len(_answers._known)


# Reads, setup and trees.


def stop_nothing(monkeypatch):
    """Let blocks of stop_gradient hand on what is read as it is."""
    monkeypatch.setattr(
        _transform.StopGradient, 'read', lambda self, info, value, other: value)


def names_of_flax():
    """Return the names that setup does not watch."""
    return _setup._FLAX


def is_watched_by_setup(attribute):
    """Say whether a member of a class is the library's, put there for what setup assigns."""
    return isinstance(attribute, _setup._SetupAttribute)


def put_together_again(tree):
    """Take a mapping apart and make it of its children."""
    return _mappings.rebuilt(tree, _mappings.children_of(tree))


# The check before the first block.


def self_check(block):
    _self_check.check(block)


def self_check_of(transform):
    """Check with a transform's block outside of all modules."""
    _self_check.check(lambda: _scope.open_at(transform, None))


def replace_self_check(monkeypatch, check):
    monkeypatch.setattr(_self_check, 'check', check)


def pass_by(monkeypatch, owner, name):
    """Let reads pass by the library through a method or property of Flax."""
    monkeypatch.setattr(owner, name, getattr(owner, name)._flax_sg_original)


@contextlib.contextmanager
def not_checked_yet():
    """Forget that the check has passed, before and after."""
    _transform.check_once.cache_clear()
    try:
        yield
    finally:
        _transform.check_once.cache_clear()


# Views.


def in_lanes(fun, names):
    return _lanes.in_lanes(fun, names)


def mark(x, lanes):
    """Mark a value for the lanes that it counts in, at the level of the innermost views."""
    return _marks.mark(x, lanes, _marks.level())


def tangent_of_a_mark(x, lanes):
    return _marks._tangent_p.bind(x, lanes=lanes, level=0)


def watch_transposes(monkeypatch):
    """Return a list that will hold what each transposed map of the lanes is traced to."""
    traced = []
    original = _pull.LaneMaps._trace

    def trace(self, *args):
        traced.append(original(self, *args))
        return traced[-1]
    monkeypatch.setattr(_pull.LaneMaps, '_trace', trace)
    return traced


# Gradient flow.


def misjudge(monkeypatch, name):
    """Let gradient_flow think that an operation hands on nothing."""
    ask, nothing = _survival._ask, _survival.Answer((frozenset(),))
    monkeypatch.setattr(_survival, '_ask', lambda eqn, context: (
        nothing if eqn.primitive.name == name else ask(eqn, context)))
