from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from inference_pio.benchmarks.evaluation import bfcl
from inference_pio.benchmarks.evaluation.bfcl_match import ABSENT
from inference_pio.benchmarks.evaluation.item import Item, Reply, ToolCall
from inference_pio.deployments.api.tool_schemas import check_tools


@pytest.fixture
def items(task_sets: object) -> list[Item]:
    return bfcl.load()


def first(possible: list[Any]) -> Any:
    """A value that is possible; objects hold possible values themselves."""
    value = next(each for each in possible if each != ABSENT)
    if isinstance(value, dict):
        return filled(value)
    if isinstance(value, list):
        return [filled(each) if isinstance(each, dict) else each for each in value]
    return value


def filled(possible: Mapping[str, list[Any]], known: Mapping[str, Any] | None = None) -> Any:
    return {
        name: first(values)
        for name, values in possible.items()
        if any(each != ABSENT for each in values) and (known is None or name in known)
    }


def answer_calls(item: Item) -> list[ToolCall]:
    functions = {function["name"]: function for function in item.row["function"]}
    calls = []
    for wanted in item.row["ground_truth"]:
        ((name, possible),) = wanted.items()
        # Two answers allow arguments that their function does not have.
        arguments = filled(possible, functions[name]["parameters"]["properties"])
        calls.append(ToolCall(name.replace(".", "_"), json.dumps(arguments)))
    return calls


def is_right(item: Item, calls: list[ToolCall]) -> bool:
    return bfcl.score(item, Reply(tool_calls=tuple(calls))) == {"right": [True]}


def test_the_possible_answers_are_right_and_less_or_more_is_not(items: list[Item]) -> None:
    assert len(items) == 1000
    for item in items:
        calls = answer_calls(item)
        assert is_right(item, calls), item.id
        assert not is_right(item, calls[1:]), item.id
        assert not is_right(item, [*calls, calls[0]]), item.id
        assert not is_right(item, []), item.id


def test_the_order_of_parallel_calls_does_not_matter(items: list[Item]) -> None:
    # One answer lets its first call take what its third needs: the rule takes calls as they come.
    wrong = [item.id for item in items if not is_right(item, answer_calls(item)[::-1])]
    assert wrong == ["parallel_178"]


def test_the_server_takes_every_tool(items: list[Item]) -> None:
    for item in items:
        check_tools([dict(tool) for tool in item.tools])


FUNCTION = {
    "name": "shop.order",
    "description": "Order.",
    "parameters": {
        "type": "dict",
        "properties": {
            "what": {"type": "string"},
            "count": {"type": "integer"},
            "price": {"type": "float"},
            "gift": {"type": "boolean"},
            "sizes": {"type": "array", "items": {"type": "integer"}},
            "to": {"type": "dict", "properties": {"city": {"type": "string"}}},
        },
        "required": ["what"],
    },
}
POSSIBLE = {
    "what": ["red shoes", "shoes"],
    "count": [2, ABSENT],
    "price": [9.5, 10.0, ABSENT],
    "gift": [True, ABSENT],
    "sizes": [[41, 42], ABSENT],
    "to": [{"city": ["New York", "NYC"], "street": ["Main St.", ABSENT]}, ABSENT],
}


def order(arguments: object, name: str = "shop_order") -> bool:
    row = {"function": [FUNCTION], "ground_truth": [{"shop.order": POSSIBLE}]}
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return is_right(Item("bfcl", "x", (), row), [ToolCall(name, text)])


@pytest.mark.parametrize(
    "arguments",
    [
        {"what": "shoes"},
        {"what": "Red-Shoes"},
        {"what": "shoes", "count": 2, "gift": True},
        {"what": "shoes", "price": 10},
        {"what": "shoes", "sizes": [41, 42]},
        {"what": "shoes", "to": {"city": "new york"}},
        {"what": "shoes", "to": {"city": "NYC", "street": "main st"}},
    ],
)
def test_a_call_that_matches(arguments: object) -> None:
    assert order(arguments)
    assert order(arguments, name="shop.order")
    assert not order(arguments, name="shop_buy")


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"count": 2},
        {"what": ""},
        {"what": "socks"},
        {"what": ["shoes"]},
        {"what": "shoes", "count": "2"},
        {"what": "shoes", "count": 2.0},
        {"what": "shoes", "count": True},
        {"what": "shoes", "gift": 1},
        {"what": "shoes", "price": "10"},
        {"what": "shoes", "sizes": [42, 41]},
        {"what": "shoes", "sizes": ["41", "42"]},
        {"what": "shoes", "to": {"street": "Main St."}},
        {"what": "shoes", "to": {"city": "NYC", "zip": "1"}},
        {"what": "shoes", "to": "NYC"},
        {"what": "shoes", "size": 41},
        "{",
        "[]",
        "null",
        "[" * 100_000,
    ],
)
def test_a_call_that_does_not(arguments: object) -> None:
    assert not order(arguments)


def test_a_schema_has_json_schemas_words() -> None:
    parameters = {
        "type": "dict",
        "properties": {
            "dict": {"type": "tuple", "items": {"type": "float"}, "optional": True},
            "any": {"type": "any", "default": "float"},
        },
    }
    made = bfcl.tool({"name": "a.b", "description": "", "parameters": parameters})["function"]
    assert made["name"] == "a_b"
    assert made["parameters"] == {
        "type": "object",
        "properties": {
            "dict": {"type": "array", "items": {"type": "number"}},
            "any": {"type": "string", "default": "float"},
        },
    }
