"""AWQ checkpoints in AutoAWQ's GEMM layout, 4 bits.

For a linear of [out, in]:
    qweight  int32 [in, out / 8]        a word's codes are neighbours along the outputs
    qzeros   int32 [groups, out / 8]
    scales   float [groups, out]
The codes of a word are interleaved: its k-th four bits belong to output ``_ORDER[k]`` of its eight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....kernels.quantized import IMPLIED_ZERO, QuantizedWeight, pack_pairs
from .layout import Settings, Shape, Tensors, check_dtype, check_groups, check_packed
from .words import unpack_columns

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PER_WORD = 8


class AWQLayout:
    """``quant_method: awq``, ``version: gemm``."""

    name = "awq"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        settings.one_of("bits", (4,))
        version = settings.raw.get("version", "gemm")
        if str(version).lower() != "gemm":
            raise settings.error("version", "only the 'gemm' layout is read")
        self._group = settings.group_size(whole_row=-1)

    def holds(self, tensors: Tensors, prefix: str) -> bool:
        """See ``Layout.holds``."""
        return f"{prefix}.weight" not in tensors or f"{prefix}.qweight" in tensors

    def expected(self, tensors: Tensors, prefix: str, shape: Shape) -> dict[str, Shape | None]:
        """See ``Layout.expected``."""
        rows, columns = shape
        group = self._group or columns
        check_packed(self._settings, prefix, "output features", rows, _PER_WORD)
        check_groups(self._settings, prefix, columns, group)
        return {
            f"{prefix}.qweight": (columns, rows // _PER_WORD),
            f"{prefix}.qzeros": (columns // group, rows // _PER_WORD),
            f"{prefix}.scales": (columns // group, rows),
        }

    def ignored(self, prefix: str) -> frozenset[str]:
        """See ``Layout.ignored``."""
        return frozenset()

    def read(self, tensors: Tensors, prefix: str, shape: Shape) -> QuantizedWeight:
        """See ``Layout.read``."""
        for part in ("qweight", "qzeros"):
            check_dtype(tensors, f"{prefix}.{part}", ("I32",))
        check_dtype(tensors, f"{prefix}.scales", ("F16", "BF16", "F32"))
        codes_IO = _in_order(unpack_columns(tensors.view(f"{prefix}.qweight"), 4))
        zeros_GO = _in_order(unpack_columns(tensors.view(f"{prefix}.qzeros"), 4))
        zeros_OG = zeros_GO.T.contiguous().view(torch.int8)
        symmetric = bool((zeros_OG == IMPLIED_ZERO["int4"]).all())
        return QuantizedWeight(
            format="int4",
            shape=(shape[0], shape[1]),
            codes=pack_pairs(codes_IO.T.contiguous()),
            scales_OG=tensors.view(f"{prefix}.scales").T.contiguous(),
            group_size=self._group or shape[1],
            zeros_OG=None if symmetric else zeros_OG,
        )


def _in_order(codes: Tensor) -> Tensor:
    """The codes of every eight outputs in the outputs' order."""
    places = [_ORDER.index(output) for output in range(_PER_WORD)]
    return codes.view(len(codes), -1, _PER_WORD)[:, :, places].flatten(1)
