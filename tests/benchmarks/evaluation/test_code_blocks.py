from __future__ import annotations

import pytest

from inference_pio.benchmarks.evaluation.code_blocks import block_with_function, code_blocks

FUNCTION = "def f(x):\n    return x\n"


@pytest.mark.parametrize(
    "answer",
    [
        f"```python\n{FUNCTION}```",
        f"Like this:\n\n```\n{FUNCTION}```\nIt returns x.",
        f"```python\n{FUNCTION.rstrip()}",  # cut at the limit of tokens
        f"~~~py\n{FUNCTION}~~~",
        f"```python\ndef g(): pass\n```\n```python\n{FUNCTION}```\n```\nf(1) == 1\nf(2) == 2\n```",
        f"A first try:\n```python\ndef f(x): return 0\n```\nBetter:\n```python\n{FUNCTION}```",
        f"````\n{FUNCTION}````",
    ],
)
def test_the_block_that_defines_the_function(answer: str) -> None:
    assert block_with_function(answer, "f") == FUNCTION


def test_without_a_block_the_text_is_the_program() -> None:
    assert block_with_function(FUNCTION, "f") == FUNCTION


def test_without_the_function_the_longest_block() -> None:
    answer = "```\na\n```\n```\n    return x + 1\n```"
    assert block_with_function(answer, "f") == "    return x + 1\n"


def test_a_fence_in_a_longer_fence_is_text() -> None:
    assert code_blocks("````\n```\nx\n```\n````") == ["```\nx\n```\n"]
    assert code_blocks("no block") == []
