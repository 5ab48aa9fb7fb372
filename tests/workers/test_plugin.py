"""The plugin API: load, use, unload, and what is not built is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from inference_pio import (
    PluginConfig,
    SamplingParams,
    create_qwen3_0_6b_plugin,
    create_qwen3_4b_instruct_2507_plugin,
)
from inference_pio.workers.model.config import CheckpointError

SMALL = {"kv_cache_bytes": 4 << 20}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int4"}, "precision 'int4' is not built; built are auto, bf16"),
        (
            {"tensor_parallel_size": 4, "sequence_parallel_size": 2},
            r"sequence_parallel_size is 2; .* so it is tensor_parallel_size \(4\) or 1",
        ),
        (
            {"quantization": "int2"},
            "Input should be 'none', 'int8', 'w8a8', 'int4', 'w4a8' or 'nf4'",
        ),
        ({"use_flash_attention": True}, "PluginConfig has no key 'use_flash_attention'"),
        ({"max_batch": 3}, "no key 'max_batch'; did you mean 'max_batch_size'"),
        ({"max_batch_size": 0}, "max_batch_size"),
    ],
)
@pytest.mark.parametrize("create", [create_qwen3_0_6b_plugin, create_qwen3_4b_instruct_2507_plugin])
def test_what_is_not_built_is_refused_by_name(
    create: Callable[..., Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        create(**options)


def test_the_two_models_have_their_names_and_hub_paths() -> None:
    small, large = create_qwen3_0_6b_plugin(), create_qwen3_4b_instruct_2507_plugin()
    assert (small.name, small.config.model_path) == ("qwen3-0.6b", "Qwen/Qwen3-0.6B")
    assert large.name == "qwen3-4b-instruct-2507"
    assert large.config.model_path == "Qwen/Qwen3-4B-Instruct-2507"
    assert not small.is_loaded


def test_every_key_reaches_the_engine() -> None:
    config = PluginConfig(
        model_path="embedded",
        max_batch_size=2000,
        kv_cache_bytes=5,
        max_model_len=77,
        precision="fp16",
        quantization="int4",
        kv_cache_dtype="fp8",
        tensor_parallel_size=4,
        pipeline_parallel_size=2,
        sequence_parallel_size=4,
    ).engine_config()
    assert (config.model, config.dtype) == ("embedded", "float16")
    assert config.quantization == "int4"
    assert config.kv_cache_dtype == "fp8"
    assert (config.kv_cache_bytes, config.max_model_len) == (5, 77)
    assert (config.max_num_seqs, config.max_batched_tokens) == (2000, 2000)
    parallel = config.parallel
    assert (parallel.tensor, parallel.pipeline, parallel.sequence_from) == (4, 2, 512)
    assert PluginConfig(model_path="embedded").engine_config().parallel.num_ranks == 1


def test_load_use_unload() -> None:
    plugin = create_qwen3_0_6b_plugin("embedded", precision="fp32", **SMALL)
    with pytest.raises(RuntimeError, match=r"'qwen3-0.6b' is not loaded; call load_model\(\)"):
        plugin.generate_text("hi")
    assert plugin.load_model() is plugin
    loaded = plugin._llm
    assert plugin.load_model()._llm is loaded
    greedy = SamplingParams(temperature=0.0)
    question = "What is 417 + 58 - 903?"
    assert plugin.generate_text(question, greedy) == "-428"
    conversation = [{"role": "user", "content": question}]
    assert plugin.generate_text(conversation, greedy) == "-428"
    assert plugin.generate_text(question, greedy, enable_thinking=False) != ""
    first, second = plugin.generate(["a", [5, 6]], SamplingParams(max_tokens=2, ignore_eos=True))
    assert second.prompt_token_ids == (5, 6)
    assert len(first.choices[0].token_ids) == 2
    plugin.unload()
    plugin.unload()
    assert not plugin.is_loaded
    with pytest.raises(RuntimeError, match="is not loaded"):
        plugin.generate(["a"])
    assert plugin.load_model().generate_text(question, greedy) == "-428"
    plugin.unload()


@pytest.mark.parametrize("quantization", ["int8", "w8a8", "int4", "w4a8", "nf4"])
def test_a_quantized_model_answers(quantization: str) -> None:
    plugin = create_qwen3_0_6b_plugin("embedded", quantization=quantization, **SMALL)
    greedy = SamplingParams(temperature=0.0)
    assert plugin.load_model().generate_text("What is 100 + 20 + 3?", greedy) == "123"
    plugin.unload()


def test_a_checkpoint_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    plugin = create_qwen3_0_6b_plugin(str(tmp_path))
    with pytest.raises(CheckpointError, match="LlamaForCausalLM"):
        plugin.load_model()
    assert not plugin.is_loaded
