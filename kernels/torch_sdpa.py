"""Every operation in torch's own kernels, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from .context import ForwardContext
from .reference import ReferenceLinear, ReferenceSwiGLU
from .torch_attention import PagedAttention


class TorchKernels:
    """Plain linears, fused SDPA and as few operations a layer as torch allows."""

    name = "torch"

    def __init__(self) -> None:
        self._scratch = torch.empty(0)

    def pack_linear(self, weight: Tensor, bias: Tensor | None = None) -> ReferenceLinear:
        """See ``Kernels.pack_linear``."""
        return ReferenceLinear(weight.clone(), bias.clone() if bias is not None else None)

    def pack_swiglu(self, gate: Tensor, up: Tensor) -> ReferenceSwiGLU:
        """See ``Kernels.pack_swiglu``."""
        return ReferenceSwiGLU(gate.clone(), up.clone())

    def rms_norm(self, x_TC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
        """See ``Kernels.rms_norm``."""
        return torch.rms_norm(x_TC, (x_TC.shape[-1],), weight_C, eps)

    def qk_norm_rope_write(
        self,
        qkv_TC: Tensor,
        weight_AD: Tensor,
        cos_TE: Tensor,
        sin_TE: Tensor,
        kv_N2KSD: Tensor,
        slots_T: Tensor,
        eps: float,
    ) -> Tensor:
        """See ``Kernels.qk_norm_rope_write``."""
        _, _, kv_heads, block_size, dim = kv_N2KSD.shape
        heads_TUD = qkv_TC.view(qkv_TC.shape[0], -1, dim)
        qk_heads = weight_AD.shape[0]
        qk_TAD = heads_TUD[:, :qk_heads]
        normed = torch.rms_norm(qk_TAD.float(), (dim,), None, eps).mul_(weight_AD)
        first, second = normed.chunk(2, dim=-1)
        cos, sin = cos_TE[:, None], sin_TE[:, None]
        # Rounded once, on the way back into the projection's own memory.
        qk_TAD[..., : dim // 2] = (first * cos).addcmul_(second, sin, value=-1)
        qk_TAD[..., dim // 2 :] = (second * cos).addcmul_(first, sin)
        kv_T2KD = heads_TUD[:, qk_heads - kv_heads :].unflatten(1, (2, kv_heads))
        kv_N2KSD[slots_T // block_size, :, :, slots_T % block_size] = kv_T2KD
        return heads_TUD[:, : qk_heads - kv_heads]

    def plan_attention(self, context: ForwardContext) -> PagedAttention:
        """See ``Kernels.plan_attention``."""
        return PagedAttention(context, self._take_scratch)

    def _take_scratch(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory that is kept between steps: fresh pages cost more than the copy into them."""
        scratch = self._scratch
        if scratch.dtype != dtype or scratch.device != device or scratch.numel() < count:
            self._scratch = scratch = torch.empty(count, dtype=dtype, device=device)
        return scratch[:count]
