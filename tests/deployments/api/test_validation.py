from __future__ import annotations

from typing import Any

import pytest

from inference_pio.deployments.api.protocol import CompletionRequest
from inference_pio.deployments.api.validation import (
    check_context,
    check_prompt_ids,
    sampling_params,
)
from inference_pio.workers.types import SAMPLING_PROFILES, RequestError, SamplingParams

NUM_TOKENS = 300


def params(profile: str | None = None, **fields: Any) -> SamplingParams:
    body = CompletionRequest.model_validate({"prompt": "hi", **fields})
    return sampling_params(
        body,
        num_tokens=NUM_TOKENS,
        encode_word=lambda word: [ord(character) for character in word],
        max_tokens=body.max_tokens,
        logprobs=None,
        default_profile=profile,
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"300": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"\u0663": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"stop_token_ids": [300]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"allowed_token_ids": [2**40]}, "allowed_token_ids"),
        ({"n": 10**9}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"min_tokens": 10**9, "max_tokens": 5}, "min_tokens"),
        ({"min_tokens": 10**18}, "min_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"stop": ["x"] * 10_000}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"bad_words": [" "]}, "bad_words"),
        ({"sampling_profile": "wild"}, "sampling_profile"),
    ],
)
def test_values_out_of_range_are_refused_with_their_field(
    fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        params(**fields)
    assert (caught.value.param or "").startswith(param)


def test_fields_arrive_as_parameters() -> None:
    made = params(
        logit_bias={"007": -5},
        stop="end",
        bad_words=["no"],
        allowed_token_ids=[1, 2],
        sampling_profile="loop_averse",
        seed=-(2**63),
    )
    assert made.logit_bias == {7: -5.0}
    assert made.stop == ("end",)
    assert made.bad_words == ((110, 111), (32, 110, 111))
    assert made.allowed_token_ids == (1, 2)
    assert made.thinking == SAMPLING_PROFILES["loop_averse"].thinking


def test_the_servers_profile_serves_requests_that_name_none() -> None:
    assert params().thinking is None
    assert params("loop_averse").thinking == SAMPLING_PROFILES["loop_averse"].thinking


def test_prompt_ids_must_name_tokens() -> None:
    check_prompt_ids([0, 299], NUM_TOKENS)
    for ids in ([], [300], [5, -1], [2**70]):
        with pytest.raises(RequestError):
            check_prompt_ids(ids, NUM_TOKENS)


def test_overflow_by_one_token_is_refused_with_the_numbers() -> None:
    check_context(90, 10, 100, "prompt")
    check_context(99, None, 100, "prompt")
    for prompt, wanted in ((91, 10), (100, None), (90, 11)):
        with pytest.raises(RequestError, match="100") as caught:
            check_context(prompt, wanted, 100, "prompt")
        assert caught.value.code == "context_length_exceeded"
        assert str(prompt) in caught.value.message
