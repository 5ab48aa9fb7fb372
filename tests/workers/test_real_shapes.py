"""The real shapes with random weights and the real tokenizer: ``pytest -m slow``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from inference_pio import LLM, SamplingParams
from inference_pio.workers.model.random_checkpoint import make_random_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PROMPT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


def test_06b_agrees_with_transformers(data_dir: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    make_random_checkpoint("qwen3-0.6b", tmp_path, data_dir / "hf-qwen3-0.6b", 0)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=5)
    with LLM(str(tmp_path), dtype="float32", max_model_len=2048) as llm:
        output = llm.generate(PROMPT, params)[0]
    choice = output.choices[0]
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.tensor([[*output.prompt_token_ids, *choice.token_ids]])
    with torch.inference_mode():
        logits = oracle(ids).logits[0, len(output.prompt_token_ids) - 1 : -1]
    # Rows above the tokenizer's tokens are padding and take no part.
    expected = logits[:, :151_669].log_softmax(-1)
    assert expected.argmax(-1).tolist() == list(choice.token_ids)
    assert choice.logprobs is not None
    for position, found in enumerate(choice.logprobs):
        for token_id, logprob in found.top:
            assert abs(float(expected[position, token_id]) - logprob) <= 2e-4


def test_4b_loads_and_generates(data_dir: Path, tmp_path: Path) -> None:
    make_random_checkpoint("qwen3-4b", tmp_path, data_dir / "hf-qwen3-4b-instruct-2507", 0)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with LLM(str(tmp_path), max_model_len=1024, kv_cache_bytes=1 << 30) as llm:
        output = llm.chat([{"role": "user", "content": "Hello"}], params)
    assert output.choices[0].usage.completion_tokens == 4
    assert output.choices[0].reasoning is None  # this model never thinks
