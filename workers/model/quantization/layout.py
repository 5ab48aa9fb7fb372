"""What a file format of quantized weights has to say about itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ....kernels.quantized import QuantizedWeight
from ..config import CheckpointError

Shape = tuple[int, ...]


class Tensors(Protocol):
    """The tensors of a checkpoint, by name."""

    @property
    def folder(self) -> Path: ...

    def __contains__(self, name: str) -> bool: ...

    def view(self, name: str) -> Tensor:
        """A tensor as stored."""
        ...

    def stored_dtype(self, name: str) -> str:
        """Its dtype in safetensors' words."""
        ...


class Layout(Protocol):
    """How one format stores the linear ``prefix`` of ``shape`` [out, in]."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    def holds(self, tensors: Tensors, prefix: str) -> bool:
        """Whether this linear is quantized; formats leave some as they were."""
        ...

    def expected(self, tensors: Tensors, prefix: str, shape: Shape) -> dict[str, Shape | None]:
        """The tensors that stand for the weight, with their shapes; ``None``: any shape.

        Raises ``CheckpointError`` for a linear that this format cannot hold.
        """
        ...

    def ignored(self, prefix: str) -> frozenset[str]:
        """Tensors that may be there too as long as they are zeros."""
        ...

    def read(self, tensors: Tensors, prefix: str, shape: Shape) -> QuantizedWeight:
        """The whole weight. Raises ``CheckpointError`` for values that cannot be."""
        ...


class Settings:
    """Typed look-ups in ``quantization_config`` that name the file and the key."""

    def __init__(self, raw: Mapping[str, Any], origin: str) -> None:
        self.raw = raw
        self.origin = origin

    def error(self, key: str, right: str) -> CheckpointError:
        """What is wrong with a key, and what would be right."""
        return CheckpointError(
            f"{self.origin}: quantization_config.{key} is {self.raw.get(key)!r}; {right}"
        )

    def one_of(self, key: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
        """A value that is among ``allowed``."""
        value = self.raw.get(key, default)
        if isinstance(value, bool) != isinstance(allowed[0], bool) or value not in allowed:
            raise self.error(key, f"supported: {', '.join(map(repr, allowed))}")
        return value

    def group_size(self, *, whole_row: int | None = None) -> int | None:
        """``group_size``, at least 1; the value ``whole_row`` means one group a row (``None``)."""
        value = self.raw.get("group_size")
        if whole_row is not None and value == whole_row:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error("group_size", "a number of columns is expected")
        return value


def check_groups(settings: Settings, prefix: str, columns: int, group: int) -> None:
    """Raise ``CheckpointError`` where groups do not divide a row."""
    if columns % group:
        raise CheckpointError(
            f"{settings.origin}: quantization_config.group_size is {group}, which does not divide "
            f"the {columns} input features of {prefix}"
        )


def check_packed(settings: Settings, prefix: str, what: str, size: int, per_word: int) -> None:
    """Raise ``CheckpointError`` where codes do not fill whole words."""
    if size % per_word:
        raise CheckpointError(
            f"{settings.origin}: {prefix} has {size} {what}; {per_word} codes share a word in this "
            f"format, so it must be a multiple of {per_word}"
        )


def check_dtype(tensors: Tensors, name: str, expected: tuple[str, ...]) -> None:
    """Raise ``CheckpointError`` for a tensor stored as another dtype."""
    stored = tensors.stored_dtype(name)
    if stored not in expected:
        raise CheckpointError(
            f"{tensors.folder}: {name} is stored as {stored}; {' or '.join(expected)} is expected"
        )
