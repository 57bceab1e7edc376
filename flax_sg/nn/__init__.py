"""flax.linen with flax_sg's names beside it, so that ``nn.stop_gradient`` reads as one library.

``from flax_sg import nn`` replaces ``from flax import linen as nn``: every name of ``flax.linen``
is the same object here.

The files beside this one make transforms, blocks and views work on Linen's modules (`_front_end`).
They import what is below, and nothing of `_flow`.
"""

from typing import Any

from flax import linen as _linen
from flax.linen import *  # noqa: F403

from flax_sg._filters.filters import everything, nothing, path, regex, where  # noqa: F401
from flax_sg._transforms.gradients import map_gradient, scale_gradient  # noqa: F401
from flax_sg._transforms.stop_gradient import (
    constant,  # noqa: F401
    stop_gradient,  # noqa: F401
)
from flax_sg._transforms.values import map_values, replace_values  # noqa: F401
from flax_sg._views.gradient_views import gradient_views  # noqa: F401
from flax_sg.nn import _attributes as _attributes  # taps setup
from flax_sg.nn import _front_end as _front_end  # enters Linen
from flax_sg.nn import _lifted_bodies as _lifted_bodies  # taps what lifted transforms hand on
from flax_sg.nn import _reads as _reads  # taps reads

_OURS = (
    'constant',
    'everything',
    'gradient_views',
    'map_gradient',
    'map_values',
    'nothing',
    'path',
    'regex',
    'replace_values',
    'scale_gradient',
    'stop_gradient',
    'where',
)
__all__ = sorted({*_OURS, *(name for name in dir(_linen) if not name.startswith('_'))})


def __getattr__(name: str) -> Any:
    # `import *` leaves out what flax.linen defines lazily, or imports without listing it.
    return getattr(_linen, name)


def __dir__() -> list[str]:
    return __all__
