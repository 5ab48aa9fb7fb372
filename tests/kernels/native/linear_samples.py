"""What the tests of dense and quantized linears share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inference_pio.kernels.native.library import Library, LibraryError, cpu_flags, load, usable

SETS = usable(cpu_flags())
DTYPES = (torch.float32, torch.bfloat16)


def built(name: str) -> Library:
    """The library of an instruction set; the test skips with the reason where it does not load."""
    try:
        return load(name)
    except LibraryError as error:
        pytest.skip(str(error))


def random(rows: int, cols: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator).to(dtype)
