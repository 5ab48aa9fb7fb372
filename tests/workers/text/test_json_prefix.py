from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from inference_pio.workers.text.json_prefix import MAX_DEPTH, JsonPrefix, JsonState

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
FRAGMENTS = ['{"a"', ":", ",", "[", "]", "{", "}", '"', "\\", "\\u", "00e9", "\n", "tru", "e",
             "null", "-", "0", "1", ".", "e", "E+", " ", "x", "\t", "\x00", "\\n", "é"]  # fmt: skip


def accepted(text: str) -> int:
    """How many characters are taken."""
    checker = JsonPrefix()
    for number, character in enumerate(text):
        if not checker.feed(character):
            return number
    return len(text)


def is_whole(text: str) -> bool:
    checker = JsonPrefix()
    # A number at the very end is known to be over only by what follows it.
    return all(checker.feed(character) for character in text + " ") and (
        checker.state is JsonState.DONE
    )


def loads(text: str) -> bool:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return True


@settings(max_examples=300, deadline=None)
@given(value=VALUES, ascii_only=st.booleans(), indent=st.sampled_from([None, 1]))
def test_valid_json_is_taken_whole(value: object, ascii_only: bool, indent: int | None) -> None:
    assert is_whole(json.dumps(value, ensure_ascii=ascii_only, indent=indent))


@settings(max_examples=800, deadline=None)
@given(parts=st.lists(st.sampled_from(FRAGMENTS), max_size=9))
@example(parts=["[", "1", ",", "]"])
@example(parts=["-"])
@example(parts=["0", "1"])
@example(parts=["1", "e", "1", ".", "1"])
def test_agrees_with_the_standard_parser(parts: list[str]) -> None:
    text = "".join(parts)
    assert is_whole(text) == loads(text)


CLOSINGS = ["", "]", "}", '"', '"}', '":0}', ":0}", "0}", "0]", "0", '"":0}', "ull", "rue", "alse",
            "n", '0000"', '000"', '00"', '0"', "e", "ue", "lse", "se", "ll", "l"]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.sampled_from(FRAGMENTS), max_size=6))
def test_nothing_is_refused_that_could_still_be_completed(parts: list[str]) -> None:
    text = "".join(parts)
    taken = accepted(text)
    if taken == len(text):
        return
    for closing in CLOSINGS:
        for second in ("", "}", "]", "}}", "]]", "]}", "}]"):
            assert not loads(text[: taken + 1] + closing + second)


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ('{"a": 01}', 7),
        ('{"a" 1}', 5),
        ("{'a': 1}", 1),
        ('{"a": True}', 6),
        ('{"a": "line\nend"}', 11),
        ('["\\x"]', 3),
        ('["\\u12g4"]', 6),
        ("[1,]", 3),
        ("{}}", 2),
        ("[1}", 2),
        ("NaN", 0),
    ],
)
def test_the_first_wrong_character_is_found(text: str, taken: int) -> None:
    assert accepted(text) == taken


def test_depth_is_bounded() -> None:
    assert accepted("[" * MAX_DEPTH) == MAX_DEPTH
    assert accepted("[" * (MAX_DEPTH + 1)) == MAX_DEPTH
