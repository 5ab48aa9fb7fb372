"""Random batches over random caches, on any device."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from inference_pio.kernels.context import ContextItem, ForwardContext, build_context
from inference_pio.kernels.reference import ReferenceKernels

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = list(TOLERANCE)
DOT_DTYPES = [
    torch.float32,
    torch.float16,
    # The interpreter multiplies matrices of bfloat16 by their bits.
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]
"""Of operations with a matrix product in them."""
Heads = tuple[int, int, int]
"""Query heads, KV heads and head_dim."""
Lengths = list[tuple[int, int]]
"""Cached and new tokens of each sequence."""


def close(got: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of the dtype."""
    tolerance = TOLERANCE[expected.dtype]
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got.cpu(), expected.cpu(), atol=tolerance, rtol=tolerance)


@dataclass(frozen=True)
class Case:
    """A batch on the device, over a cache in which every slot that holds no token of it is NaN.

    ``expected`` is the reference's answer, computed on the CPU.
    """

    context: ForwardContext
    q: Tensor
    cache: Tensor
    expected: Tensor


def attention_case(
    heads: Heads,
    lengths: Lengths,
    dtype: torch.dtype,
    device: torch.device,
    block_size: int = 16,
    scale: float = 1.0,
) -> Case:
    num_heads, kv_heads, dim = heads
    generator = torch.Generator().manual_seed(0)
    need = [-(-(computed + new) // block_size) for computed, new in lengths]
    blocks = list(range(sum(need) + 3))
    random.Random(0).shuffle(blocks)
    items = [
        ContextItem([blocks.pop() for _ in range(count)], computed, new)
        for count, (computed, new) in zip(need, lengths, strict=True)
    ]
    context = build_context(items, block_size, CPU)
    shape = sum(need) + 3, 2, kv_heads, block_size, dim
    cache = torch.randn(shape, generator=generator).to(dtype)
    # Wider than needed: queries are a view into the projection, as in the model.
    rows = context.query_starts[-1], num_heads + 2, dim
    q = torch.randn(rows, generator=generator).mul_(scale * dim**-0.5).to(dtype)[:, :num_heads]
    expected = ReferenceKernels().plan_attention(context)(q, cache)
    used = torch.zeros(cache.shape[0], block_size, dtype=torch.bool)
    for length, table in zip(context.seq_lens, context.block_tables, strict=True):
        for position in range(length):
            used[table[position // block_size], position % block_size] = True
    cache.permute(0, 3, 1, 2, 4)[~used] = float("nan")
    wide = q.new_empty(rows).to(device)[:, :num_heads]
    wide.copy_(q)
    return Case(on_device(context, device), wide, cache.to(device), expected)


def on_device(context: ForwardContext, device: torch.device) -> ForwardContext:
    """The same batch with its tensors on the device."""
    return replace(
        context,
        positions_T=context.positions_T.to(device),
        slots_T=context.slots_T.to(device),
    )
