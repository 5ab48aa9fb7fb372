"""Reading config.json and generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from inference_pio.workers.model.config import CheckpointError, GenerationDefaults, ModelConfig

RAW: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": 151645,
}


def read(**changes: Any) -> ModelConfig:
    raw = {key: value for key, value in (RAW | changes).items() if value != "absent"}
    return ModelConfig.from_dict(raw, "config.json")


def test_every_number_is_read() -> None:
    assert read() == ModelConfig(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
        attention_bias=False,
        dtype=torch.bfloat16,
    )


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e6},
        {"rope_theta": "absent", "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
        {"rope_theta": 5e6, "rope_parameters": {"rope_type": "default"}},
        {"rope_theta": 5e6, "rope_scaling": None},
    ],
)
def test_both_spellings_of_the_rope_base(rope: dict[str, Any]) -> None:
    assert read(**rope).rope_theta == 5e6


def test_defaults_follow_transformers() -> None:
    config = read(num_key_value_heads="absent", head_dim="absent", dtype="float16")
    assert (config.num_kv_heads, config.head_dim, config.dtype) == (16, 64, torch.float16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "only \\['Qwen3ForCausalLM'\\] is supported"),
        ({"architectures": "absent"}, "architectures is None"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "code that comes with a checkpoint is never run"),
        ({"use_sliding_window": True}, "use_sliding_window is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "RoPE type 'yarn'"),
        ({"rope_theta": "absent"}, "gives a RoPE base"),
        ({"rope_theta": "10"}, "a number is expected"),
        ({"rope_theta": float("nan")}, "must be finite"),
        ({"hidden_size": "absent"}, "hidden_size is missing"),
        ({"hidden_size": 1024.5}, "an integer is expected"),
        ({"num_hidden_layers": 0}, "must be at least 1"),
        ({"num_key_value_heads": 5}, "16 query heads cannot share 5"),
        ({"head_dim": 33}, "RoPE needs it even"),
        ({"torch_dtype": "int8"}, "dtype is 'int8'"),
        ({"tie_word_embeddings": "yes"}, "true or false is expected"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(**changes)


def test_a_missing_or_broken_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ')
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds a list"):
        ModelConfig.from_folder(tmp_path)


def defaults(tmp_path: Path, generation: dict[str, Any] | None) -> GenerationDefaults:
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return GenerationDefaults.from_folder(tmp_path)


def test_generation_defaults(tmp_path: Path) -> None:
    generation = {
        "eos_token_id": [151645, 151643],
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
    }
    assert defaults(tmp_path, generation) == GenerationDefaults((151645, 151643), 0.6, 0.95, 20)


def test_without_generation_config_the_config_names_the_eos(tmp_path: Path) -> None:
    assert defaults(tmp_path, None) == GenerationDefaults((151645,))


def test_a_greedy_checkpoint_is_greedy(tmp_path: Path) -> None:
    assert defaults(tmp_path, {"do_sample": False}).temperature == 0.0


@pytest.mark.parametrize(
    "generation", [{"temperature": "hot"}, {"top_k": 2.5}, {"eos_token_id": ["</s>"]}]
)
def test_broken_generation_defaults(tmp_path: Path, generation: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        defaults(tmp_path, generation)
