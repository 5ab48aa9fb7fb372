"""The layout that ``inference-pio quantize`` writes.

For a linear of [out, in]:
    weight        int8 and w8a8: int8 [out, in];
                  int4, w4a8 and nf4: uint8 [out, ceil(in / 2)], two codes a byte, the even column
                  in the low half; int4 codes stand for themselves less 8, nf4 codes for a place
                  in the NF4 table
    weight_scale  float32 (int8, w8a8) or float16 (int4, w4a8, nf4),
                  [out, ceil(in / group_size)]
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from ....kernels.quantized import QuantizedWeight
from .layout import Settings, Shape, Tensors, check_dtype
from .quantize import (
    CODE_FORMATS,
    GROUP_SIZES,
    HEAD_FORMATS,
    INT8_ACTIVATIONS,
    MADE_FORMATS,
    MadeFormat,
)

METHOD = "inference-pio"
_DTYPES: dict[MadeFormat, str] = {
    "int8": "I8",
    "w8a8": "I8",
    "int4": "U8",
    "w4a8": "U8",
    "nf4": "U8",
}


class OwnLayout:
    """``quant_method: inference-pio``."""

    name = METHOD

    def __init__(self, settings: Settings) -> None:
        self.format = cast(MadeFormat, settings.one_of("format", MADE_FORMATS))
        self.head_format = cast(MadeFormat, settings.one_of("head_format", MADE_FORMATS))
        self._group = settings.group_size(whole_row=-1)

    def holds(self, tensors: Tensors, prefix: str) -> bool:
        """See ``Layout.holds``."""
        weight = f"{prefix}.weight"
        packed = weight in tensors and tensors.stored_dtype(weight) in _DTYPES.values()
        return packed or f"{prefix}.weight_scale" in tensors

    def expected(self, tensors: Tensors, prefix: str, shape: Shape) -> dict[str, Shape | None]:
        """See ``Layout.expected``."""
        format, group = self._of(prefix, shape)
        columns = shape[1] if CODE_FORMATS[format] == "int8" else -(-shape[1] // 2)
        return {
            f"{prefix}.weight": (shape[0], columns),
            f"{prefix}.weight_scale": (shape[0], -(-shape[1] // group)),
        }

    def ignored(self, prefix: str) -> frozenset[str]:
        """See ``Layout.ignored``."""
        return frozenset()

    def read(self, tensors: Tensors, prefix: str, shape: Shape) -> QuantizedWeight:
        """See ``Layout.read``."""
        format, group = self._of(prefix, shape)
        check_dtype(tensors, f"{prefix}.weight", (_DTYPES[format],))
        check_dtype(tensors, f"{prefix}.weight_scale", ("F32", "F16"))
        return QuantizedWeight(
            format=CODE_FORMATS[format],
            shape=(shape[0], shape[1]),
            codes=tensors.view(f"{prefix}.weight"),
            scales_OG=tensors.view(f"{prefix}.weight_scale"),
            group_size=group,
            int8_activations=format in INT8_ACTIVATIONS,
        )

    def _of(self, prefix: str, shape: Shape) -> tuple[MadeFormat, int]:
        if prefix == "lm_head" and self.head_format != self.format:
            return self.head_format, GROUP_SIZES[self.head_format] or shape[1]
        return self.format, self._group or shape[1]


def own_settings(format: MadeFormat) -> dict[str, Any]:
    """``quantization_config`` of a checkpoint that is written now."""
    return {
        "quant_method": METHOD,
        "format": format,
        "group_size": GROUP_SIZES[format] or -1,
        "head_format": HEAD_FORMATS[format],
    }


def own_tensors(prefix: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of one linear in this layout."""
    return {f"{prefix}.weight": weight.codes, f"{prefix}.weight_scale": weight.scales_OG}
