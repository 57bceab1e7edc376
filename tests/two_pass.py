"""What the tests of the two-pass programs share: what moves what, and loops in a jaxpr."""

import contextlib
import importlib
import sys

import jax
import pytest

from loading import ROOT

# The parameters that each loss may move. All others have to stay exactly where they are.
MOVES = {
    'reader': {'retina', 'reader'},
    'gln': {'encoding/gln'},
    'code': {'encoding/code_value', 'encoding/code_presence'},
    'explanation': {'encoding/explanation'},
}
PARTS = set().union(*MOVES.values())


@contextlib.contextmanager
def imported(*names):
    """Import programs of the examples folder, which import each other, wherever tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / 'examples'))
        yield tuple(map(importlib.import_module, names))
    for name in names:
        del sys.modules[name]


def moved(norms):
    """Return for each loss the parts with a gradient that is not exactly zero."""
    return {loss: {part for part, row in norms.items() if row[loss] != 0} for loss in MOVES}


def equations(jaxpr):
    """Yield all equations of a jaxpr, at any depth."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, 'eqns')):
            if hasattr(parameter, 'eqns'):
                yield from equations(getattr(parameter, 'jaxpr', parameter))


def loops(fn, *args):
    names = [equation.primitive.name for equation in equations(jax.make_jaxpr(fn)(*args).jaxpr)]
    return sum(name in ('scan', 'while') for name in names)
