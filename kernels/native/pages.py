"""Bounds of pages by the native kernels, on torch tensors."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ..kv_layer import KVLayer, layer_shape
from .dtypes import native_dtype
from .kv_layers import native_kv_address, native_kv_format
from .library import Library, check

_INT, _LONG, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


@cache
def _bound_pages(library: Library) -> ctypes._NamedFuncPointer:
    function = library.cdll.pio_bound_pages
    function.argtypes = [
        *(_POINTER, _INT, _INT),
        *(_POINTER, _INT, _INT, _INT),
        *(_POINTER, _LONG, _POINTER),
    ]
    function.restype = ctypes.c_char_p
    return function


def bound_pages(
    library: Library, team: int, kv_N2KSD: KVLayer, bounds_N2KD: Tensor, blocks: Sequence[int]
) -> None:
    """See ``Kernels.bound_pages``. Raises ``ValueError`` for a block that the cache does not have
    or bounds that are not of this cache."""
    expect_bounds(bounds_N2KD, kv_N2KSD, bounds_N2KD.dtype)
    kv_format = native_kv_format(kv_N2KSD, bounds_N2KD.dtype)
    num_blocks, *shape = layer_shape(kv_N2KSD)
    if blocks and not 0 <= min(blocks) <= max(blocks) < num_blocks:
        raise ValueError(
            f"blocks {min(blocks)} to {max(blocks)}; the cache has 0 to {num_blocks - 1}"
        )
    numbers = array("i", blocks)
    check(
        _bound_pages(library)(
            *(team, native_dtype(bounds_N2KD), kv_format),
            *(native_kv_address(kv_N2KSD), *shape),
            *(numbers.buffer_info()[0], len(numbers), bounds_N2KD.data_ptr()),
        )
    )


def expect_bounds(bounds_N2KD: Tensor | None, kv_N2KSD: KVLayer, dtype: torch.dtype) -> None:
    """Raise ``ValueError`` where they are no bounds of a cache for activations of ``dtype``.

    The library sees addresses only.
    """
    num_blocks, kv_heads, _, head_dim = layer_shape(kv_N2KSD)
    shape = (num_blocks, 2, kv_heads, head_dim)
    if (
        bounds_N2KD is None
        or tuple(bounds_N2KD.shape) != shape
        or bounds_N2KD.dtype != dtype
        or not bounds_N2KD.is_contiguous()
    ):
        got = None if bounds_N2KD is None else f"{bounds_N2KD.dtype} {list(bounds_N2KD.shape)}"
        raise ValueError(
            f"bounds are {got}; the pages of this cache have {dtype} {list(shape)}, without gaps"
        )
