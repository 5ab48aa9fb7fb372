"""Qwen3: weights in the kernels' layout, and the forward pass over a paged batch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...kernels.api import Kernels, PackedLinear, PackedSwiGLU
from ...kernels.context import ForwardContext
from ...kernels.dispatch import select_kernels
from ...kernels.rope import inverse_frequencies, rope_cos_sin
from .cache import KVCache
from .config import ModelConfig
from .weights import WeightReader


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One block's packed weights."""

    input_norm: Tensor
    qkv: PackedLinear
    qk_norm_AD: Tensor
    """float32, as ``Kernels.qk_norm_rope_write`` takes it."""
    attention_out: PackedLinear
    mlp_norm: Tensor
    gate_up: PackedSwiGLU
    down: PackedLinear


class Qwen3Model:
    """A loaded checkpoint.

    Steps: ``forward`` embeds the new tokens, runs every layer over them and the cache, and returns
    hidden states behind the final norm; ``logits`` turns chosen rows into scores.
    """

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        layers: tuple[DecoderLayer, ...],
        embedding: Tensor,
        final_norm: Tensor,
        head: PackedLinear,
        *,
        max_positions: int,
    ) -> None:
        self.config = config
        self.kernels = kernels
        self.layers = layers
        self.embedding = embedding
        self.final_norm = final_norm
        self.head = head
        self.max_positions = max_positions
        self.dtype = embedding.dtype
        self.device = final_norm.device
        self._frequencies_E = inverse_frequencies(config.rope_theta, config.head_dim, self.device)

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        dtype: torch.dtype | None,
        device: torch.device,
        max_positions: int | None = None,
    ) -> Qwen3Model:
        """Loads a checkpoint folder; ``dtype`` ``None`` keeps the checkpoint's.

        ``max_positions`` narrows the longest sequence, at most the checkpoint's own limit. Raises
        ``CheckpointError`` for a checkpoint that is incomplete, damaged or of another architecture.
        """
        config = ModelConfig.from_folder(path)
        limit = config.max_position_embeddings
        if max_positions is not None and not 1 <= max_positions <= limit:
            raise ValueError(f"max_positions is {max_positions}; it lies in [1, {limit}]")
        dtype = dtype or config.dtype
        kernels = select_kernels(device, dtype)
        with torch.inference_mode(), WeightReader(path, config, kernels, dtype, device) as weights:
            layers = tuple(_load_layer(weights, config, i) for i in range(config.num_layers))
            embedding, head = weights.embedding_and_head()
            final_norm = weights.vector("model.norm.weight")
        return cls(
            config,
            kernels,
            layers,
            embedding,
            final_norm,
            head,
            max_positions=max_positions or limit,
        )

    def new_cache(self, num_blocks: int, block_size: int) -> KVCache:
        """A cache for this model; ``KVCache.bytes_per_block`` tells its size."""
        return KVCache(self.config, num_blocks, block_size, self.dtype, self.device)

    @torch.inference_mode()
    def forward(self, token_ids_T: Tensor, context: ForwardContext, cache: KVCache) -> Tensor:
        """Hidden states behind the final norm, [T, hidden]; writes the tokens' KV into the cache.

        ``token_ids_T`` int64. Raises ``ValueError`` for a sequence past ``max_positions`` or a
        context of another block size.
        """
        self._check(context, cache)
        cache.clear_blocks(context.new_partial_blocks)
        kernels, eps = self.kernels, self.config.rms_norm_eps
        cos_TE, sin_TE = rope_cos_sin(context.positions_T, self._frequencies_E)
        attention = kernels.plan_attention(context)
        hidden_TC = torch.nn.functional.embedding(token_ids_T, self.embedding)
        for layer, kv_N2KSD in zip(self.layers, cache.layers, strict=True):
            normed_TC = kernels.rms_norm(hidden_TC, layer.input_norm, eps)
            q_THD = kernels.qk_norm_rope_write(
                layer.qkv(normed_TC),
                layer.qk_norm_AD,
                cos_TE,
                sin_TE,
                kv_N2KSD,
                context.slots_T,
                eps,
            )
            hidden_TC = layer.attention_out(attention(q_THD, kv_N2KSD), hidden_TC)
            normed_TC = kernels.rms_norm(hidden_TC, layer.mlp_norm, eps)
            hidden_TC = layer.down(layer.gate_up(normed_TC), hidden_TC)
        return kernels.rms_norm(hidden_TC, self.final_norm, eps)

    @torch.inference_mode()
    def logits(self, hidden_RC: Tensor) -> Tensor:
        """Scores of every vocabulary row, float32 [R, vocab_size].

        An inference tensor, as all outputs here: to be changed under ``torch.inference_mode()``.
        """
        return self.head(hidden_RC).float()

    def _check(self, context: ForwardContext, cache: KVCache) -> None:
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


def _load_layer(weights: WeightReader, config: ModelConfig, index: int) -> DecoderLayer:
    prefix = f"model.layers.{index}"
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    return DecoderLayer(
        input_norm=weights.vector(f"{prefix}.input_layernorm.weight"),
        qkv=weights.linear(f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
        qk_norm_AD=_head_norms(weights, attention, config),
        attention_out=weights.linear(f"{attention}.o_proj"),
        mlp_norm=weights.vector(f"{prefix}.post_attention_layernorm.weight"),
        gate_up=weights.swiglu(f"{mlp}.gate_proj", f"{mlp}.up_proj"),
        down=weights.linear(f"{mlp}.down_proj"),
    )


def _head_norms(weights: WeightReader, attention: str, config: ModelConfig) -> Tensor:
    """One row of QK-norm weights a head; the softmax scale goes into the queries' rows."""
    query = weights.vector(f"{attention}.q_norm.weight").float() * config.head_dim**-0.5
    key = weights.vector(f"{attention}.k_norm.weight").float()
    return torch.cat((query.repeat(config.num_heads, 1), key.repeat(config.num_kv_heads, 1)))
