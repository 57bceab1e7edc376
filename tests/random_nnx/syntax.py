"""The syntax of random programs of flax.nnx: transforms, statements, classes, programs."""

from __future__ import annotations

import dataclasses
from typing import Any

# References to modules: ('self',), ('local', name), ('attr', base, name, index or None).
Ref = tuple


@dataclasses.dataclass(frozen=True)
class Within:
    """A predicate that is a module, or a Variable of it."""

    ref: Ref
    name: str | None = None


@dataclasses.dataclass(frozen=True)
class Mask:
    """A transform: of a kind of `random_programs.masks`, a filter, and what has the names of it."""

    filter: Any
    kind: str = 'stop_gradient'
    on: Ref | None = None  # in a block: the module that the names are of
    collections: Any = 'params'


@dataclasses.dataclass
class Read:
    """`x = op(x, <a Variable, read in some way>)`."""

    ref: Ref
    name: str
    how: str
    op: str
    keep: str | None = None  # or it is only held in a local


@dataclasses.dataclass
class Held:
    """`x = op(x, local)`."""

    name: str
    op: str


@dataclasses.dataclass
class Call:
    ref: Ref
    method: str


@dataclasses.dataclass
class Block:
    mask: Mask
    body: list


@dataclasses.dataclass
class Made:
    """`local = <a mirror, a copy, or a merged split of a module>`."""

    local: str
    ref: Ref
    how: str  # 'mirror', 'clone', 'deepcopy', 'map' or 'split'
    mask: Mask | None = None


@dataclasses.dataclass
class Traced:
    """A function of a module under a transform of NNX, in a mode; or of a State, under JAX's."""

    kind: str
    mode: str
    local: str
    ref: Ref
    body: list


@dataclasses.dataclass
class Captured:
    """A function that has captured its modules, under a transform of JAX."""

    kind: str
    local: str
    body: list


@dataclasses.dataclass
class Write:
    """A parameter becomes `0.5 * itself + 0.1 * x`, or a statistic a running mean, read after."""

    ref: Ref
    name: str
    how: str


@dataclasses.dataclass
class Noise:
    """`x = x + <random numbers>`, of the root's stream."""


@dataclasses.dataclass
class Class:
    """A class of modules.

    Attributes:
      params: their ranks. subs: a class, or a list or dict of it, or a stack: a pair of its name.
      ties: further names of a Variable or module, each with where it lies.
      masks: of methods that are decorated. mask: of the class as a whole.
      effects: of each method, what it writes: 'stat', 'noise', 'param'; 'traced', if it hands
        modules to transforms, which NNX allows only in the trace that they were made in; and
        'derived', if it differentiates with respect to one, an error for copies and in views.
    """

    name: str
    params: dict[str, str] = dataclasses.field(default_factory=dict)
    subs: dict[str, Any] = dataclasses.field(default_factory=dict)
    ties: dict[str, tuple[Ref, str | None]] = dataclasses.field(default_factory=dict)
    stat: bool = False
    noise: bool = False
    methods: dict[str, list] = dataclasses.field(default_factory=dict)
    masks: dict[str, Mask] = dataclasses.field(default_factory=dict)
    mask: Mask | None = None
    effects: dict[str, set[str]] = dataclasses.field(default_factory=dict)

    @property
    def below(self) -> list[Class]:
        """It, and the classes of all that it holds."""
        return [self, *(each for sub in self.subs.values() for each in class_of(sub).below)]

    @property
    def tied(self) -> bool:
        return any(cls.ties for cls in self.below)


@dataclasses.dataclass(frozen=True)
class Stack:
    """Two layers in one module, whose values have one more axis."""

    cls: Class


def class_of(sub: Any) -> Class:
    if isinstance(sub, list):
        return sub[0]
    if isinstance(sub, dict):
        return next(iter(sub.values()))
    return sub.cls if isinstance(sub, Stack) else sub


@dataclasses.dataclass
class Program:
    """A model, and several runs of it.

    Attributes:
      runs: the masks of blocks around each run.
      form: of the derivative: 'values', 'nnx.grad', 'jit of nnx.grad' or 'split'.
      mode: of its transforms.
      around: the blocks stand around the derivative, and else in the loss.
      views: entries of gradient views of the model's call, by name; and of which target.
    """

    classes: list[Class]
    runs: list[list[Mask]]
    form: str
    mode: str
    around: bool
    views: tuple[dict[str, Any], str] | None = None

    @property
    def root(self) -> Class:
        return self.classes[-1]
