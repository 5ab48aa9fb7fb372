"""Random checkpoints: real shapes, the same bytes for a seed, usable weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from inference_pio.workers.model.config import GenerationDefaults, ModelConfig
from inference_pio.workers.model.names import expected_shapes
from inference_pio.workers.model.random_checkpoint import (
    CONFIGS,
    GENERATION_CONFIGS,
    make_random_checkpoint,
)

MakeCheckpoint = Callable[..., Path]


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_a_seed_gives_the_same_bytes(make_checkpoint: MakeCheckpoint) -> None:
    assert digest(make_checkpoint(seed=3)) == digest(make_checkpoint(seed=3))
    assert digest(make_checkpoint(seed=3)) != digest(make_checkpoint(seed=4))


def test_shards_hold_the_same_tensors(make_checkpoint: MakeCheckpoint) -> None:
    single = load_file(make_checkpoint() / "model.safetensors")
    folder = make_checkpoint(max_shard_bytes=60_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(single)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in single.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(folder / file)[name], single[name])


def test_weights_look_like_an_initialisation(make_checkpoint: MakeCheckpoint) -> None:
    tensors = load_file(make_checkpoint() / "model.safetensors")
    matrix = tensors["model.layers.0.mlp.up_proj.weight"]
    assert abs(matrix.mean()) < 0.01
    assert 0.09 < matrix.std() < 0.11
    norm = tensors["model.norm.weight"]
    assert 0.9 < norm.mean() < 1.1
    assert norm.std() > 0.02


@pytest.mark.parametrize(
    ("shape", "parameters", "limit", "theta"),
    [("qwen3-0.6b", 596_049_920, 40_960, 1e6), ("qwen3-4b", 4_022_468_096, 262_144, 5e6)],
)
def test_the_shapes_are_the_published_ones(
    shape: str, parameters: int, limit: int, theta: float
) -> None:
    config = ModelConfig.from_dict(CONFIGS[shape], shape)
    shapes = expected_shapes(config).values()
    assert sum(torch.Size(s).numel() for s in shapes) == parameters
    assert (config.max_position_embeddings, config.rope_theta) == (limit, theta)
    assert GENERATION_CONFIGS[shape]["eos_token_id"] == [151645, 151643]


def test_the_whole_folder(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = CONFIGS["qwen3-0.6b"] | {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 64}
    monkeypatch.setitem(CONFIGS, "qwen3-0.6b", tiny | {"num_hidden_layers": 1})
    tokenizer = data_dir / "hf-qwen3-0.6b"
    make_random_checkpoint("qwen3-0.6b", tmp_path / "new" / "folder", tokenizer, seed=1)
    folder = tmp_path / "new" / "folder"
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert GenerationDefaults.from_folder(folder).top_k == 20
    assert (folder / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        make_random_checkpoint("qwen3-0.6b", tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()
