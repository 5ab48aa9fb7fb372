"""From an ``EngineConfig`` to everything an engine is built of."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ..kernels.pattern import AttentionPattern
from .config import AttentionConfig, EngineConfig
from .memory import free_bytes, num_kv_blocks
from .model.cache import KVCache
from .model.config import DTYPES, CheckpointError, GenerationDefaults, ModelConfig
from .model.fingerprint import model_fingerprint
from .model.loader import weight_files
from .model.qwen3 import Qwen3Model
from .model.shard import WHOLE, ShardSpec
from .model_source import resolve_model
from .phases import PhaseTokens
from .sampling.resolve import SamplingDefaults
from .text.template import ChatTemplate
from .text.tokenizer import Tokenizer

_SMALL_MODEL_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class LoadedText:
    """A checkpoint's text side; cheap to load, so an ingress has its own."""

    folder: Path
    tokenizer: Tokenizer
    template: ChatTemplate
    phase_tokens: PhaseTokens
    eos: frozenset[int]


@dataclass(frozen=True, slots=True)
class LoadedPart:
    """What one rank of an engine has in memory; in one process: the whole model."""

    model: Qwen3Model
    whole_layers: Qwen3Model | None
    """The stage's layers unsplit, for steps that are split by tokens instead."""
    fingerprint: bytes
    limit: int
    """Tokens of one sequence: the configured or the model's limit."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory, the size of its KV pool, and its text side.

    On a grid of ranks ``model`` is the part that this process computes; its ``config`` is of the
    whole model, as everything else here.
    """

    model: Qwen3Model
    text: LoadedText
    sampling_defaults: SamplingDefaults
    fingerprint: bytes
    num_blocks: int
    max_model_len: int
    """Tokens of one sequence: the configured or the model's limit, within the KV pool."""

    @property
    def tokenizer(self) -> Tokenizer:
        return self.text.tokenizer


def load_text(folder: Path) -> LoadedText:
    """Tokenizer, chat template and the ids that mark phases.

    Raises ``TextFilesError`` or ``CheckpointError`` for files that are missing or broken.
    """
    tokenizer = Tokenizer.load(folder)
    template = ChatTemplate.load(folder, tokenizer)
    tags = tokenizer.tags
    named = GenerationDefaults.from_folder(folder).eos_token_ids
    eos = frozenset(named or (() if tags.eos is None else (tags.eos,)))
    thinks = template.supports_thinking
    phase_tokens = PhaseTokens(
        think_open=tags.think_open if thinks else None,
        think_close=tags.think_close if thinks else None,
        tool_open=tags.tool_open,
        tool_close=tags.tool_close,
        whitespace=tags.whitespace,
        stop_text_ids=tags.stop_text_ids,
        eos=eos,
    )
    return LoadedText(folder, tokenizer, template, phase_tokens, eos)


def load_model(config: EngineConfig) -> LoadedModel:
    """Load the checkpoint that ``config`` names and size its KV pool, all in this process.

    Raises ``ModelSourceError``, ``CheckpointError`` or ``TextFilesError`` for a checkpoint that
    cannot be used, ``ValueError`` where the memory does not hold what was asked for.
    """
    text = load_text_for(config)
    part = load_part(config)
    return with_pool(config, text, part, pool_blocks(config, part))


def load_text_for(config: EngineConfig) -> LoadedText:
    """The text side of a configuration's model, checked against the model's shapes."""
    folder = resolve_model(config.model)
    shapes = ModelConfig.from_folder(folder)
    text = load_text(folder)
    if text.tokenizer.num_tokens > shapes.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {text.tokenizer.num_tokens} tokens, "
            f"the model's vocabulary {shapes.vocab_size} rows; they are not of one checkpoint"
        )
    return text


def load_part(config: EngineConfig, shard: ShardSpec = WHOLE, *, ranks_here: int = 1) -> LoadedPart:
    """Load one rank's part of the checkpoint; ``ranks_here`` ranks share this machine.

    Sets the number of CPU threads of this process. Raises as ``load_model`` does.
    """
    folder = resolve_model(config.model)
    limit = _model_limit(config, ModelConfig.from_folder(folder))
    device = _device(config)
    if device.type == "cpu":
        torch.set_num_threads(config.num_threads or _threads(folder, ranks_here))
    dtype = None if config.dtype == "auto" else DTYPES[config.dtype]

    def load(part: ShardSpec, with_head: bool = True) -> Qwen3Model:
        return Qwen3Model.load(
            folder,
            dtype=dtype,
            device=device,
            max_positions=limit,
            shard=part,
            with_head=with_head,
            quantization=config.quantization,
            weight_memory_bytes=config.weight_memory_bytes,
            pattern=attention_pattern(config.attention),
        )

    by_tokens = config.parallel.sequence_from is not None
    return LoadedPart(
        model=load(shard),
        whole_layers=load(shard.whole_layers, with_head=False) if by_tokens else None,
        fingerprint=model_fingerprint(
            folder,
            quantization=config.quantization,
            kv_cache_dtype=config.kv_cache_dtype,
            attention=config.attention.label,
        ),
        limit=limit,
    )


def pool_blocks(config: EngineConfig, part: LoadedPart, *, ranks_here: int = 1) -> int:
    """Blocks that a rank has memory for.

    ``kv_cache_bytes`` is the size of the whole pool, over all ranks; where it is not told, every
    rank takes its share of what is free on its machine. Raises ``ValueError`` where none fits.
    """
    model, told = part.model, config.kv_cache_bytes
    shapes = model.config if told is not None else model.shard.local_config(model.config)
    return num_kv_blocks(
        bytes_per_block=KVCache.bytes_per_block(
            shapes, config.block_size, model.dtype, config.kv_cache_dtype, model.pattern
        ),
        told_bytes=told,
        free=free_bytes(model.device) // (ranks_here if model.device.type == "cpu" else 1),
        share=config.kv_memory_share,
        most_blocks=-(-part.limit // config.block_size) * config.max_num_seqs,
    )


def with_pool(
    config: EngineConfig, text: LoadedText, part: LoadedPart, num_blocks: int
) -> LoadedModel:
    """The loaded model with the size of its KV pool settled.

    Raises ``ValueError`` where the pool does not hold a sequence of the length asked for.
    """
    capacity = num_blocks * config.block_size
    most = part.model.pattern.most_blocks(
        0, part.limit, config.max_batched_tokens, config.block_size
    )
    if config.max_model_len is not None and most > num_blocks:
        raise ValueError(
            f"max_model_len is {part.limit}, but the KV cache holds {capacity} tokens "
            f"({num_blocks} blocks of {config.block_size}, where {most} are needed); raise "
            "kv_cache_bytes or lower max_model_len"
        )
    generation = GenerationDefaults.from_folder(text.folder)
    return LoadedModel(
        model=part.model,
        text=text,
        sampling_defaults=SamplingDefaults.from_generation(
            generation.temperature, generation.top_p, generation.top_k
        ),
        fingerprint=part.fingerprint,
        num_blocks=num_blocks,
        max_model_len=part.limit if most <= num_blocks else capacity,
    )


def attention_pattern(config: AttentionConfig) -> AttentionPattern:
    """What the kernels are told of an engine's attention."""
    return AttentionPattern(config.window, config.sinks or 0, config.pages)


def _device(config: EngineConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch sees no CUDA device; use 'cpu' or 'auto'")
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def _threads(folder: Path, ranks_here: int) -> int:
    """This rank's share of the cores that the process may use.

    One for a model so small that waking other threads costs more.
    """
    num_bytes = sum(path.stat().st_size for path in weight_files(folder))
    if num_bytes < _SMALL_MODEL_BYTES:
        return 1
    return max(1, len(os.sched_getaffinity(0)) // ranks_here)


def _model_limit(config: EngineConfig, shapes: ModelConfig) -> int:
    limit = shapes.max_position_embeddings
    if config.max_model_len is None:
        return limit
    if config.max_model_len > limit:
        raise ValueError(
            f"max_model_len is {config.max_model_len}; this checkpoint's limit is {limit}"
        )
    return config.max_model_len
