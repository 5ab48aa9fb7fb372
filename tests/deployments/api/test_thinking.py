from __future__ import annotations

from typing import Any

import pytest

from inference_pio.deployments.api.protocol import ChatCompletionRequest
from inference_pio.deployments.api.thinking import ThinkingSetting, resolve_thinking
from inference_pio.deployments.config import ThinkingConfig
from inference_pio.workers.types import RequestError


def resolve(config: ThinkingConfig | None = None, **fields: Any) -> ThinkingSetting:
    body = ChatCompletionRequest.model_validate({"messages": [{"role": "user"}], **fields})
    return resolve_thinking(body, config or ThinkingConfig())


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ThinkingSetting(None, None)),
        ({"enable_thinking": False}, ThinkingSetting(False, None)),
        ({"chat_template_kwargs": {"enable_thinking": False}}, ThinkingSetting(False, None)),
        ({"chat_template_kwargs": {"enable_thinking": True}}, ThinkingSetting(True, None)),
        ({"reasoning_effort": "none"}, ThinkingSetting(False, None)),
        ({"reasoning_effort": "minimal"}, ThinkingSetting(False, None)),
        ({"reasoning_effort": "low"}, ThinkingSetting(True, 1024)),
        ({"reasoning_effort": "high"}, ThinkingSetting(True, 16384)),
        ({"thinking_token_budget": 7}, ThinkingSetting(None, 7)),
        ({"thinking_budget": 0}, ThinkingSetting(None, 0)),
        ({"thinking_budget_tokens": 9}, ThinkingSetting(None, 9)),
        ({"thinking_budget": 9, "reasoning_effort": "low"}, ThinkingSetting(True, 9)),
        ({"thinking_budget": 9, "thinking_budget_tokens": 9}, ThinkingSetting(None, 9)),
        ({"enable_thinking": True, "reasoning_effort": "medium"}, ThinkingSetting(True, 4096)),
    ],
)
def test_every_name_means_the_same_setting(
    fields: dict[str, Any], expected: ThinkingSetting
) -> None:
    assert resolve(**fields) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"enable_thinking": True, "reasoning_effort": "none"},
        {"enable_thinking": False, "chat_template_kwargs": {"enable_thinking": True}},
        {"thinking_budget": 1, "thinking_token_budget": 2},
        {"chat_template_kwargs": {"enable_thinking": "yes"}},
        {"chat_template_kwargs": {"other": True}},
    ],
)
def test_contradictions_and_unknown_template_keys_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        resolve(**fields)
    assert caught.value.param is not None


def test_the_servers_ceiling_bounds_every_budget() -> None:
    config = ThinkingConfig(max_budget=100, default=True)
    assert resolve(config) == ThinkingSetting(True, 100)
    assert resolve(config, thinking_budget=50) == ThinkingSetting(True, 50)
    assert resolve(config, thinking_budget=5000) == ThinkingSetting(True, 100)
    assert resolve(config, reasoning_effort="high") == ThinkingSetting(True, 100)
    assert resolve(config, enable_thinking=False).enabled is False
