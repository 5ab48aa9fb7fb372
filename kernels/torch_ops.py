"""Every operation in torch's own kernels, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .api import DecoderLayer, PackedLinear, PackedSwiGLU
from .context import ForwardContext
from .kv_layer import CodedKV, KVLayer, layer_shape, write_tokens
from .pattern import bound_pages
from .quantized import QuantizedWeight
from .reference import ReferenceLinear, ReferenceSwiGLU
from .sampling.api import SamplingKernels
from .sampling.torch_sampling import TorchSampling
from .torch_attention import PagedAttention


class TorchKernels:
    """Plain linears and as few operations a layer as torch allows."""

    name = "torch"

    def __init__(self) -> None:
        self.sampling: SamplingKernels = TorchSampling()
        self._scratch = torch.empty(0)

    def pack_linear(self, weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
        """See ``Kernels.pack_linear``."""
        return ReferenceLinear(weight.clone(), bias.clone() if bias is not None else None)

    def pack_swiglu(self, gate: Tensor, up: Tensor) -> PackedSwiGLU:
        """See ``Kernels.pack_swiglu``."""
        return ReferenceSwiGLU(gate.clone(), up.clone())

    def pack_quantized(
        self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype
    ) -> PackedLinear | None:
        """No kernel of its own: the weight is dequantized."""
        return None

    def pack_quantized_swiglu(
        self, gate: QuantizedWeight, up: QuantizedWeight, dtype: torch.dtype
    ) -> PackedSwiGLU | None:
        """As ``pack_quantized``."""
        return None

    def rms_norm(self, x_TC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
        """See ``Kernels.rms_norm``."""
        return _normalised(x_TC, eps).to(weight_C.dtype).mul_(weight_C)

    def qk_norm_rope_write(
        self,
        qkv_TC: Tensor,
        weight_AD: Tensor,
        cos_TE: Tensor,
        sin_TE: Tensor,
        kv_N2KSD: KVLayer,
        slots_T: Tensor,
        eps: float,
    ) -> Tensor:
        """See ``Kernels.qk_norm_rope_write``."""
        _, kv_heads, _, dim = layer_shape(kv_N2KSD)
        heads_TUD = qkv_TC.view(qkv_TC.shape[0], -1, dim)
        qk_heads = weight_AD.shape[0]
        qk_TAD = heads_TUD[:, :qk_heads]
        normed = _normalised(qk_TAD, eps).mul_(weight_AD)
        first, second = normed.chunk(2, dim=-1)
        cos, sin = cos_TE[:, None], sin_TE[:, None]
        if isinstance(kv_N2KSD, CodedKV):
            # Keys are rounded to codes alone, not to the projection's dtype before.
            wide = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
            qk_TAD.copy_(wide)
            values_TKD = heads_TUD[:, qk_heads:].float()
            keys_TKD = wide[:, qk_heads - kv_heads :]
            write_tokens(kv_N2KSD, slots_T, torch.stack((keys_TKD, values_TKD), dim=1))
            return heads_TUD[:, : qk_heads - kv_heads]
        # Rounded once, on the way back into the projection's own memory.
        qk_first, qk_second = qk_TAD.chunk(2, dim=-1)
        torch.addcmul(first * cos, second, sin, value=-1, out=qk_first)
        torch.addcmul(second * cos, first, sin, out=qk_second)
        kv_T2KD = heads_TUD[:, qk_heads - kv_heads :].view(-1, 2, kv_heads, dim)
        write_tokens(kv_N2KSD, slots_T, kv_T2KD)
        return heads_TUD[:, : qk_heads - kv_heads]

    def bound_pages(self, kv_N2KSD: KVLayer, bounds_N2KD: Tensor, blocks: Sequence[int]) -> None:
        """See ``Kernels.bound_pages``."""
        bound_pages(kv_N2KSD, bounds_N2KD, blocks)

    def plan_attention(self, context: ForwardContext) -> PagedAttention:
        """See ``Kernels.plan_attention``."""
        return PagedAttention(context, self._take_scratch)

    def stack(self, layers: Sequence[DecoderLayer], eps: float) -> None:
        """One operation after the other."""

    def _take_scratch(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory that is kept between steps: fresh pages cost more than the copy into them."""
        scratch = self._scratch
        if scratch.dtype != dtype or scratch.device != device or scratch.numel() < count:
            self._scratch = scratch = torch.empty(count, dtype=dtype, device=device)
        return scratch[:count]


def _normalised(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x ** 2) + eps) over the last axis, in float32 of its own.

    Mixed-dtype products take a slow path on the CPU, so ``x`` is converted once, up front.
    """
    wide = x.to(torch.float32, copy=True)
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return wide.mul_(norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_())
