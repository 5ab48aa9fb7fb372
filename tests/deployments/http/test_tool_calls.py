"""Tool calls as clients see them, whole and streamed."""

from __future__ import annotations

import json
from typing import Any

import httpx

CHAT = "/v1/chat/completions"
CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}
ASK: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Use the calculator: 12 * 34"}],
    "tools": [CALCULATOR],
    "temperature": 0,
    "max_tokens": 200,
}


def call_of(answer: dict[str, Any]) -> dict[str, Any]:
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert choice["message"]["content"] is None
    found: dict[str, Any] = call
    return found


def test_a_call_is_parsed_and_its_result_is_read(client: httpx.Client) -> None:
    call = call_of(client.post(CHAT, json=ASK).json())
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    assert call["function"]["name"] == "calculator"
    assert json.loads(call["function"]["arguments"]) == {"expression": "12 * 34"}
    history = [
        *ASK["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "408"},
    ]
    after = client.post(CHAT, json={**ASK, "messages": history}).json()["choices"][0]
    assert after["finish_reason"] == "stop"
    assert "408" in after["message"]["content"]


def test_a_streamed_call_is_the_same(client: httpx.Client) -> None:
    whole = call_of(client.post(CHAT, json=ASK).json())
    name, arguments, content, reasons, ids = "", "", "", [], []
    with client.stream("POST", CHAT, json={**ASK, "stream": True}) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            reasons.append(choice["finish_reason"])
            content += choice["delta"].get("content", "")
            for piece in choice["delta"].get("tool_calls", []):
                assert piece["index"] == 0
                name += piece["function"].get("name", "")
                arguments += piece["function"]["arguments"]
                ids += [piece["id"]] if "id" in piece else []
    assert (name, arguments) == (whole["function"]["name"], whole["function"]["arguments"])
    assert len(ids) == 1
    assert content == ""
    assert [reason for reason in reasons if reason] == ["tool_calls"]


def test_without_tools_nothing_is_a_call(client: httpx.Client) -> None:
    for fields in ({"tool_choice": "none"}, {"tools": None}):
        (choice,) = client.post(CHAT, json={**ASK, **fields}).json()["choices"]
        assert "tool_calls" not in choice["message"]
        assert choice["message"]["content"]
        assert choice["finish_reason"] in ("stop", "length")
