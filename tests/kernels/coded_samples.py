"""Layers in codes for the tests of kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from inference_pio.kernels.kv_bytes import KVCodes, head_bytes
from inference_pio.kernels.kv_layer import CodedKV, KVLayer, write_tokens

FORMATS: list[KVCodes | None] = [None, "int8", "fp8"]


def empty_layer(
    shape: tuple[int, int, int, int], codes: KVCodes | None, dtype: torch.dtype
) -> KVLayer:
    """Zeros, of blocks, KV heads, block size and head_dim."""
    num_blocks, kv_heads, block_size, dim = shape
    if codes is None:
        return torch.zeros(num_blocks, 2, kv_heads, block_size, dim, dtype=dtype)
    data = torch.zeros(num_blocks, 2, kv_heads, head_bytes(block_size, dim), dtype=torch.uint8)
    return CodedKV(data, codes, block_size, dim)


def coded(kv_N2KSD: Tensor, codes: KVCodes) -> CodedKV:
    """The same numbers, rounded."""
    num_blocks, _, kv_heads, block_size, dim = kv_N2KSD.shape
    layer = empty_layer((num_blocks, kv_heads, block_size, dim), codes, kv_N2KSD.dtype)
    assert isinstance(layer, CodedKV)
    slots = torch.arange(num_blocks * block_size)
    write_tokens(layer, slots, kv_N2KSD.permute(0, 3, 1, 2, 4).flatten(0, 1))
    return layer


def unused(kv: KVLayer, rows_NS: Tensor) -> None:
    """Makes rows NaN, codes and scales alike."""
    if not isinstance(kv, CodedKV):
        kv.permute(0, 3, 1, 2, 4)[rows_NS] = float("nan")
        return
    kv.codes_of(kv.data_N2KB).permute(0, 3, 1, 2, 4)[rows_NS] = 0x7F
    kv.scales_of(kv.data_N2KB).permute(0, 3, 1, 2)[rows_NS] = float("nan")
