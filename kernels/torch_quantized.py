"""Linears that stay quantized in memory, with torch's own CPU kernels.

A few rows take torch's weight-only kernels, which read the codes as they are and are faster than
bfloat16 there. Those are slow at many rows: then the weight is brought to the activations' dtype a
block of output features at a time, so that only a block of it ever exists, and multiplied as usual.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .api import PackedLinear, PackedSwiGLU
from .quantized import IMPLIED_ZERO, QuantizedWeight

# Operators without Python stubs: typed here, once.
_int8_mm: Callable[..., Tensor] = torch.ops.aten._weight_int8pack_mm.default
_int4_mm: Callable[..., Tensor] = torch.ops.aten._weight_int4pack_mm_for_cpu.default
_int4_pack: Callable[..., Tensor] = torch.ops.aten._convert_weight_to_int4pack_for_cpu.default

# Measured at [3072, 1024]: up to so many rows the weight-only kernels are ahead of the blocks.
FEW_ROWS_INT8 = 16
FEW_ROWS_INT4 = 32
# Output features of a block: its weight stays in the cache until it is multiplied.
BLOCK = 512
INT4_GROUPS = (32, 64, 128, 256)


class _Rounding(ABC):
    """A linear whose product comes rounded to the dtype of ``x``."""

    __slots__ = ()

    @abstractmethod
    def __call__(self, x_TC: Tensor, residual_TC: Tensor | None = None) -> Tensor:
        """See ``PackedLinear``."""

    def in_float32(self, x_TC: Tensor) -> Tensor:
        """See ``PackedLinear.in_float32``: rounded to ``x``'s dtype before."""
        return self(x_TC).float()


@dataclass(frozen=True, slots=True)
class Int8Linear(_Rounding):
    """int8 codes with one scale a row."""

    codes_OI: Tensor
    scales_O: Tensor
    """float32: products are scaled before they are rounded again."""
    bias: Tensor | None

    def __call__(self, x_TC: Tensor, residual_TC: Tensor | None = None) -> Tensor:
        if len(x_TC) <= FEW_ROWS_INT8 and x_TC.dtype == torch.bfloat16:
            ones = torch.ones(len(self.scales_O), dtype=x_TC.dtype)
            out = _int8_mm(x_TC.contiguous(), self.codes_OI, ones)
        else:
            out = x_TC.new_empty(len(x_TC), len(self.codes_OI))
            for start in range(0, len(self.codes_OI), BLOCK):
                weight = self.codes_OI[start : start + BLOCK].to(x_TC.dtype)
                out[:, start : start + BLOCK] = torch.nn.functional.linear(x_TC, weight)
        return _finished((out * self.scales_O).to(x_TC.dtype), self.bias, residual_TC)


@dataclass(frozen=True, slots=True)
class W8A8Linear(_Rounding):
    """int8 codes and activations rounded to int8, each token by its own scale; exact sums."""

    codes_OI: Tensor
    scales_O: Tensor
    """float32."""
    bias: Tensor | None

    def __call__(self, x_TC: Tensor, residual_TC: Tensor | None = None) -> Tensor:
        codes_TC, scales_T1 = round_activations(x_TC)
        sums_TO: Tensor = torch._int_mm(codes_TC, self.codes_OI.T)
        out_TO = sums_TO.float().mul_(scales_T1).mul_(self.scales_O)
        return _finished(out_TO.to(x_TC.dtype), self.bias, residual_TC)


@dataclass(frozen=True, slots=True)
class W4A8Linear(_Rounding):
    """4-bit codes in groups and activations rounded to int8, each token by its own scale."""

    weight: QuantizedWeight
    bias: Tensor | None

    def __call__(self, x_TC: Tensor, residual_TC: Tensor | None = None) -> Tensor:
        codes_TC, scales_T1 = round_activations(x_TC)
        values_TC, outputs = codes_TC.float(), self.weight.shape[0]
        out_TO = values_TC.new_empty(len(x_TC), outputs)
        for start in range(0, outputs, BLOCK):
            span = range(start, min(start + BLOCK, outputs))
            part = self.weight.rows(span).dequantize()
            out_TO[:, span.start : span.stop] = torch.nn.functional.linear(values_TC, part)
        return _finished(out_TO.mul_(scales_T1).to(x_TC.dtype), self.bias, residual_TC)


@dataclass(frozen=True, slots=True)
class Int4Linear(_Rounding):
    """4-bit codes in panels, as torch's kernel reads them, with a scale and a shift a group."""

    packed: Tensor
    scales_shifts_GO2: Tensor
    """In the activations' dtype: ``weight = (code - 8) * scale + shift``."""
    group_size: int
    bias: Tensor | None

    def __call__(self, x_TC: Tensor, residual_TC: Tensor | None = None) -> Tensor:
        if len(x_TC) <= FEW_ROWS_INT4:
            out = _int4_mm(x_TC.contiguous(), self.packed, self.group_size, self.scales_shifts_GO2)
        else:
            out = x_TC.new_empty(len(x_TC), self.scales_shifts_GO2.shape[1])
            for start in range(0, out.shape[1], BLOCK):
                rows = slice(start, start + BLOCK)
                out[:, rows] = torch.mm(x_TC, self._transposed(rows))
        return _finished(out, self.bias, residual_TC)

    def _transposed(self, rows: slice) -> Tensor:
        """Some rows of the weight, [in, rows], in the scales' dtype."""
        inputs, half = self.packed.shape[1] * 2, panel_width() // 2
        packed_IPW = self.packed[rows].view(-1, inputs, half).transpose(0, 1)
        shape = (inputs, packed_IPW.shape[1], 2 * half)
        weight = self.scales_shifts_GO2.new_empty(shape)
        weight[..., :half] = packed_IPW & 15
        weight[..., half:] = packed_IPW >> 4
        scales_GO, shifts_GO = self.scales_shifts_GO2[:, rows].unbind(-1)
        weight_GSO = weight.sub_(8).view(len(scales_GO), self.group_size, -1)
        return weight_GSO.mul_(scales_GO[:, None]).add_(shifts_GO[:, None]).flatten(0, 1)


@dataclass(frozen=True, slots=True)
class SwiGLU:
    """Two linears and the product."""

    gate: PackedLinear
    up: PackedLinear

    def __call__(self, x_TC: Tensor) -> Tensor:
        return torch.nn.functional.silu(self.gate(x_TC), inplace=True).mul_(self.up(x_TC))


def pack_swiglu(
    gate: QuantizedWeight, up: QuantizedWeight, dtype: torch.dtype
) -> PackedSwiGLU | None:
    """Gate and up as ``pack`` keeps them."""
    packed_gate, packed_up = pack(gate, None, dtype), pack(up, None, dtype)
    if packed_gate is None or packed_up is None:
        return None
    return SwiGLU(packed_gate, packed_up)


def pack(weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> PackedLinear | None:
    """The linear that keeps ``weight`` as it is; ``None`` where torch has no kernel for it."""
    bias = None if bias is None else bias.clone()
    if weight.column_groups_I is not None:
        return None
    if weight.format == "int8" and weight.zeros_OG is None and weight.scales_OG.shape[1] == 1:
        if dtype not in (torch.bfloat16, torch.float32):
            return None  # sums of codes overflow float16
        linear = W8A8Linear if weight.int8_activations else Int8Linear
        return linear(weight.codes, weight.scales_OG.float().view(-1), bias)
    if weight.format == "int4" and weight.int8_activations:
        return W4A8Linear(weight, bias)
    rows, columns = weight.shape
    in_panels = weight.format == "int4" and panel_width() > 0 and rows % panel_width() == 0
    if in_panels and weight.group_size in INT4_GROUPS and columns % weight.group_size == 0:
        # float32 is for parity: it takes the weight as it is defined.
        return None if dtype == torch.float32 else _pack_int4(weight, bias, dtype)
    return None


def round_activations(x_TC: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [T, C] and float32 scales [T, 1] with ``x`` near their product."""
    wide_TC = x_TC.float()
    # A token of zeros keeps a scale that can be divided by.
    scales_T1 = wide_TC.abs().amax(1, keepdim=True).clamp_(min=1e-30).div_(127)
    return (wide_TC / scales_T1).round_().to(torch.int8), scales_T1


@functools.cache
def panel_width() -> int:
    """Output features of a panel in torch's int4 layout on this CPU; 0 for one not known here.

    A byte of a panel holds the codes of one input for the features d and d + width / 2.
    """
    # 64 is the width with AVX-512, 32 with AVX2; any other layout gives other bytes.
    for width in (64, 32):
        codes = torch.arange(width * 64, dtype=torch.int32).view(width, 64) * 7 // 3 % 16
        low, high = codes.T.to(torch.uint8).chunk(2, dim=1)
        if torch.equal(_int4_pack(codes, 1).view(64, width // 2), low | (high << 4)):
            return width
    return 0


def _pack_int4(weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> Int4Linear:
    scales_OG = weight.scales_OG.float()
    implied = IMPLIED_ZERO["int4"]
    shifts_OG = torch.zeros_like(scales_OG)
    if weight.zeros_OG is not None:
        shifts_OG = (implied - weight.zeros_OG.float()) * scales_OG
    joined = torch.stack((scales_OG.T, shifts_OG.T), dim=-1).to(dtype)
    parts = []
    for start in range(0, weight.shape[0], BLOCK):  # torch's packing takes a code an int32
        part = weight.rows(range(start, min(start + BLOCK, weight.shape[0])))
        parts.append(_int4_pack(part.code_values().int(), 1))
    packed = torch.cat(parts)
    return Int4Linear(packed, joined.contiguous(), weight.group_size, bias)


def _finished(out_TC: Tensor, bias: Tensor | None, residual_TC: Tensor | None) -> Tensor:
    if bias is not None:
        out_TC.add_(bias)
    return out_TC if residual_TC is None else out_TC.add_(residual_TC)
