from __future__ import annotations

import time

import pytest

from inference_pio.benchmarks.evaluation.prose import count_capital_words, count_sentences


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("...", 0),
        ("No mark", 1),
        ("One. Two! Three?", 3),
        ("One.\n\nTwo", 2),
        ("Dr. Smith met Mrs. Jones at 3 p.m. on Monday. They talked.", 2),
        ("J. R. R. Tolkien wrote it. I read it.", 2),
        ("It costs 3.50 dollars. Cheap!", 2),
        ("See e.g. Paris, i.e. France. Go.", 2),
        ('"Stop!" he said. "Why?" She left.', 3),
        ("Wait... what? Yes.", 2),
        ("He works for Acme Inc.", 1),
        ("(It rained.) We stayed.", 2),
        ("# Title\nOne sentence here.", 1),
    ],
)
def test_sentences(text: str, count: int) -> None:
    assert count_sentences(text) == count


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("I am HERE, THERE and Everywhere.", 3),
        ("A well-known U.S. STATE-OF-THE-ART thing", 3),
        ("NASA2 123 -- IT'S", 2),
        ("ÄRGER ärger", 1),
    ],
)
def test_words_in_capitals(text: str, count: int) -> None:
    assert count_capital_words(text) == count


@pytest.mark.parametrize("text", ["." * 60_000, "a" * 60_000, "A." * 30_000, ". " * 30_000])
def test_a_huge_text_takes_no_time(text: str) -> None:
    begin = time.thread_time()
    count_sentences(text)
    count_capital_words(text)
    assert time.thread_time() - begin < 5  # seconds, where a square would take hours
