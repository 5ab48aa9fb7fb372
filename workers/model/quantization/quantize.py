"""Rounding a weight to few bits: how int8, int4 and nf4 are made on load and for files.

``w8a8`` is int8 and ``w4a8`` int4 whose activations may be rounded to int8 too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ....kernels.quantized import NF4_VALUES, CodeFormat, QuantizedWeight, pack_pairs

MadeFormat = Literal["int8", "w8a8", "int4", "w4a8", "nf4"]
MADE_FORMATS: tuple[MadeFormat, ...] = get_args(MadeFormat)

HEAD_FORMATS: dict[MadeFormat, MadeFormat] = {
    "int8": "int8",
    "w8a8": "int8",
    "int4": "int8",
    "w4a8": "w8a8",
    "nf4": "int8",
}
"""The output layer's, by that of the layers: 4 bits there cost accuracy, 16 cost speed."""

# One scale a row keeps int8 matrix units busy and loses next to nothing; int4 needs
# small groups; 64 is what nf4 is published with.
GROUP_SIZES: dict[MadeFormat, int | None] = {
    "int8": None,
    "w8a8": None,
    "int4": 32,
    "w4a8": 32,
    "nf4": 64,
}
"""Columns of a group; ``None``: a whole row."""
CODE_FORMATS: dict[MadeFormat, CodeFormat] = {
    "int8": "int8",
    "w8a8": "int8",
    "int4": "int4",
    "w4a8": "int4",
    "nf4": "nf4",
}
INT8_ACTIVATIONS: frozenset[MadeFormat] = frozenset(("w8a8", "w4a8"))
"""Formats whose activations may be rounded to int8."""

# Rows that are rounded at once: bounds the float32 copies.
_ROWS = 4096
# Shares of the largest value that a 4-bit range may end at; the best one for each group is taken.
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)


@dataclass(frozen=True, slots=True)
class _Rounded:
    codes: Tensor
    scales_OG: Tensor


def quantize(weight: Tensor, format: MadeFormat) -> QuantizedWeight:
    """Round a weight [out, in]; every row is rounded on its own, so rows may be cut before.

    Raises ``ValueError`` for values that are not finite or too large for a float16 scale.
    """
    group = GROUP_SIZES[format] or weight.shape[1]
    codes = CODE_FORMATS[format]
    parts = [_round(rows.float(), codes, group) for rows in _row_blocks(weight)]
    return QuantizedWeight(
        format=codes,
        shape=(weight.shape[0], weight.shape[1]),
        codes=torch.cat([part.codes for part in parts]),
        scales_OG=torch.cat([part.scales_OG for part in parts]),
        group_size=group,
        int8_activations=format in INT8_ACTIVATIONS,
    )


def _row_blocks(weight: Tensor) -> Iterator[Tensor]:
    for start in range(0, weight.shape[0], _ROWS):
        yield weight[start : start + _ROWS]


def _round(weight_OI: Tensor, format: CodeFormat, group: int) -> _Rounded:
    if not bool(torch.isfinite(weight_OI).all()):
        raise ValueError("it has values that are not finite")
    largest = float(weight_OI.abs().max())
    if format != "int8" and largest > torch.finfo(torch.float16).max:
        raise ValueError(f"its largest value is {largest:.3g}: beyond a float16 scale")
    columns = weight_OI.shape[1]
    # The last group may be short: zeros beside it change no maximum and no error.
    padded = torch.nn.functional.pad(weight_OI, (0, -columns % group))
    groups_OGS = padded.view(len(padded), -1, group)
    if format == "int8":
        codes_OGS, scales_OG = _int8(groups_OGS)
    elif format == "int4":
        codes_OGS, scales_OG = _int4(groups_OGS)
    else:
        codes_OGS, scales_OG = _nf4(groups_OGS)
    codes = codes_OGS.flatten(1)[:, :columns]
    return _Rounded(codes.contiguous() if format == "int8" else pack_pairs(codes), scales_OG)


def _int8(groups_OGS: Tensor) -> tuple[Tensor, Tensor]:
    scales_OG = groups_OGS.abs().amax(-1) / 127
    codes = _divided(groups_OGS, scales_OG).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scales_OG


def _int4(groups_OGS: Tensor) -> tuple[Tensor, Tensor]:
    """The side with the largest value gets the code -8, by the sign of the scale."""
    places = groups_OGS.abs().argmax(-1, keepdim=True)
    extremes_OG = groups_OGS.gather(-1, places).squeeze(-1)
    best_codes = torch.zeros_like(groups_OGS)
    best_scales = torch.zeros_like(extremes_OG, dtype=torch.float16)
    best_errors = torch.full_like(extremes_OG, float("inf"))
    for clip in _CLIPS:
        scales_OG = (extremes_OG * (clip / -8)).to(torch.float16)
        codes = _divided(groups_OGS, scales_OG.float()).round_().clamp_(-8, 7)
        errors = (codes * scales_OG.float()[..., None] - groups_OGS).square_().sum(-1)
        better = errors < best_errors
        best_errors = torch.where(better, errors, best_errors)
        best_scales = torch.where(better, scales_OG, best_scales)
        best_codes = torch.where(better[..., None], codes, best_codes)
    return best_codes.add_(8).to(torch.uint8), best_scales


def _nf4(groups_OGS: Tensor) -> tuple[Tensor, Tensor]:
    scales_OG = groups_OGS.abs().amax(-1).to(torch.float16)
    table = torch.tensor(NF4_VALUES, device=groups_OGS.device)
    between = (table[1:] + table[:-1]) / 2
    codes = torch.bucketize(_divided(groups_OGS, scales_OG.float()), between, out_int32=True)
    return codes.to(torch.uint8), scales_OG


def _divided(groups_OGS: Tensor, scales_OG: Tensor) -> Tensor:
    """Zero where the scale is zero: a group of zeros, or one below float16's smallest."""
    inverse = torch.where(scales_OG == 0, 0.0, 1 / scales_OG)
    return groups_OGS * inverse[..., None]
