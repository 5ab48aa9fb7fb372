from __future__ import annotations

import pytest

from inference_pio.workers.sampling.resolve import RepetitionWindow, SamplingDefaults
from inference_pio.workers.sampling.state import SamplingState
from inference_pio.workers.types import (
    SAMPLING_PROFILES,
    SamplingParams,
    SequencePhase,
    ThinkingMode,
    TokenKind,
)


def state(params: SamplingParams, prompt: tuple[int, ...] = (1, 2)) -> SamplingState:
    return SamplingState(
        params,
        SamplingDefaults(),
        ThinkingMode.THINKING,
        prompt,
        seed=11,
        stop_ids=frozenset({8, 9}),
    )


def test_a_row_carries_seed_step_and_what_the_request_asks() -> None:
    sampling = state(SamplingParams(logit_bias={4: 1.5}, allowed_token_ids=(6, 4, 6), logprobs=3))
    sampling.append(4, TokenKind.CONTENT)
    row = sampling.row(SequencePhase.ANSWER)
    assert (row.seed, row.step, row.num_logprobs) == (11, 1, 3)
    assert row.bias is not None
    assert (row.bias.ids.tolist(), row.bias.values.tolist()) == ([4], [1.5])
    assert row.allowed is not None
    assert row.allowed.tolist() == [4, 6]


def test_stop_ids_are_banned_until_min_tokens_are_out() -> None:
    sampling = state(SamplingParams(min_tokens=2, max_tokens=5))
    banned = []
    for _ in range(4):
        banned.append(sampling.row(SequencePhase.ANSWER).banned)
        sampling.append(4, TokenKind.CONTENT)
    assert banned == [(8, 9), (8, 9), (), ()]


def test_a_bad_word_is_banned_after_its_beginning_was_generated() -> None:
    sampling = state(SamplingParams(bad_words=((5,), (1, 2, 3))), prompt=(1, 2))
    banned = []
    for token_id in (1, 2, 2, 1):
        banned.append(sampling.row(SequencePhase.ANSWER).banned)
        sampling.append(token_id, TokenKind.CONTENT)
    assert banned == [(5,), (5,), (5, 3), (5,)]


def test_tokens_are_counted_only_where_a_penalty_may_ask() -> None:
    assert state(SamplingParams()).row(SequencePhase.ANSWER).penalties is None


@pytest.mark.parametrize(
    ("phase", "penalty", "counted"),
    [(SequencePhase.THINKING, 1.5, [4]), (SequencePhase.ANSWER, 1.0, [5])],
)
def test_a_phase_penalises_its_own_tokens(
    phase: SequencePhase, penalty: float, counted: list[int]
) -> None:
    profile = SAMPLING_PROFILES["loop_averse"]
    sampling = state(SamplingParams(thinking=profile.thinking, answer=profile.answer))
    for token_id, kind in ((3, TokenKind.TAG), (4, TokenKind.THOUGHT), (5, TokenKind.CONTENT)):
        sampling.append(token_id, kind)
    row = sampling.row(phase)
    assert row.sampling.repetition_penalty == penalty
    assert row.penalties is not None
    assert row.penalties.window(row.sampling.repetition_window).ids.tolist() == counted


def test_a_fork_keeps_the_past_and_goes_on_with_its_own_seed() -> None:
    params = SamplingParams(repetition_penalty=1.2, bad_words=((4, 5),))
    sampling = state(params)
    sampling.append(4, TokenKind.CONTENT)
    fork = sampling.fork(seed=12)
    fork.append(6, TokenKind.CONTENT)
    row, forked = sampling.row(SequencePhase.ANSWER), fork.row(SequencePhase.ANSWER)
    assert (row.seed, row.step, row.banned) == (11, 1, (5,))
    assert (forked.seed, forked.step, forked.banned) == (12, 2, ())
    assert row.penalties is not None
    assert forked.penalties is not None
    assert row.penalties.window(RepetitionWindow.SEQUENCE).ids.tolist() == [1, 2, 4]
    assert forked.penalties.window(RepetitionWindow.SEQUENCE).ids.tolist() == [1, 2, 4, 6]
