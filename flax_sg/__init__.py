"""Block-scoped gradient masks for Flax Linen: train some parameters with a loss, and not others."""

from flax_sg import _cached as _cached  # taps Flax's modules and their setup
from flax_sg import _lifts as _lifts  # taps what lifted transforms hand on; _scope taps reads
from flax_sg import _rules as _rules  # taps functions with rules of the user's own
from flax_sg import data_structures, nn
from flax_sg._adaptors import from_haiku, from_nnx
from flax_sg._assert_flow import assert_flow
from flax_sg._constant import constant
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
from flax_sg._filters import Filter, everything, nothing, path, regex, where
from flax_sg._flow import gradient_flow
from flax_sg._gradients import map_gradient, scale_gradient
from flax_sg._info import VariableInfo
from flax_sg._labels import labels
from flax_sg._obstacles import Verdict
from flax_sg._records import FlowRecord
from flax_sg._report import Flow
from flax_sg._transform import Transform, stop_gradient
from flax_sg._values import map_values, replace_values
from flax_sg._views import gradient_views

__version__ = '0.1.0'

__all__ = [
    'Filter', 'Flow', 'FlowRecord', 'FrozenVariableError', 'LabelError', 'PredicateError',
    'Transform', 'UnknownRecordError', 'UnmatchedPathError', 'UnreadBlockWarning',
    'UnsupportedVersionError', 'UsageError', 'VariableInfo', 'Verdict', 'assert_flow',
    'constant', 'data_structures', 'everything', 'from_haiku', 'from_nnx', 'gradient_flow',
    'gradient_views', 'labels', 'map_gradient', 'map_values', 'nn', 'nothing', 'path', 'regex',
    'replace_values', 'scale_gradient', 'stop_gradient', 'where',
]
