"""Packed linears whose weights keep their codes: int8, int4 and nf4.

Codes are brought to the activations' dtype in the cache, a piece at a time; with AVX2 alone to
float32. In groups that gives exactly ``QuantizedWeight.dequantize`` of that dtype; int8 with one
scale a row multiplies the sums of codes by it instead, and so is not rounded to the activations'
dtype before. With int8 activations codes are multiplied as they are.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from ..quantized import IMPLIED_ZERO, NF4_VALUES, QuantizedWeight
from .library import Library, check
from .linear import AnyLinear, AnySwiGLU


class _View(ctypes.Structure):
    """``QuantizedView`` of linear.h."""

    _fields_ = (
        ("rows", c_int64),
        ("cols", c_int64),
        ("codes", c_void_p),
        ("row_bytes", c_int64),
        ("table", c_void_p),
        ("scales", c_void_p),
        ("zeros", c_void_p),
        ("group_inputs", c_int64),
        ("has_half_scales", c_int32),
        ("has_int8_activations", c_int32),
    )


class _Operand:
    """A weight's tensors as the library reads them, and the struct that points to them."""

    def __init__(self, weight: QuantizedWeight) -> None:
        scales_OG = weight.scales_OG
        # A row's only int8 scale multiplies float32 sums, outside of the panels.
        is_half = scales_OG.dtype == torch.float16 and not _has_row_scales(weight)
        self._codes = weight.codes.contiguous()
        self._scales_OG = (scales_OG if is_half else scales_OG.float()).contiguous()
        self._zeros_OG = None if weight.zeros_OG is None else weight.zeros_OG.contiguous()
        self._table = _table(weight)
        self.view = _View(
            rows=weight.shape[0],
            cols=weight.shape[1],
            codes=self._codes.data_ptr(),
            row_bytes=self._codes.shape[1],
            table=None if self._table is None else self._table.data_ptr(),
            scales=self._scales_OG.data_ptr(),
            zeros=None if self._zeros_OG is None else self._zeros_OG.data_ptr(),
            group_inputs=weight.group_size,
            has_half_scales=is_half,
            has_int8_activations=weight.int8_activations,
        )


class QuantizedLinear(AnyLinear):
    """A linear of one quantized weight for activations of ``dtype``; see ``is_kept``."""

    def __init__(
        self,
        library: Library,
        team: int,
        weight: QuantizedWeight,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(library, team, weight.shape, dtype)
        bias = self._float32_bias(bias)
        operand, handle = _Operand(weight), c_void_p()
        address = None if bias is None else bias.data_ptr()
        pack = self._cdll.pio_linear_pack_quantized
        check(pack(team, self._dtype, byref(operand.view), address, byref(handle)))
        self._keep(handle)


class QuantizedSwiGLU(AnySwiGLU):
    """Gate and up, quantized alike, for activations of ``dtype``; see ``are_alike``."""

    def __init__(
        self,
        library: Library,
        team: int,
        gate: QuantizedWeight,
        up: QuantizedWeight,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(library, team, gate.shape, dtype)
        operands, handle = (_Operand(gate), _Operand(up)), c_void_p()
        views = (byref(operand.view) for operand in operands)
        pack = self._cdll.pio_linear_pack_quantized_swiglu
        check(pack(team, self._dtype, *views, byref(handle)))
        self._keep(handle)


def is_kept(weight: QuantizedWeight) -> bool:
    """Whether the library computes with the weight's codes: int8, int4 or nf4 in groups of an even
    number of neighbouring columns; with int8 activations, int8 with one scale a row and int4 with
    float16 scales of a multiple of 32 columns or of a row."""
    if weight.int8_activations:
        return _has_row_scales(weight) or _has_whole_groups(weight)
    in_runs = weight.column_groups_I is None
    even = weight.group_size % 2 == 0 or weight.group_size >= weight.shape[1]
    return weight.format != "fp8" and in_runs and even


def are_alike(gate: QuantizedWeight, up: QuantizedWeight) -> bool:
    """Whether the two, each of which ``is_kept``, can be interleaved."""
    return (
        gate.format == up.format
        and gate.int8_activations == up.int8_activations
        and gate.shape == up.shape
        and gate.group_size == up.group_size
        and gate.scales_OG.dtype == up.scales_OG.dtype
        and (gate.zeros_OG is None) == (up.zeros_OG is None)
        and up.column_groups_I is None
    )


def _has_row_scales(weight: QuantizedWeight) -> bool:
    return weight.format == "int8" and weight.zeros_OG is None and weight.scales_OG.shape[1] == 1


def _has_whole_groups(weight: QuantizedWeight) -> bool:
    in_runs = weight.column_groups_I is None and weight.zeros_OG is None
    whole = weight.group_size % 32 == 0 or weight.group_size >= weight.shape[1]
    return weight.format == "int4" and weight.scales_OG.dtype == torch.float16 and in_runs and whole


def _table(weight: QuantizedWeight) -> Tensor | None:
    """What the sixteen codes stand for, before zero points; ``None`` for int8."""
    if weight.format == "int8":
        return None
    if weight.format == "nf4":
        return torch.tensor(NF4_VALUES)
    implied = IMPLIED_ZERO[weight.format] if weight.zeros_OG is None else 0
    return torch.arange(16, dtype=torch.float32) - implied
