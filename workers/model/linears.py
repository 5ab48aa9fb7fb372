"""The weights of linears, however a checkpoint stores them, and how they reach the kernels.

A weight is quantized where the checkpoint has it so, or where it is made so on load. Kernels that
compute with it as it is keep it; for all others it is brought to the model's dtype here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.api import Kernels, PackedLinear, PackedSwiGLU
from ...kernels.quantized import QuantizedWeight, stacked
from ..config import QuantizationName
from .config import CheckpointError, ModelConfig
from .loader import Checkpoint
from .names import EMBEDDING, HEAD, expected_shapes, linear_of
from .quantization.layout import Layout
from .quantization.own import OwnLayout
from .quantization.quantize import HEAD_FORMATS, MadeFormat, quantize


class LinearReader:
    """Reads linears by their prefix, such as ``model.layers.0.mlp.down_proj``.

    The head of a model with tied embeddings has the embedding's prefix. Raises ``ValueError``
    where a quantized checkpoint is to be quantized.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        layout: Layout | None,
        quantization: QuantizationName,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if layout is not None and quantization != "none":
            raise ValueError(
                f"quantization is {quantization!r}, but {checkpoint.folder} is quantized already "
                f"({layout.name}); use 'none', or the checkpoint that it was made from"
            )
        self._checkpoint = checkpoint
        self._layout = layout
        self._making: MadeFormat | None = None if quantization == "none" else quantization
        self._dtype = dtype
        self._device = device
        self._shapes = expected_shapes(config)
        # A tied checkpoint may still carry the head; it equals the embedding.
        self._ignored = {HEAD} if config.tie_word_embeddings else set()

    def check(self) -> None:
        """Compare the checkpoint with what the architecture needs, in its layout.

        Raises ``CheckpointError``.
        """
        expected: dict[str, tuple[int, ...] | None] = {}
        zeros: set[str] = set()
        for name, shape in self._shapes.items():
            prefix = linear_of(name)
            if prefix is None or self._layout is None or not self._is_stored_quantized(prefix):
                expected[name] = shape
                continue
            expected |= self._layout.expected(self._checkpoint, prefix, shape)
            zeros |= self._layout.ignored(prefix)
        zeros -= self._shapes.keys()
        self._checkpoint.check(expected, self._ignored | zeros)
        for name in sorted(zeros):
            if name in self._checkpoint and bool(self._checkpoint.float_view(name).any()):
                raise CheckpointError(
                    f"{self._checkpoint.folder}: {name} is not zero, but this architecture has no "
                    "such tensor"
                )

    def stored_names(self, prefix: str) -> tuple[str, ...]:
        """The tensors that a linear's weight is read from."""
        if self._layout is not None and self._is_stored_quantized(prefix):
            return tuple(self._layout.expected(self._checkpoint, prefix, self._shape(prefix)))
        return (f"{prefix}.weight",)

    def read(
        self, prefix: str, rows: range | None = None, columns: range | None = None
    ) -> tuple[Tensor | QuantizedWeight, int]:
        """Some rows or columns of a weight, and how many of its stored bytes they are.

        Raises ``CheckpointError`` for values that cannot be.
        """
        shape = self._shape(prefix)
        rows, columns = rows or range(shape[0]), columns or range(shape[1])
        stored = sum(map(self._checkpoint.num_tensor_bytes, self.stored_names(prefix)))
        num_bytes = stored * len(rows) * len(columns) // (shape[0] * shape[1])
        if self._layout is not None and self._is_stored_quantized(prefix):
            whole = self._layout.read(self._checkpoint, prefix, shape)
            return whole.rows(rows).columns(columns).copied_to(self._device), num_bytes
        weight = self._checkpoint.float_view(f"{prefix}.weight")[rows.start : rows.stop]
        made = self._made_format(prefix)
        if made is None:
            part = weight[:, columns.start : columns.stop]
            return part.to(device=self._device, dtype=self._dtype).contiguous(), num_bytes
        # Whole rows are rounded, so that every rank of a grid has a part of the same weight.
        try:
            rounded = quantize(weight.to(self._device), made)
        except ValueError as error:
            raise CheckpointError(
                f"{self._checkpoint.folder}: {prefix}.weight cannot be quantized: {error}"
            ) from error
        return rounded.columns(columns), num_bytes

    def _shape(self, prefix: str) -> tuple[int, ...]:
        return self._shapes[f"{prefix}.weight"]

    def _is_stored_quantized(self, prefix: str) -> bool:
        assert self._layout is not None
        is_linear = linear_of(f"{prefix}.weight") is not None
        return is_linear and self._layout.holds(self._checkpoint, prefix)

    def _made_format(self, prefix: str) -> MadeFormat | None:
        """What a weight that is not stored quantized is rounded to."""
        is_head = f"{prefix}.weight" in (HEAD, EMBEDDING)
        if self._making is not None:
            return HEAD_FORMATS[self._making] if is_head else self._making
        if is_head and isinstance(self._layout, OwnLayout):
            return self._layout.head_format  # tied: the file has the embedding alone
        return None


def pack_linear(
    kernels: Kernels,
    weights: Sequence[Tensor | QuantizedWeight],
    bias: Tensor | None,
    dtype: torch.dtype,
) -> PackedLinear:
    """One linear of the rows of all ``weights``; kept quantized where the kernels can."""
    quantized = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
    if len(quantized) == len(weights):
        joined = quantized[0] if len(quantized) == 1 else stacked(quantized)
        packed = None if joined is None else kernels.pack_quantized(joined, bias, dtype)
        if packed is not None:
            return packed
    dense = [_dense(weight, dtype) for weight in weights]
    return kernels.pack_linear(dense[0] if len(dense) == 1 else torch.cat(dense), bias)


def pack_swiglu(
    kernels: Kernels,
    gate: Tensor | QuantizedWeight,
    up: Tensor | QuantizedWeight,
    dtype: torch.dtype,
) -> PackedSwiGLU:
    """The same for the two projections of an MLP."""
    if isinstance(gate, QuantizedWeight) and isinstance(up, QuantizedWeight):
        packed = kernels.pack_quantized_swiglu(gate, up, dtype)
        if packed is not None:
            return packed
    return kernels.pack_swiglu(_dense(gate, dtype), _dense(up, dtype))


def _dense(weight: Tensor | QuantizedWeight, dtype: torch.dtype) -> Tensor:
    return weight.dequantize(dtype) if isinstance(weight, QuantizedWeight) else weight
