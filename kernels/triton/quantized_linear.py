"""Linears that stay quantized in the device's memory; see ``quantized_code`` for the products."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor

from ..api import PackedLinear, PackedSwiGLU
from ..quantized import NF4_VALUES, QuantizedWeight, stacked
from .launch import OPTIONS
from .quantized_code import (
    int8_matmul_kernel,
    matmul_kernel,
    round_rows_kernel,
    vector_kernel,
)
from .rows import silu_mul, with_plain_rows

FEW_ROWS = 4
"""Up to so many rows each takes the whole weight by itself; from there matrix units share it."""


@dataclass(frozen=True, slots=True)
class CodeLinear:
    """A weight as its codes, for activations in a float dtype; see ``is_kept``."""

    weight: QuantizedWeight
    bias: Tensor | None
    table: Tensor = field(init=False)
    """float32 [16], what nf4 codes stand for; of no use to the other formats."""

    def __post_init__(self) -> None:
        table = torch.tensor(NF4_VALUES, device=self.weight.codes.device)
        object.__setattr__(self, "table", table)

    def __call__(self, x_TC: Tensor, residual_TC: Tensor | None = None) -> Tensor:
        return self._product(x_TC, residual_TC, x_TC.dtype)

    def in_float32(self, x_TC: Tensor) -> Tensor:
        """See ``PackedLinear.in_float32``; not rounded before."""
        return self._product(x_TC, None, torch.float32)

    def _product(self, x_TC: Tensor, residual_TC: Tensor | None, dtype: torch.dtype) -> Tensor:
        weight, x_TC = self.weight, with_plain_rows(x_TC)
        outputs, inputs = weight.shape
        num_rows = x_TC.shape[0]
        out_TC = torch.empty(num_rows, outputs, dtype=dtype, device=x_TC.device)
        residual_TC = None if residual_TC is None else with_plain_rows(residual_TC)
        # Where something is absent, its pointer is never followed.
        codes = weight.codes.view(torch.uint8) if weight.format == "fp8" else weight.codes
        operands = (
            x_TC,
            codes,
            weight.scales_OG,
            codes if weight.zeros_OG is None else weight.zeros_OG,
            self.table,
            out_TC if self.bias is None else self.bias,
            out_TC if residual_TC is None else residual_TC,
            out_TC,
        )
        strides = x_TC.stride(0), out_TC.stride(0) if residual_TC is None else residual_TC.stride(0)
        constants = {
            "INPUTS": inputs,
            "OUTPUTS": outputs,
            "GROUP": weight.group_size,
            "NUM_GROUPS": weight.scales_OG.shape[1],
            "FORMAT": weight.format,
            "PAIRS": weight.is_packed,
            "HAS_ZEROS": weight.zeros_OG is not None,
            "ROW_SCALES": _has_row_scales(weight),
            "HAS_BIAS": self.bias is not None,
            "HAS_RESIDUAL": residual_TC is not None,
            **OPTIONS,
        }
        if num_rows <= FEW_ROWS:
            out_tile = 4 if outputs <= 8192 else 8
            vector_kernel[(triton.cdiv(outputs, out_tile), num_rows)](
                *operands,
                *strides,
                **constants,
                OUT_TILE=out_tile,
                CODE_TILE=256,
                num_warps=4,
            )
            return out_TC
        row_tile, out_tile = tiles(num_rows)
        matmul_kernel[(triton.cdiv(num_rows, row_tile), triton.cdiv(outputs, out_tile))](
            *operands,
            num_rows,
            *strides,
            **constants,
            ROW_TILE=row_tile,
            OUT_TILE=out_tile,
            CODE_TILE=32 if weight.is_packed or x_TC.dtype == torch.float32 else 64,
            num_warps=8 if row_tile == 64 else 4,
            num_stages=3,
        )
        return out_TC


@dataclass(frozen=True, slots=True)
class Int8Linear:
    """int8 codes with a scale a row, and activations rounded to int8, each token by its own."""

    weight: QuantizedWeight
    bias: Tensor | None

    def __call__(self, x_TC: Tensor, residual_TC: Tensor | None = None) -> Tensor:
        return self._product(x_TC, residual_TC, x_TC.dtype)

    def in_float32(self, x_TC: Tensor) -> Tensor:
        """See ``PackedLinear.in_float32``."""
        return self._product(x_TC, None, torch.float32)

    def _product(self, x_TC: Tensor, residual_TC: Tensor | None, dtype: torch.dtype) -> Tensor:
        outputs, inputs = self.weight.shape
        num_rows = x_TC.shape[0]
        codes_TC, scales_T = round_rows(x_TC)
        out_TC = torch.empty(num_rows, outputs, dtype=dtype, device=x_TC.device)
        residual_TC = None if residual_TC is None else with_plain_rows(residual_TC)
        row_tile, out_tile = tiles(num_rows)
        int8_matmul_kernel[(triton.cdiv(num_rows, row_tile), triton.cdiv(outputs, out_tile))](
            codes_TC,
            scales_T,
            self.weight.codes,
            self.weight.scales_OG,
            out_TC if self.bias is None else self.bias,
            out_TC if residual_TC is None else residual_TC,
            out_TC,
            num_rows,
            out_TC.stride(0) if residual_TC is None else residual_TC.stride(0),
            INPUTS=inputs,
            OUTPUTS=outputs,
            HAS_BIAS=self.bias is not None,
            HAS_RESIDUAL=residual_TC is not None,
            ROW_TILE=row_tile,
            OUT_TILE=out_tile,
            IN_TILE=64,
            num_warps=8 if row_tile == 64 else 4,
            num_stages=3,
            **OPTIONS,
        )
        return out_TC


@dataclass(frozen=True, slots=True)
class QuantizedSwiGLU:
    """Gate and up as one product where they are quantized alike, else as two."""

    linears: tuple[PackedLinear, ...]

    def __call__(self, x_TC: Tensor) -> Tensor:
        parts = [linear(x_TC) for linear in self.linears]
        return silu_mul(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))


def pack(weight: QuantizedWeight, bias: Tensor | None) -> PackedLinear | None:
    """The linear that computes with the weight's codes; ``None`` where there is no kernel."""
    if not is_kept(weight):
        return None
    if weight.int8_activations and weight.format == "int8" and _has_row_scales(weight):
        return Int8Linear(weight, bias)
    return CodeLinear(weight, bias)


def pack_swiglu(gate: QuantizedWeight, up: QuantizedWeight) -> PackedSwiGLU | None:
    """Gate and up as ``pack`` keeps them."""
    joined = stacked((gate, up)) if gate.int8_activations == up.int8_activations else None
    linears = [pack(weight, None) for weight in ((gate, up) if joined is None else (joined,))]
    if any(linear is None for linear in linears):
        return None
    return QuantizedSwiGLU(tuple(linear for linear in linears if linear is not None))


def is_kept(weight: QuantizedWeight) -> bool:
    """Whether the kernels read the weight's codes: groups are runs of neighbouring columns, and
    codes that share a byte share a group."""
    one_group = weight.group_size >= weight.shape[1]
    even = weight.group_size % 2 == 0 or one_group or not weight.is_packed
    return weight.column_groups_I is None and even


def round_rows(x_TC: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [T, C] and float32 scales [T] with ``x`` near their product."""
    x_TC = with_plain_rows(x_TC)
    num_rows, width = x_TC.shape
    codes_TC = torch.empty(num_rows, width, dtype=torch.int8, device=x_TC.device)
    scales_T = torch.empty(num_rows, dtype=torch.float32, device=x_TC.device)
    round_rows_kernel[(num_rows,)](
        x_TC,
        codes_TC,
        scales_T,
        x_TC.stride(0),
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        num_warps=4,
        **OPTIONS,
    )
    return codes_TC, scales_T


def tiles(num_rows: int) -> tuple[int, int]:
    """Rows and outputs of a program: narrow for few rows, so that there are many programs."""
    if num_rows <= 16:
        return 16, 32
    return (32, 64) if num_rows <= 32 else (64, 128)


def _has_row_scales(weight: QuantizedWeight) -> bool:
    one_group = weight.scales_OG.shape[1] == 1 and weight.zeros_OG is None
    return one_group and weight.format in ("int8", "fp8")
