"""One engine, step by step: refusals, seeds, aborts, deadlines and books."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from inference_pio.workers.types import FinishReason, RequestError

MakeDriver = Callable[..., Any]
Prompt = Callable[..., list[int]]

PLAIN = {"ignore_eos": True, "loop_guard": False}
GREEDY = PLAIN | {"temperature": 0.0}


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "params", "message"),
    [
        (
            100,
            {},
            "limit is 100 tokens; the prompt has 100 and at least 1 are to be generated: 101",
        ),
        (90, {"max_tokens": 11}, "the prompt has 90 and 11 are to be generated: 101 in all"),
        (5000, {"max_tokens": 1}, "the prompt has 5000 and 1 are to be generated: 5001 in all"),
    ],
)
def test_the_context_limit_is_told_with_its_numbers(
    make_driver: MakeDriver, prompt: Prompt, length: int, params: dict[str, int], message: str
) -> None:
    driver = make_driver(max_model_len=100)
    with pytest.raises(RequestError, match=message) as caught:
        driver.add("r", prompt(length), **params)
    assert caught.value.code == "context_length_exceeded"
    assert not driver.engine.has_work


@pytest.mark.parametrize("length", [1, 98, 99])
def test_the_context_limit_ends_an_open_request(
    make_driver: MakeDriver, prompt: Prompt, length: int
) -> None:
    driver = make_driver(max_model_len=100)
    driver.add("open", prompt(length), **GREEDY)
    driver.add("named", prompt(length), max_tokens=100 - length, **GREEDY)
    driver.run()
    for name in ("open", "named"):
        assert driver.end(name) is FinishReason.LENGTH
        assert len(driver.tokens(name)) == 100 - length


def test_the_models_own_limit_is_the_default(
    make_driver: MakeDriver, make_text_checkpoint: Callable[..., Path], prompt: Prompt
) -> None:
    driver = make_driver(make_text_checkpoint(max_position_embeddings=70), max_num_seqs=2)
    with pytest.raises(RequestError, match="the context limit is 70 tokens"):
        driver.add("r", prompt(70))
    driver.add("r", prompt(60), **GREEDY)
    driver.run()
    assert len(driver.tokens("r")) == 10


@pytest.mark.parametrize(
    ("ids", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1, 497], {}, "the prompt holds id 497; the model's tokens are 0 to 496"),
        ([1, -1], {}, "the prompt holds id -1"),
        ([1], {"logit_bias": {500: 1.0}}, "500"),
        ([1], {"stop_token_ids": (508,)}, "508"),
        ([1], {"allowed_token_ids": (497,)}, "497"),
        ([1], {"bad_words": ((3, 600),)}, "600"),
        ([1], {"n": 17}, "n is 17; this engine runs at most 16"),
        ([1], {"n": 2, "max_tokens": 90}, "for each of 2 choices needs 12 KV blocks .* has 10"),
    ],
)
def test_refusals_touch_nothing(
    make_driver: MakeDriver, ids: list[int], params: dict[str, Any], message: str
) -> None:
    driver = make_driver(num_blocks=10)
    before = driver.engine.stats()
    with pytest.raises(RequestError, match=message):
        driver.add("r", ids, **params)
    assert driver.engine.stats() == before
    assert not driver.engine.has_work


def test_an_id_in_use_is_refused_and_the_first_request_goes_on(
    make_driver: MakeDriver, prompt: Prompt
) -> None:
    driver = make_driver()
    driver.add("r", prompt(5), max_tokens=4, **GREEDY)
    with pytest.raises(ValueError, match="a request of that id is in the engine"):
        driver.add("r", prompt(6), max_tokens=4, **GREEDY)
    driver.run()
    assert driver.last("r").usage.prompt_tokens == 5
    assert len(driver.tokens("r")) == 4


# --- seeds ----------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_text_in_any_batch(make_driver: MakeDriver, prompt: Prompt) -> None:
    def run(order: Sequence[int], **options: Any) -> dict[int, list[list[int]]]:
        driver = make_driver(**options)
        for number in order:
            driver.add(
                str(number),
                prompt(10 + 7 * number),
                seed=number % 3,
                n=1 + number % 2,
                temperature=0.8 + number / 10,
                top_k=(0, 20, 5)[number % 3],
                top_p=0.9 if number % 2 else 1.0,
                presence_penalty=0.5 if number == 3 else 0.0,
                max_tokens=12,
                **PLAIN,
            )
        driver.run()
        return {
            number: [driver.tokens(str(number), index) for index in range(1 + number % 2)]
            for number in order
        }

    numbers = list(range(6))
    together = run(numbers)
    assert {number: run([number])[number] for number in numbers} == together
    assert run(numbers[::-1], max_batched_tokens=17, max_num_seqs=3) == together
    assert run(numbers, num_blocks=8, default_reservation=1) == together
    assert together[1][0] != together[1][1]


def test_requests_without_seed_differ_and_come_again_with_the_engines_seed(
    make_driver: MakeDriver, prompt: Prompt
) -> None:
    def run(seed: int) -> list[list[int]]:
        driver = make_driver(seed=seed)
        for name in "ab":
            driver.add(name, prompt(9), temperature=1.0, top_k=0, max_tokens=12, **PLAIN)
        driver.run()
        return [driver.tokens(name) for name in "ab"]

    first = run(1)
    assert first[0] != first[1]
    assert run(1) == first
    assert run(2) != first


# --- aborts and deadlines -------------------------------------------------------------------------


def test_abort_in_every_state(make_driver: MakeDriver, prompt: Prompt) -> None:
    driver = make_driver(max_num_seqs=4)
    driver.add("running", prompt(10), n=2, max_tokens=50, **GREEDY)
    for _ in range(3):
        driver.step()
    driver.add("prefilling", prompt(200), n=2, max_tokens=50, **GREEDY)
    driver.step()
    driver.add("waiting", prompt(10), n=3, max_tokens=50, **GREEDY)
    driver.step()
    for name in ("running", "prefilling", "waiting", "unknown", "running"):
        driver.engine.abort(name)
        driver.engine.check_integrity()
    driver.run()
    assert {key for key in driver.chunks if key[0] != "running"} == {
        ("prefilling", 0),
        ("prefilling", 1),
        ("waiting", 0),
        ("waiting", 1),
        ("waiting", 2),
    }
    for key, chunks in driver.chunks.items():
        assert chunks[-1].finish_reason is FinishReason.ABORT, key
        assert sum(len(chunk.token_ids) for chunk in chunks) == (5 if key[0] == "running" else 0)
    driver.engine.abort("running")
    assert not driver.engine.has_work


def test_one_choice_may_end_before_its_siblings_are_aborted(
    make_driver: MakeDriver, prompt: Prompt
) -> None:
    driver = make_driver()
    driver.add("r", prompt(10), n=6, temperature=2.0, top_k=0, seed=1, max_tokens=300,
               stop_token_ids=tuple(range(0, 497, 40)), **PLAIN)  # fmt: skip
    while not any(chunks[-1].finish_reason for chunks in driver.chunks.values()):
        driver.step()
    driver.engine.abort("r")
    driver.run()
    ends = [driver.end("r", index) for index in range(6)]
    assert set(ends) == {FinishReason.STOP, FinishReason.ABORT}


def test_a_deadline_ends_a_request_wherever_it_is(make_driver: MakeDriver, prompt: Prompt) -> None:
    driver = make_driver(max_num_seqs=2, max_model_len=2000, num_blocks=300)
    driver.add("running", prompt(10), n=2, deadline_s=0.05, max_tokens=1900, **GREEDY)
    driver.add("waiting", prompt(10), n=2, deadline_s=0.05, max_tokens=1900, **GREEDY)
    driver.step()
    time.sleep(0.06)
    driver.run()
    assert len(driver.chunks) == 4
    for (name, _), chunks in driver.chunks.items():
        assert chunks[-1].finish_reason is FinishReason.ERROR
        assert chunks[-1].error.code == "deadline_exceeded"
        tokens = sum(len(chunk.token_ids) for chunk in chunks)
        assert f"0.05 s passed after {tokens} tokens" in chunks[-1].error.message
        assert tokens == (1 if name == "running" else 0)


# --- books ----------------------------------------------------------------------------


def test_stats_add_up(make_driver: MakeDriver, prompt: Prompt) -> None:
    driver = make_driver()
    driver.add("a", prompt(40), max_tokens=5, n=2, **GREEDY)
    assert driver.engine.stats().waiting == 1
    driver.step()
    stats = driver.engine.stats()
    assert (stats.running, stats.waiting, stats.steps) == (2, 0, 1)
    assert stats.kv_blocks_used == 3
    driver.add("b", prompt(40), max_tokens=3, **GREEDY)
    driver.run()
    stats = driver.engine.stats()
    assert stats.prompt_tokens == 80
    assert stats.generated_tokens == 13
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (80, 32)
    assert stats.kv_blocks_cached == 2
    assert stats.requests_finished == {"length": 3}
