"""A quantized weight of one linear layer: what every file format is read into.

Letters of shapes: O output features, I input features, G groups of a row. Each row of the weight is
cut into groups of ``group_size`` columns (the last one may be shorter); a group has one scale:

    weight[o, i] = value(code[o, i]) * scale[o, group(i)]

``value`` is ``code - zero`` for int8 and int4, a place in a table for nf4, the number itself for
fp8. Published layouts differ in how they pack codes and where scales lie, not in this formula, so
kernels know four kinds of codes and no file format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

CodeFormat = Literal["int8", "int4", "nf4", "fp8"]

CODE_DTYPES: dict[CodeFormat, torch.dtype] = {
    "int8": torch.int8,
    "int4": torch.uint8,
    "nf4": torch.uint8,
    "fp8": torch.float8_e4m3fn,
}
"""What codes are stored as; int4 and nf4 have two in a byte, the even column in the low half."""

IMPLIED_ZERO: dict[CodeFormat, int] = {"int8": 0, "int4": 8}
"""The zero point of a symmetric weight: int4 codes are unsigned."""

# Quantiles of the normal distribution, scaled to [-1, 1] with an exact zero: the table of QLoRA
# (https://arxiv.org/abs/2305.14314, appendix E).
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight of ``shape`` [out, in]; ``dequantize`` defines what it means.

    Raises ``ValueError`` for tensors that do not fit each other.
    """

    format: CodeFormat
    shape: tuple[int, int]
    codes: Tensor
    """[O, I], or [O, ceil(I / 2)] bytes where two codes share one; dtype as ``CODE_DTYPES``."""
    scales_OG: Tensor
    """float32, float16 or bfloat16."""
    group_size: int
    """Columns of a group; at least I: one scale a row."""
    zeros_OG: Tensor | None = None
    """int8, for int8 and int4 only; ``None``: ``IMPLIED_ZERO``."""
    column_groups_I: Tensor | None = None
    """int32: the group of each column where groups are not runs of ``group_size`` columns (GPTQ
    with ``desc_act``, or a slice that does not start with a group)."""
    int8_activations: bool = False
    """Whether kernels may round the activations to int8 as well, each token by its own scale."""

    def __post_init__(self) -> None:
        rows, columns = self.shape
        stored = (rows, (columns + 1) // 2 if self.is_packed else columns)
        dtype = CODE_DTYPES[self.format]
        if self.codes.dtype != dtype or tuple(self.codes.shape) != stored:
            raise ValueError(
                f"codes of an {self.format} weight {list(self.shape)} are {dtype} {list(stored)}, "
                f"got {self.codes.dtype} {list(self.codes.shape)}"
            )
        if self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size}; it is at least 1")
        grid = tuple(self.scales_OG.shape)
        if self.column_groups_I is None:
            expected = (rows, -(-columns // self.group_size))
            if grid != expected:
                raise ValueError(
                    f"scales of a weight {list(self.shape)} in groups of {self.group_size} are "
                    f"{list(expected)}, got {list(grid)}"
                )
        elif self.column_groups_I.shape != (columns,):
            raise ValueError(
                f"column_groups are [{columns}], got {list(self.column_groups_I.shape)}"
            )
        if self.zeros_OG is not None:
            if self.format not in IMPLIED_ZERO:
                raise ValueError(f"{self.format} codes have no zero points")
            if tuple(self.zeros_OG.shape) != grid:
                raise ValueError(
                    f"zero points are {list(grid)} as the scales, got {list(self.zeros_OG.shape)}"
                )

    @property
    def is_packed(self) -> bool:
        """Whether two codes share a byte."""
        return self.format in ("int4", "nf4")

    @property
    def num_bytes(self) -> int:
        """Memory of all its tensors."""
        parts = (self.codes, self.scales_OG, self.zeros_OG, self.column_groups_I)
        return sum(part.nbytes for part in parts if part is not None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight, [out, in]: computed in float32, rounded once to ``dtype``."""
        values_OI = self._values()
        groups_I = self._groups()
        if self.format in IMPLIED_ZERO:
            if self.zeros_OG is None:
                values_OI -= IMPLIED_ZERO[self.format]
            else:
                values_OI -= self.zeros_OG.float()[:, groups_I]
        values_OI *= self.scales_OG.float()[:, groups_I]
        return values_OI.to(dtype)

    def code_values(self) -> Tensor:
        """One code an element, [out, in]: int8, fp8, or uint8 from 0 to 15."""
        return unpack_pairs(self.codes, self.shape[1]) if self.is_packed else self.codes

    def rows(self, span: range) -> QuantizedWeight:
        """The same weight with some of its output features; views of the same memory."""
        part = slice(span.start, span.stop)
        return replace(
            self,
            shape=(len(span), self.shape[1]),
            codes=self.codes[part],
            scales_OG=self.scales_OG[part],
            zeros_OG=None if self.zeros_OG is None else self.zeros_OG[part],
        )

    def columns(self, span: range) -> QuantizedWeight:
        """The same weight with some of its input features.

        A span of whole groups takes their scales alone; any other keeps the scales that it needs
        and says which column has which.
        """
        if span == range(self.shape[1]):
            return self
        codes = self.code_values()[:, span.start : span.stop]
        aligned = self.column_groups_I is None and span.start % self.group_size == 0
        if aligned:
            first, last = span.start // self.group_size, -(-span.stop // self.group_size)
            column_groups = None
        else:
            groups_I = self._groups()[span.start : span.stop]
            first, last = int(groups_I.min()), int(groups_I.max()) + 1
            column_groups = (groups_I - first).to(torch.int32)
        return replace(
            self,
            shape=(self.shape[0], len(span)),
            codes=(pack_pairs(codes) if self.is_packed else codes).contiguous(),
            scales_OG=self.scales_OG[:, first:last].contiguous(),
            zeros_OG=None if self.zeros_OG is None else self.zeros_OG[:, first:last].contiguous(),
            column_groups_I=column_groups,
        )

    def copied_to(self, device: torch.device) -> QuantizedWeight:
        """The same on ``device``, in memory of its own."""

        def copied(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.to(device, copy=True).contiguous()

        return replace(
            self,
            codes=self.codes.to(device, copy=True).contiguous(),
            scales_OG=self.scales_OG.to(device, copy=True).contiguous(),
            zeros_OG=copied(self.zeros_OG),
            column_groups_I=copied(self.column_groups_I),
        )

    def _values(self) -> Tensor:
        """Codes as numbers, in memory of their own, before zero points."""
        codes = self.code_values()
        if self.format == "nf4":
            table = torch.tensor(NF4_VALUES, device=codes.device)
            return table[codes.int()]
        return codes.to(torch.float32, copy=True)

    def _groups(self) -> Tensor:
        """The group of each column, [I]."""
        if self.column_groups_I is not None:
            return self.column_groups_I.long()
        return torch.arange(self.shape[1], device=self.codes.device) // self.group_size


def stacked(weights: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """One weight with the rows of all; ``None`` where they are not quantized alike."""
    first = weights[0]
    alike = all(
        weight.format == first.format
        and weight.shape[1] == first.shape[1]
        and weight.group_size == first.group_size
        and weight.scales_OG.dtype == first.scales_OG.dtype
        and _equal(weight.column_groups_I, first.column_groups_I)
        for weight in weights
    )
    if not alike:
        return None
    zeros = None
    if any(weight.zeros_OG is not None for weight in weights):
        zeros = torch.cat([_zeros(weight) for weight in weights])
    return replace(
        first,
        shape=(sum(weight.shape[0] for weight in weights), first.shape[1]),
        codes=torch.cat([weight.codes.view(torch.uint8) for weight in weights]).view(
            first.codes.dtype
        ),
        scales_OG=torch.cat([weight.scales_OG for weight in weights]),
        zeros_OG=zeros,
    )


def pack_pairs(codes: Tensor) -> Tensor:
    """Codes from 0 to 15, uint8 [O, I], two in a byte; an odd last column gets a partner of 0."""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_pairs(pairs: Tensor, columns: int) -> Tensor:
    """The inverse of ``pack_pairs``, uint8 [O, columns]."""
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)[:, :columns]


def _zeros(weight: QuantizedWeight) -> Tensor:
    if weight.zeros_OG is not None:
        return weight.zeros_OG
    implied = IMPLIED_ZERO[weight.format]
    return torch.full_like(weight.scales_OG, implied, dtype=torch.int8)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
