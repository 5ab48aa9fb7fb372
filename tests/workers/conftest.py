"""Engines on small random checkpoints, and a driver that checks them at every step."""

from __future__ import annotations

import functools
import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from inference_pio.workers.config import EngineConfig
from inference_pio.workers.engine import Engine
from inference_pio.workers.model.cache import KVCache
from inference_pio.workers.model.config import DTYPES, ModelConfig
from inference_pio.workers.model.random_checkpoint import write_random_checkpoint
from inference_pio.workers.types import (
    FinishReason,
    GenerateRequest,
    Resumption,
    SamplingParams,
    StepOutput,
    TokenChunk,
)

from .engine_pair import MakePair, Pair

TINY: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    # A dozen rows more than the embedded tokenizer has tokens: padding that must never be sampled.
    "vocab_size": 509,
    "hidden_size": 56,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    # Wide enough that attention and logits are far from uniform at this size.
    "initializer_range": 0.1,
    "eos_token_id": 490,
}
NUM_TOKENS = 497
"""Tokens of the embedded tokenizer."""


class Driver:
    """Runs an engine's steps, files its chunks and checks both after each step."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.chunks: dict[tuple[str, int], list[TokenChunk]] = defaultdict(list)
        self.output = StepOutput()
        """All that the last step gave."""
        self._told: dict[tuple[str, int], int] = defaultdict(int)

    def add(
        self,
        request_id: str,
        prompt: Sequence[int],
        *,
        priority: int = 0,
        deadline_s: float | None = None,
        cache_salt: str = "",
        resume: tuple[Resumption, ...] = (),
        **params: Any,
    ) -> None:
        request = GenerateRequest(
            request_id,
            tuple(prompt),
            SamplingParams(**params),
            priority=priority,
            deadline_s=deadline_s,
            cache_salt=cache_salt,
            resume=resume,
        )
        self.engine.validate(request)
        self.engine.add(request)
        for part in resume:
            self._told[request_id, part.index] = len(part.token_ids)

    def step(self) -> list[TokenChunk]:
        self.output = self.engine.step()
        chunks = self.output.chunks
        for chunk in chunks:
            name = chunk.request_id, chunk.index
            filed = self.chunks[name]
            assert not filed or filed[-1].finish_reason is None, "a chunk behind the last"
            before = self._told[name] + sum(len(c.token_ids) for c in filed)
            assert chunk.first == before, "a gap or a repeat"
            assert len(chunk.token_ids) == len(chunk.kinds)
            filed.append(chunk)
        self.engine.check_integrity()
        return chunks

    def run(self) -> None:
        """To the end of all work, after which nothing may be held."""
        while self.engine.has_work:
            self.step()
        stats = self.engine.stats()
        assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
        assert all(chunks[-1].finish_reason is not None for chunks in self.chunks.values())

    def tokens(self, request_id: str, index: int = 0) -> list[int]:
        return [t for chunk in self.chunks[request_id, index] for t in chunk.token_ids]

    def kinds(self, request_id: str, index: int = 0) -> list[Any]:
        return [kind for chunk in self.chunks[request_id, index] for kind in chunk.kinds]

    def logprobs(self, request_id: str, index: int = 0) -> list[Any]:
        return [entry for c in self.chunks[request_id, index] for entry in c.logprobs or ()]

    def last(self, request_id: str, index: int = 0) -> TokenChunk:
        return self.chunks[request_id, index][-1]

    def end(self, request_id: str, index: int = 0) -> FinishReason | None:
        return self.last(request_id, index).finish_reason


MakeCheckpoint = Callable[..., Path]
MakeDriver = Callable[..., Driver]


@pytest.fixture(scope="session")
def make_text_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, embedded_dir: Path
) -> MakeCheckpoint:
    """Writes a random model with the embedded tokenizer; keys of ``config.json`` as asked.

    The same keys give the same folder.
    """

    @functools.cache
    def write(encoded: str) -> Path:
        folder = tmp_path_factory.mktemp("checkpoint")
        write_random_checkpoint(json.loads(encoded), folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(embedded_dir / name, folder / name)
        return folder

    def make(**changes: Any) -> Path:
        config = {key: value for key, value in (TINY | changes).items() if value is not None}
        return write(json.dumps(config))

    return make


@pytest.fixture(scope="session")
def make_driver(make_text_checkpoint: MakeCheckpoint) -> MakeDriver:
    """An engine with ``num_blocks`` KV blocks behind a driver; other keys are the engine's."""

    def make(folder: Path | None = None, *, num_blocks: int = 128, **options: Any) -> Driver:
        folder = folder or make_text_checkpoint()
        options = {"block_size": 16, "max_num_seqs": 16, "max_batched_tokens": 64} | options
        shapes = ModelConfig.from_folder(folder)
        name = options.get("dtype", "auto")
        dtype = shapes.dtype if name == "auto" else DTYPES[name]
        block_bytes = KVCache.bytes_per_block(
            shapes, options["block_size"], dtype, options.get("kv_cache_dtype", "auto")
        )
        config = EngineConfig(model=str(folder), kv_cache_bytes=num_blocks * block_bytes, **options)
        return Driver(Engine(config))

    return make


@pytest.fixture
def make_pair(make_driver: MakeDriver) -> MakePair:
    def make(prefill: dict[str, Any] | None = None, **decode: Any) -> Pair:
        return Pair(make_driver, prefill or {}, **decode)

    return make


def random_prompt(length: int, seed: int = 0) -> list[int]:
    """Ids of plain text: none that starts a thought or a tool call."""
    generator = torch.Generator().manual_seed(seed * 100_003 + length)
    return torch.randint(0, 488, (length,), generator=generator).tolist()


@pytest.fixture(scope="session")
def prompt() -> Callable[..., list[int]]:
    """``prompt(length, seed)`` gives random ids of plain text."""
    return random_prompt
