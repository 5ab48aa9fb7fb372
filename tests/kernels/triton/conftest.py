"""Where Triton's kernels run: interpreted on the CPU, or on a CUDA device.

Triton decides once, when a kernel is defined, whether it is interpreted. Without a device this
process interprets; with one it does where ``TRITON_INTERPRET=1`` asks for it.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

pytest.importorskip("triton")


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each test runs under the interpreter by default, and on a device with ``-m gpu``."""
    if request.param == "interpreter":
        if not INTERPRETED:
            pytest.skip("kernels are compiled in this process; TRITON_INTERPRET=1 interprets")
        return torch.device("cpu")
    if INTERPRETED:
        pytest.skip("kernels are interpreted in this process")
    return torch.device("cuda")
