"""The kernels in C++ for x86-64 CPUs: packed weights, one team of threads, one region a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .api import DecoderLayer, PackedLinear, PackedSwiGLU
from .context import ForwardContext
from .native.attention import AttentionPool, NativeAttention
from .native.forward import NativeStack
from .native.library import Library
from .native.linear import NativeLinear, NativeSwiGLU, Packed
from .native.linear_quantized import QuantizedLinear, QuantizedSwiGLU, are_alike, is_kept
from .native.rows import qk_norm_rope_write, rms_norm
from .native.sampling import NativeSampling
from .quantized import QuantizedWeight
from .torch_quantized import pack, pack_swiglu


class NativeKernels:
    """Every operation in the code of one library, on a team of ``num_threads`` threads.

    The calling thread is one of the team.
    """

    def __init__(self, library: Library, num_threads: int) -> None:
        self.name = f"native:{library.name}"
        self._library = library
        self._team = library.team(num_threads)
        self.sampling = NativeSampling(library, self._team)
        self._attentions = AttentionPool(library, self._team)

    def pack_linear(self, weight: Tensor, bias: Tensor | None = None) -> NativeLinear:
        """See ``Kernels.pack_linear``."""
        return NativeLinear(self._library, self._team, weight, bias)

    def pack_swiglu(self, gate: Tensor, up: Tensor) -> NativeSwiGLU:
        """See ``Kernels.pack_swiglu``."""
        return NativeSwiGLU(self._library, self._team, gate, up)

    def pack_quantized(
        self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype
    ) -> PackedLinear | None:
        """See ``Kernels.pack_quantized``; activations in int8 are multiplied by torch."""
        if weight.int8_activations:
            return pack(weight, bias, dtype)
        if not is_kept(weight):
            return None
        return QuantizedLinear(self._library, self._team, weight, bias, dtype)

    def pack_quantized_swiglu(
        self, gate: QuantizedWeight, up: QuantizedWeight, dtype: torch.dtype
    ) -> PackedSwiGLU | None:
        """See ``Kernels.pack_quantized_swiglu``; activations in int8 are multiplied by torch."""
        if gate.int8_activations or up.int8_activations:
            return pack_swiglu(gate, up, dtype)
        if not is_kept(gate) or not are_alike(gate, up):
            return None
        return QuantizedSwiGLU(self._library, self._team, gate, up, dtype)

    def rms_norm(self, x_TC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
        """See ``Kernels.rms_norm``."""
        return rms_norm(self._library, self._team, x_TC, weight_C, eps)

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
        return qk_norm_rope_write(
            self._library,
            self._team,
            qkv_TC,
            weight_AD,
            cos_TE,
            sin_TE,
            kv_N2KSD,
            slots_T,
            eps,
        )

    def plan_attention(self, context: ForwardContext) -> NativeAttention:
        """See ``Kernels.plan_attention``."""
        return self._attentions.plan(context)

    def stack(self, layers: Sequence[DecoderLayer], eps: float) -> NativeStack | None:
        """See ``Kernels.stack``."""
        packed = (p for y in layers for p in (y.qkv, y.attention_out, y.gate_up, y.down))
        if not layers or not all(isinstance(p, Packed) for p in packed):
            return None
        return NativeStack(self._library, self._team, layers, eps)
