"""When function calls match BFCL's possible answers: the published rules of its AST check.

- As many calls as the answer has, in any order; each with the right name and all required
  arguments, and none that the answer does not know.
- A value has the declared type (an integer passes for a float; array elements too) or the type of
  the possible answer, which stands for a variable.
- It equals one of the possible values. Text is compared in lower case without blanks and without
  ``, . / - _ * ^``, with ``'`` as ``"``; so are texts in lists and objects.
- An argument may be left out where the empty text is among its possible values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ABSENT = ""
"""A possible value that says: the argument may be left out."""

_TYPES: dict[str, type] = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
}
_WITH_ITEMS = ("array", "tuple")
_IGNORED = re.compile(r"[ ,./\-_*^]")


@dataclass(frozen=True, slots=True)
class Call:
    """A call with its arguments parsed."""

    name: str
    arguments: Mapping[str, Any]


def api_name(name: str) -> str:
    """A function's name as an API takes it."""
    return name.replace(".", "_")


def matches(
    functions: Sequence[Mapping[str, Any]],
    answer: Sequence[Mapping[str, Mapping[str, Any]]],
    calls: Sequence[Call],
) -> bool:
    """Whether the calls are what the answer asks for; each stands for one of its calls."""
    if len(calls) != len(answer):
        return False
    by_name = {api_name(function["name"]): function for function in functions}
    left = list(calls)
    for wanted in answer:
        ((name, possible),) = wanted.items()
        function = by_name[api_name(name)]
        found = next((call for call in left if _fits(function, possible, call)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _fits(function: Mapping[str, Any], possible: Mapping[str, Any], call: Call) -> bool:
    parameters = function["parameters"]
    given = call.arguments
    if api_name(call.name) != api_name(function["name"]):
        return False
    if any(name not in given for name in parameters["required"]):
        return False
    if any(name not in possible or name not in parameters["properties"] for name in given):
        return False
    if any(name not in given and ABSENT not in values for name, values in possible.items()):
        return False
    return all(
        _value_fits(value, parameters["properties"][name], possible[name])
        for name, value in given.items()
    )


def _value_fits(value: Any, schema: Mapping[str, Any], possible: Sequence[Any]) -> bool:
    declared = _TYPES[schema["type"]]
    if schema["type"] == "float" and type(value) is int:
        value = float(value)
    items = _TYPES[schema["items"]["type"]] if schema["type"] in _WITH_ITEMS else None
    answer_type = _answer_type(possible)
    if not _type_fits(value, declared, items, possible):
        return False
    # What stands for a variable is compared as it is.
    if answer_type not in (None, declared) or not _is_exactly(value, declared):
        return value in possible
    if declared is dict:
        return any(_object_fits(value, each) for each in possible if each != ABSENT)
    if declared is list and items is dict:
        return any(_objects_fit(value, each) for each in possible if each != ABSENT)
    if declared is list or declared is str:
        return _plain(value) in [_plain(each) for each in possible]
    return value in possible


def _type_fits(value: Any, declared: type, items: type | None, possible: Sequence[Any]) -> bool:
    if _is_exactly(value, declared):
        if items is None:
            return True
        # Elements are typed against one possible list after another.
        return any(
            not isinstance(each, list) or all(_type_fits(v, items, None, each) for v in value)
            for each in possible
        )
    return type(value) is _answer_type(possible)


def _is_exactly(value: Any, declared: type) -> bool:
    """Not ``isinstance``: a truth value is no integer here."""
    return type(value) is declared


def _answer_type(possible: Sequence[Any]) -> type | None:
    return next((type(each) for each in possible if each != ABSENT), None)


def _object_fits(value: Mapping[str, Any], possible: Mapping[str, Any]) -> bool:
    return all(
        key in possible and _plain(inner) in [_plain(each) for each in possible[key]]
        for key, inner in value.items()
    ) and all(key in value or ABSENT in each for key, each in possible.items())


def _objects_fit(values: Sequence[Any], possible: Sequence[Mapping[str, Any]]) -> bool:
    return len(values) == len(possible) and all(
        isinstance(value, dict) and _object_fits(value, each)
        for value, each in zip(values, possible, strict=True)
    )


def _plain(value: Any) -> Any:
    """Texts, and those in a list, as they are compared."""
    if isinstance(value, str):
        return _IGNORED.sub("", value).lower().replace("'", '"')
    if isinstance(value, list):
        return [_plain(each) if isinstance(each, str) else each for each in value]
    return value
