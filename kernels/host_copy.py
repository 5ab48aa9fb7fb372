"""Lists on their way to a device, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def host_tensor(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A list in memory of the host, from where it is copied to ``device``.

    For a CUDA device it is pinned: a copy with ``non_blocking`` then goes on while the host does,
    and torch's allocator gives the memory to nobody else before the copy is done.
    """
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")


def copied_to(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A list as a tensor on ``device``."""
    return host_tensor(values, dtype, device).to(device, non_blocking=True)
