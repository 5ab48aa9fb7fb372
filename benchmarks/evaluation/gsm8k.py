"""GSM8K (Cobbe et al. 2021): school sums in words, asked zero-shot in a chat.

The prompt is the question and the instruction that Qwen3's model card gives for mathematics. The
final number is what the last ``\\boxed{}`` holds; without one what follows the last ``####`` (the
form of the data's own answers); without that the last number of the answer. It is right where it
equals the data's number.
"""

from __future__ import annotations

import re
from collections import deque
from fractions import Fraction

from .data import read_rows
from .item import Item, Reply, Verdict

TASK = "gsm8k"
FILE = "gsm8k_test.jsonl"
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."

_BOXED = "\\boxed{"
_MARK = "####"
_MINUS = "\u2212"
# A minus behind a digit or letter is an operator or a hyphen, not a sign.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+")
_MOST_DIGITS = 40


def load() -> list[Item]:
    """The items, in the order of the data. Raises ``DataError``."""
    return [
        Item(
            TASK,
            f"gsm8k_{number}",
            ({"role": "user", "content": f"{row['question']}\n\n{INSTRUCTION}"},),
            row,
        )
        for number, row in enumerate(read_rows(FILE))
    ]


def score(item: Item, reply: Reply) -> Verdict:
    """``right``: whether the final number is the data's."""
    wanted = final_number(str(item.row["answer"]))
    assert wanted is not None, "the data's answers end in their number"
    return {"right": [final_number(reply.answer) == wanted]}


def final_number(answer: str) -> Fraction | None:
    """The number that an answer ends in, by the rule above; ``None`` without a number."""
    boxed = _last_boxed(answer)
    if boxed is not None:
        return _last_number(boxed)
    _, mark, behind = answer.rpartition(_MARK)
    if mark:
        first_line = behind.strip().partition("\n")[0]
        return _last_number(first_line)
    return _last_number(answer)


def _last_boxed(text: str) -> str | None:
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    start += len(_BOXED)
    depth = 1
    for end in range(start, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[start:end]
    return text[start:]


def _last_number(text: str) -> Fraction | None:
    # LaTeX sets thousands apart by {,} or \, and escapes the dollar; typography has its own minus.
    plain = text.replace("{,}", ",").replace("\\,", "").replace("\\$", "$").replace(_MINUS, "-")
    found = deque(_NUMBER.finditer(plain), maxlen=1)
    if not found:
        return None
    digits = found[0][0].replace(",", "").replace("$", "")
    return None if len(digits) > _MOST_DIGITS else Fraction(digits)
