from __future__ import annotations

from typing import Any

import pytest

from inference_pio.workers.text.messages import (
    MAX_DEPTH,
    normalise_messages,
    normalise_tools,
    soft_switch,
)
from inference_pio.workers.types import RequestError


def one(message: dict[str, Any]) -> dict[str, Any]:
    (result,) = normalise_messages([message])
    return result


def test_text_parts_are_joined_by_line_ends() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]
    assert one({"role": "user", "content": parts}) == {"role": "user", "content": "a\nb"}


def test_developer_is_system() -> None:
    assert one({"role": "developer", "content": "x", "name": "n"}) == {
        "role": "system",
        "content": "x",
    }


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_under_either_name(field: str) -> None:
    assert one({"role": "assistant", "content": "4", field: "2+2"}) == {
        "role": "assistant",
        "content": "4",
        "reasoning_content": "2+2",
    }


@pytest.mark.parametrize(
    ("content", "reasoning", "answer"),
    [
        ("<think>\na\nb\n</think>\n\nc", "a\nb", "c"),
        ("<think>\n  a \n</think>\n  c", "  a ", "  c"),
        ("\n<think></think>c", "", "c"),
        ("<think>a</think>b</think>c", "a", "b</think>c"),
    ],
)
def test_thought_in_the_text_is_moved(content: str, reasoning: str, answer: str) -> None:
    message = one({"role": "assistant", "content": content})
    assert message["reasoning_content"] == reasoning
    assert message["content"] == answer


@pytest.mark.parametrize(
    "content", ["Write </think> so.", "x <think>a</think>", "<think>never closed", ""]
)
def test_other_tags_in_the_text_stay(content: str) -> None:
    assert one({"role": "assistant", "content": content}) == {
        "role": "assistant",
        "content": content,
    }


def test_a_given_reasoning_leaves_the_text_alone() -> None:
    text = "<think>a</think>b"
    message = one({"role": "assistant", "content": text, "reasoning_content": ""})
    assert message == {"role": "assistant", "content": text, "reasoning_content": ""}


def test_users_may_write_thought_tags() -> None:
    text = "<think>a</think>b"
    assert one({"role": "user", "content": text})["content"] == text


def calling(arguments: Any) -> dict[str, Any]:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ('{"a":1}', '{"a":1}'),
        ({"a": 1}, {"a": 1}),
        ("", {}),
        (None, {}),
    ],
)
def test_arguments_keep_their_spelling(given: Any, kept: Any) -> None:
    message = one(calling(given))
    assert message["content"] == ""
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": kept}


@pytest.mark.parametrize(
    ("messages", "param", "reason"),
    [
        ([], "messages", "at least one"),
        (None, "messages", "list"),
        ("hi", "messages", "list"),
        (["hi"], "messages[0]", "object"),
        ([{"role": "robot", "content": ""}], "messages[0].role", "developer"),
        ([{"role": ["user"], "content": ""}], "messages[0].role", "user"),
        ([{"role": "user"}], "messages[0].content", "missing"),
        ([{"role": "user", "content": None}], "messages[0].content", "missing"),
        ([{"role": "user", "content": 3}], "messages[0].content", "int"),
        ([{"role": "user", "content": "\ud800"}], "messages[0].content", "U\\+D800"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]", "text"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]", "text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text", "miss"),
        ([{"role": "assistant", "content": "", "tool_calls": {}}], "messages[0].tool_calls", "lis"),
        (
            [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": ""}}]}],
            "messages[0].tool_calls[0].function",
            "name",
        ),
        ([calling("{")], "messages[0].tool_calls[0].function.arguments", "not valid JSON"),
        ([calling("[]")], "messages[0].tool_calls[0].function.arguments", "object"),
        ([calling("[" * 10**5)], "messages[0].tool_calls[0].function.arguments", "JSON"),
        ([calling({"a": "\udc00"})], "messages[0].tool_calls[0].function.arguments", "U\\+DC00"),
    ],
)
def test_refusals_name_the_place(messages: Any, param: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as refused:
        normalise_messages(messages)
    assert refused.value.param == param


def test_nul_and_other_odd_characters_are_taken() -> None:
    text = "a\0b\x7f\ufffe\U0010ffff"
    assert one({"role": "user", "content": text})["content"] == text


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"a": schema}
    return {"type": "function", "function": {"name": "f", "parameters": schema}}


def test_tools_come_back_as_they_were() -> None:
    assert normalise_tools(None) == []
    tool = nested(MAX_DEPTH - 3)
    assert normalise_tools([tool]) == [tool]


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ({}, "list"),
        ([{}], "name"),
        ([3], "type 'function'"),
        ([{"type": "web_search"}], "type 'function'"),
        ([{"type": "function", "function": {"name": 3}}], "name"),
        ([nested(5000)], "nests deeper"),
        ([{"function": {"name": "f", "description": "\ud801"}}], "lone surrogate"),
        ([{"function": {"name": "f", "parameters": {"x": {1}}}}], "not JSON"),
    ],
)
def test_unusable_tools(tools: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        normalise_tools(tools)


@pytest.mark.parametrize(
    ("turns", "switch"),
    [
        ([("user", "hi")], None),
        ([("user", "hi /think")], True),
        ([("user", "hi /no_think")], False),
        ([("user", "/nothink hi")], False),
        ([("system", "/no_think"), ("user", "why? /think")], True),
        ([("user", "/think"), ("assistant", "/no_think"), ("user", "and?")], True),
        ([("user", "/think\n/no_think.")], False),
        ([("user", "open /think/tank.txt or C:/think")], None),
        ([("user", "/think_more /thinking")], None),
    ],
)
def test_the_last_soft_switch_wins(turns: list[tuple[str, str]], switch: bool | None) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    assert soft_switch(normalise_messages(messages)) is switch
