from __future__ import annotations

from typing import Any

import pytest

from inference_pio.deployments.api.protocol import ChatCompletionRequest
from inference_pio.deployments.api.tool_schemas import check_tools, tools_in_use
from inference_pio.workers.types import RequestError


def tool(parameters: Any, name: str = "f") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


GOOD = {
    "type": "object",
    "properties": {
        "type": {"type": ["string", "null"], "enum": ["a", None]},
        "enum": {"$ref": "#/$defs/unit"},
        "list": {"type": "array", "items": {"$ref": "#/$defs/unit"}},
        "$ref": {"anyOf": [{"type": "integer"}, {"type": "number"}]},
    },
    "$defs": {"unit": {"type": "string", "default": {"type": "nonsense"}}},
    "required": ["type"],
}


def test_usual_schemas_pass() -> None:
    check_tools([tool(GOOD), tool({}, "g"), {"type": "function", "function": {"name": "h"}}])


@pytest.mark.parametrize(
    "tools",
    [
        [tool({"type": "money"})],
        [tool({"properties": {"a": {"type": "money"}}})],
        [tool({"$ref": "https://example.com/schema"})],
        [tool({"$ref": "other.json#/a"})],
        [tool({"$ref": "#"})],
        [tool({"$ref": "#/$defs/missing"})],
        [tool({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"items": {"$ref": "#/$defs/a"}}}})],
        [tool(nested(500))],
        [tool({"enum": list(range(1_000_000))})],
        [tool({"allOf": [{}] * 30_000})],
        [tool([])],
        [tool({}, "bad name")],
        [tool({}, "")],
        [tool({}), tool({})],
        [{"type": "retrieval"}],
        [{"type": "function"}],
        [tool({}, f"f{number}") for number in range(5000)],
    ],
)
def test_hostile_and_broken_definitions_are_refused(tools: list[dict[str, Any]]) -> None:
    with pytest.raises(RequestError) as caught:
        check_tools(tools)
    assert (caught.value.param or "").startswith("tools")


def use(**fields: Any) -> list[dict[str, Any]] | None:
    messages = [{"role": "user", "content": "hi"}]
    return tools_in_use(ChatCompletionRequest.model_validate({"messages": messages, **fields}))


def test_the_choice_decides_which_tools_are_shown() -> None:
    tools = [tool({})]
    assert use() is None
    assert use(tool_choice="none") is None
    assert use(tools=tools) == tools
    assert use(tools=tools, tool_choice="auto") == tools
    assert use(tools=tools, tool_choice="none") is None


@pytest.mark.parametrize(
    "choice", ["required", "sometimes", {"type": "function", "function": {"name": "f"}}]
)
def test_choices_that_need_a_grammar_are_refused(choice: Any) -> None:
    with pytest.raises(RequestError) as caught:
        use(tools=[tool({})], tool_choice=choice)
    assert caught.value.param == "tool_choice"
