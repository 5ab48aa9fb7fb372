"""BFCL v4's single-turn Python categories (Patil et al. 2025): calls through the API's ``tools``.

What is scored are the ``tool_calls`` of the answer; ``bfcl_match`` has the rules. Functions are
offered as JSON Schema: the data's ``dict``, ``float`` and ``tuple`` become ``object``, ``number``
and ``array``, ``any`` becomes ``string``, and dots in names underscores, for the API's names have
none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .bfcl_match import Call, api_name, matches
from .data import DataError, read_rows
from .item import Item, Reply, ToolCall, Verdict

TASK = "bfcl"
CATEGORIES = ("simple_python", "multiple", "parallel", "parallel_multiple")

_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}


def load() -> list[Item]:
    """The items of all categories, in their order in the data. Raises ``DataError``."""
    return [item for category in CATEGORIES for item in _load_category(category)]


def score(item: Item, reply: Reply) -> Verdict:
    """``right``: whether the calls match one of the possible answers."""
    calls = [_parsed(call) for call in reply.tool_calls]
    whole = [call for call in calls if call is not None]
    right = len(whole) == len(calls) and matches(
        item.row["function"], item.row["ground_truth"], whole
    )
    return {"right": [right]}


def tool(function: Mapping[str, Any]) -> dict[str, Any]:
    """A function of the data as the API takes it."""
    return {
        "type": "function",
        "function": {
            "name": api_name(function["name"]),
            "description": function["description"],
            "parameters": _schema(function["parameters"]),
        },
    }


def _load_category(category: str) -> list[Item]:
    answers = {
        row["id"]: row["ground_truth"]
        for row in read_rows(f"bfcl/BFCL_v4_{category}.possible_answer.json")
    }
    items = []
    for row in read_rows(f"bfcl/BFCL_v4_{category}.json"):
        if row["id"] not in answers:
            raise DataError(f"BFCL's {row['id']} has no possible answer")
        tools = tuple(tool(function) for function in row["function"])
        full = {**row, "ground_truth": answers[row["id"]]}
        items.append(Item(TASK, row["id"], tuple(row["question"][0]), full, tools, category))
    return items


def _schema(node: Mapping[str, Any]) -> dict[str, Any]:
    """One schema and those in it; ``optional`` is no word of JSON Schema."""
    schema = {key: value for key, value in node.items() if key != "optional"}
    if "type" in schema:
        schema["type"] = _TYPES.get(schema["type"], schema["type"])
    if "properties" in schema:
        schema["properties"] = {
            name: _schema(inner) for name, inner in schema["properties"].items()
        }
    if "items" in schema:
        schema["items"] = _schema(schema["items"])
    return schema


def _parsed(call: ToolCall) -> Call | None:
    """``None`` for arguments that are not a JSON object."""
    try:
        arguments = json.loads(call.arguments or "{}")
    except (ValueError, RecursionError):
        return None
    return Call(call.name, arguments) if isinstance(arguments, dict) else None
