from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from inference_pio.workers.text.tool_calls import ToolCallBlock

WEATHER = '\n{"name": "get_weather", "arguments": {"city": "Köln", "days": [1, {"a": "}\\""}]}}\n'
ARGUMENTS = '{"city": "Köln", "days": [1, {"a": "}\\""}]}'


def read(*parts: str) -> tuple[str | None, str, str, bool]:
    """Name, arguments, content and completeness of a block that comes in these parts."""
    block = ToolCallBlock()
    pieces = [block.feed(part) for part in parts]
    content = "".join(content for _, content in pieces) + block.end()
    return block.name, "".join(arguments for arguments, _ in pieces), content, block.complete


def test_a_call() -> None:
    assert read(WEATHER) == ("get_weather", ARGUMENTS, "", True)


def test_every_split_of_a_call() -> None:
    for cut in range(len(WEATHER) + 1):
        assert read(WEATHER[:cut], WEATHER[cut:]) == ("get_weather", ARGUMENTS, "", True)
    assert read(*WEATHER) == ("get_weather", ARGUMENTS, "", True)


def test_arguments_come_while_they_are_written() -> None:
    block = ToolCallBlock()
    assert block.feed('{"name": "f", "argu') == ("", "")
    assert block.name is None
    assert block.feed('ments": {"a') == ('{"a', "")
    assert block.name == "f"
    assert block.feed('": 1') == ('": 1', "")
    assert not block.complete
    assert block.feed("}}") == ("}", "")
    assert block.complete
    assert block.end() == ""


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"arguments": {"a": 1}, "name": "f"}', '{"a": 1}'),
        ('{"id": 7, "name": "f", "arguments": {}, "extra": [null]}', "{}"),
        ('{"name":"\\u0066","arguments":{ }}', "{ }"),
        ('{"name": "f", "x": {"name": 1, "arguments": 2}, "arguments": {"arguments": {}}}',
         '{"arguments": {}}'),
    ],
)  # fmt: skip
def test_other_spellings_of_a_call(text: str, arguments: str) -> None:
    assert read(text) == read(*text) == ("f", arguments, "", True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "hello",
        "[]",
        '{"name": "f"}',
        '{"arguments": {}}',
        '{"name": "f", "arguments": "{}"}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": null}',
        '{"name": 3, "arguments": {}}',
        '{"name": "", "arguments": {}}',
        '{"name": "a\\nb", "arguments": {}}',
        '{"name": "\\ud800", "arguments": {}}',
        '{"name": "f", "name": "g", "arguments": {}}',
        "{'name': 'f', 'arguments': {}}",
        '{"name": "f", "argu',
        '{"function": {"name": "f", "arguments": {}}}',
        '"name"',
    ],
)
def test_what_is_no_call_is_content(text: str) -> None:
    assert read(text) == read(*text) == (None, "", text, False)


@pytest.mark.parametrize(
    ("text", "arguments", "rest", "complete"),
    [
        ('{"name": "f", "arguments": {"a": 1', '{"a": 1', "", False),
        ('{"name": "f", "arguments": {"a": "x\ny"}}', '{"a": "x', '\ny"}}', False),
        ('{"name": "f", "arguments": {"a": True}}', '{"a": ', "True}}", False),
        ('{"name": "f", "arguments": {"a": 1,}}', '{"a": 1,', "}}", False),
        ('{"name": "f", "arguments": {"a": 1}', '{"a": 1}', "", True),
        ('{"name": "f", "arguments": {}}}', "{}", "}", True),
        ('{"name": "f", "arguments": {}} and more', "{}", "and more", True),
        ('{"name": "f", "arguments": {}, "arguments": {}}', "{}", ": {}}", True),
    ],
)
def test_a_call_that_breaks_ends_there(
    text: str, arguments: str, rest: str, complete: bool
) -> None:
    name, found, content, whole = read(text)
    assert (name, found, whole) == ("f", arguments, complete)
    assert content.endswith(rest)
    assert read(*text) == (name, found, content, whole)


NAMES = st.text(st.characters(categories=["L", "N"], include_characters="_-."), min_size=1)
OBJECTS = st.dictionaries(
    st.text(max_size=6),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=10),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=5,
    ),
    max_size=3,
)


@settings(max_examples=200, deadline=None)
@given(name=NAMES, arguments=OBJECTS, ascii_only=st.booleans(), cuts=st.data())
def test_any_call_in_any_parts(
    name: str, arguments: dict[str, object], ascii_only: bool, cuts: st.DataObject
) -> None:
    written = json.dumps(arguments, ensure_ascii=ascii_only)
    text = f'\n{{"name": {json.dumps(name)}, "arguments": {written}}}\n'
    borders = sorted(cuts.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    parts = [text[a:b] for a, b in zip([0, *borders], [*borders, len(text)], strict=True)]
    assert read(*parts) == (name, written, "", True)


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(
        st.sampled_from(
            ['{"name": "f"', '"arguments": ', "{", "}", ", ", '"a": ', "[1]", '"', "\\", "x", "\n"]
        ),
        max_size=12,
    )
)
@example(parts=['{"name": "f"', ", ", '"arguments": ', "[1]", "}"])
def test_every_split_of_a_broken_block_is_read_alike(parts: list[str]) -> None:
    text = "".join(parts)
    whole = read(text)
    assert read(*parts) == whole
    assert read(*text) == whole
    name, arguments, content, complete = whole
    if name is None:
        assert (arguments, content) == ("", text)
    if complete:
        assert isinstance(json.loads(arguments), dict)
