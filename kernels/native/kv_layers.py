"""A layer of the cache as native kernels take it: ``KVFormat`` of ``types.h`` and an address."""

from __future__ import annotations

import torch

from ..kv_layer import CodedKV, KVLayer

_FORMATS = {"int8": 1, "fp8": 2}


def native_kv_format(kv_N2KSD: KVLayer, dtype: torch.dtype) -> int:
    """How it stores its numbers.

    Raises ``ValueError`` for a layer that kernels of ``dtype`` cannot take: a plain one of another
    dtype, or one with gaps.
    """
    data = kv_N2KSD.data_N2KB if isinstance(kv_N2KSD, CodedKV) else kv_N2KSD
    if data is kv_N2KSD and data.dtype != dtype:
        raise ValueError(
            f"activations are {dtype} and the cache is {data.dtype}; it is of their dtype or in "
            "codes"
        )
    if not data.is_contiguous():
        raise ValueError(f"the cache has strides {data.stride()}; no gaps are allowed")
    return _FORMATS[kv_N2KSD.codes] if isinstance(kv_N2KSD, CodedKV) else 0


def native_kv_address(kv_N2KSD: KVLayer) -> int:
    """Where it lies."""
    data = kv_N2KSD.data_N2KB if isinstance(kv_N2KSD, CodedKV) else kv_N2KSD
    return data.data_ptr()
