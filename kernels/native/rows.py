"""Operations on each token alone, on torch tensors: embedding, norms, rotation, cache writes.

Every function takes the library and the address of one of its teams first. Tensors lie on the CPU.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from ..kv_layer import KVLayer, layer_shape
from .dtypes import native_dtype
from .kv_layers import native_kv_address, native_kv_format
from .library import Library, check

_INT, _LONG, _FLOAT, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


@cache
def _functions(library: Library) -> ctypes.CDLL:
    cdll = library.cdll
    cdll.pio_embed.argtypes = [
        *(_POINTER, _INT),
        *(_POINTER, _LONG, _LONG),
        *(_POINTER, _LONG, _LONG, _POINTER),
    ]
    cdll.pio_rms_norm.argtypes = [
        *(_POINTER, _INT, _INT),
        *(_POINTER, _LONG, _LONG, _LONG),
        *(_POINTER, _FLOAT, _POINTER),
    ]
    cdll.pio_qk_norm_rope_write.argtypes = [
        *(_POINTER, _INT),
        *(_POINTER, _LONG, _LONG, _INT),
        *(_POINTER, _POINTER, _POINTER, _POINTER, _FLOAT),
        *(_INT, _POINTER, _LONG, _INT, _INT, _INT),
    ]
    for function in (cdll.pio_embed, cdll.pio_rms_norm, cdll.pio_qk_norm_rope_write):
        function.restype = ctypes.c_char_p
    return cdll


def embed(library: Library, team: int, table_VC: Tensor, ids_T: Tensor) -> Tensor:
    """The tokens' rows of ``table_VC`` as float32 [T, C]: the begin of the residual stream.

    ``ids_T`` is int64. Raises ``KernelError`` for an id that the table does not have.
    """
    table_VC, ids_T = _with_plain_rows(table_VC), ids_T.contiguous()
    out_TC = torch.empty(len(ids_T), table_VC.shape[1])
    check(
        _functions(library).pio_embed(
            team,
            native_dtype(table_VC),
            table_VC.data_ptr(),
            *(table_VC.shape[0], table_VC.stride(0)),
            ids_T.data_ptr(),
            *out_TC.shape,
            out_TC.data_ptr(),
        )
    )
    return out_TC


def rms_norm(library: Library, team: int, x_TC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis, of the weight's dtype.

    ``x_TC`` is of that dtype too, or float32. Computed in float32; rounded before the product with
    the weight, as in the reference, and after it.
    """
    if x_TC.dtype not in (weight_C.dtype, torch.float32):
        raise ValueError(
            f"x is {x_TC.dtype}; with a weight of {weight_C.dtype} it is that or float32"
        )
    rows_TC = _with_plain_rows(x_TC.reshape(-1, x_TC.shape[-1]))
    weight_C = weight_C.contiguous()
    out_TC = torch.empty(rows_TC.shape, dtype=weight_C.dtype)
    check(
        _functions(library).pio_rms_norm(
            team,
            *(native_dtype(rows_TC), native_dtype(weight_C)),
            rows_TC.data_ptr(),
            *(*rows_TC.shape, rows_TC.stride(0)),
            *(weight_C.data_ptr(), eps, out_TC.data_ptr()),
        )
    )
    return out_TC.view(x_TC.shape)


def qk_norm_rope_write(
    library: Library,
    team: int,
    qkv_TC: Tensor,
    weight_AD: Tensor,
    cos_TE: Tensor,
    sin_TE: Tensor,
    kv_N2KSD: KVLayer,
    slots_T: Tensor,
    eps: float,
) -> Tensor:
    """See ``Kernels.qk_norm_rope_write``; the queries stay in ``qkv_TC``'s own memory.

    Raises ``KernelError`` for a slot that the cache does not have.
    """
    num_blocks, kv_heads, block_size, head_dim = layer_shape(kv_N2KSD)
    kv_format = native_kv_format(kv_N2KSD, qkv_TC.dtype)
    num_heads = weight_AD.shape[0] - kv_heads
    if head_dim % 2 != 0 or qkv_TC.shape[1] != (num_heads + 2 * kv_heads) * head_dim:
        raise ValueError(
            f"a row of {qkv_TC.shape[1]} elements does not hold {num_heads} + 2 * {kv_heads} "
            f"heads of {head_dim}, an even number"
        )
    qkv_TC = _with_plain_rows(qkv_TC)
    weight_AD, slots_T = weight_AD.contiguous(), slots_T.contiguous()
    cos_TE, sin_TE = cos_TE.contiguous(), sin_TE.contiguous()
    check(
        _functions(library).pio_qk_norm_rope_write(
            *(team, native_dtype(qkv_TC)),
            *(qkv_TC.data_ptr(), qkv_TC.shape[0], qkv_TC.stride(0), num_heads),
            *(weight_AD.data_ptr(), cos_TE.data_ptr(), sin_TE.data_ptr(), slots_T.data_ptr(), eps),
            *(kv_format, native_kv_address(kv_N2KSD), num_blocks),
            *(kv_heads, block_size, head_dim),
        )
    )
    return qkv_TC[:, : num_heads * head_dim].view(-1, num_heads, head_dim)


def _with_plain_rows(x_TC: Tensor) -> Tensor:
    """Rows may lie apart, but the elements of one lie side by side."""
    return x_TC if x_TC.stride(1) == 1 else x_TC.contiguous()
