"""From mapped checkpoint tensors into the layout that the kernels read, one layer at a time.

The life of a weight: mapped view, cut to what this rank holds, converted to the model's dtype and
device where they differ, fused with its neighbours, packed by the kernels; then its pages are given
back, so the checkpoint and the packed model never both lie in memory.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from rich.console import Console
from torch import Tensor

from ...kernels.api import Kernels, PackedLinear, PackedSwiGLU
from .config import ModelConfig
from .loader import Checkpoint, LoadProgress
from .shard import WHOLE, ShardSpec

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
    """Packs one rank's part of a checkpoint; a context manager around its progress bar.

    ``num_bytes_read`` counts what was packed, as stored; the embedding is read as it is used.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        kernels: Kernels,
        dtype: torch.dtype,
        device: torch.device,
        shard: ShardSpec = WHOLE,
    ) -> None:
        self._checkpoint = Checkpoint(folder)
        # A tied checkpoint may still carry the head; it equals the embedding.
        ignored = frozenset({HEAD}) if config.tie_word_embeddings else frozenset()
        self._checkpoint.check(expected_shapes(config), ignored)
        self._config = config
        self._kernels = kernels
        self._dtype = dtype
        self._device = device
        self._shard = shard
        self.num_bytes_read = 0
        # A rank's share of the whole: near enough for a bar, and one bar is enough.
        total = self._checkpoint.num_bytes // shard.num_ranks
        console = None if shard.rank == 0 else Console(quiet=True)
        self._progress = LoadProgress(total, f"Loading {folder.name}", console=console)

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
        """A small tensor as its own copy, the same on every rank."""
        vector = self._part(name).clone()
        self._done(name)
        return vector

    def qkv(self, attention: str) -> PackedLinear:
        """The query, key and value projections of this rank's heads, as one matrix."""
        dim = self._config.head_dim
        queries = _times(self._shard.query_heads(self._config), dim)
        keys = _times(self._shard.kv_heads(self._config), dim)
        spans = {f"{attention}.q_proj": queries}
        spans |= {f"{attention}.k_proj": keys, f"{attention}.v_proj": keys}
        weights = {f"{name}.weight": rows for name, rows in spans.items()}
        biases = {f"{name}.bias": rows for name, rows in spans.items()}
        weight = torch.cat([self._part(name, rows=rows) for name, rows in weights.items()])
        bias = None
        if self._config.attention_bias:
            bias = torch.cat([self._part(name, rows=rows) for name, rows in biases.items()])
        packed = self._kernels.pack_linear(weight, bias)
        self._done(*weights, *(biases if self._config.attention_bias else ()))
        return packed

    def attention_out(self, attention: str) -> PackedLinear:
        """The output projection of this rank's heads; the first rank alone adds the bias."""
        columns = _times(self._shard.query_heads(self._config), self._config.head_dim)
        biased = self._config.attention_bias and self._shard.tp_rank == 0
        return self._partial(f"{attention}.o_proj", columns, biased)

    def gate_up(self, mlp: str) -> PackedSwiGLU:
        """The gate and up projections of this rank's channels."""
        names = (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight")
        rows = self._shard.mlp_channels(self._config)
        packed = self._kernels.pack_swiglu(*(self._part(name, rows=rows) for name in names))
        self._done(*names)
        return packed

    def down(self, mlp: str) -> PackedLinear:
        """The down projection of this rank's channels."""
        return self._partial(f"{mlp}.down_proj", self._shard.mlp_channels(self._config), False)

    def embedding(self) -> Tensor:
        """This rank's rows of the table that tokens are looked up in.

        On the CPU a table in the model's dtype stays mapped: look-ups touch a few rows a step, so
        it costs page cache that replicas share instead of memory of its own.
        """
        rows = self._shard.vocabulary(self._config)
        return self._converted(self._checkpoint.view(EMBEDDING)[rows.start : rows.stop])

    def head(self) -> PackedLinear:
        """The output layer of this rank's rows of the vocabulary."""
        name = EMBEDDING if self._config.tie_word_embeddings else HEAD
        rows = self._shard.vocabulary(self._config)
        packed = self._kernels.pack_linear(self._part(name, rows=rows))
        self._done(name)
        return packed

    def _partial(self, prefix: str, columns: range, biased: bool) -> PackedLinear:
        """A projection of some of its input channels: what it gives is one term of a sum."""
        names = [f"{prefix}.weight", *([f"{prefix}.bias"] if biased else [])]
        weight = self._part(names[0], columns=columns)
        packed = self._kernels.pack_linear(weight, self._part(names[1]) if biased else None)
        self._done(*names)
        return packed

    def _part(self, name: str, rows: range | None = None, columns: range | None = None) -> Tensor:
        """Rows or columns of a tensor in the model's dtype; only they are read."""
        part = self._checkpoint.view(name)
        if rows is not None:
            part = part[rows.start : rows.stop]
        if columns is not None:
            part = part[:, columns.start : columns.stop]
        self.num_bytes_read += part.nbytes
        self._progress.advance(part.nbytes)
        return self._converted(part)

    def _converted(self, part: Tensor) -> Tensor:
        return part.to(device=self._device, dtype=self._dtype).contiguous()

    def _done(self, *names: str) -> None:
        for name in names:
            self._checkpoint.release(name)


def _times(span: range, size: int) -> range:
    return range(span.start * size, span.stop * size)
