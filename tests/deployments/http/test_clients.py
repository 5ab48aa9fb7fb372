"""Clients that people use, with their own checks of what they are sent switched on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from langchain_core.utils.utils import convert_to_secret_str
from langchain_openai import ChatOpenAI
from openai import BadRequestError, NotFoundError, OpenAI

QUESTION = "What is 12 + 30 + 5?"


@pytest.fixture
def openai(service_url: str) -> Iterator[OpenAI]:
    """The OpenAI client; it refuses answers that do not fit its own types."""
    with OpenAI(
        base_url=f"{service_url}/v1",
        api_key="none",
        max_retries=0,
        _strict_response_validation=True,
    ) as client:
        yield client


def chat(openai: OpenAI, **fields: Any) -> Any:
    return openai.chat.completions.create(
        model="embedded", messages=[{"role": "user", "content": QUESTION}], **fields
    )


def test_openai_chat(openai: OpenAI) -> None:
    answer = chat(openai, seed=1, max_completion_tokens=300, logprobs=True, top_logprobs=1)
    assert answer.choices[0].message.content == "47"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0
    assert answer.choices[0].logprobs.content
    assert answer.choices[0].message.reasoning_content


def test_openai_chat_stream(openai: OpenAI) -> None:
    text, usage, reasons = "", None, []
    for piece in chat(openai, seed=1, stream=True, stream_options={"include_usage": True}):
        usage = piece.usage or usage
        for choice in piece.choices:
            text += choice.delta.content or ""
            reasons.append(choice.finish_reason)
    assert text == "47"
    assert usage is not None
    assert [reason for reason in reasons if reason] == ["stop"]


def test_openai_extra_fields(openai: OpenAI) -> None:
    answer = chat(
        openai,
        seed=1,
        user="someone",
        metadata={"a": "b"},
        store=False,
        reasoning_effort="none",
        extra_body={"top_k": 5, "chat_template_kwargs": {"enable_thinking": False}},
    )
    assert answer.choices[0].message.reasoning is None


def test_openai_completions(openai: OpenAI) -> None:
    answer = openai.completions.create(
        model="embedded", prompt=["abc", "def"], max_tokens=3, logprobs=2, seed=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    # The client's types know no null finish reason, which OpenAI itself streams here.
    lenient = openai.with_options(_extra_kwargs={"_strict_response_validation": False})
    pieces = lenient.completions.create(model="embedded", prompt="abc", seed=1, stream=True)
    assert sum(bool(p.choices[0].finish_reason) for p in pieces) == 1


def test_openai_models_and_errors(openai: OpenAI) -> None:
    assert [model.id for model in openai.models.list()] == ["embedded"]
    assert openai.models.retrieve("embedded").id == "embedded"
    with pytest.raises(NotFoundError, match="does not exist"):
        openai.models.retrieve("other")
    with pytest.raises(BadRequestError) as caught:
        chat(openai, extra_body={"temprature": 1})
    assert "temperature" in str(caught.value)


def test_langchain(service_url: str) -> None:
    model = ChatOpenAI(
        base_url=f"{service_url}/v1",
        api_key=convert_to_secret_str("none"),
        model="embedded",
        seed=1,
        max_retries=0,
        stream_usage=True,
    )
    answer = model.invoke([HumanMessage(QUESTION)])
    assert answer.content == "47"
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_token_details"]["reasoning"] > 0
    pieces = list(model.stream([HumanMessage(QUESTION)]))
    assert "".join(str(piece.content) for piece in pieces) == "47"
    assert sum(piece.usage_metadata is not None for piece in pieces) == 1
    model.root_client.close()
