from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from inference_pio.deployments.api.protocol import ChatCompletionRequest, CompletionRequest
from inference_pio.deployments.api.thinking import chat_wishes, raw_wishes
from inference_pio.deployments.config import ThinkingConfig
from inference_pio.deployments.routing.classifier import Wishes
from inference_pio.workers.types import RequestError

Wished = tuple[bool | None, str, int | None, str]


def wish(**fields: Any) -> Wishes:
    body = ChatCompletionRequest.model_validate({"messages": [{"role": "user"}], **fields})
    return chat_wishes(body, ThinkingConfig(), soft_switch=None)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (None, "", None, "")),
        ({"enable_thinking": False}, (False, "enable_thinking", None, "")),
        (
            {"chat_template_kwargs": {"enable_thinking": False}},
            (False, "chat_template_kwargs", None, ""),
        ),
        (
            {"chat_template_kwargs": {"enable_thinking": True}},
            (True, "chat_template_kwargs", None, ""),
        ),
        ({"reasoning_effort": "none"}, (False, "reasoning_effort", None, "")),
        ({"reasoning_effort": "minimal"}, (False, "reasoning_effort", None, "")),
        ({"reasoning_effort": "low"}, (True, "reasoning_effort", 1024, "reasoning_effort")),
        ({"reasoning_effort": "high"}, (True, "reasoning_effort", 16384, "reasoning_effort")),
        ({"thinking_token_budget": 7}, (None, "", 7, "thinking_token_budget")),
        ({"thinking_budget": 0}, (None, "", 0, "thinking_budget")),
        ({"thinking_budget_tokens": 9}, (None, "", 9, "thinking_budget_tokens")),
        (
            {"thinking_budget": 9, "reasoning_effort": "low"},
            (True, "reasoning_effort", 9, "thinking_budget"),
        ),
        (
            {"thinking_budget": 9, "thinking_budget_tokens": 9},
            (None, "", 9, "thinking_budget"),
        ),
        ({"thinking": {"type": "enabled"}}, (True, "thinking", None, "")),
        ({"thinking": {"type": "disabled"}}, (False, "thinking", None, "")),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 2000}},
            (True, "thinking", 2000, "thinking.budget_tokens"),
        ),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 5}, "thinking_budget": 5},
            (True, "thinking", 5, "thinking_budget"),
        ),
        (
            {"enable_thinking": True, "reasoning_effort": "medium"},
            (True, "enable_thinking", 4096, "reasoning_effort"),
        ),
    ],
)
def test_every_name_means_the_same_setting(fields: dict[str, Any], expected: Wished) -> None:
    found = wish(**fields)
    assert (found.enabled, found.enabled_by, found.budget, found.budget_by) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"enable_thinking": True, "reasoning_effort": "none"},
        {"enable_thinking": False, "chat_template_kwargs": {"enable_thinking": True}},
        {"enable_thinking": False, "thinking": {"type": "enabled"}},
        {"thinking_budget": 1, "thinking_token_budget": 2},
        {"thinking_budget": 1, "thinking": {"type": "enabled", "budget_tokens": 2}},
        {"chat_template_kwargs": {"enable_thinking": "yes"}},
        {"chat_template_kwargs": {"other": True}},
    ],
)
def test_contradictions_and_unknown_template_keys_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        wish(**fields)
    assert caught.value.param is not None


@pytest.mark.parametrize(
    "switch",
    [
        {"type": "on"},
        {"type": "disabled", "budget_tokens": 5},
        {"type": "enabled", "budget_tokens": -1},
        {"type": "enabled", "tokens": 5},
        {},
    ],
)
def test_a_malformed_thinking_object_is_refused(switch: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        wish(thinking=switch)


def test_the_configured_efforts_are_budgets() -> None:
    body = ChatCompletionRequest.model_validate(
        {"messages": [{"role": "user"}], "reasoning_effort": "low"}
    )
    config = ThinkingConfig.model_validate({"effort": {"low": 10}})
    assert chat_wishes(body, config, None).budget == 10


def test_raw_prompts_have_every_budget_and_no_switch() -> None:
    for name in ("thinking_token_budget", "thinking_budget", "thinking_budget_tokens"):
        body = CompletionRequest.model_validate({"prompt": "a", name: 5})
        assert raw_wishes(body) == Wishes(budget=5, budget_by=name, raw=True)
    with pytest.raises(ValidationError, match="enable_thinking"):
        CompletionRequest.model_validate({"prompt": "a", "enable_thinking": True})
