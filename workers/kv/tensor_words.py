"""The integer arrays that tickets carry, seen as torch tensors: nothing is copied."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .ticket import TicketDType, Words

_DTYPES: dict[TicketDType, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.uint8,
    "fp8": torch.uint8,
}
_PLAIN: tuple[TicketDType, ...] = ("float32", "bfloat16", "float16")


def ticket_dtype(dtype: torch.dtype) -> TicketDType:
    """The name of a plain element type. Raises ``ValueError`` for one that cannot travel."""
    for name in _PLAIN:
        if _DTYPES[name] is dtype:
            return name
    raise ValueError(f"KV travels as one of {', '.join(_PLAIN)}, got {dtype}")


def as_tensor(words: Words, dtype: TicketDType) -> Tensor:
    """Words as a tensor over the same memory, which is kept alive.

    It may be written where ``words`` may, and is only ever read where they are read-only.
    """
    return torch.from_numpy(np.asarray(_Unlocked(words))).view(_DTYPES[dtype])


class _Unlocked:
    """Tells numpy that an array may be written: torch has no read-only tensors and warns."""

    def __init__(self, words: Words) -> None:
        self._words = words  # keeps the memory alive as long as the view

    @property
    def __array_interface__(self) -> dict[str, Any]:
        address, _ = self._words.__array_interface__["data"]
        return {**self._words.__array_interface__, "data": (address, False)}
