"""The syntax of random programs: statements, classes, and a program as a whole."""

from __future__ import annotations

import dataclasses
from typing import Any

from random_programs.masks import Mask

# References to modules: ('self',), ('local', name), ('attr', base, name, index or None).
Ref = tuple


@dataclasses.dataclass
class Read:
    """`x = op(x, <a variable or a value derived from one>)`; `keep` only holds it in a local."""

    ref: Ref
    name: str
    how: str  # 'attr', 'param', 'get_variable', 'variables' or 'held'
    op: str
    keep: str | None = None


@dataclasses.dataclass
class Call:
    ref: Ref
    method: str
    use: Use  # what is called, for its signature


@dataclasses.dataclass
class Block:
    mask: Mask
    body: list


@dataclasses.dataclass
class Mirror:
    """`local = stop_gradient(...)(ref)`."""

    local: str
    mask: Mask
    ref: Ref


@dataclasses.dataclass
class Alias:
    local: str
    ref: Ref


@dataclasses.dataclass
class New:
    """`local = Class(...)` in a compact method."""

    local: str
    use: Use
    auto: bool


@dataclasses.dataclass
class Closure:
    """`def local(x): ...`, a closure over the bound module, to be run under raw JAX transforms."""

    local: str
    body: list


@dataclasses.dataclass
class Raw:
    kind: str  # 'scan', 'checkpoint', 'jit', 'cond', 'vmap' or 'plain'
    local: str


@dataclasses.dataclass
class Lifted:
    """A function of the module under a lifted transform of Flax."""

    kind: str  # 'scan', 'remat', 'jit', 'cond' or 'vmap'
    local: str
    body: list


@dataclasses.dataclass
class Stepped:
    """A decorated generator function of the module, whose steps run in the block."""

    mask: Mask
    local: str
    body: list


@dataclasses.dataclass
class Noise:
    pass


@dataclasses.dataclass
class Stat:
    """Update a running mean in `batch_stats`, and read it."""


@dataclasses.dataclass
class Use:
    """A class as it is instantiated: lifted, masked, with modules handed in as fields."""

    cls: Class
    lifts: tuple = ()  # innermost first: names of lifts, and masks
    fields: dict[str, Ref] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        return {lift for lift in self.lifts if isinstance(lift, str)}

    @property
    def open(self) -> bool:
        """Whether its attributes can be read from outside: not stacked, not in a loop."""
        return self.names <= {'remat', 'jit'}


@dataclasses.dataclass
class Class:
    name: str
    compact: bool
    scanned: bool = False  # has the signature that nn.scan wants
    params: dict[str, str] = dataclasses.field(default_factory=dict)  # name: 'vec' or 'mat'
    derived: dict[str, tuple] = dataclasses.field(default_factory=dict)  # name: (fn, param, direct)
    subs: dict[str, Any] = dataclasses.field(default_factory=dict)  # a Use, or a list or dict
    fields: dict[str, Class] = dataclasses.field(default_factory=dict)
    stat: bool = False
    methods: dict[str, list] = dataclasses.field(default_factory=dict)
    masks: dict[str, Mask] = dataclasses.field(default_factory=dict)  # method decorators
    effects: set[str] = dataclasses.field(default_factory=set)  # 'noise', 'stat'
    created: set[str] = dataclasses.field(default_factory=set)  # parameters of a compact method
    pool: list[Class] = dataclasses.field(default_factory=list)  # what it may instantiate


@dataclasses.dataclass
class Program:
    classes: list[Class]
    wraps: list[tuple[str, Mask]]  # the root's class or instance is masked
    runs: list[list[Mask]]  # blocks around each of several applications of one module object
    around_grad: bool
    bind: bool
    mutable_params: bool

    @property
    def root(self) -> Class:
        return self.classes[-1]


class Pass:
    pass
