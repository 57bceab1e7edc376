"""Block-scoped gradient masks for Flax: train some parameters with a loss, and not others."""

import importlib as _importlib

from flax_sg import data_structures, nn
from flax_sg._errors import (
    FrozenVariableError,
    LabelError,
    PredicateError,
    UnknownRecordError,
    UnmatchedPathError,
    UnreadBlockWarning,
    UnsupportedVersionError,
    UsageError,
)
from flax_sg._filters.adaptors import from_haiku, from_nnx
from flax_sg._filters.filters import Filter, everything, nothing, path, regex, where
from flax_sg._filters.labels import labels
from flax_sg._filters.modules import within
from flax_sg._filters.variables import VariableInfo
from flax_sg._flow.assert_flow import assert_flow
from flax_sg._flow.gradient_flow import gradient_flow
from flax_sg._flow.records import FlowRecord, Verdict
from flax_sg._flow.report import Flow
from flax_sg._transforms import front_ends as _front_ends
from flax_sg._transforms import rules as _rules  # noqa: F401  (taps functions with rules)
from flax_sg._transforms.gradients import map_gradient, scale_gradient
from flax_sg._transforms.stop_gradient import constant, stop_gradient
from flax_sg._transforms.transform import Transform
from flax_sg._transforms.values import map_values, replace_values
from flax_sg._views.gradient_views import gradient_views

__version__ = '0.1.0'

__all__ = [
    'Filter',
    'Flow',
    'FlowRecord',
    'FrozenVariableError',
    'LabelError',
    'PredicateError',
    'Transform',
    'UnknownRecordError',
    'UnmatchedPathError',
    'UnreadBlockWarning',
    'UnsupportedVersionError',
    'UsageError',
    'VariableInfo',
    'Verdict',
    'assert_flow',
    'constant',
    'data_structures',
    'everything',
    'from_haiku',
    'from_nnx',
    'gradient_flow',
    'gradient_views',
    'labels',
    'map_gradient',
    'map_values',
    'nn',
    'nothing',
    'path',
    'regex',
    'replace_values',
    'scale_gradient',
    'stop_gradient',
    'where',
    'within',
]

_front_ends.expect('flax.nnx', 'flax_sg.nnx')


def __getattr__(name: str) -> object:
    if name == 'nnx':  # slow to import, so that it is when it is asked for
        return _importlib.import_module('flax_sg.nnx')
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
