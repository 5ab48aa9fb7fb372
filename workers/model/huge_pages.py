"""Zeroed tensors in the host's memory, on huge pages where the system gives them."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20


def zeros_on_huge_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """All of its pages are there when this returns; they go back to the system with the tensor.

    Blocks of a KV cache lie all over it: on 4 KB pages nearly each of them costs a walk through the
    page tables, and the hardware's prefetch stops at each page's end. Plain memory of torch serves
    where it is small or the system has no huge pages.
    """
    num_bytes = prod(shape) * dtype.itemsize
    memory = _huge_mapping(num_bytes)
    if memory is None:
        return torch.empty(*shape, dtype=dtype).zero_()
    return memory.view(dtype).view(*shape).zero_()


def _huge_mapping(num_bytes: int) -> Tensor | None:
    """So many bytes from a huge page's begin on; the mapping ends with the last view of them."""
    if sys.platform != "linux" or num_bytes < HUGE_PAGE:
        return None
    try:
        # It has room for a begin at a huge page's border. Private: a fork's writes are its own.
        mapping = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapping.madvise(mmap.MADV_HUGEPAGE)
    except (OSError, AttributeError):  # no memory, a kernel or a Python without huge pages
        return None
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
    begin = -whole.data_ptr() % HUGE_PAGE
    return whole[begin : begin + num_bytes]
