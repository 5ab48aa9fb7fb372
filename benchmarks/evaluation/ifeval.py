"""IFEval (Zhou et al. 2023): prompts whose instructions a program can check.

Four measures: of prompts whose instructions are all followed and of single instructions, each
strict (the answer as it is) and loose (any of eight forms of it: without its first line, its last
line, both, neither; each with and without asterisks).
"""

from __future__ import annotations

from collections.abc import Iterator

from .data import DataError, read_rows
from .ifeval_checks import CHECKS
from .item import Item, Reply, Verdict

TASK = "ifeval"
FILE = "ifeval_input_data.jsonl"


def load() -> list[Item]:
    """The items, in the order of the data. Raises ``DataError``."""
    items = []
    for row in read_rows(FILE):
        for name in row["instruction_id_list"]:
            if name not in CHECKS:
                raise DataError(f"IFEval's prompt {row['key']} has the unknown instruction {name}")
        message = {"role": "user", "content": row["prompt"]}
        items.append(Item(TASK, f"ifeval_{row['key']}", (message,), row))
    return items


def score(item: Item, reply: Reply) -> Verdict:
    """All four measures; an empty answer follows nothing."""
    strict = _followed(item, [reply.answer])
    loose = _followed(item, list(loose_forms(reply.answer)))
    return {
        "prompt strict": [all(strict)],
        "instruction strict": strict,
        "prompt loose": [all(loose)],
        "instruction loose": loose,
    }


def loose_forms(answer: str) -> Iterator[str]:
    """The answer as it is and in seven other forms, which drop what models like to add."""
    lines = answer.split("\n")
    for kept in (lines, lines[1:], lines[:-1], lines[1:-1]):
        form = answer if kept is lines else "\n".join(kept).strip()
        yield form
        yield form.replace("*", "")


def _followed(item: Item, forms: list[str]) -> list[bool]:
    """For each instruction whether one of the forms follows it."""
    given = zip(item.row["instruction_id_list"], item.row["kwargs"], strict=True)
    return [
        any(form.strip() and CHECKS[name](form, arguments) for form in forms)
        for name, arguments in given
    ]
