"""From mapped checkpoint tensors into the layout that the kernels read, one layer at a time.

The life of a weight: mapped view, converted to the model's dtype and device where they differ,
fused with its neighbours, packed by the kernels; then its pages are given back, so the checkpoint
and the packed model never both lie in memory.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from ...kernels.api import Kernels, PackedLinear, PackedSwiGLU
from .config import ModelConfig
from .loader import Checkpoint, LoadProgress

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Qwen3 checkpoint, by its name in transformers."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_heads * dim, config.num_kv_heads * dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        layer = f"model.layers.{index}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        projections = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden)}
        for name, shape in (projections | {"o": (hidden, queries)}).items():
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = shape
            if config.attention_bias:
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = shape[:1]
        shapes[f"{layer}.self_attn.q_norm.weight"] = (dim,)
        shapes[f"{layer}.self_attn.k_norm.weight"] = (dim,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


class WeightReader:
    """Packs the weights of one checkpoint; a context manager around its progress bar."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        kernels: Kernels,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._checkpoint = Checkpoint(folder)
        # A tied checkpoint may still carry the head; it equals the embedding.
        ignored = frozenset({HEAD}) if config.tie_word_embeddings else frozenset()
        self._checkpoint.check(expected_shapes(config), ignored)
        self._config = config
        self._kernels = kernels
        self._dtype = dtype
        self._device = device
        self._progress = LoadProgress(self._checkpoint.num_bytes, f"Loading {folder.name}")

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.__exit__(kind, error, trace)

    def vector(self, name: str) -> Tensor:
        """A small tensor as its own copy."""
        vector = self._converted(name).clone()
        self._done(name)
        return vector

    def linear(self, *prefixes: str) -> PackedLinear:
        """Projections of the same input, packed as one matrix."""
        names = [f"{prefix}.weight" for prefix in prefixes]
        weight = self._joined(names)
        biases = [f"{p}.bias" for p in prefixes if f"{p}.bias" in self._checkpoint]
        bias = torch.cat([self._converted(name) for name in biases]) if biases else None
        packed = self._kernels.pack_linear(weight, bias)
        self._done(*names, *biases)
        return packed

    def swiglu(self, gate: str, up: str) -> PackedSwiGLU:
        """The gate and up projections."""
        names = (f"{gate}.weight", f"{up}.weight")
        packed = self._kernels.pack_swiglu(*(self._converted(name) for name in names))
        self._done(*names)
        return packed

    def embedding_and_head(self) -> tuple[Tensor, PackedLinear]:
        """The table that tokens are looked up in, and the packed output layer.

        On the CPU a table in the model's dtype stays mapped: look-ups touch a few rows a step, so
        it costs page cache that replicas share instead of memory of its own.
        """
        table = self._converted(EMBEDDING)
        head = table if self._config.tie_word_embeddings else self._converted(HEAD)
        packed = self._kernels.pack_linear(head)
        self._done(EMBEDDING, *(() if self._config.tie_word_embeddings else (HEAD,)))
        return table, packed

    def _joined(self, names: list[str]) -> Tensor:
        parts = [self._converted(name) for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _converted(self, name: str) -> Tensor:
        return self._checkpoint.view(name).to(device=self._device, dtype=self._dtype)

    def _done(self, *names: str) -> None:
        for name in names:
            self._checkpoint.release(name)
            self._progress.advance(self._checkpoint.num_tensor_bytes(name))
