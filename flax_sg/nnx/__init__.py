"""flax.nnx with flax_sg's names beside it, so that ``nnx.stop_gradient`` reads as one library.

``from flax_sg import nnx`` replaces ``from flax import nnx``: every name of ``flax.nnx`` is the
same object here.

The files beside this one make transforms, blocks and views work on the modules of flax.nnx
(`_front_end`). They import what is below, and nothing of `nn` and `_flow`.
"""

from typing import Any

from flax import nnx as _nnx
from flax.nnx import *  # noqa: F403

from flax_sg._filters.filters import everything, nothing, path, regex, where  # noqa: F401
from flax_sg._filters.modules import within  # noqa: F401
from flax_sg._transforms.gradients import map_gradient, scale_gradient  # noqa: F401
from flax_sg._transforms.stop_gradient import (
    constant,  # noqa: F401
    stop_gradient,  # noqa: F401
)
from flax_sg._transforms.values import map_values, replace_values  # noqa: F401
from flax_sg._views.gradient_views import gradient_views  # noqa: F401
from flax_sg.nnx import _bridges as _bridges  # taps models of the one in the other
from flax_sg.nnx import _front_end as _front_end  # enters flax.nnx
from flax_sg.nnx import _reads as _reads  # taps reads
from flax_sg.nnx import _writes as _writes  # taps writes

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
    'within',
)
__all__ = sorted({*_OURS, *(name for name in dir(_nnx) if not name.startswith('_'))})


def __getattr__(name: str) -> Any:
    # `import *` leaves out what flax.nnx imports without listing it.
    return getattr(_nnx, name)


def __dir__() -> list[str]:
    return __all__
