"""What of a request is asked for again, over many ways to have come halfway."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_pio.deployments.migration import (
    LONGEST_PAUSE_S,
    Choice,
    all_choices,
    loses_its_replica,
    pause_s,
    remaining_requests,
)
from inference_pio.workers.types import (
    FinishReason,
    GenerateRequest,
    RequestError,
    Resumption,
    SamplingParams,
    TokenChunk,
    Usage,
)

progress = st.none() | st.just("ended") | st.lists(st.integers(0, 9), max_size=4)
"""Of one choice: no chunk yet, its end, or the tokens that came."""


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[GenerateRequest], dict[Choice, list[int] | None]]:
    asked = [
        GenerateRequest(
            f"r{number}",
            (1, 2),
            SamplingParams(
                n=draw(st.integers(1, 4)), prompt_logprobs=draw(st.sampled_from([None, 2]))
            ),
            priority=number,
            deadline_s=60,
        )
        for number in range(draw(st.integers(1, 3)))
    ]
    received: dict[Choice, list[int] | None] = {}
    for choice in all_choices(asked):
        state = draw(progress)
        if state is None or isinstance(state, list):
            received[choice] = state
    return asked, received


@given(requests())
def test_what_is_open_is_asked_for_again_and_nothing_else(
    given_: tuple[list[GenerateRequest], dict[Choice, list[int] | None]],
) -> None:
    asked, received = given_
    remaining = remaining_requests(asked, received, 7.5)
    of = {request.request_id: request for request in asked}
    # Together they stand for exactly the open choices, each at its place.
    found = {
        (request.request_id, index): next(
            (part.token_ids for part in request.resume if part.index == index), ()
        )
        for request in remaining
        for index in request.choice_indices
    }
    assert found == {choice: tuple(tokens or ()) for choice, tokens in received.items()}
    assert len({request.request_id for request in remaining}) == len(remaining)
    for request in remaining:
        before = of[request.request_id]
        untold = any(
            tokens is None for (name, _), tokens in received.items() if name == before.request_id
        )
        assert request.params.prompt_logprobs == (before.params.prompt_logprobs if untold else None)
        same = dataclasses.replace(
            request,
            resume=(),
            deadline_s=before.deadline_s,
            params=dataclasses.replace(
                request.params, prompt_logprobs=before.params.prompt_logprobs
            ),
        )
        assert request.deadline_s == 7.5
        assert same == before


def test_a_request_that_told_nothing_starts_anew() -> None:
    request = GenerateRequest("r", (1,), SamplingParams(n=2))
    assert remaining_requests([request], {("r", 0): None, ("r", 1): None}, 1.0)[0].resume == ()
    one_ended = remaining_requests([request], {("r", 1): None}, 1.0)[0].resume
    assert one_ended == (Resumption(1, ()),)


@pytest.mark.parametrize(
    ("reason", "code", "lost"),
    [
        (FinishReason.ERROR, "engine_dead", True),
        (FinishReason.ERROR, "internal_error", False),
        (FinishReason.ERROR, None, False),
        (FinishReason.ABORT, None, True),
        (FinishReason.STOP, None, False),
        (FinishReason.LENGTH, None, False),
        (None, None, False),
    ],
)
def test_only_an_engine_that_is_gone_moves_a_request(
    reason: FinishReason | None, code: str | None, lost: bool
) -> None:
    error = None if code is None else RequestError("so", code=code)
    chunk = TokenChunk("r", 0, 0, (), (), Usage(1, 0, 0, 0), finish_reason=reason, error=error)
    assert loses_its_replica(chunk) is lost


def test_pauses_grow_and_stay_bounded() -> None:
    pauses = [pause_s(failures) for failures in range(1, 2000)]
    assert pauses == sorted(pauses)
    assert 0 < pauses[0] < 0.2
    assert pauses[-1] == LONGEST_PAUSE_S
