"""The embedded model's figures, through the engine, on problems it has not seen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from inference_pio import LLM, SamplingParams
from inference_pio.benchmarks import accuracy
from inference_pio.benchmarks.accuracy import Score, score_all

COUNT = 120
PARAMS = SamplingParams(temperature=0, max_tokens=400)
NEEDS_NO_STEPS = ("copy", "compare", "reverse_short", "small_sum")
ASKED_OFTEN = ("arithmetic", *NEEDS_NO_STEPS)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("embedded", block_size=16, kv_cache_bytes=128 << 20) as llm:
        yield llm


@pytest.fixture(scope="module")
def scores(llm: LLM) -> dict[tuple[str, bool], Score]:
    """Of the kinds whose shares are told below."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accuracy, "KINDS", ASKED_OFTEN)
        found = score_all(llm, COUNT, 1000, PARAMS, lambda _: None)
    return {(score.kind, score.thinking): score for score in found}


def test_thinking_solves_the_arithmetic(scores: dict[tuple[str, bool], Score]) -> None:
    thinking, at_once = scores["arithmetic", True], scores["arithmetic", False]
    assert thinking.share >= 0.98
    assert thinking.share - at_once.share >= 0.5
    assert max(thinking.thought_tokens) >= 100
    assert set(at_once.thought_tokens) == {0}


@pytest.mark.parametrize("kind", NEEDS_NO_STEPS)
def test_no_thought_is_needed_where_there_are_no_steps(
    scores: dict[tuple[str, bool], Score], kind: str
) -> None:
    assert scores[kind, False].share >= 0.9


def test_a_cut_thought_still_ends_in_an_answer(llm: LLM) -> None:
    params = SamplingParams(temperature=0, thinking_budget=20, max_tokens=400)
    for number in range(101, 121):
        question = f"What is {number} + 58 - 903?"
        answer = llm.chat([{"role": "user", "content": question}], params).choices[0]
        assert answer.content.removeprefix("-").isdigit()
