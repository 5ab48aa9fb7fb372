"""How hard a request looks, from cheap features of its text: a guess, made without any model.

1. The last user turn is cut to its first and last ``SAMPLE_CHARS`` characters: the question stands
   at one of its ends, and the cost does not grow with the text.
2. Each feature gives a strength in [0, 1]; its weight is the most it can bring.
3. The score is what is left when every feature takes its share of the rest,
   ``1 - prod(1 - weight * strength)``: within [0, 1], never lower for one feature more.

Words are looked for in five languages (``words``); numbers, operators, code, lists, question marks
and length count in every one, the last in bytes of UTF-8, which measures scripts with and without
letters alike. Every pattern is a plain alternation or repetition without nesting: its time is
linear.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import words

SAMPLE_CHARS = 4096
"""Characters looked at, at either end of the question."""


@dataclass(frozen=True, slots=True)
class Question:
    """What of a request is measured: its last user turn, the rest's length, its tools."""

    text: str
    context_chars: int = 0
    num_tools: int = 0


@dataclass(frozen=True, slots=True)
class Complexity:
    """``score`` in [0, 1], and the ``features`` that made it, the strongest first."""

    score: float
    features: tuple[str, ...] = ()


WEIGHTS: dict[str, float] = {
    "math": 0.60,
    "code": 0.55,
    "reasoning": 0.40,
    "long": 0.28,
    "tasks": 0.35,
    "context": 0.20,
    "tools": 0.25,
    "structured": 0.15,
}
"""The most a feature can bring. Set by hand, so that ``docs/routing.md``'s table comes out."""

NAMED_FROM = 0.05
"""A feature that brings less than this is not named."""

_NUMBER = re.compile(r"\d+")
_DATE_OR_TIME = re.compile(r"\b\d{4}-\d{2}-\d{2}\b|\b\d{1,2}:\d{2}\b|\b\d{1,2}/\d{1,2}/\d{2,4}\b")
_OPERATOR = re.compile(
    r"(?:(?<=[\d)\]])|(?<=\b[a-z])) ?[-+*/^=<>\u00d7\u00f7\u2264\u2265] ?(?=[\w(\[])"
    r"|[%\u221a\u2211\u222b\u2202\u03c0\u221e\u00b2\u00b3]|\\[a-z]{2,12}"
)
"""Signs behind a number, a bracket or a name of one letter, signs that need none, LaTeX."""
_FENCE = re.compile(r"```|~~~")
_CODE_LINE = re.compile(
    r"^[ \t]{0,64}(?:def |class |import |from \w+ import |return\b|for .{1,80}:$|if .{1,80}:$"
    r"|#include|public |private |static |const |let |var |func |fn |>>> |SELECT |@\w|\}"
    r"|.{0,200};$)",
    re.MULTILINE,
)
_ITEM = re.compile(
    r"^[ \t]{0,64}(?:(?:[-*•]|\(?\d{1,3}[.)]|[a-z][.)])[ \t]|[\d一二三四五六七八九十]{1,3}、)",
    re.MULTILINE,
)
_QUESTION_MARK = re.compile("[?\uff1f\u061f]")  # the last two: Chinese and Arabic


def measure(question: Question) -> Complexity:
    """The complexity of a request. Pure; at most a few milliseconds, whatever the length."""
    sample, size = _sample(question.text)
    text = sample.lower()
    strengths = {
        "math": _math(text),
        "code": _code(sample, text),
        "reasoning": min(1.0, len(words.REASONING.findall(text)) / 2),
        "long": _between(size, 120, 6000),
        "tasks": _tasks(text),
        "context": _between(question.context_chars, 2000, 200_000),
        "tools": 0.0 if not question.num_tools else min(1.0, (question.num_tools + 1) / 8),
        "structured": min(1.0, float(len(words.STRUCTURE.findall(text)))),
    }
    parts = {name: WEIGHTS[name] * strength for name, strength in strengths.items()}
    left = math.prod(1.0 - part for part in parts.values())
    named = sorted(
        (name for name, part in parts.items() if part >= NAMED_FROM),
        key=lambda name: -parts[name],
    )
    return Complexity(round(1.0 - left, 4), tuple(named))


def question_of(messages: Sequence[Mapping[str, Any]], num_tools: int) -> Question:
    """The question of a normalised conversation (see ``workers.text.messages``)."""
    last = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    total = sum(len(message["content"]) for message in messages)
    return Question(last, total - len(last), num_tools)


def _sample(text: str) -> tuple[str, float]:
    """The part that is looked at, and the bytes of the whole text by the part's bytes a char."""
    cut = text
    if len(text) > 2 * SAMPLE_CHARS:
        cut = f"{text[:SAMPLE_CHARS]}\n{text[-SAMPLE_CHARS:]}"
    if not cut:
        return "", 0.0
    per_char = len(cut.encode("utf-8", "surrogatepass")) / len(cut)
    return cut, per_char * len(text)


def _math(text: str) -> float:
    """Numbers alone are names and prices; with signs or a question of quantity they count."""
    text = _DATE_OR_TIME.sub(" ", text)
    numbers = len(_NUMBER.findall(text)) + len(words.NUMBER.findall(text))
    signs = len(_OPERATOR.findall(text))
    named = len(words.MATH.findall(text))
    asked = numbers >= 3 and _QUESTION_MARK.search(text) is not None
    parts = 0.12 * min(numbers, 4) + 0.2 * min(named, 3) + 0.15 * min(signs, 4)
    return min(1.0, parts + (0.2 if asked else 0.0))


def _code(sample: str, text: str) -> float:
    fenced = 0.4 if _FENCE.search(sample) else 0.0
    lines = len(_CODE_LINE.findall(sample))
    named = len(words.CODE.findall(text))
    return min(1.0, fenced + 0.2 * lines + 0.2 * named)


def _tasks(text: str) -> float:
    """Several things asked for at once: list items, questions, demands."""
    items = len(_ITEM.findall(text))
    questions = len(_QUESTION_MARK.findall(text))
    demands = len(words.DEMAND.findall(text))
    return min(1.0, 0.25 * max(0, items - 1) + 0.25 * max(0, questions - 1) + 0.15 * demands)


def _between(size: float, low: float, high: float) -> float:
    """0 up to ``low``, 1 from ``high``, in between by the number of doublings."""
    if size <= low:
        return 0.0
    return min(1.0, math.log(size / low) / math.log(high / low))
