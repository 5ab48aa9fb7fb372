"""Small random checkpoints of odd shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inference_pio.workers.model.random_checkpoint import write_random_checkpoint

SMALL: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 211,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 24,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    # Wide enough that attention and logits are far from uniform at this size.
    "initializer_range": 0.1,
    "eos_token_id": 7,
}

MakeCheckpoint = Callable[..., Path]


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Writes a small checkpoint, with keys of ``config.json`` changed as asked."""

    def make(*, max_shard_bytes: int = 10**9, seed: int = 0, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("checkpoint")
        config = {key: value for key, value in (SMALL | changes).items() if value is not None}
        write_random_checkpoint(config, folder, seed=seed, max_shard_bytes=max_shard_bytes)
        return folder

    return make
