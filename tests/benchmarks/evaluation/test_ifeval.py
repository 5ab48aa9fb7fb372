from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from inference_pio.benchmarks.evaluation import ifeval
from inference_pio.benchmarks.evaluation.ifeval_checks import CHECKS
from inference_pio.benchmarks.evaluation.item import Item, Reply

AT_LEAST, LESS_THAN = "at least", "less than"

# Instruction, arguments, texts that follow it, texts that do not.
CASES: list[tuple[str, Mapping[str, Any], list[str], list[str]]] = [
    (
        "keywords:existence",
        {"keywords": ["river", "cold"]},
        ["A Cold river.", "Riverside, colder"],
        ["A river.", ""],
    ),
    (
        "keywords:frequency",
        {"keyword": "tea", "frequency": 2, "relation": AT_LEAST},
        ["Tea and tea", "teatea"],
        ["Tea", "te a te a"],
    ),
    (
        "keywords:frequency",
        {"keyword": "tea", "frequency": 2, "relation": LESS_THAN},
        ["Tea", "none"],
        ["tea tea", "tea Tea tea"],
    ),
    (
        "keywords:forbidden_words",
        {"forbidden_words": ["bad", "no way"]},
        ["A badge.", "No. Way"],
        ["BAD!", "There is no way."],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "Q", "let_frequency": 2, "let_relation": AT_LEAST},
        ["Quick queue"],
        ["quick"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "!", "let_frequency": 2, "let_relation": LESS_THAN},
        ["Hi!", "Hi"],
        ["Hi!!"],
    ),
    (
        "language:response_language",
        {"language": "de"},
        ["Das ist nicht der Weg, den ich kenne."],
        ["That is not the way that I know.", "Это не тот путь."],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": LESS_THAN},
        ["One. Two.", "One"],
        ["One. Two. Three."],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": AT_LEAST},
        ["One. Two."],
        ["Mr. One."],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": AT_LEAST},
        ["one two three", "well-known word"],
        ["one two", "- - - -"],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": LESS_THAN},
        ["one two"],
        ["one two three"],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "***\na\n***\nb\n***", "a *** b"],
        ["a\n\nb", "a\n***\n\n***\nb", "a *** b *** c"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Rain"},
        ["Sun.\n\nRain, again", 'Sun.\n\n"Rain" it is', "Sun.\n\nrain\nfalls"],
        ["Sun.\nRain", "Sun.\n\nRains", "Rain\n\nSun", "a\n\nRain\n\nb"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["[name] of [city]", "[a][b][c]"],
        ["[name]", "[na\nme] [city]", "]["],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["Bye\nP.S. Write!", "p. s. hello"],
        ["Bye", "PS hello"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.P.S"},
        ["Bye\nP.P.S Write!", "P.P.S. hello"],
        ["P.S. hello"],
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n* b", "text\n  - a\n\n- b"],
        ["* a", "* a\n* b\n* c", "**a**\n**b**"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is yes.", "Well. My answer is maybe."],
        ["Yes.", "my answer is no."],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and *b*", "**a** and *b*", "**a** and **b**"],
        ["*a*", "* a\n* b", "****"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb"],
        ["SECTION 1\na", "SECTION a SECTION b", "Section 1 Section 2"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": [1]}', '```json\n{"a": 1}\n```', '```\n"text"\n```', "[]"],
        ["{a: 1}", 'Here: {"a": 1}', "", "[" * 100_000],
    ),
    (
        "detectable_format:title",
        {},
        ["<<A day>>\nText", "Text <<x>>"],
        ["<A day>", "<<\n>>", "<< >>", ">>a<<"],
    ),
    (
        "combination:two_responses",
        {},
        ["a\n******\nb", "******a******b******"],
        ["a", "a******a", "a******b******c", "a************b"],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "What is it? "},
        ["what is it? It is tea.", "  What is it?"],
        ["It is tea. What is it?"],
    ),
    (
        "startend:end_checker",
        {"end_phrase": "The End."},
        ["So long. the end.", '"Bye. The End."\n'],
        ["The End. So", "The End"],
    ),
    ("startend:quotation", {}, ['"Hello"', ' "a" and "b"\n'], ["Hello", '"', '"Hello" he said']),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": AT_LEAST},
        ["GO NOW please", "A B"],
        ["GO now", "Go Now"],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": LESS_THAN},
        ["GO now", "go"],
        ["GO NOW"],
    ),
    (
        "change_case:english_capital",
        {},
        ["THIS IS THE END."],
        ["This is the end.", "DAS IST NICHT DER WEG.", "123"],
    ),
    (
        "change_case:english_lowercase",
        {},
        ["this is the end."],
        ["This is the end.", "das ist nicht der weg.", "123"],
    ),
    ("punctuation:no_comma", {}, ["No comma; none."], ["One, two."]),
]


@pytest.mark.parametrize(("name", "arguments", "following", "others"), CASES)
def test_an_instruction_is_told_from_its_violation(
    name: str, arguments: Mapping[str, Any], following: list[str], others: list[str]
) -> None:
    for text in following:
        assert CHECKS[name](text, arguments) is True, text
    for text in others:
        assert not CHECKS[name](text, arguments), text


def test_every_instruction_has_a_case() -> None:
    assert {name for name, *_ in CASES} == CHECKS.keys()
    assert len(CHECKS) == 25


@pytest.mark.usefixtures("task_sets")
def test_every_instruction_of_the_data_is_asked_with_its_arguments() -> None:
    items = ifeval.load()
    assert len(items) == 541
    asked = {name for item in items for name in item.row["instruction_id_list"]}
    assert asked == CHECKS.keys()
    for item in items:
        verdict = ifeval.score(item, Reply(content="An answer of one line, in English."))
        assert len(verdict["instruction strict"]) == len(item.row["instruction_id_list"])


@pytest.mark.usefixtures("task_sets")
@pytest.mark.parametrize("content", ["", "  \n", "<think>\nNo end"])
def test_no_answer_follows_nothing(content: str) -> None:
    for item in ifeval.load():
        verdict = ifeval.score(item, Reply(content=content))
        assert not any(any(judged) for judged in verdict.values())


def score(names: list[str], kwargs: list[dict[str, Any]], content: str) -> dict[str, list[bool]]:
    row = {"instruction_id_list": names, "kwargs": kwargs}
    return {
        k: list(v) for k, v in ifeval.score(Item("ifeval", "x", (), row), Reply(content)).items()
    }


def test_the_four_measures() -> None:
    found = score(
        ["punctuation:no_comma", "startend:quotation"], [{}, {}], 'Sure, here it is:\n"Tea"'
    )
    assert found == {
        "prompt strict": [False],
        "instruction strict": [False, False],
        "prompt loose": [True],
        "instruction loose": [True, True],
    }


def test_loose_forms_drop_lines_and_asterisks() -> None:
    forms = list(ifeval.loose_forms("a\n*b*\nc"))
    assert forms == ["a\n*b*\nc", "a\nb\nc", "*b*\nc", "b\nc", "a\n*b*", "a\nb", "*b*", "b"]


@pytest.mark.parametrize("letter", ["[", "*", "\n", "<<", " ", "a ", "- ", "p. ", "```", "."])
def test_a_huge_answer_takes_no_time(task_sets: Path, letter: str) -> None:
    text = letter * 20_000
    rows = [json.loads(x) for x in (task_sets / ifeval.FILE).read_text().splitlines()]
    arguments = {
        name: given
        for row in rows
        for name, given in zip(row["instruction_id_list"], row["kwargs"], strict=True)
    }
    begin = time.thread_time()
    for name, given in arguments.items():
        CHECKS[name](text, given)
    assert time.thread_time() - begin < 10  # seconds, where a square would take minutes
