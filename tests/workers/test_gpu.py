"""The engine on a CUDA device against the same engine on the CPU: ``pytest -m gpu``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from inference_pio import LLM, EngineConfig, SamplingParams
from inference_pio.workers.engine import Engine
from inference_pio.workers.types import GenerateRequest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

QUESTIONS = [f"What is {a} + 58 - 903?" for a in (417, 250, 999)]
PROMPTS = [f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n" for q in QUESTIONS]


@pytest.mark.parametrize("block_size", [16, 64])
def test_greedy_text_equals_the_cpu(block_size: int) -> None:
    params = SamplingParams(temperature=0, logprobs=1)
    with LLM("embedded", device="cpu", dtype="float32", block_size=block_size) as llm:
        expected = llm.generate(PROMPTS, params)
    with LLM("embedded", device="cuda", dtype="float32", block_size=block_size) as llm:
        found = llm.generate(PROMPTS, params)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.choices[0].token_ids == theirs.choices[0].token_ids
        pairs = zip(ours.choices[0].logprobs or (), theirs.choices[0].logprobs or (), strict=True)
        assert max(abs(a.logprob - b.logprob) for a, b in pairs) < 2e-3


def test_seeded_sampling_is_the_same_in_any_batch() -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=7)
    with LLM("embedded", device="cuda", dtype="float32") as llm:
        alone = llm.generate(PROMPTS[0], params)[0]
        together = llm.generate(PROMPTS, params)[0]
    assert alone.choices[0].token_ids == together.choices[0].token_ids


def test_no_operation_between_decode_steps_waits_for_the_device() -> None:
    engine = Engine(EngineConfig(model="embedded", device="cuda", dtype="float32", block_size=16))
    # A step that has all of them launches what any of them needs.
    ways: list[dict[str, Any]] = [
        {"temperature": 0.0, "repetition_penalty": 1.2, "logit_bias": {5: 1.0}},
        {"top_k": 20, "top_p": 0.9, "presence_penalty": 0.3, "logprobs": 5},
        {"top_k": 0, "top_p": 0.9, "logprobs": 0},
        {"top_k": 0, "top_p": 1.0, "frequency_penalty": 0.1},
        {"top_k": 300, "min_p": 0.01},
    ]
    for number, way in enumerate(ways):
        params = SamplingParams(
            **({"temperature": 0.8, "seed": number} | way),
            max_tokens=60, ignore_eos=True, loop_guard=False,
        )  # fmt: skip
        engine.add(GenerateRequest(str(number), tuple(range(9)), params))
    for _ in range(6):
        engine.step()  # the prompts, and the first graph
    try:
        torch.cuda.set_sync_debug_mode("error")
        counts = [len(engine.step().chunks) for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert counts == [len(ways)] * 20
    while engine.has_work:
        engine.step()
    engine.close()


def test_evicted_blocks_come_back_from_pinned_memory() -> None:
    params = SamplingParams(temperature=0, max_tokens=4)
    prompts = ["".join(f"{n + k}, " for n in range(80)) for k in (1, 200, 400)]
    with LLM(
        "embedded",
        device="cuda",
        dtype="float32",
        block_size=16,
        kv_cache_bytes=1_400_000,
        max_model_len=512,
        kv_paging={"host_bytes": 32_000_000},
    ) as llm:
        first = [llm.generate(prompt, params)[0].choices[0] for prompt in prompts]
        paging = llm.engine._paging
        assert paging is not None
        store = paging._store
        assert torch.from_numpy(store._pages).is_pinned()
        assert store.room(1).is_pinned()
        again = llm.generate(prompts[0], params)[0].choices[0]
        assert again.token_ids == first[0].token_ids
        assert llm.engine.stats().kv_paging.hit_tokens["host"] > 0
