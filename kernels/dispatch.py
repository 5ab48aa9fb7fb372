"""Which implementation computes the model: decided once, when it is loaded."""

from __future__ import annotations

import os

import torch

from .api import Kernels
from .reference import ReferenceKernels
from .torch_ops import TorchKernels

OVERRIDE = "INFERENCE_PIO_KERNELS"


def select_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The fastest kernels for a device and dtype.

    ``INFERENCE_PIO_KERNELS=reference`` or ``torch`` overrides the choice; another value raises
    ``ValueError``.
    """
    choice = os.environ.get(OVERRIDE, "torch")
    if choice == "reference":
        return ReferenceKernels()
    if choice != "torch":
        raise ValueError(f"{OVERRIDE} is {choice!r}; it is 'reference' or 'torch'")
    if device.type == "cpu" and torch._C._has_mkldnn:
        from .torch_cpu import TorchCPUKernels

        return TorchCPUKernels(dtype)
    return TorchKernels()
