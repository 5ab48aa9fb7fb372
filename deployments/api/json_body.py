"""Strict JSON objects: no duplicate keys, no NaN or infinity, bounded nesting, valid UTF-8."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

import orjson

from ...workers.types import RequestError

INLINE_BYTES = 64 * 2**10  # a body up to this size is parsed in the event loop
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"')


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse a request body.

    orjson refuses NaN, numbers beyond float64, nesting over 1024, lone surrogates and invalid
    UTF-8, but keeps the last of duplicate keys, which two parsers may read as two requests.

    Raises ``RequestError`` with the place in the text.
    """
    if not body.strip():
        raise RequestError("the request body is empty; a JSON object is expected", code=_CODE)
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the request body is not valid JSON: {error}", code=_CODE) from None
    if not isinstance(value, dict):
        kind = {list: "an array", str: "a string", type(None): "null"}.get(type(value), "a value")
        raise RequestError(f"the request body is {kind}; a JSON object is expected", code=_CODE)
    _refuse_duplicate_keys(body, value)
    return value


_CODE = "invalid_json"


def _refuse_duplicate_keys(body: bytes, value: dict[str, Any]) -> None:
    """Each member has one colon outside strings, so a lost member shows in the count."""
    members = _count_members(value)
    if body.count(b":") == members or _STRING.sub(b"", body).count(b":") == members:
        return
    # Python's parser may give up on nesting that orjson takes; the name is a courtesy only.
    with contextlib.suppress(RecursionError):
        json.loads(body, object_pairs_hook=_name_duplicate)
    raise RequestError("the request body repeats a key within one object", code=_CODE)


def _count_members(root: dict[str, Any]) -> int:
    total = 0
    stack: list[Any] = [root]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            total += len(item)
            stack.extend(v for v in item.values() if isinstance(v, dict | list))
        else:
            stack.extend(v for v in item if isinstance(v, dict | list))
    return total


def _name_duplicate(pairs: list[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise RequestError(
                f"the request body repeats the key {key[:64]!r} within one object", code=_CODE
            )
        seen.add(key)
