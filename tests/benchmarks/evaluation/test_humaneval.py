from __future__ import annotations

from functools import partial

import pytest

from inference_pio.benchmarks.evaluation import humaneval
from inference_pio.benchmarks.evaluation.item import Item, Reply
from inference_pio.benchmarks.evaluation.sandbox import run_code

SAMPLE = (2, 32, 38, 50, 162)
"""Some with imports and helper functions in the prompt."""
BODY = "    return a + b\n"


@pytest.fixture
def items(task_sets: object) -> list[Item]:
    return humaneval.load()


def passes(item: Item, content: str) -> bool:
    return humaneval.score(item, Reply(content=content)) == {"pass@1": [True]}


def canonical(item: Item) -> str:
    return f"```python\n{item.row['prompt']}{item.row['canonical_solution']}```"


def test_the_prompt_asks_for_a_block(items: list[Item]) -> None:
    assert len(items) == 164
    (message,) = items[0].messages
    assert "```python\nfrom typing import List" in message["content"]
    assert "METADATA" not in message["content"]


@pytest.mark.parametrize("number", SAMPLE)
def test_canonical_solutions_pass_and_empty_ones_do_not(items: list[Item], number: int) -> None:
    item = items[number]
    assert passes(item, canonical(item))
    assert passes(item, f"Only the body:\n```\n{item.row['canonical_solution']}```")
    name = item.row["entry_point"]
    assert not passes(item, f"```python\ndef {name}(*_, **__):\n    return None\n```")


@pytest.mark.slow
def test_every_canonical_solution_passes(items: list[Item]) -> None:
    assert [item.id for item in items if not passes(item, canonical(item))] == []


@pytest.mark.parametrize(
    "content",
    [
        "",
        "I cannot write code.",
        "<think>\n```python\ndef add(x, y):\n    return x + y\n```",
        "```python\ndef add(x, y):\n    while True: pass\n```",
        "```python\nimport os\nos._exit(0)\n```",
        "```python\ndef add(x, y):\n    return x +",
        "x" * 1_000_000,
    ],
)
def test_what_is_no_solution_does_not_pass(
    items: list[Item], content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(humaneval, "run_code", partial(run_code, seconds=0.5))
    add = items[53]
    assert add.row["entry_point"] == "add"
    assert not passes(add, content)
