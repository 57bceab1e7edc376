"""What a block knows of the transform that it is an opening of."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol

from flax_sg._filters.filters import Filter
from flax_sg._filters.variables import VariableInfo

__all__ = ['Change']


class Change(Protocol):
    """A change to the reads of selected variables; `Transform` is one."""

    filter: Filter
    allow_unmatched: bool

    def read(self, info: VariableInfo, value: Any, other: Callable[[str], Any]) -> Any: ...

    def read_from(self) -> tuple[str, ...]: ...

    def in_collections(self, collection: str) -> bool: ...

    def named_collections(self) -> tuple[str, ...]: ...

    def says(self, info: VariableInfo) -> Hashable: ...

    def asks(self) -> bool: ...

    def key(self, of_predicate: Callable[[Callable], Hashable] = ...) -> Hashable: ...
