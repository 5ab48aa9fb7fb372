"""How much memory the ranks of an engine hold, from the model's shapes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from ...workers.config import EngineConfig
from ...workers.loading import attention_pattern
from ...workers.memory import num_kv_blocks
from ...workers.model.cache import KVCache
from ...workers.model.config import DTYPES, CheckpointError, ModelConfig
from ...workers.model.names import EMBEDDING, HEAD, expected_shapes
from ...workers.model.random_checkpoint import CONFIGS
from ...workers.model.shard import ShardSpec, check_grid
from ...workers.model_source import EMBEDDED, EMBEDDED_FOLDER

PUBLISHED = {"Qwen/Qwen3-0.6B": "qwen3-0.6b", "Qwen/Qwen3-4B-Instruct-2507": "qwen3-4b"}
"""Hub names whose shapes are known without a download."""

PROCESS_BYTES = 600 * 2**20
"""An engine process beside weights and KV. With the embedded model a replica's own memory was
0.26 GiB more than both; the rest is for the activations and logits of a large model's step."""


class UnknownModelError(ValueError):
    """A model whose shapes are not known here."""


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes of one rank. ``kv`` is ``None`` where the engine takes a share of what is free."""

    rank: int
    weights: int
    kv: int | None
    tier: int = 0
    """Host memory for evicted KV blocks, also where the model lies on a GPU."""

    @property
    def total(self) -> int:
        """All that is known of it where its model lies."""
        return self.weights + (self.kv or 0) + PROCESS_BYTES


def model_shapes(name: str) -> ModelConfig:
    """The shapes of ``embedded``, a folder, or a hub name that is known.

    Raises ``CheckpointError`` for a broken folder, ``UnknownModelError`` for any other name.
    """
    if name in PUBLISHED:
        return ModelConfig.from_dict(CONFIGS[PUBLISHED[name]], name)
    folder = EMBEDDED_FOLDER if name == EMBEDDED else Path(name).expanduser()
    if folder.is_dir():
        return ModelConfig.from_folder(folder)
    raise UnknownModelError(
        f"the shapes of {name!r} are not known here: it is no folder on this machine, and the hub "
        f"names that need no download are {', '.join(PUBLISHED)}"
    )


def engine_memory(config: EngineConfig) -> tuple[RankMemory, ...]:
    """Every rank of an engine, in order.

    Raises ``UnknownModelError``; ``CheckpointError`` or ``ValueError``, with numbers, for an engine
    that could not start: heads that cannot be split so, or a pool that does not hold a sequence.
    """
    shapes = model_shapes(config.model)
    if config.dtype != "auto":
        shapes = replace(shapes, dtype=DTYPES[config.dtype])
    parallel = config.parallel
    check_grid(shapes, tp_size=parallel.tensor, pp_size=parallel.pipeline)
    blocks = _kv_blocks(config, shapes)
    ranks = []
    for rank in range(parallel.num_ranks):
        shard = ShardSpec.of_rank(rank, tp_size=parallel.tensor, pp_size=parallel.pipeline)
        weights = _weight_bytes(shapes, shard)
        if parallel.sequence_from is not None:
            # Steps that are split by tokens need every weight of the stage, beside the rank's own.
            weights += _weight_bytes(shapes, shard.whole_layers, with_head=False)
        if config.weight_memory_bytes is not None:
            weights = min(weights, config.weight_memory_bytes)  # what is above it is streamed
        per_block = KVCache.bytes_per_block(
            shard.local_config(shapes),
            config.block_size,
            shapes.dtype,
            config.kv_cache_dtype,
            attention_pattern(config.attention),
        )
        kv = None if blocks is None else blocks * per_block
        tier = config.kv_paging.host_bytes if rank == 0 else 0
        ranks.append(RankMemory(rank, weights, kv, tier))
    return tuple(ranks)


def _kv_blocks(config: EngineConfig, shapes: ModelConfig) -> int | None:
    limit = config.max_model_len or shapes.max_position_embeddings
    if limit > shapes.max_position_embeddings:
        raise CheckpointError(
            f"max_model_len is {limit}; the limit of {config.model} is "
            f"{shapes.max_position_embeddings}"
        )
    if config.kv_cache_bytes is None:
        return None
    blocks = num_kv_blocks(
        bytes_per_block=KVCache.bytes_per_block(
            shapes,
            config.block_size,
            shapes.dtype,
            config.kv_cache_dtype,
            attention_pattern(config.attention),
        ),
        told_bytes=config.kv_cache_bytes,
        free=0,
        share=config.kv_memory_share,
        most_blocks=math.ceil(limit / config.block_size) * config.max_num_seqs,
    )
    capacity = blocks * config.block_size
    most = attention_pattern(config.attention).most_blocks(
        0, limit, config.max_batched_tokens, config.block_size
    )
    if config.max_model_len is not None and most > blocks:
        a_token = KVCache.bytes_per_block(shapes, 1, shapes.dtype, config.kv_cache_dtype)
        raise ValueError(
            f"kv_cache_bytes ({config.kv_cache_bytes}) holds {capacity} tokens, fewer than "
            f"max_model_len ({limit}); one token takes {a_token} bytes"
        )
    return blocks


def _weight_bytes(config: ModelConfig, shard: ShardSpec, *, with_head: bool = True) -> int:
    """Packed weights of a rank.

    The embedding table is not counted on its own: it stays mapped from the checkpoint where the
    dtype is the same, as page cache that all processes of a node share.
    """
    layers = shard.layers(config)
    heads = len(shard.query_heads(config)) / config.num_heads
    kv_heads = len(shard.kv_heads(config)) / config.num_kv_heads
    channels = len(shard.mlp_channels(config)) / config.intermediate_size
    elements = 0.0
    for name, shape in expected_shapes(config).items():
        size = math.prod(shape)
        if name in (EMBEDDING, HEAD):
            continue
        if not name.startswith("model.layers."):
            elements += size if shard.is_last_stage else 0
        elif int(name.split(".")[2]) in layers:
            share = 1.0
            if "q_proj" in name or "o_proj.weight" in name:
                share = heads
            elif "k_proj" in name or "v_proj" in name:
                share = kv_heads
            elif ".mlp." in name:
                share = channels
            elements += size * share
    if with_head and shard.is_last_stage:
        elements += len(shard.vocabulary(config)) * config.hidden_size
    return round(elements) * config.dtype.itemsize
