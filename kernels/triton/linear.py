"""Linears in the activations' dtype: cuBLAS's products, with the activation in one kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .rows import silu_mul


@dataclass(frozen=True, slots=True)
class DenseLinear:
    """A weight of [out, in]; see ``PackedLinear``."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x_TC: Tensor, residual_TC: Tensor | None = None) -> Tensor:
        if residual_TC is None:
            return torch.nn.functional.linear(x_TC, self.weight, self.bias)
        if self.bias is None:  # the sum is the product's epilogue
            return torch.addmm(residual_TC, x_TC, self.weight.T)
        return torch.nn.functional.linear(x_TC, self.weight, self.bias).add_(residual_TC)

    def in_float32(self, x_TC: Tensor) -> Tensor:
        """See ``PackedLinear.in_float32``; cuBLAS writes the float32 that it sums in."""
        if not x_TC.is_cuda or x_TC.dtype == torch.float32:
            return self(x_TC).float()
        out = torch.mm(x_TC, self.weight.T, out_dtype=torch.float32)
        return out if self.bias is None else out.add_(self.bias)


@dataclass(frozen=True, slots=True)
class DenseSwiGLU:
    """Gate and up as one product, then their activation; see ``PackedSwiGLU``."""

    gate_up: Tensor

    def __call__(self, x_TC: Tensor) -> Tensor:
        return silu_mul(torch.nn.functional.linear(x_TC, self.gate_up))
