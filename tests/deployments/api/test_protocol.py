from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from inference_pio.deployments.api.errors import from_validation_error
from inference_pio.deployments.api.fields import HARMLESS, REFUSED
from inference_pio.deployments.api.protocol import ChatCompletionRequest, CompletionRequest
from inference_pio.workers.types import RequestError

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


def complaint(fields: dict[str, Any]) -> RequestError:
    with pytest.raises(ValidationError) as caught:
        ChatCompletionRequest.model_validate({**CHAT, **fields})
    return from_validation_error(caught.value)


def test_an_unknown_field_is_refused_with_the_nearest_name() -> None:
    error = complaint({"temprature": 1.0})
    assert "temprature" in error.message
    assert "'temperature'" in error.message


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_fields_that_are_refused_say_why(name: str) -> None:
    assert REFUSED[name] in complaint({name: {"a": 1}}).message


@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_harmless_fields_are_taken_whatever_they_hold(name: str) -> None:
    ChatCompletionRequest.model_validate({**CHAT, name: {"a": 1}})


def test_null_is_the_same_as_absent() -> None:
    absent = ChatCompletionRequest.model_validate(CHAT)
    every = dict.fromkeys(set(ChatCompletionRequest.model_fields) - {"messages"})
    assert ChatCompletionRequest.model_validate({**CHAT, **every}) == absent


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "0.5"}, "temperature"),
        ({"n": True}, "n"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": 5}, "stop"),
        ({"stop_token_ids": ["1"]}, "stop_token_ids"),
        ({"logit_bias": {"1": "x"}}, "logit_bias"),
        ({"top_logprobs": 151936, "logprobs": True}, "top_logprobs"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
    ],
)
def test_a_wrong_type_is_refused_with_its_field(fields: dict[str, Any], param: str) -> None:
    error = complaint(fields)
    assert error.param is not None
    assert error.param.startswith(param)


def test_plain_text_is_the_one_response_format() -> None:
    body = ChatCompletionRequest.model_validate({**CHAT, "response_format": {"type": "text"}})
    assert body.response_format is not None


@pytest.mark.parametrize("prompt", ["a", [1, 2], ["a", "b"], [[1], [2, 3]], []])
def test_prompts_are_texts_or_ids(prompt: Any) -> None:
    assert CompletionRequest.model_validate({"prompt": prompt}).prompt == prompt


@pytest.mark.parametrize("prompt", [1, [1, "a"], [[1], "a"], {"a": 1}, [[1.5]], [True]])
def test_mixed_and_odd_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(ValidationError):
        CompletionRequest.model_validate({"prompt": prompt})
