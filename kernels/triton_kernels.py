"""The kernels for CUDA devices: Triton's own code, and cuBLAS for the products.

Everything runs on the CPU too where Triton interprets its kernels (``TRITON_INTERPRET=1`` before
the first import): slow, and how they are tested without a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .api import DecoderLayer, PackedLinear, PackedSwiGLU
from .context import ForwardContext
from .kv_layer import KVLayer
from .quantized import QuantizedWeight
from .torch_ops import TorchKernels
from .triton.attention import takes_cache
from .triton.decode_graphs import CudaGraphRunner, DirectRunner
from .triton.linear import DenseLinear, DenseSwiGLU
from .triton.quantized_linear import pack, pack_swiglu
from .triton.rows import qk_norm_rope_write, rms_norm
from .triton.sampling import TritonSampling
from .triton.stack import TritonStack
from .triton.step_attention import TritonAttention


class TritonKernels(TorchKernels):
    """Every operation in few launches; torch's way for caches that the kernels do not take."""

    name = "triton"

    def __init__(self) -> None:
        super().__init__()
        self.sampling = TritonSampling()

    def pack_linear(self, weight: Tensor, bias: Tensor | None = None) -> DenseLinear:
        """See ``Kernels.pack_linear``."""
        return DenseLinear(weight.clone(), bias.clone() if bias is not None else None)

    def pack_swiglu(self, gate: Tensor, up: Tensor) -> DenseSwiGLU:
        """See ``Kernels.pack_swiglu``."""
        return DenseSwiGLU(torch.cat((gate, up)))

    def pack_quantized(
        self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype
    ) -> PackedLinear | None:
        """See ``Kernels.pack_quantized``."""
        return pack(weight, bias)

    def pack_quantized_swiglu(
        self, gate: QuantizedWeight, up: QuantizedWeight, dtype: torch.dtype
    ) -> PackedSwiGLU | None:
        """See ``Kernels.pack_quantized_swiglu``."""
        return pack_swiglu(gate, up)

    def rms_norm(self, x_TC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
        """See ``Kernels.rms_norm``."""
        return rms_norm(x_TC, weight_C, eps)

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
        if not takes_cache(kv_N2KSD, qkv_TC.dtype, len(weight_AD)):
            return super().qk_norm_rope_write(
                qkv_TC, weight_AD, cos_TE, sin_TE, kv_N2KSD, slots_T, eps
            )
        return qk_norm_rope_write(qkv_TC, weight_AD, cos_TE, sin_TE, kv_N2KSD, slots_T, eps)

    def plan_attention(self, context: ForwardContext) -> TritonAttention:  # type: ignore[override]
        """See ``Kernels.plan_attention``."""
        return TritonAttention(context, super().plan_attention)

    def stack(  # type: ignore[override]
        self, layers: Sequence[DecoderLayer], eps: float
    ) -> TritonStack | None:
        """See ``Kernels.stack``."""
        if not layers:
            return None
        runner = CudaGraphRunner() if layers[0].input_norm.is_cuda else DirectRunner()
        return TritonStack(self, layers, eps, runner)
