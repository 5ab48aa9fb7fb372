"""Qwen's FP8 checkpoints: ``weight`` in float8_e4m3fn, one scale for each block of 128 by 128.

``weight_scale_inv`` [ceil(out / 128), ceil(in / 128)] is multiplied with the codes, in spite of its
name. Described by transformers' ``finegrained_fp8`` and DeepSeek-V3's model card.
"""

from __future__ import annotations

from ....kernels.quantized import QuantizedWeight
from .layout import Settings, Shape, Tensors, check_dtype


class FP8Layout:
    """``quant_method: fp8`` with ``weight_block_size``."""

    name = "fp8"

    def __init__(self, settings: Settings) -> None:
        settings.one_of("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
        block = settings.raw.get("weight_block_size")
        sizes = block if isinstance(block, list) else []
        sound = all(isinstance(size, int) and size > 0 for size in sizes)
        if len(sizes) != 2 or not sound:
            raise settings.error("weight_block_size", "two numbers such as [128, 128] are expected")
        self._rows, self._columns = int(sizes[0]), int(sizes[1])

    def holds(self, tensors: Tensors, prefix: str) -> bool:
        """See ``Layout.holds``."""
        weight = f"{prefix}.weight"
        stored = tensors.stored_dtype(weight) if weight in tensors else ""
        return f"{prefix}.weight_scale_inv" in tensors or stored.startswith("F8")

    def expected(self, tensors: Tensors, prefix: str, shape: Shape) -> dict[str, Shape | None]:
        """See ``Layout.expected``."""
        grid = (-(-shape[0] // self._rows), -(-shape[1] // self._columns))
        return {f"{prefix}.weight": shape, f"{prefix}.weight_scale_inv": grid}

    def ignored(self, prefix: str) -> frozenset[str]:
        """See ``Layout.ignored``."""
        return frozenset()

    def read(self, tensors: Tensors, prefix: str, shape: Shape) -> QuantizedWeight:
        """Each row gets its block's scales."""
        check_dtype(tensors, f"{prefix}.weight", ("F8_E4M3",))
        check_dtype(tensors, f"{prefix}.weight_scale_inv", ("F32", "BF16", "F16"))
        scales = tensors.view(f"{prefix}.weight_scale_inv")
        return QuantizedWeight(
            format="fp8",
            shape=(shape[0], shape[1]),
            codes=tensors.view(f"{prefix}.weight"),
            scales_OG=scales.repeat_interleave(self._rows, dim=0)[: shape[0]],
            group_size=self._columns,
        )
