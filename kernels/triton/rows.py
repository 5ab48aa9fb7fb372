"""Operations on each token alone, on torch tensors: see ``rows_code`` for what runs on the device.

Everything that describes the model (widths, heads) is a constant of the compiled kernel; what
changes from step to step is the grid alone, so that nothing is compiled twice.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .launch import OPTIONS
from .rows_code import qk_norm_rope_write_kernel, rms_norm_kernel, silu_mul_kernel

_ACTIVATION_BLOCK = 1024
_HEADS_TOGETHER = 8


def rms_norm(x_TC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis, of the weight's dtype; see ``Kernels.rms_norm``."""
    rows_TC = with_plain_rows(x_TC.reshape(-1, x_TC.shape[-1]))
    return _rms_norm(rows_TC, None, weight_C, eps).view(x_TC.shape)


def add_rms_norm(stream_TC: Tensor, delta_TC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """Adds ``delta`` to the float32 residual stream, in place, and returns the sum's RMSNorm."""
    if stream_TC.dtype != torch.float32 or stream_TC.stride(1) != 1:
        raise ValueError(f"the residual stream is {stream_TC.dtype}; float32 rows are needed")
    if delta_TC.shape != stream_TC.shape:
        raise ValueError(f"{list(delta_TC.shape)} is added to a stream of {list(stream_TC.shape)}")
    return _rms_norm(stream_TC, delta_TC.contiguous(), weight_C, eps)


def qk_norm_rope_write(
    qkv_TC: Tensor,
    weight_AD: Tensor,
    cos_TE: Tensor,
    sin_TE: Tensor,
    kv_N2KSD: Tensor,
    slots_T: Tensor,
    eps: float,
) -> Tensor:
    """See ``Kernels.qk_norm_rope_write``; the queries stay in ``qkv_TC``'s own memory.

    A slot below zero writes nothing.
    """
    _, _, kv_heads, block_size, head_dim = kv_N2KSD.shape
    num_heads = weight_AD.shape[0] - kv_heads
    all_heads = num_heads + 2 * kv_heads
    if qkv_TC.dtype != kv_N2KSD.dtype or not kv_N2KSD.is_contiguous():
        raise ValueError(
            f"the cache is {kv_N2KSD.dtype} with strides {kv_N2KSD.stride()}; "
            f"{qkv_TC.dtype} without gaps is needed"
        )
    if head_dim % 2 != 0 or qkv_TC.shape[1] != all_heads * head_dim:
        raise ValueError(
            f"a row of {qkv_TC.shape[1]} elements does not hold {num_heads} + 2 * {kv_heads} "
            f"heads of {head_dim}, an even number"
        )
    qkv_TC = with_plain_rows(qkv_TC)
    num_tokens = qkv_TC.shape[0]
    head_tile = min(_HEADS_TOGETHER, triton.next_power_of_2(all_heads))
    qk_norm_rope_write_kernel[(num_tokens, triton.cdiv(all_heads, head_tile))](
        qkv_TC,
        weight_AD.contiguous(),
        cos_TE.contiguous(),
        sin_TE.contiguous(),
        kv_N2KSD,
        slots_T,
        qkv_TC.stride(0),
        eps,
        HEADS=num_heads,
        KV_HEADS=kv_heads,
        HALF=head_dim // 2,
        BLOCK_SIZE=block_size,
        HEAD_TILE=head_tile,
        HALF_TILE=triton.next_power_of_2(head_dim // 2),
        num_warps=4,
        **OPTIONS,
    )
    return qkv_TC[:, : num_heads * head_dim].view(num_tokens, num_heads, head_dim)


def silu_mul(gate_up_TC: Tensor) -> Tensor:
    """``silu(gate) * up`` of rows that hold both side by side, [T, C / 2]; rounded once."""
    num_tokens, width = gate_up_TC.shape[0], gate_up_TC.shape[1] // 2
    out_TC = gate_up_TC.new_empty(num_tokens, width)
    block = min(_ACTIVATION_BLOCK, triton.next_power_of_2(width))
    silu_mul_kernel[(num_tokens, triton.cdiv(width, block))](
        gate_up_TC.contiguous(), out_TC, WIDTH=width, BLOCK=block, num_warps=4, **OPTIONS
    )
    return out_TC


def with_plain_rows(x_TC: Tensor) -> Tensor:
    """Rows may lie apart, but the elements of one lie side by side."""
    return x_TC if x_TC.stride(-1) == 1 else x_TC.contiguous()


def _rms_norm(x_TC: Tensor, delta_TC: Tensor | None, weight_C: Tensor, eps: float) -> Tensor:
    num_rows, width = x_TC.shape
    out_TC = torch.empty(num_rows, width, dtype=weight_C.dtype, device=x_TC.device)
    block = triton.next_power_of_2(width)
    rms_norm_kernel[(num_rows,)](
        x_TC,
        x_TC if delta_TC is None else delta_TC,
        weight_C.contiguous(),
        out_TC,
        x_TC.stride(0),
        eps,
        WIDTH=width,
        BLOCK=block,
        ADDS=delta_TC is not None,
        num_warps=8 if block > 2048 else 4,
        **OPTIONS,
    )
    return out_TC
