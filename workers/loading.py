"""From an ``EngineConfig`` to everything an engine is built of."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from .config import EngineConfig
from .memory import free_bytes, num_kv_blocks
from .model.cache import KVCache
from .model.config import DTYPES, CheckpointError, GenerationDefaults, ModelConfig
from .model.fingerprint import model_fingerprint
from .model.loader import weight_files
from .model.qwen3 import Qwen3Model
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
class LoadedModel:
    """A model in memory, the size of its KV pool, and its text side."""

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
    """Load the checkpoint that ``config`` names and size its KV pool.

    Raises ``ModelSourceError``, ``CheckpointError`` or ``TextFilesError`` for a checkpoint that
    cannot be used, ``ValueError`` where the memory does not hold what was asked for.
    """
    folder = resolve_model(config.model)
    shapes = ModelConfig.from_folder(folder)
    device = _device(config)
    if device.type == "cpu":
        torch.set_num_threads(config.num_threads or _threads(folder))
    limit = _model_limit(config, shapes)
    text = load_text(folder)
    if text.tokenizer.num_tokens > shapes.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {text.tokenizer.num_tokens} tokens, "
            f"the model's vocabulary {shapes.vocab_size} rows; they are not of one checkpoint"
        )
    dtype = None if config.dtype == "auto" else DTYPES[config.dtype]
    model = Qwen3Model.load(folder, dtype=dtype, device=device, max_positions=limit)
    blocks_per_sequence = -(-limit // config.block_size)
    num_blocks = num_kv_blocks(
        bytes_per_block=KVCache.bytes_per_block(shapes, config.block_size, model.dtype),
        told_bytes=config.kv_cache_bytes,
        free=free_bytes(device),
        share=config.kv_memory_share,
        most_blocks=blocks_per_sequence * config.max_num_seqs,
    )
    capacity = num_blocks * config.block_size
    if config.max_model_len is not None and capacity < limit:
        raise ValueError(
            f"max_model_len is {limit}, but the KV cache holds {capacity} tokens "
            f"({num_blocks} blocks of {config.block_size}); raise kv_cache_bytes or lower "
            "max_model_len"
        )
    generation = GenerationDefaults.from_folder(folder)
    return LoadedModel(
        model=model,
        text=text,
        sampling_defaults=SamplingDefaults.from_generation(
            generation.temperature, generation.top_p, generation.top_k
        ),
        fingerprint=model_fingerprint(folder),
        num_blocks=num_blocks,
        max_model_len=min(limit, capacity),
    )


def _device(config: EngineConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch sees no CUDA device; use 'cpu' or 'auto'")
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def _threads(folder: Path) -> int:
    """Every core this process may use; one for a model so small that waking others costs more."""
    num_bytes = sum(path.stat().st_size for path in weight_files(folder))
    return 1 if num_bytes < _SMALL_MODEL_BYTES else len(os.sched_getaffinity(0))


def _model_limit(config: EngineConfig, shapes: ModelConfig) -> int:
    limit = shapes.max_position_embeddings
    if config.max_model_len is None:
        return limit
    if config.max_model_len > limit:
        raise ValueError(
            f"max_model_len is {config.max_model_len}; this checkpoint's limit is {limit}"
        )
    return config.max_model_len
