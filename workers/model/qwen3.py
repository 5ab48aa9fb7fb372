"""Qwen3: weights in the kernels' layout, and the forward pass over a paged batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ...kernels.api import DecoderLayer, Kernels, PackedLinear
from ...kernels.context import ForwardContext
from ...kernels.dispatch import select_kernels
from ...kernels.pattern import FULL, AttentionPattern
from ...kernels.rope import inverse_frequencies, rope_cos_sin
from ..config import KVCacheDType, QuantizationName
from .cache import KVCache
from .config import ModelConfig
from .shard import WHOLE, ShardSpec
from .streaming.embedding_rows import EmbeddingRows
from .streaming.layer_stream import StreamStats
from .streaming.layers import LayerStore, ResidentLayers, StreamedLayers
from .streaming.loading import load_layers
from .weights import WeightReader


class Exchange(Protocol):
    """What the ranks that share a layer tell each other while they compute it."""

    def to_heads(self, qkv_TC: Tensor) -> Tensor:
        """From every head of this rank's tokens to this rank's heads of every token."""
        ...

    def to_tokens(self, out_TC: Tensor) -> Tensor:
        """The way back, for what attention gave."""
        ...

    def residual(self, hidden_TC: Tensor) -> Tensor | None:
        """What this rank adds to its own term of a sum over ranks."""
        ...

    def total(self, partial_TC: Tensor) -> Tensor:
        """The sum of every rank's term; may overwrite it."""
        ...


class Alone:
    """The exchange of a rank that holds whole layers and all tokens."""

    def to_heads(self, qkv_TC: Tensor) -> Tensor:
        """See ``Exchange.to_heads``."""
        return qkv_TC

    def to_tokens(self, out_TC: Tensor) -> Tensor:
        """See ``Exchange.to_tokens``."""
        return out_TC

    def residual(self, hidden_TC: Tensor) -> Tensor | None:
        """See ``Exchange.residual``."""
        return hidden_TC

    def total(self, partial_TC: Tensor) -> Tensor:
        """See ``Exchange.total``."""
        return partial_TC


ALONE = Alone()


class Qwen3Model:
    """A loaded checkpoint, or the part of it that one rank of a grid holds.

    Steps: ``embed`` looks the new tokens up, ``run_layers`` runs every layer over them and the
    cache, ``normalise`` applies the final norm (``forward`` is the three in a row), and ``logits``
    turns chosen rows into scores. A stage that is not the first has no embedding, one that is not
    the last no final norm and head.
    """

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        layers: LayerStore,
        embedding: Tensor | EmbeddingRows | None,
        final_norm: Tensor | None,
        head: PackedLinear | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_positions: int,
        shard: ShardSpec = WHOLE,
        pattern: AttentionPattern = FULL,
        num_bytes_read: int = 0,
    ) -> None:
        self.config = config
        """Of the whole model."""
        self.kernels = kernels
        self._store = layers
        self.embedding = embedding
        self.final_norm = final_norm
        self.head = head
        self.max_positions = max_positions
        self.dtype = dtype
        self.device = device
        self.shard = shard
        self.pattern = pattern
        """Which keys a token attends to; contexts of this model are built with it."""
        self.num_bytes_read = num_bytes_read
        """Of the checkpoint, while loading."""
        # Layers that are split over ranks stop to exchange; whole ones run through.
        eps = config.rms_norm_eps
        self._stack = kernels.stack(layers.layers, eps) if shard.tp_size == 1 else None
        self._frequencies_E = inverse_frequencies(config.rope_theta, config.head_dim, self.device)

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        dtype: torch.dtype | None,
        device: torch.device,
        max_positions: int | None = None,
        shard: ShardSpec = WHOLE,
        with_head: bool = True,
        quantization: QuantizationName = "none",
        weight_memory_bytes: int | None = None,
        pattern: AttentionPattern = FULL,
    ) -> Qwen3Model:
        """Loads a checkpoint folder; ``dtype`` ``None`` keeps the checkpoint's.

        ``max_positions`` narrows the longest sequence, at most the checkpoint's own limit.
        ``shard`` is the part to load; ``with_head=False`` leaves the last stage's output layer out.
        ``quantization`` rounds the linears while they are loaded. ``weight_memory_bytes`` is what
        the weights of this part may take: layers that it does not hold are streamed.
        Raises ``CheckpointError`` for a checkpoint that is incomplete, damaged or of another
        architecture, ``ValueError`` for a limit that cannot be kept.
        """
        if weight_memory_bytes is not None and device.type != "cpu":
            raise ValueError(
                f"weight_memory_bytes streams weights from the disk to the CPU; the device is "
                f"{device.type}"
            )
        config = ModelConfig.from_folder(path)
        limit = config.max_position_embeddings
        if max_positions is not None and not 1 <= max_positions <= limit:
            raise ValueError(f"max_positions is {max_positions}; it lies in [1, {limit}]")
        dtype = dtype or config.dtype
        kernels = select_kernels(device, dtype)
        reader = WeightReader(path, config, kernels, dtype, device, shard, quantization)
        with torch.inference_mode(), reader as weights:
            local = shard.local_config(config)
            ends = shard.is_last_stage and with_head
            head = weights.head() if ends else None
            layers = load_layers(
                shard.layers(config),
                lambda index: _load_layer(weights, local, index),
                limit=weight_memory_bytes,
                head=head,
            )
            embedding: Tensor | EmbeddingRows | None = None
            if shard.is_first_stage:
                is_streamed = isinstance(layers, StreamedLayers)
                embedding = weights.embedding_rows() if is_streamed else weights.embedding()
            final_norm = weights.vector("model.norm.weight") if ends else None
        return cls(
            config,
            kernels,
            layers,
            embedding,
            final_norm,
            head,
            dtype=dtype,
            device=device,
            max_positions=max_positions or limit,
            shard=shard,
            pattern=pattern,
            num_bytes_read=weights.num_bytes_read,
        )

    @property
    def layers(self) -> Sequence[DecoderLayer]:
        """Of this part."""
        return self._store.layers

    def stream_stats(self) -> StreamStats:
        """What streaming has cost so far."""
        return self._store.stats()

    def close(self) -> None:
        """End what streams; the model computes no more where anything did."""
        self._store.close()
        if isinstance(self.embedding, EmbeddingRows):
            self.embedding.close()

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` where the books of what streams disagree."""
        self._store.check_integrity()

    def new_cache(
        self, num_blocks: int, block_size: int, kv_cache_dtype: KVCacheDType = "auto"
    ) -> KVCache:
        """A cache for this part; ``KVCache.bytes_per_block`` tells its size."""
        local = self.shard.local_config(self.config)
        return KVCache(
            local, num_blocks, block_size, self.dtype, self.device, kv_cache_dtype, self.pattern
        )

    def forward(self, token_ids_T: Tensor, context: ForwardContext, cache: KVCache) -> Tensor:
        """Hidden states behind the final norm, [T, hidden]; writes the tokens' KV into the cache.

        ``token_ids_T`` int64. Raises ``ValueError`` for a sequence past ``max_positions`` or a
        context of another block size or pattern.
        """
        hidden_TC = self.embed(token_ids_T)
        return self.normalise(self.run_layers(hidden_TC, context, cache))

    @torch.inference_mode()
    def embed(self, token_ids_T: Tensor) -> Tensor:
        """The tokens' rows of the embedding, [T, hidden]; zeros for other ranks' rows."""
        if self.shard.tp_size == 1:
            return self._look_up(token_ids_T)
        own = self.shard.vocabulary(self.config)
        rows_T = token_ids_T - own.start
        foreign_T = (rows_T < 0) | (rows_T >= len(own))
        found_TC = self._look_up(rows_T.masked_fill(foreign_T, 0))
        return found_TC.masked_fill_(foreign_T[:, None], 0)

    def _look_up(self, rows_T: Tensor) -> Tensor:
        assert self.embedding is not None, "the first stage has the embedding"
        if isinstance(self.embedding, EmbeddingRows):
            return self.embedding.look_up(rows_T)
        return torch.nn.functional.embedding(rows_T, self.embedding)

    @torch.inference_mode()
    def run_layers(
        self,
        hidden_TC: Tensor,
        context: ForwardContext,
        cache: KVCache,
        exchange: Exchange = ALONE,
        layers: Sequence[DecoderLayer] | None = None,
    ) -> Tensor:
        """This part's layers; hidden states before the final norm, [T, hidden].

        They are in float32 where the kernels have them so and the final norm follows here.
        ``exchange`` joins the ranks that share a layer. With one that splits by tokens,
        ``hidden_TC`` has this rank's tokens, ``context`` all of them, and ``layers`` are whole.
        Raises what ``forward`` raises.
        """
        self.check(context, cache)
        cache.clear_blocks(context.new_partial_blocks)
        kernels, eps = self.kernels, self.config.rms_norm_eps
        cos_TE, sin_TE = rope_cos_sin(context.positions_T, self._frequencies_E)
        store = self._store if layers is None else ResidentLayers(layers)
        if self._stack is not None and exchange is ALONE and layers is None:
            for span in store.spans():
                kv_layers = cache.layers[span.start : span.stop]
                bounds_layers = cache.bounds[span.start : span.stop]
                hidden_TC = self._stack(
                    hidden_TC, context, cos_TE, sin_TE, kv_layers, bounds_layers, span.start
                )
            return hidden_TC if self.final_norm is not None else hidden_TC.to(self.dtype)
        attention = kernels.plan_attention(context)
        all_bounds: Sequence[Tensor | None] = cache.bounds or [None] * len(cache.layers)
        for index in itertools.chain.from_iterable(store.spans()):
            layer, kv_N2KSD = store.layers[index], cache.layers[index]
            bounds_N2KD = all_bounds[index]
            normed_TC = kernels.rms_norm(hidden_TC, layer.input_norm, eps)
            q_THD = kernels.qk_norm_rope_write(
                exchange.to_heads(layer.qkv(normed_TC)),
                layer.qk_norm_AD,
                cos_TE,
                sin_TE,
                kv_N2KSD,
                context.slots_T,
                eps,
            )
            if bounds_N2KD is not None:
                kernels.bound_pages(kv_N2KSD, bounds_N2KD, context.filled_blocks)
            out_TC = exchange.to_tokens(attention(q_THD, kv_N2KSD, bounds_N2KD))
            hidden_TC = exchange.total(layer.attention_out(out_TC, exchange.residual(hidden_TC)))
            normed_TC = kernels.rms_norm(hidden_TC, layer.mlp_norm, eps)
            inner_TC = layer.gate_up(normed_TC)
            hidden_TC = exchange.total(layer.down(inner_TC, exchange.residual(hidden_TC)))
        return hidden_TC

    @torch.inference_mode()
    def normalise(self, hidden_TC: Tensor) -> Tensor:
        """The final norm."""
        assert self.final_norm is not None, "the last stage has the final norm"
        return self.kernels.rms_norm(hidden_TC, self.final_norm, self.config.rms_norm_eps)

    @torch.inference_mode()
    def logits(self, hidden_RC: Tensor) -> Tensor:
        """Scores of this part's vocabulary rows, float32 [R, vocab_size].

        An inference tensor, as all outputs here: to be changed under ``torch.inference_mode()``.
        """
        assert self.head is not None, "the last stage has the head"
        return self.head.in_float32(hidden_RC)

    def check(self, context: ForwardContext, cache: KVCache) -> None:
        """Raise what ``forward`` raises."""
        if max(context.seq_lens) > self.max_positions:
            raise ValueError(
                f"a sequence of {max(context.seq_lens)} tokens is past the model's "
                f"{self.max_positions} positions"
            )
        if context.block_size != cache.block_size:
            raise ValueError(
                f"the context counts blocks of {context.block_size} tokens, "
                f"the cache has {cache.block_size}"
            )
        if context.pattern != self.pattern:
            raise ValueError(f"the context has {context.pattern}, the model {self.pattern}")


def _load_layer(weights: WeightReader, config: ModelConfig, index: int) -> DecoderLayer:
    prefix = f"model.layers.{index}"
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    return DecoderLayer(
        input_norm=weights.vector(f"{prefix}.input_layernorm.weight"),
        qkv=weights.qkv(attention),
        qk_norm_AD=_head_norms(weights, attention, config),
        attention_out=weights.attention_out(attention),
        mlp_norm=weights.vector(f"{prefix}.post_attention_layernorm.weight"),
        gate_up=weights.gate_up(mlp),
        down=weights.down(mlp),
    )


def _head_norms(weights: WeightReader, attention: str, config: ModelConfig) -> Tensor:
    """One row of QK-norm weights a head; the softmax scale goes into the queries' rows.

    ``config`` counts the heads that this rank computes.
    """
    query = weights.vector(f"{attention}.q_norm.weight").float() * config.head_dim**-0.5
    key = weights.vector(f"{attention}.k_norm.weight").float()
    return torch.cat((query.repeat(config.num_heads, 1), key.repeat(config.num_kv_heads, 1)))
