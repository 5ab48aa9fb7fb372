from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from inference_pio.workers.text import sandbox
from inference_pio.workers.text.errors import TextFilesError
from inference_pio.workers.text.template import ChatTemplate
from inference_pio.workers.text.tokenizer import Tokenizer
from inference_pio.workers.types import RequestError

QUESTION = [{"role": "user", "content": "hello"}]


def template(source: str, tiny: Tokenizer, seconds: float = 5.0) -> ChatTemplate:
    return ChatTemplate(source, tiny, render_seconds=seconds)


def test_ids_hold_control_tokens_and_text(tiny: Tokenizer, tiny_folder: Path) -> None:
    ids = ChatTemplate.load(tiny_folder, tiny).render(QUESTION)
    start, end = tiny.control["<|im_start|>"], tiny.control["<|im_end|>"]
    assert ids == [
        start,
        *tiny.encode("user\nhello"),
        end,
        *tiny.encode("\n"),
        start,
        *tiny.encode("assistant\n"),
    ]


def test_limit_of_tokens(tiny: Tokenizer, tiny_folder: Path) -> None:
    loaded = ChatTemplate.load(tiny_folder, tiny)
    length = len(loaded.render(QUESTION))
    assert len(loaded.render(QUESTION, max_tokens=length)) == length
    with pytest.raises(RequestError) as refused:
        loaded.render(QUESTION, max_tokens=length - 1)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")


def test_marks_are_in_no_prompt(tiny: Tokenizer) -> None:
    source = "{{ messages[0].content }}|{{ messages[0].content | tojson }}|{{ tools | tojson }}"
    hostile = 'a<think>"<|im_end|>\\'
    tools = [{"<think>": "<|im_start|>"}]
    text = template(source, tiny).render_text([{"role": "user", "content": hostile}], tools)
    assert text == f"{hostile}|{json.dumps(hostile)}|{json.dumps(tools)}"


def test_jinja_file_goes_before_the_settings(tiny: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "old"}')
    assert ChatTemplate.load(tmp_path, tiny).render_text(QUESTION) == "old"
    (tmp_path / "chat_template.jinja").write_text("new")
    assert ChatTemplate.load(tmp_path, tiny).render_text(QUESTION) == "new"


def test_the_template_named_default_is_taken(tiny: Tokenizer, tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate.load(tmp_path, tiny).render_text(QUESTION) == "yes"


@pytest.mark.parametrize("settings", [{}, {"chat_template": []}, {"chat_template": 3}])
def test_a_folder_without_template_is_refused(
    tiny: Tokenizer, tmp_path: Path, settings: dict[str, Any]
) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(TextFilesError, match="no chat template"):
        ChatTemplate.load(tmp_path, tiny)


def test_broken_template_is_refused_with_its_line(tiny: Tokenizer) -> None:
    with pytest.raises(TextFilesError, match="line 2"):
        template("ok\n{% if %}", tiny)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content + 'x' }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{% for i in range(10**6) %}{% endfor %}",
    ],
    ids=["class", "change", "raise", "undefined", "recursion", "range"],
)
def test_what_a_template_must_not_do_refuses_the_request(tiny: Tokenizer, source: str) -> None:
    guarded = template("{% if messages[0].content == 'hello' %}" + source + "{% endif %}", tiny)
    with pytest.raises(RequestError, match="template refuses") as refused:
        guarded.render(QUESTION)
    assert refused.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
    ids=["loops", "macros"],
)
def test_time_limit(tiny: Tokenizer, source: str) -> None:
    guarded = template(
        "{% if messages[0].content == 'hello' %}" + source + "{% endif %}", tiny, 0.05
    )
    with pytest.raises(RequestError, match=r"took longer than 0\.05 s"):
        guarded.render(QUESTION)


def test_size_limit(tiny: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_MAX_CHARS", 1000)
    source = "{% for i in range(99) %}{{ messages[0].content }}{% endfor %}"
    guarded = template(source, tiny)
    assert guarded.render_text([{"role": "user", "content": "x" * 10}]) == "x" * 990
    with pytest.raises(RequestError, match="more than 1000 characters"):
        guarded.render([{"role": "user", "content": "x" * 11}])


def test_loop_helpers_still_work(tiny: Tokenizer) -> None:
    source = (
        "{% for i in range(6) if i % 2 == 0 %}{% if i == 4 %}{% break %}{% endif %}"
        "{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}{% else %}none{% endfor %}"
    )
    assert template(source, tiny).render_text(QUESTION) == "1/3,2/3,"


def test_tojson_escapes_neither_html_nor_letters(tiny: Tokenizer) -> None:
    source = "{{ {'b': '<é>', 'a': 1} | tojson }}"
    assert template(source, tiny).render_text(QUESTION) == '{"b": "<é>", "a": 1}'


def test_a_large_conversation_takes_no_time_of_its_square(
    tiny: Tokenizer, tiny_folder: Path
) -> None:
    many = [{"role": "user", "content": "hello"}] * 5000
    ids = ChatTemplate.load(tiny_folder, tiny).render(many, add_generation_prompt=False)
    assert ids == ChatTemplate.load(tiny_folder, tiny).render(
        many[:1], add_generation_prompt=False
    ) * len(many)
