"""Torch's dtypes by the numbers of ``DType`` in types.h."""

from __future__ import annotations

import torch
from torch import Tensor

_NUMBERS = {torch.float32: 0, torch.bfloat16: 1}


def native_dtype(x: Tensor) -> int:
    """Raises ``ValueError`` for a dtype that the native kernels do not compute in."""
    number = _NUMBERS.get(x.dtype)
    if number is None:
        raise ValueError(f"the native kernels compute in float32 and bfloat16, not in {x.dtype}")
    return number
