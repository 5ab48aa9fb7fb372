from __future__ import annotations

from fractions import Fraction

import pytest

from inference_pio.benchmarks.evaluation import gsm8k
from inference_pio.benchmarks.evaluation.item import Item, Reply

ITEM = Item("gsm8k", "x", (), {"question": "?", "answer": "It is <<9*2=18>>18.\n#### 18"})


def is_right(content: str) -> bool:
    return gsm8k.score(ITEM, Reply(content=content)) == {"right": [True]}


@pytest.mark.usefixtures("task_sets")
def test_the_datas_own_answers_are_right_and_another_number_is_not() -> None:
    items = gsm8k.load()
    assert len(items) == 1319
    for item in items:
        answer = str(item.row["answer"])
        number = answer.rpartition("#### ")[2]
        assert gsm8k.score(item, Reply(content=answer)) == {"right": [True]}, item.id
        boxed = f"so \\boxed{{{number}}} in all, of 7."
        assert gsm8k.score(item, Reply(content=boxed)) == {"right": [True]}, item.id
        wrong = f"#### {number}1"
        assert gsm8k.score(item, Reply(content=wrong)) == {"right": [False]}, item.id


@pytest.mark.usefixtures("task_sets")
def test_the_prompt_is_the_question_and_the_instruction() -> None:
    item = gsm8k.load()[0]
    (message,) = item.messages
    assert message["role"] == "user"
    assert message["content"].startswith(item.row["question"])
    assert message["content"].endswith("put your final answer within \\boxed{}.")
    assert "####" not in message["content"]


@pytest.mark.parametrize(
    "answer",
    [
        "\\boxed{18}",
        "First \\boxed{7}, no: $\\boxed{\\$18.00}$ for all 3.",
        "\\boxed{\\text{about } 18 \\text{ eggs}}",
        "**Answer:** 18",
        "She has 2 + 16 = 18.",
        "5 of 20 are gone\n#### 18\nDone in 3 steps.",
        "<think>\nMaybe 20?\n</think>\n\nIt is 18.",
        "x = 18",
        "the sum (18)",
    ],
)
def test_the_final_number_is_found(answer: str) -> None:
    assert is_right(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I do not know.",
        "18 or 19",
        "\\boxed{}",
        "\\boxed{19} and not 18",
        "<think>\nIt is 18",  # a thought that did not end has no answer
        "-18",
        "180",
        "1.8",
        "18" * 100_000,
        "#### \n18",
    ],
)
def test_what_is_no_answer_is_wrong(answer: str) -> None:
    # The last is deliberately right: the mark may stand on a line of its own.
    assert is_right(answer) is (answer == "#### \n18")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234,567.50", Fraction("1234567.5")),
        ("\\boxed{1{,}000}", Fraction(1000)),
        ("\\boxed{1\\,000}", Fraction(1000)),
        ("\\boxed{-3}", Fraction(-3)),
        ("\u22123", Fraction(-3)),
        ("-$5", Fraction(-5)),
        ("9-4", Fraction(4)),
        ("it costs $4.", Fraction(4)),
        (".5", Fraction(1, 2)),
        ("2,3", Fraction(3)),
        ("70%", Fraction(70)),
        ("7" * 41, None),
    ],
)
def test_numbers_as_people_write_them(text: str, number: Fraction | None) -> None:
    assert gsm8k.final_number(text) == number
