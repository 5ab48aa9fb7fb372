"""Windows give back the KV blocks that no later token sees, and nobody notices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inference_pio.kernels.pattern import FULL

from .engine_pair import MakePair, alone

MakeDriver = Callable[..., Any]
Prompt = Callable[..., list[int]]

GREEDY: dict[str, Any] = {
    "temperature": 0.0,
    "repetition_penalty": 1.5,
    "ignore_eos": True,
    "loop_guard": False,
}
WINDOWS = ["sliding_window:24", "sink_window:20+4"]


def without_giving_back(driver: Any) -> Any:
    """The same engine, which keeps every block: its kernels hide keys, its books do not."""
    driver.engine._kv._pattern = FULL
    return driver


def busiest(driver: Any) -> int:
    """Runs to the end; the most blocks that were in use behind a step."""
    most = 0
    while driver.engine.has_work:
        driver.step()
        most = max(most, driver.engine.stats().kv_blocks_used)
    driver.run()
    return most


@pytest.mark.parametrize("attention", WINDOWS)
def test_a_window_holds_no_more_blocks_than_it_sees(
    make_driver: MakeDriver, prompt: Prompt, attention: str
) -> None:
    """While the prompt is computed in chunks, and while tokens are generated."""
    found = {}
    for keeps in (False, True):
        driver = make_driver(attention=attention, max_batched_tokens=32)
        if keeps:
            without_giving_back(driver)
        driver.add("r", prompt(400), max_tokens=100, **GREEDY)
        found[keeps] = busiest(driver), driver.tokens("r")
    assert found[False][1] == found[True][1]
    assert found[True][0] == 32  # 499 tokens in blocks of 16
    assert found[False][0] <= 1 + (24 + 32) // 16 + 1


@pytest.mark.parametrize("attention", WINDOWS)
def test_what_the_pool_could_never_hold_at_once_is_served(
    make_driver: MakeDriver, prompt: Prompt, attention: str
) -> None:
    """Eight blocks, 128 tokens of them; two requests of more than 300 in turns or together."""
    roomy, small = (
        make_driver(attention=attention, num_blocks=n, max_batched_tokens=32, max_model_len=400)
        for n in (64, 8)
    )
    for driver in (without_giving_back(roomy), small):
        for seed in range(2):
            driver.add(str(seed), prompt(300, seed), max_tokens=60, **GREEDY)
        driver.run()
    assert [small.tokens(n) for n in "01"] == [roomy.tokens(n) for n in "01"]
    with pytest.raises(ValueError, match="max_model_len is 400"):
        make_driver(num_blocks=8, max_batched_tokens=32, max_model_len=400)
    with pytest.raises(ValueError, match="max_model_len is 400"):
        make_driver(attention=attention, num_blocks=8, max_batched_tokens=128, max_model_len=400)


@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    attention=st.sampled_from([*WINDOWS, "sliding_window:5", "sink_window:40+30"]),
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=5),
    n=st.integers(1, 2),
    chunk=st.sampled_from([16, 30, 64]),
    blocks=st.integers(14, 24),
)
def test_any_load_gives_what_it_gives_where_blocks_are_kept(
    make_driver: MakeDriver,
    prompt: Prompt,
    attention: str,
    lengths: list[int],
    n: int,
    chunk: int,
    blocks: int,
) -> None:
    """Prompts that begin alike, several choices, preemption, prefix hits of what was given back."""
    found = []
    for keeps, num_blocks in ((True, 128), (False, blocks)):
        driver = make_driver(
            attention=attention,
            num_blocks=num_blocks,
            max_batched_tokens=chunk,
            max_model_len=200,
            default_reservation=1,
        )
        if keeps:
            without_giving_back(driver)
        for turn in range(2):
            for number, length in enumerate(lengths):
                ids = [*prompt(length), *prompt(3, number)]
                options = GREEDY | {"temperature": 1.0, "seed": number, "n": n}
                driver.add(f"{turn} {number}", ids, **options)
            driver.run()
        found.append({name: driver.tokens(*name) for name in sorted(driver.chunks)})
    assert found[0] == found[1]


@pytest.mark.parametrize("attention", WINDOWS)
def test_a_prefix_is_found_though_its_beginning_was_given_back(
    make_driver: MakeDriver, prompt: Prompt, attention: str
) -> None:
    """And though other prompts have taken the room of what lies before its window."""
    driver = make_driver(attention=attention, num_blocks=16, max_batched_tokens=32)
    turns = [prompt(300), [*prompt(300), *prompt(40, 3)]]
    for number, ids in enumerate(turns):
        driver.add(str(number), ids, max_tokens=8, **GREEDY)
        driver.run()
    assert driver.last("1").usage.cached_tokens == 288
    fresh = make_driver(attention=attention, prefix_caching=False)
    fresh.add("1", turns[1], max_tokens=8, **GREEDY)
    fresh.run()
    assert driver.tokens("1") == fresh.tokens("1")


@pytest.mark.parametrize("attention", WINDOWS)
def test_kv_of_another_engine_needs_room_for_all_of_it(
    make_pair: MakePair, make_driver: MakeDriver, prompt: Prompt, attention: str
) -> None:
    """The prompt is computed here where there is none, and where the other one has none."""
    expected = alone(
        lambda **options: make_driver(attention=attention, **options),
        prompt(300),
        max_tokens=20,
        **GREEDY,
    )
    for here, there, asked, ends in (
        (64, 64, 1, {"done": 1}),
        (64, 8, 1, {"context_length_exceeded": 1}),
        (8, 64, 0, {}),
    ):
        pair = make_pair(
            {"num_blocks": there},
            attention=attention,
            num_blocks=here,
            max_batched_tokens=32,
            max_model_len=400,
        )
        pair.decode.add("r", prompt(300), max_tokens=20, **GREEDY)
        pair.run()
        assert (len(pair.queries), pair.ends) == (asked, ends)
        assert pair.decode.tokens("r") == expected


@pytest.mark.parametrize("attention", WINDOWS)
def test_what_comes_back_from_a_tier_is_given_back_as_well(
    make_driver: MakeDriver, prompt: Prompt, attention: str
) -> None:
    """As far as the pool has room for it at once; the rest is computed."""
    driver = make_driver(
        attention=attention,
        num_blocks=12,
        max_batched_tokens=32,
        max_model_len=400,
        kv_paging={"host_bytes": 4 << 20},
    )
    driver.engine._paging._prefill_rate = lambda: None  # else a tiny model may compute faster
    try:
        first = []
        for turn in range(2):
            for seed in range(3):
                driver.add(f"{turn} {seed}", prompt(300, seed), max_tokens=8, **GREEDY)
                assert busiest(driver) <= 12
        first, again = ([driver.tokens(f"{turn} {seed}") for seed in range(3)] for turn in (0, 1))
        assert first == again
        assert driver.engine.stats().kv_paging.hit_tokens["host"] >= 3 * 100
    finally:
        driver.engine.close()


@pytest.mark.parametrize("attention", ["sliding_window:64", "sink_window:60+4"])
def test_the_trained_model_thinks_and_answers_as_where_blocks_are_kept(
    embedded_dir: Path, make_driver: MakeDriver, attention: str
) -> None:
    found = []
    for keeps in (False, True):
        driver = make_driver(embedded_dir, dtype="float32", attention=attention, num_blocks=200)
        if keeps:
            without_giving_back(driver)
        tokenizer = driver.engine.loaded.tokenizer
        question = "What is 417 + 58 - 903? Sort 30, 4, 12, 77, 5. "
        for number in range(3):
            text = f"<|im_start|>user\n{question * (8 * number + 1)}<|im_end|>\n"
            ids = tokenizer.encode(f"{text}<|im_start|>assistant\n<think>\n")
            driver.add(str(number), ids, max_tokens=120, thinking_budget=60, temperature=0.0)
        most = busiest(driver)
        assert most > 50 if keeps else most <= 3 * (1 + (64 + 64) // 16 + 1)
        found.append([driver.tokens(str(number)) for number in range(3)])
    assert found[0] == found[1]
