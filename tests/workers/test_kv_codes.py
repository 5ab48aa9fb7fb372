"""A KV cache in codes through the whole engine: what never changes the text."""

from __future__ import annotations

import random
from typing import Any

import pytest

from inference_pio import LLM, SamplingParams
from inference_pio.kernels.native.library import cpu_flags, usable
from inference_pio.workers.kv.ticket import read_header

from .engine_pair import GREEDY, MakeDriver, MakePair, Prompt, alone

CODES = ["int8", "fp8"]
QUESTIONS = [
    ("What is 417 + 58 - 903?", "-428"),
    ("Sort these numbers from smallest to largest: 30, 4, 12.", "4, 12, 30"),
    ("Which is larger, 817 or 871?", "871"),
]


def answers(kv_cache_dtype: str, **options: Any) -> list[str]:
    params = SamplingParams(temperature=0.0, max_tokens=300)
    with LLM("embedded", kv_cache_dtype=kv_cache_dtype, kv_cache_bytes=16 << 20, **options) as llm:
        chats = [[{"role": "user", "content": question}] for question, _ in QUESTIONS]
        return [llm.chat(chat, params).choices[0].content for chat in chats]


@pytest.mark.parametrize("codes", CODES)
def test_the_embedded_model_answers(codes: str) -> None:
    found = answers(codes)
    assert all(right in answer for answer, (_, right) in zip(found, QUESTIONS, strict=True)), found


@pytest.mark.skipif(not usable(cpu_flags()), reason="no native kernels for this CPU")
@pytest.mark.parametrize("codes", CODES)
def test_native_kernels_write_what_the_reference_writes(
    codes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    for kernels in ("native", "reference"):
        monkeypatch.setenv("INFERENCE_PIO_KERNELS", kernels)
        texts.append(answers(codes, dtype="float32", block_size=16))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("codes", CODES)
def test_batches_chunks_hits_forks_and_preemptions_change_nothing(
    make_driver: MakeDriver, prompt: Prompt, codes: str
) -> None:
    rng = random.Random(0)
    driver = make_driver(
        num_blocks=12,
        max_model_len=96,
        max_batched_tokens=40,
        default_reservation=1,
        kv_cache_dtype=codes,
    )
    shared = prompt(48)
    prompts = {f"r{i}": [*shared[: rng.choice([0, 16, 48])], *prompt(7 + i, i)] for i in range(9)}
    for name, ids in prompts.items():
        # Those without a limit reserve one token and grow to the model's.
        limit = {"max_tokens": 20, "n": 2} if name == "r4" else {}
        driver.add(name, ids, **limit, **GREEDY)
        for _ in range(rng.randrange(4)):
            driver.step()
    driver.run()
    assert driver.engine.stats().preemptions > 0

    single = make_driver(max_model_len=96, prefix_caching=False, kv_cache_dtype=codes)
    for name, ids in prompts.items():
        single.add(name, ids, max_tokens=20 if name == "r4" else None, **GREEDY)
        single.run()
        assert driver.tokens(name) == single.tokens(name)
    assert driver.tokens("r4", 1) == driver.tokens("r4", 0)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("length", [2, 33, 100])
def test_a_prompt_handed_over_gives_the_same_text(
    make_pair: MakePair, make_driver: MakeDriver, prompt: Prompt, codes: str, length: int
) -> None:
    pair = make_pair({"max_batched_tokens": 32}, kv_cache_dtype=codes)
    pair.decode.add("r", prompt(length), max_tokens=12, **GREEDY)
    pair.run()
    assert pair.ends == {"done": 1}
    assert pair.decode.engine.stats().kv_imported_tokens == length - 1
    layout = read_header(pair.tickets[0].buffer).layout
    assert layout.dtype == codes
    # 2 layers x key and value x 2 heads x 16 tokens x (16 channels + a scale)
    assert layout.bytes_per_block == 2 * 2 * 2 * 16 * (16 + 4)

    def unbroken(**options: Any) -> MakeDriver:
        return make_driver(kv_cache_dtype=codes, **options)

    assert pair.decode.tokens("r") == alone(unbroken, prompt(length), max_tokens=12, **GREEDY)


@pytest.mark.parametrize(("here", "there"), [("auto", "int8"), ("int8", "fp8"), ("fp8", "auto")])
def test_kv_in_another_format_is_refused_and_computed_here(
    make_pair: MakePair, make_driver: MakeDriver, prompt: Prompt, here: str, there: str
) -> None:
    pair = make_pair({"kv_cache_dtype": there}, kv_cache_dtype=here)
    pair.decode.add("r", prompt(60), max_tokens=12, **GREEDY)
    pair.run()
    assert pair.ends == {"layout_mismatch": 1}

    def unbroken(**options: Any) -> MakeDriver:
        return make_driver(kv_cache_dtype=here, **options)

    assert pair.decode.tokens("r") == alone(unbroken, prompt(60), max_tokens=12, **GREEDY)
