"""The complexity measure: what it says of known prompts, and that no text can hurt it."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_pio.deployments.config import RoutingConfig, ThinkingConfig
from inference_pio.deployments.routing.complexity import (
    SAMPLE_CHARS,
    WEIGHTS,
    Complexity,
    Question,
    measure,
    question_of,
)

PAGE = Path(__file__).resolve().parents[3] / "docs" / "routing.md"

SMALL_TALK = [
    "hi",
    "Hello!",
    "Thanks, that helped a lot.",
    "How are you today?",
    "Good morning",
    "ok",
    "lol",
    "What's your name?",
    "Tell me a joke",
    "Who are you?",
    "See you tomorrow!",
    "I'm bored",
    "Nice weather today, isn't it?",
    "Happy birthday!",
    "Can you help me?",
    "\u4f60\u597d",
    "Bonjour, \u00e7a va ?",
    "\u0421\u043f\u0430\u0441\u0438\u0431\u043e!",
    "\u3053\u3093\u306b\u3061\u306f",
    "\u00bfC\u00f3mo est\u00e1s?",
]
LOOKUPS = [
    "What is the capital of France?",
    "Who wrote Hamlet?",
    "When did World War II end?",
    "Where is Mount Everest?",
    "What does HTTP stand for?",
    "What color is the sky?",
    "How do you say thank you in Spanish?",
    "What is the tallest building in the world?",
    "Who is the president of France?",
    "Define photosynthesis.",
    "What is 2+2?",
    "Translate 'good morning' to German.",
    "What year was Einstein born?",
    "Name a fruit.",
    "Is the earth round?",
    "\u6cd5\u56fd\u7684\u9996\u90fd\u662f\u54ea\u91cc\uff1f",
    "Wann endete der Zweite Weltkrieg?",
    "What time zone is Tokyo in?",
    "Spell 'necessary'.",
    "What is the boiling point of water?",
]


def score(text: str) -> float:
    return measure(Question(text)).score


@pytest.mark.parametrize(
    ("text", "feature"),
    [
        ("Solve x^2 - 5x + 6 = 0", "math"),
        ("Evaluate \\frac{1}{2} + \\sqrt{3} at the limit", "math"),
        (
            "\u5c0f\u660e\u67095\u4e2a\u82f9\u679c\uff0c\u4ed6\u5403\u4e862\u4e2a\uff0c\u53c8"
            "\u4e70\u4e868\u4e2a\uff0c\u73b0\u5728\u6709\u591a\u5c11\uff1f",
            "math",
        ),
        ("```\nprint(1)\n```\nWhat does this do?", "code"),
        ("import os\n\ndef f(x):\n    return x\n", "code"),
        ("Explain why the sky is blue and compare it with Mars", "reasoning"),
        ("- do this\n- then that\n- and this", "tasks"),
        ("Who? What? Where?", "tasks"),
        ("Give me the planets as JSON", "structured"),
        ("word " * 1000, "long"),
    ],
)
def test_features_are_seen(text: str, feature: str) -> None:
    assert feature in measure(Question(text)).features


@pytest.mark.parametrize(
    "text",
    [
        "My flight is at 10:30 on 2024-05-06",
        "a well-known and/or read/write thing",
        "Write a limerick about a cat",
    ],
)
def test_what_only_looks_like_a_feature_is_none(text: str) -> None:
    assert measure(Question(text)) == Complexity(0.0, ())


def test_context_and_tools_count() -> None:
    alone = measure(Question("hi"))
    long = measure(Question("hi", context_chars=100_000))
    assert (alone.features, long.features) == ((), ("context",))
    scores = [measure(Question("hi", num_tools=number)).score for number in range(12)]
    assert scores == sorted(scores)
    assert scores[0] == 0
    assert scores[1] > 0


def test_the_last_user_turn_is_the_question() -> None:
    messages = [
        {"role": "system", "content": "1234"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "12"},
        {"role": "user", "content": "second"},
        {"role": "tool", "content": "123"},
    ]
    assert question_of(messages, 2) == Question("second", 4 + 5 + 2 + 3, 2)
    assert question_of([{"role": "system", "content": "x"}], 0) == Question("", 1, 0)


@given(
    st.builds(
        Question,
        text=st.text(st.characters(), max_size=300),  # lone surrogates too
        context_chars=st.integers(0, 10**9),
        num_tools=st.integers(0, 200),
    )
)
def test_every_text_has_a_score(question: Question) -> None:
    found = measure(question)
    assert 0 <= found.score <= 1
    assert set(found.features) <= set(WEIGHTS)
    assert found == measure(question)
    assert bool(found.score) or not found.features


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "unit",
    ["x", "1+", "a; ", " ", "\n- ", "def ", "\\ab", "if ", "\n", "(", "1,", "\u00e9", "```", "1-"],
)
def test_ten_million_characters_are_bounded_work(unit: str) -> None:
    """Only both ends are looked at; patterns that tried again and again would run for hours."""
    size = 10_000_000
    text = unit * (size // len(unit))
    found = measure(Question(text))
    assert 0 <= found.score <= 1
    assert "long" in found.features
    middle = "x" * (len(text) - 2 * SAMPLE_CHARS)
    assert len(middle) > 0
    ends = text[:SAMPLE_CHARS] + middle + text[-SAMPLE_CHARS:]
    assert measure(Question(ends)) == found


def data_sets(data: Path) -> Iterator[tuple[str, list[Question]]]:
    """The sets of the table in docs/routing.md, by the names there."""
    bench = data / "bench"

    def lines(path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text().splitlines()]

    yield "small talk (ours)", [Question(text) for text in SMALL_TALK]
    yield "lookups (ours)", [Question(text) for text in LOOKUPS]
    yield "GSM8K", [Question(row["question"]) for row in lines(bench / "gsm8k_test.jsonl")]
    with gzip.open(bench / "HumanEval.jsonl.gz", "rt") as file:
        yield "HumanEval", [Question(json.loads(line)["prompt"]) for line in file]
    problems = lines(bench / "qwen25math_aime24.jsonl")
    yield "AIME 2024", [Question(row.get("problem") or row["question"]) for row in problems]
    yield "IFEval", [Question(row["prompt"]) for row in lines(bench / "ifeval_input_data.jsonl")]
    for name in ("simple_python", "multiple", "parallel", "parallel_multiple"):
        rows = lines(bench / "bfcl" / f"BFCL_v4_{name}.json")
        yield (
            f"BFCL {name}",
            [question_of(row["question"][0], len(row["function"])) for row in rows],
        )
    for name in ("conv", "code"):
        rows_of = (data / "traces" / f"azure_{name}_2000.csv").read_text().splitlines()[1:]
        lengths = [int(row.split(",")[1]) for row in rows_of]
        yield f"Azure {name} trace, lengths alone", [Question("x" * 4 * n) for n in lengths]


def table_row(name: str, questions: list[Question]) -> str:
    scores = sorted(measure(question).score for question in questions)
    count = len(scores)
    low, middle, high = (scores[count * tenths // 10] for tenths in (1, 5, 9))
    thinks = sum(value >= ThinkingConfig().think_from for value in scores) / count
    large = sum(value >= RoutingConfig().large_from for value in scores) / count
    return (
        f"| {name} | {count} | {low:.2f} | {middle:.2f} | {high:.2f} | {thinks:.0%} | {large:.0%} |"
    )


def test_the_table_of_the_page_is_what_is_measured(data_dir: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    sets = list(data_sets(data_dir))
    for name, questions in sets:
        row = table_row(name, questions)
        assert row in page, f"docs/routing.md should have: {row}"
    rows = re.findall(r"^\| .* \| \d+% \| \d+% \|$", page, re.MULTILINE)
    assert len(rows) == len(sets)


def test_problems_stand_clearly_above_small_talk_and_lookups(data_dir: Path) -> None:
    easy = [score(text) for text in SMALL_TALK + LOOKUPS]
    sets = dict(data_sets(data_dir))
    for name in ("GSM8K", "HumanEval", "AIME 2024"):
        scores = sorted(measure(question).score for question in sets[name])
        above = sum(value > max(easy) for value in scores) / len(scores)
        assert above > 0.95, name
        assert scores[len(scores) // 2] > 2 * max(easy), name
