"""Host arrays on their way to a device, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def copied_to(values: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A list as a tensor on ``device``.

    To a CUDA device it is copied from pinned memory and the host goes on meanwhile: torch's
    allocator gives that memory to nobody else before the copy is done.
    """
    if torch.device(device).type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
