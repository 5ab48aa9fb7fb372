from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_pio.deployments.api.json_body import parse_object
from inference_pio.workers.types import RequestError

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(texts, values, max_size=6))
def test_every_object_without_duplicates_is_read_as_it_is(value: dict[str, Any]) -> None:
    assert parse_object(json.dumps(value).encode()) == value
    assert parse_object(json.dumps(value, ensure_ascii=False).encode()) == value


@given(st.dictionaries(texts, values, min_size=1, max_size=4), texts, st.integers(0, 2))
def test_a_repeated_key_is_found_at_any_depth(
    value: dict[str, Any], other: str, depth: int
) -> None:
    key = next(iter(value))
    text = "{" + f"{json.dumps(key)}: 1, {json.dumps(other)}: [], {json.dumps(key)}: 1" + "}"
    for _ in range(depth):
        text = f'{{"a": [":", {text}, "\\":"]}}'
    with pytest.raises(RequestError, match="repeats") as caught:
        parse_object(text.encode())
    assert caught.value.code == "invalid_json"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"  \n",
        b"null",
        b"[]",
        b'"text"',
        b"1",
        b'{"a": 1',
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": 1e999}',
        b'{"a": "\\ud800"}',
        b'{"a": "\xff"}',
        b'{"a": 1} {"b": 2}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": 1, "a": 2}',
        b'{"a": {"b": 1, "\\u0062": 2}}',
    ],
    ids=lambda body: repr(body[:16]),
)
def test_what_is_not_one_strict_object_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse_object(body)
    assert caught.value.code == "invalid_json"
    assert len(caught.value.message) < 300
