"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them.

For a linear of [out, in], with n = 32 / bits codes in a word:
    qweight  int32 [in / n, out]          a word's codes are neighbours along the inputs
    qzeros   int32 [groups, out / n]      zero points; the first format stores them less one
    scales   float [groups, out]
    g_idx    int32 [in]                   the group of each input; in order unless ``desc_act``
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....kernels.quantized import IMPLIED_ZERO, QuantizedWeight, pack_pairs
from ..config import CheckpointError
from .layout import Settings, Shape, Tensors, check_dtype, check_packed
from .words import unpack_columns, unpack_rows

_V1, _V2 = "gptq", "gptq_v2"


class GPTQLayout:
    """``quant_method: gptq`` with 4 or 8 bits."""

    name = "gptq"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._bits = int(settings.one_of("bits", (4, 8)))
        self._group = settings.group_size(whole_row=-1)
        self._reorders = bool(settings.one_of("desc_act", (False, True), False))
        self._format = settings.one_of("checkpoint_format", (_V1, _V2), _V1)
        dynamic = settings.raw.get("dynamic") or {}
        if not isinstance(dynamic, dict) or any(not str(key).startswith("-") for key in dynamic):
            raise settings.error("dynamic", "rules that give modules other widths are not read")

    def holds(self, tensors: Tensors, prefix: str) -> bool:
        """See ``Layout.holds``."""
        return f"{prefix}.weight" not in tensors or f"{prefix}.qweight" in tensors

    def expected(self, tensors: Tensors, prefix: str, shape: Shape) -> dict[str, Shape | None]:
        """See ``Layout.expected``."""
        rows, columns = shape
        per_word = 32 // self._bits
        check_packed(self._settings, prefix, "input features", columns, per_word)
        check_packed(self._settings, prefix, "output features", rows, per_word)
        groups = -(-columns // (self._group or columns))
        found: dict[str, Shape | None] = {
            f"{prefix}.qweight": (columns // per_word, rows),
            f"{prefix}.qzeros": (groups, rows // per_word),
            f"{prefix}.scales": (groups, rows),
        }
        if self._reorders or f"{prefix}.g_idx" in tensors:
            found[f"{prefix}.g_idx"] = (columns,)
        return found

    def ignored(self, prefix: str) -> frozenset[str]:
        """Older writers give every linear a bias of zeros."""
        return frozenset({f"{prefix}.bias"})

    def read(self, tensors: Tensors, prefix: str, shape: Shape) -> QuantizedWeight:
        """See ``Layout.read``."""
        for part in ("qweight", "qzeros"):
            check_dtype(tensors, f"{prefix}.{part}", ("I32",))
        check_dtype(tensors, f"{prefix}.scales", ("F16", "BF16", "F32"))
        group = self._group or shape[1]
        codes = unpack_rows(tensors.view(f"{prefix}.qweight"), self._bits).T.contiguous()
        zeros_OG = self._zeros(tensors.view(f"{prefix}.qzeros")).T.contiguous()
        if self._bits == 8:  # to signed codes around a signed zero point
            codes, zeros_OG = (codes ^ 128).view(torch.int8), (zeros_OG ^ 128).view(torch.int8)
        else:
            codes, zeros_OG = pack_pairs(codes), zeros_OG.view(torch.int8)
        symmetric = bool((zeros_OG == IMPLIED_ZERO["int8" if self._bits == 8 else "int4"]).all())
        return QuantizedWeight(
            format="int8" if self._bits == 8 else "int4",
            shape=(shape[0], shape[1]),
            codes=codes,
            scales_OG=tensors.view(f"{prefix}.scales").T.contiguous(),
            group_size=group,
            zeros_OG=None if symmetric else zeros_OG,
            column_groups_I=self._column_groups(tensors, prefix, shape[1], group),
        )

    def _zeros(self, words: Tensor) -> Tensor:
        """Zero points, uint8 [groups, out].

        The first format took one from each by subtracting from the word, so a zero point of 0
        borrowed from its neighbour; adding to the word gives all of them back.
        """
        if self._format == _V1:
            ones = 0x01010101 if self._bits == 8 else 0x11111111
            wide = words.long() + ones
            words = ((wide + 2**31) % 2**32 - 2**31).to(torch.int32)
        return unpack_columns(words, self._bits)

    def _column_groups(
        self, tensors: Tensors, prefix: str, columns: int, group: int
    ) -> Tensor | None:
        name = f"{prefix}.g_idx"
        if name not in tensors:
            return None
        check_dtype(tensors, name, ("I32", "I64"))
        groups_I = tensors.view(name).to(torch.int32)
        num_groups = -(-columns // group)
        if int(groups_I.min()) < 0 or int(groups_I.max()) >= num_groups:
            raise CheckpointError(
                f"{tensors.folder}: {name} names groups from {int(groups_I.min())} to "
                f"{int(groups_I.max())}; this linear has groups 0 to {num_groups - 1}"
            )
        in_order = torch.arange(columns, dtype=torch.int32) // group
        return None if torch.equal(groups_I, in_order) else groups_I.clone()
