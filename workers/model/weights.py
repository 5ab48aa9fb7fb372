"""From mapped checkpoint tensors into the layout that the kernels read, one layer at a time.

The life of a weight: mapped view, cut to what this rank holds, converted to the model's dtype and
device where they differ (or quantized), fused with its neighbours, packed by the kernels; then its
pages are given back, so the checkpoint and the packed model never both lie in memory.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from rich.console import Console
from torch import Tensor

from ...kernels.api import Kernels, PackedLinear, PackedSwiGLU
from ...kernels.quantized import QuantizedWeight
from ..config import QuantizationName
from .config import ModelConfig
from .linears import LinearReader, pack_linear, pack_swiglu
from .loader import Checkpoint, LoadProgress
from .names import EMBEDDING, HEAD
from .quantization.detect import layout_of_folder
from .shard import WHOLE, ShardSpec
from .streaming.embedding_rows import EmbeddingRows


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
        quantization: QuantizationName = "none",
    ) -> None:
        """``quantization`` rounds the linears while they are loaded.

        Raises ``CheckpointError`` for tensors that are not as the configuration says.
        """
        self._checkpoint = Checkpoint(folder)
        layout = layout_of_folder(folder)
        self._linears = LinearReader(self._checkpoint, config, layout, quantization, dtype, device)
        self._linears.check()
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
        weights = [self._linear(prefix, rows=rows) for prefix, rows in spans.items()]
        bias = None
        if self._config.attention_bias:
            biases = {f"{prefix}.bias": rows for prefix, rows in spans.items()}
            bias = torch.cat([self._part(name, rows) for name, rows in biases.items()])
            self._done(*biases)
        return self._packed(weights, bias, *spans)

    def attention_out(self, attention: str) -> PackedLinear:
        """The output projection of this rank's heads; the first rank alone adds the bias."""
        columns = _times(self._shard.query_heads(self._config), self._config.head_dim)
        biased = self._config.attention_bias and self._shard.tp_rank == 0
        return self._partial(f"{attention}.o_proj", columns, biased)

    def gate_up(self, mlp: str) -> PackedSwiGLU:
        """The gate and up projections of this rank's channels."""
        prefixes = (f"{mlp}.gate_proj", f"{mlp}.up_proj")
        rows = self._shard.mlp_channels(self._config)
        gate, up = (self._linear(prefix, rows=rows) for prefix in prefixes)
        packed = pack_swiglu(self._kernels, gate, up, self._dtype)
        self._linears_done(*prefixes)
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
        return self._converted(self._checkpoint.float_view(EMBEDDING)[rows.start : rows.stop])

    def embedding_rows(self) -> EmbeddingRows:
        """The same table, read as tokens come."""
        rows = self._shard.vocabulary(self._config)
        self._checkpoint.float_view(EMBEDDING)  # refuses a stored dtype that is not a float's
        return EmbeddingRows(self._checkpoint.file_of(EMBEDDING), EMBEDDING, rows, self._dtype)

    def head(self) -> PackedLinear:
        """The output layer of this rank's rows of the vocabulary."""
        name = EMBEDDING if self._config.tie_word_embeddings else HEAD
        prefix = name.removesuffix(".weight")
        weight = self._linear(prefix, rows=self._shard.vocabulary(self._config))
        return self._packed([weight], None, prefix)

    def _partial(self, prefix: str, columns: range, biased: bool) -> PackedLinear:
        """A projection of some of its input channels: what it gives is one term of a sum."""
        weight = self._linear(prefix, columns=columns)
        bias = None
        if biased:
            bias = self._part(f"{prefix}.bias")
            self._done(f"{prefix}.bias")
        return self._packed([weight], bias, prefix)

    def _packed(
        self, weights: list[Tensor | QuantizedWeight], bias: Tensor | None, *prefixes: str
    ) -> PackedLinear:
        packed = pack_linear(self._kernels, weights, bias, self._dtype)
        self._linears_done(*prefixes)
        return packed

    def _linear(
        self, prefix: str, rows: range | None = None, columns: range | None = None
    ) -> Tensor | QuantizedWeight:
        """Rows or columns of a linear's weight, quantized or in the model's dtype."""
        weight, num_bytes = self._linears.read(prefix, rows, columns)
        self._count(num_bytes)
        return weight

    def _linears_done(self, *prefixes: str) -> None:
        for prefix in prefixes:
            self._done(*self._linears.stored_names(prefix))

    def _part(self, name: str, rows: range | None = None) -> Tensor:
        """Rows of a tensor in the model's dtype; only they are read."""
        part = self._checkpoint.float_view(name)
        if rows is not None:
            part = part[rows.start : rows.stop]
        self._count(part.nbytes)
        return self._converted(part)

    def _count(self, num_bytes: int) -> None:
        self.num_bytes_read += num_bytes
        self._progress.advance(num_bytes)

    def _converted(self, part: Tensor) -> Tensor:
        return part.to(device=self._device, dtype=self._dtype).contiguous()

    def _done(self, *names: str) -> None:
        for name in names:
            self._checkpoint.release(name)


def _times(span: range, size: int) -> range:
    return range(span.start * size, span.stop * size)
