"""The engine against transformers: the same tokens and log-probabilities, however it gets there.

The oracle sees prompt and output at once, without cache, batch or chunks. Greedy tokens are equal
if each is the oracle's best after those before it.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

MakeCheckpoint = Callable[..., Path]
MakeDriver = Callable[..., Any]
Prompt = Callable[..., list[int]]

BLOCK, CHUNK = 16, 48
FP32_TOLERANCE = 2e-4
BF16_TOLERANCE = 0.05
NUM_TOKENS = 497
"""Tokens that exist; the checkpoint's rows above are padding."""
GREEDY: dict[str, Any] = {
    "temperature": 0.0,
    "ignore_eos": True,
    "loop_guard": False,
    "logprobs": 5,
}
SHAPES: dict[str, dict[str, Any]] = {
    "6/3 heads of 24, tied": {
        "hidden_size": 72,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 24,
        "num_hidden_layers": 3,
    },
    "5/1 heads of 32, untied, biases": {
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "hidden_size": 100,
        "tie_word_embeddings": False,
        "attention_bias": True,
    },
    "4/2 heads of 80, rope_parameters": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 80,
        "hidden_size": 130,
        "rope_theta": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6},
    },
}
EDGES = sorted(
    {1, 2}
    | {BLOCK * k + d for k in (1, 2, 4) for d in (-1, 0, 1)}
    | {CHUNK * k + d for k in (1, 2, 3) for d in (-1, 0, 1)}
)
"""Prompt lengths around block and chunk edges."""


@functools.cache
def transformers_model(folder: Path, dtype: torch.dtype) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.inference_mode()
def oracle(folder: Path, ids: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Log-probabilities after each of ``ids``, over the tokens that exist."""
    logits = transformers_model(folder, dtype)(torch.tensor([ids])).logits[0, :, :NUM_TOKENS]
    return logits.float().log_softmax(-1)


def difference(entries: Sequence[Any], expected: Tensor) -> float:
    """The largest difference of any reported log-probability, the alternatives' included."""
    worst = 0.0
    for entry, row in zip(entries, expected, strict=True):
        for token, logprob in ((entry.token_id, entry.logprob), *entry.top):
            worst = max(worst, abs(logprob - float(row[token])))
    return worst


def assert_parity(
    driver: Any, folder: Path, name: str, prompt: Sequence[int], index: int = 0
) -> None:
    """One greedy choice equals the oracle's."""
    output = driver.tokens(name, index)
    assert output
    expected = oracle(folder, [*prompt, *output])[len(prompt) - 1 : -1]
    assert output == expected.argmax(-1).tolist(), f"{name}: another greedy text"
    entries = driver.logprobs(name, index)
    assert [entry.token_id for entry in entries] == output
    assert difference(entries, expected) <= FP32_TOLERANCE
    best = expected.topk(5).indices.tolist()
    assert [[token for token, _ in entry.top] for entry in entries] == best


@pytest.fixture(scope="module", params=list(SHAPES))
def folder(request: pytest.FixtureRequest, make_text_checkpoint: MakeCheckpoint) -> Path:
    return make_text_checkpoint(**SHAPES[request.param])


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "together"])
def test_prompt_lengths_around_block_and_chunk_edges(
    folder: Path, make_driver: MakeDriver, prompt: Prompt, alone: bool
) -> None:
    driver = make_driver(folder, max_batched_tokens=CHUNK, prefix_caching=False)
    for length in EDGES:
        driver.add(str(length), prompt(length), max_tokens=4, **GREEDY)
        if alone:
            driver.run()
    driver.run()
    chunks_alone = sum(-(-length // CHUNK) + 3 for length in EDGES)
    steps = driver.engine.stats().steps
    assert steps == chunks_alone if alone else steps < chunks_alone
    for length in EDGES:
        assert_parity(driver, folder, str(length), prompt(length))


@pytest.mark.parametrize("seed", range(3))
def test_mixed_batches_with_arrivals_at_any_step(
    folder: Path, make_driver: MakeDriver, prompt: Prompt, seed: int
) -> None:
    rng = random.Random(seed)
    driver = make_driver(folder, max_num_seqs=5, max_batched_tokens=rng.choice([5, 17, 40]))
    prompts = {f"r{i}": prompt(rng.randint(1, 80), i) for i in range(9)}
    for name, ids in prompts.items():
        driver.add(name, ids, max_tokens=rng.randint(1, 20), **GREEDY)
        for _ in range(rng.randrange(6)):
            driver.step()
    driver.run()
    for name, ids in prompts.items():
        assert_parity(driver, folder, name, ids)


def test_prefix_hits(folder: Path, make_driver: MakeDriver, prompt: Prompt) -> None:
    driver = make_driver(folder)
    first = prompt(70)
    driver.add("first", first, max_tokens=30, **GREEDY)
    driver.run()
    conversation = [*first, *driver.tokens("first"), *prompt(9, 1)]
    follow_ups = {
        "64 shared": ([*first[:64], *prompt(20, 1)], 64),
        "64 shared and nothing new": (first[:64], 48),  # the last token is computed for its logits
        "63 shared": ([*first[:63], *prompt(20, 2)], 48),
        "15 shared": ([*first[:15], *prompt(20, 3)], 0),
        "a second turn": (conversation, 96),
    }
    for name, (ids, _) in follow_ups.items():
        driver.add(name, ids, max_tokens=10, **GREEDY)
    driver.run()
    for name, (ids, cached) in follow_ups.items():
        assert driver.last(name).usage.cached_tokens == cached, name
        assert_parity(driver, folder, name, ids)


def test_prefix_hits_do_not_cross_salts(make_driver: MakeDriver, prompt: Prompt) -> None:
    driver = make_driver()
    for name, salt in (("a", "one"), ("b", "two"), ("c", "one")):
        driver.add(name, prompt(70), max_tokens=2, cache_salt=salt, **GREEDY)
        driver.run()
    cached = [driver.last(name).usage.cached_tokens for name in "abc"]
    assert cached == [0, 0, 64]


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preemption_for_blocks(
    folder: Path, make_driver: MakeDriver, prompt: Prompt, prefix_caching: bool
) -> None:
    driver = make_driver(
        folder,
        num_blocks=9,
        max_model_len=70,
        default_reservation=1,
        max_batched_tokens=20,
        prefix_caching=prefix_caching,
    )
    prompts = {f"r{length}": prompt(length) for length in (3, 16, 31, 33)}
    for name, ids in prompts.items():
        driver.add(name, ids, **GREEDY)
    driver.run()
    assert driver.engine.stats().preemptions >= 2
    for name, ids in prompts.items():
        assert len(driver.tokens(name)) == 70 - len(ids)
        assert_parity(driver, folder, name, ids)


def test_preemption_for_priority(folder: Path, make_driver: MakeDriver, prompt: Prompt) -> None:
    driver = make_driver(folder, num_blocks=6)
    driver.add("low", prompt(40), max_tokens=30, priority=5, **GREEDY)
    for _ in range(12):
        driver.step()
    driver.add("high", prompt(50), max_tokens=30, priority=0, **GREEDY)
    driver.run()
    assert driver.engine.stats().preemptions == 1
    assert_parity(driver, folder, "low", prompt(40))
    assert_parity(driver, folder, "high", prompt(50))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 60])
def test_choices_share_the_prompt_and_part_by_copy_on_write(
    folder: Path, make_driver: MakeDriver, prompt: Prompt, length: int
) -> None:
    driver = make_driver(folder, max_batched_tokens=CHUNK)
    ids = prompt(length)
    driver.add("n", ids, n=4, max_tokens=20, **(GREEDY | {"temperature": 1.0, "seed": 5}))
    driver.add("m", prompt(23), max_tokens=40, **GREEDY)
    driver.run()
    outputs = [driver.tokens("n", index) for index in range(4)]
    assert len({tuple(output) for output in outputs}) == 4
    for index, output in enumerate(outputs):
        expected = oracle(folder, [*ids, *output])[length - 1 : -1]
        assert difference(driver.logprobs("n", index), expected) <= FP32_TOLERANCE
    assert_parity(driver, folder, "m", prompt(23))


def test_choices_after_preemption(folder: Path, make_driver: MakeDriver, prompt: Prompt) -> None:
    options = {"temperature": 1.0, "seed": 5, "n": 3}
    unbroken = make_driver(folder, max_model_len=64)
    unbroken.add("n", prompt(20), **(GREEDY | options))
    unbroken.run()
    driver = make_driver(folder, max_model_len=64, num_blocks=7, default_reservation=1)
    driver.add("n", prompt(20), **(GREEDY | options))
    driver.run()
    assert driver.engine.stats().preemptions > 0
    assert unbroken.engine.stats().preemptions == 0
    for index in range(3):
        assert driver.tokens("n", index) == unbroken.tokens("n", index)


@pytest.mark.parametrize("length", [1, 2, 16, 48, 49, 130])
def test_prompt_logprobs(
    folder: Path, make_driver: MakeDriver, prompt: Prompt, length: int
) -> None:
    driver = make_driver(folder, max_batched_tokens=CHUNK)
    ids = prompt(length)
    driver.add("same prompt before", ids, max_tokens=1, **GREEDY)
    driver.run()
    driver.add("other", prompt(30), max_tokens=20, **GREEDY)
    driver.add("scored", ids, max_tokens=3, prompt_logprobs=4, **GREEDY)
    driver.run()
    chunks = driver.chunks["scored", 0]
    entries = chunks[0].prompt_logprobs
    assert [chunk.prompt_logprobs for chunk in chunks[1:]] == [None] * (len(chunks) - 1)
    assert entries[0] is None
    assert [entry.token_id for entry in entries[1:]] == ids[1:]
    expected = oracle(folder, ids)[:-1]
    assert difference(entries[1:], expected) <= FP32_TOLERANCE
    best = expected.topk(4).indices.tolist() if length > 1 else []
    assert [[token for token, _ in entry.top] for entry in entries[1:]] == best
    assert_parity(driver, folder, "scored", ids)


def test_prompt_logprobs_of_a_prompt_that_was_preempted(
    folder: Path, make_driver: MakeDriver, prompt: Prompt
) -> None:
    driver = make_driver(folder, num_blocks=8, max_batched_tokens=20)
    driver.add("scored", prompt(90), max_tokens=2, prompt_logprobs=0, priority=5, **GREEDY)
    for _ in range(3):
        driver.step()
    assert not driver.chunks
    driver.add("high", prompt(70), max_tokens=2, **GREEDY)
    driver.run()
    assert driver.engine.stats().preemptions == 1
    entries = driver.chunks["scored", 0][0].prompt_logprobs
    assert [entry.token_id for entry in entries[1:]] == prompt(90)[1:]
    assert difference(entries[1:], oracle(folder, prompt(90))[:-1]) <= FP32_TOLERANCE


def test_positions_beyond_8k(
    make_text_checkpoint: MakeCheckpoint, make_driver: MakeDriver, prompt: Prompt
) -> None:
    folder = make_text_checkpoint(num_attention_heads=2, num_key_value_heads=1, head_dim=24)
    driver = make_driver(folder, num_blocks=300, block_size=32, max_batched_tokens=1500)
    for name, ids in (("short", prompt(40)), ("long", prompt(8185)), ("edge", prompt(33))):
        driver.add(name, ids, max_tokens=16, **GREEDY)
    driver.run()
    assert_parity(driver, folder, "long", prompt(8185))
    assert_parity(driver, folder, "short", prompt(40))


@pytest.mark.parametrize("shape", list(SHAPES))
def test_bfloat16_stays_near(
    make_text_checkpoint: MakeCheckpoint, make_driver: MakeDriver, prompt: Prompt, shape: str
) -> None:
    folder = make_text_checkpoint(**SHAPES[shape], initializer_range=0.06)
    driver = make_driver(folder, dtype="bfloat16", max_batched_tokens=CHUNK)
    lengths = (1, 17, 49, 130)
    for length in lengths:
        driver.add(str(length), prompt(length), max_tokens=8, **GREEDY)
    driver.run()
    for length in lengths:
        ids = [*prompt(length), *driver.tokens(str(length))]
        for dtype in (torch.bfloat16, torch.float32):
            expected = oracle(folder, ids, dtype)[length - 1 : -1]
            assert difference(driver.logprobs(str(length)), expected) <= BF16_TOLERANCE


def test_logprobs_sum_to_one_without_the_padding_rows(
    make_driver: MakeDriver, prompt: Prompt
) -> None:
    """Twelve padding rows of large logits would take most of the probability."""
    driver = make_driver()
    model = driver.engine.loaded.model
    plain = model.logits

    def logits(hidden: Tensor) -> Tensor:
        scores = plain(hidden)
        scores[:, NUM_TOKENS:] = 50.0
        return scores

    model.logits = logits
    driver.add("r", prompt(20), max_tokens=8, **(GREEDY | {"logprobs": 20, "temperature": 3.0}))
    driver.run()
    assert max(driver.tokens("r")) < NUM_TOKENS
    assert all(math.exp(e.top[0][1]) > 1 / NUM_TOKENS for e in driver.logprobs("r"))
