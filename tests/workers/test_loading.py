"""From a configuration to a loaded model: limits, sizes and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from inference_pio.workers.config import EngineConfig
from inference_pio.workers.loading import LoadedModel, load_model, load_text
from inference_pio.workers.model.cache import KVCache
from inference_pio.workers.model.config import CheckpointError, ModelConfig
from inference_pio.workers.model_source import ModelSourceError
from inference_pio.workers.text.errors import TextFilesError

MakeCheckpoint = Callable[..., Path]


def load(folder: Path, **options: Any) -> LoadedModel:
    return load_model(EngineConfig(model=str(folder), **({"kv_cache_bytes": 1 << 20} | options)))


def block_bytes(folder: Path, size: int) -> int:
    return KVCache.bytes_per_block(ModelConfig.from_folder(folder), size, torch.float32)


def test_the_pool_bounds_the_context_unless_that_was_named(
    make_text_checkpoint: MakeCheckpoint,
) -> None:
    folder = make_text_checkpoint()
    size = 3 * block_bytes(folder, 16) + 5
    loaded = load(folder, block_size=16, kv_cache_bytes=size)
    assert (loaded.num_blocks, loaded.max_model_len) == (3, 48)
    with pytest.raises(ValueError, match=r"max_model_len is 49, but .* holds 48 tokens \(3 blocks"):
        load(folder, block_size=16, kv_cache_bytes=size, max_model_len=49)
    named = load(folder, block_size=16, kv_cache_bytes=size, max_model_len=48)
    assert named.max_model_len == 48


def test_the_models_limit_bounds_the_context(make_text_checkpoint: MakeCheckpoint) -> None:
    folder = make_text_checkpoint(max_position_embeddings=100)
    loaded = load(folder, block_size=16, max_num_seqs=3)
    assert loaded.max_model_len == 100
    assert loaded.num_blocks == 3 * 7  # a full batch of the longest sequences, and no more
    assert loaded.model.max_positions == 100
    with pytest.raises(ValueError, match="max_model_len is 101; this checkpoint's limit is 100"):
        load(folder, max_model_len=101)


def test_free_memory_is_shared_when_no_size_is_told(
    make_text_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_text_checkpoint()
    size = block_bytes(folder, 16)
    monkeypatch.setattr("inference_pio.workers.loading.free_bytes", lambda _: 40 * size)
    loaded = load(folder, block_size=16, kv_cache_bytes=None, kv_memory_share=0.25)
    assert loaded.num_blocks == 10


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_the_dtype_is_the_checkpoints_or_the_one_told(
    make_text_checkpoint: MakeCheckpoint, name: str, dtype: torch.dtype
) -> None:
    assert load(make_text_checkpoint(), dtype=name).model.dtype is dtype


def test_the_fingerprint_tells_models_apart(make_text_checkpoint: MakeCheckpoint) -> None:
    one, other = make_text_checkpoint(), make_text_checkpoint(num_hidden_layers=1)
    assert load(one).fingerprint == load(one).fingerprint != load(other).fingerprint


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_told(make_text_checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(ValueError, match="device is 'cuda', but torch sees no CUDA device"):
        load(make_text_checkpoint(), device="cuda")


def test_threads_as_told_and_one_for_a_small_model(make_text_checkpoint: MakeCheckpoint) -> None:
    try:
        load(make_text_checkpoint(), num_threads=2)
        assert torch.get_num_threads() == 2
    finally:
        load(make_text_checkpoint())
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("missing", ["tokenizer.json", "model.safetensors", "config.json"])
def test_a_missing_file_is_named(
    make_text_checkpoint: MakeCheckpoint, tmp_path: Path, missing: str
) -> None:
    folder = shutil.copytree(make_text_checkpoint(), tmp_path / "copy")
    (folder / missing).unlink()
    with pytest.raises((CheckpointError, TextFilesError, ModelSourceError), match=missing):
        load(folder)


def test_a_tokenizer_larger_than_the_model_is_refused(make_text_checkpoint: MakeCheckpoint) -> None:
    folder = make_text_checkpoint(vocab_size=300, eos_token_id=7)
    with pytest.raises(CheckpointError, match="497 tokens, the model's vocabulary 300 rows"):
        load(folder)


def test_eos_ids_come_from_the_generation_config_first(
    make_text_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = shutil.copytree(make_text_checkpoint(), tmp_path / "copy")
    assert load_text(folder).eos == {490}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 490]}))
    text = load_text(folder)
    assert text.eos == text.phase_tokens.eos == {3, 490}


def test_a_template_that_cannot_think_has_no_thoughts(
    make_text_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = shutil.copytree(make_text_checkpoint(), tmp_path / "copy")
    assert load_text(folder).phase_tokens.think_open == 495
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %}"
    path.write_text(json.dumps(settings))
    tokens = load_text(folder).phase_tokens
    assert tokens.think_open is None
    assert tokens.tool_open == 491


def test_quantization_reaches_the_weights_and_the_fingerprint(
    make_text_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERENCE_PIO_KERNELS", "torch")
    folder = make_text_checkpoint()
    plain, rounded = load(folder), load(folder, quantization="int8")
    assert plain.fingerprint != rounded.fingerprint
    kinds = {type(loaded.model.layers[0].down).__name__ for loaded in (plain, rounded)}
    assert kinds == {type(plain.model.layers[0].down).__name__, "Int8Linear"}
