"""Brings messages and tools of a chat request into the one form that templates are given.

OpenAI's forms are accepted: content as text or as text parts, ``reasoning_content`` or
``reasoning``, thoughts written as ``<think>…</think>`` into an assistant's content, and tool call
arguments as JSON text or as an object. Whatever else comes is refused with its place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..types import RequestError
from .unicode import refuse_surrogates

MAX_DEPTH = 64
"""Nesting allowed in tool schemas and in arguments; templates write them out recursively."""

_ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name for the same turn
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_SWITCH = re.compile(r"(?<!\S)/(think|no_?think)(?![\w/-])")


def normalise_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages with a role, a ``content`` string, and for an assistant what else was given.

    An assistant's message may hold ``reasoning_content`` and ``tool_calls``, whose entries are
    ``{"type", "id"?, "function": {"name", "arguments"}}`` with arguments as an object, or as the
    JSON text they came in: a model's own text, unchanged, is found in the prefix cache.
    Raises ``RequestError`` naming the message.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise RequestError("messages is a list of at least one message", param="messages")
    return [_message(message, f"messages[{number}]") for number, message in enumerate(messages)]


def normalise_tools(tools: Any) -> list[dict[str, Any]]:
    """Checked function tools, as they came; an absent list is an empty one."""
    if tools is None:
        return []
    if not isinstance(tools, list | tuple):
        raise RequestError("tools is a list", param="tools")
    checked = []
    for number, tool in enumerate(tools):
        place = f"tools[{number}]"
        if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
            raise RequestError(f"{place} is no tool of type 'function'", param=place)
        function = tool.get("function")
        if not isinstance(function, Mapping) or not _is_name(function.get("name")):
            raise RequestError(f"{place}.function needs a name", param=f"{place}.function")
        check_json(tool, place)
        checked.append(dict(tool))
    return checked


def soft_switch(messages: Sequence[Mapping[str, Any]]) -> bool | None:
    """What the last ``/think`` or ``/no_think`` of the user and system turns says, if any.

    Takes normalised messages. A switch stands between spaces, so a path is none.
    """
    for message in reversed(messages):
        if message["role"] in ("user", "system"):
            found = _SWITCH.findall(message["content"])
            if found:
                return bool(found[-1] == "think")
    return None


def check_json(value: Any, place: str, depth: int = 0) -> None:
    """Raise ``RequestError`` where a JSON value nests too deep or holds a lone surrogate."""
    if depth > MAX_DEPTH:
        raise RequestError(f"{place} nests deeper than {MAX_DEPTH} levels", param=place)
    if isinstance(value, str):
        refuse_surrogates(value, place)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_json(key, place, depth + 1)
            check_json(item, place, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            check_json(item, place, depth + 1)
    elif not (value is None or isinstance(value, bool | int | float)):
        raise RequestError(f"{place} holds a {type(value).__name__}, not JSON", param=place)


def _message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{place} is an object with a role and content", param=place)
    given = message.get("role")
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise RequestError(
            f"{place}.role is one of {', '.join(_ROLES)}; got {given!r:.80}", param=f"{place}.role"
        )
    if message.get("content") is None and role != "assistant":
        raise RequestError(f"{place}.content is missing", param=f"{place}.content")
    content = _text(message.get("content"), f"{place}.content")
    if role != "assistant":
        return {"role": role, "content": content}
    return _assistant(message, content, place)


def _assistant(message: Mapping[str, Any], content: str, place: str) -> dict[str, Any]:
    result: dict[str, Any] = {"role": "assistant", "content": content}
    reasoning = message.get("reasoning_content")
    if reasoning is None:
        reasoning = message.get("reasoning")
    if reasoning is not None:
        result["reasoning_content"] = _text(reasoning, f"{place}.reasoning_content")
    elif thought := _THOUGHT.fullmatch(content):
        result["reasoning_content"] = thought[1].strip("\n")
        result["content"] = thought[2].lstrip("\n")
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list | tuple):
        raise RequestError(f"{place}.tool_calls is a list", param=f"{place}.tool_calls")
    if calls:
        result["tool_calls"] = [
            _call(call, f"{place}.tool_calls[{number}]") for number, call in enumerate(calls)
        ]
    return result


def _text(content: Any, place: str) -> str:
    if content is None:
        return ""
    if isinstance(content, list | tuple):
        texts = [_part(part, f"{place}[{number}]") for number, part in enumerate(content)]
        content = "\n".join(texts)
    if not isinstance(content, str):
        raise RequestError(
            f"{place} is text or a list of text parts, got {type(content).__name__}", param=place
        )
    refuse_surrogates(content, place)
    return content


def _part(part: Any, place: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in ("text", "input_text", "output_text"):
        raise RequestError(
            f"{place} is a part of type {kind!r:.80}; this model reads text parts only", param=place
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise RequestError(f"{place}.text is missing", param=f"{place}.text")
    return text


def _call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not _is_name(function.get("name")):
        raise RequestError(f"{place}.function needs a name", param=f"{place}.function")
    refuse_surrogates(function["name"], f"{place}.function.name")
    arguments = _arguments(function.get("arguments"), f"{place}.function.arguments")
    result = {
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }
    if isinstance(call.get("id"), str):
        refuse_surrogates(call["id"], f"{place}.id")
        result["id"] = call["id"]
    return result


def _arguments(arguments: Any, place: str) -> Any:
    if arguments is None or arguments == "":
        return {}
    value = arguments
    if isinstance(arguments, str):
        refuse_surrogates(arguments, place)
        try:
            value = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{place} is not valid JSON: {error}", param=place) from None
    if not isinstance(value, Mapping):
        raise RequestError(f"{place} is a JSON object, got {type(value).__name__}", param=place)
    if value is arguments:
        check_json(value, place)
    return arguments


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and bool(name)
