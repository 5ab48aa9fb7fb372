# ruff: noqa: RUF001 (typographic marks are what is looked for)
"""Sentences and words in capitals, by rule."""

from __future__ import annotations

import re

# An end: marks, then quotes or brackets that close, then a blank or the end of the text.
_END = re.compile(r"[.!?…]+[\"'”’)\]*_]*(?=\s|$)")
_LAST_WORD = re.compile(r"[\w.]*$")
_INITIAL = re.compile(r"(?:[A-Z]\.)*[A-Z]")
_ABBREVIATIONS = (
    "mr mrs ms dr prof st jr sr vs etc e.g i.e cf al inc ltd co corp dept est fig gen gov hon lt "
    "no nos rep rev sen sgt vol approx a.m p.m"
)
_ABBREVIATED = frozenset(_ABBREVIATIONS.split())
_LOOK_BACK = 24
_CAPITALS = re.compile(r"\w+(?:[-.'’]\w+)*")


def count_sentences(text: str) -> int:
    """Sentences that end in a mark, and one more for words behind the last.

    A full stop behind an initial or a known abbreviation ends none, nor does any mark before a word
    in small letters.
    """
    count = start = 0
    for end in _END.finditer(text):
        if _is_within(text, end):
            continue
        if any(letter.isalnum() for letter in text[start : end.start()]):
            count += 1
        start = end.end()
    return count + any(letter.isalnum() for letter in text[start:])


def count_capital_words(text: str) -> int:
    """Words without a small letter and with at least one capital."""
    return sum(1 for word in _CAPITALS.finditer(text) if word[0].isupper())


def _is_within(text: str, end: re.Match[str]) -> bool:
    """Whether the mark stands within a sentence."""
    behind = text[end.end() : end.end() + _LOOK_BACK].lstrip()
    if behind[:1].islower():
        return True
    if not behind or end[0][0] != ".":
        return False
    last = _LAST_WORD.search(text, max(0, end.start() - _LOOK_BACK), end.start())
    word = last[0] if last else ""
    return word.lower() in _ABBREVIATED or _INITIAL.fullmatch(word) is not None
