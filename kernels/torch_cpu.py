"""torch on the CPU with oneDNN's prepacked linears: twice the speed of ``F.linear``.

Import only where torch was built with oneDNN: the operators are bound here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .api import PackedLinear, PackedSwiGLU
from .quantized import QuantizedWeight
from .torch_ops import TorchKernels
from .torch_quantized import pack, pack_swiglu

# Operators without Python stubs: typed here, once.
_linear: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default
_linear_binary: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.binary
_pack: Callable[[Tensor], Tensor] = torch.ops.mkldnn._reorder_linear_weight.default


@dataclass(frozen=True, slots=True)
class OneDNNLinear:
    """A weight in oneDNN's blocked layout."""

    packed: Tensor
    bias: Tensor | None

    def __call__(self, x_TC: Tensor, residual_TC: Tensor | None = None) -> Tensor:
        if residual_TC is None:
            return _linear(x_TC, self.packed, self.bias, "none", [], "")
        return _linear_binary(x_TC, residual_TC, self.packed, self.bias, "add")

    def in_float32(self, x_TC: Tensor) -> Tensor:
        """See ``PackedLinear.in_float32``; oneDNN rounds to ``x``'s dtype before."""
        return self(x_TC).float()


@dataclass(frozen=True, slots=True)
class OneDNNSwiGLU:
    """SiLU is the gate's epilogue and the product is the up projection's."""

    gate: Tensor
    up: Tensor

    def __call__(self, x_TC: Tensor) -> Tensor:
        gate_TC = _linear(x_TC, self.gate, None, "swish", [], "")
        return _linear_binary(x_TC, gate_TC, self.up, None, "mul")


class TorchCPUKernels(TorchKernels):
    """``TorchKernels`` with packed linears where oneDNN has them for the dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._packs = can_pack(dtype)

    def pack_linear(self, weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
        """See ``Kernels.pack_linear``."""
        if not self._packs:
            return super().pack_linear(weight, bias)
        return OneDNNLinear(_pack(weight), bias.clone() if bias is not None else None)

    def pack_swiglu(self, gate: Tensor, up: Tensor) -> PackedSwiGLU:
        """See ``Kernels.pack_swiglu``."""
        if not self._packs:
            return super().pack_swiglu(gate, up)
        return OneDNNSwiGLU(_pack(gate), _pack(up))

    def pack_quantized(
        self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype
    ) -> PackedLinear | None:
        """See ``Kernels.pack_quantized``."""
        return pack(weight, bias, dtype)

    def pack_quantized_swiglu(
        self, gate: QuantizedWeight, up: QuantizedWeight, dtype: torch.dtype
    ) -> PackedSwiGLU | None:
        """See ``Kernels.pack_quantized_swiglu``."""
        return pack_swiglu(gate, up, dtype)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this CPU's oneDNN computes linears in ``dtype``."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32
