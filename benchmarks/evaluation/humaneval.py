"""HumanEval (Chen et al. 2021): functions to write from their docstring, pass@1 by running tests.

Asked in a chat. The block of the answer that defines the function is run behind the prompt's own
text, which brings its imports and helpers, then the data's tests. One sample a problem, so pass@1
is the share of problems whose tests pass.
"""

from __future__ import annotations

from .code_blocks import block_with_function, defines
from .data import read_rows
from .item import Item, Reply, Verdict
from .sandbox import run_code

TASK = "humaneval"
FILE = "HumanEval.jsonl.gz"
INSTRUCTION = (
    "Complete this Python function. Answer with the whole function, its imports included, in one "
    "```python block."
)


def load() -> list[Item]:
    """The items, in the order of the data. Raises ``DataError``."""
    return [
        Item(
            TASK,
            str(row["task_id"]),
            (
                {
                    "role": "user",
                    "content": f"{INSTRUCTION}\n\n```python\n{row['prompt'].rstrip()}\n```",
                },
            ),
            row,
        )
        for row in read_rows(FILE)
    ]


def score(item: Item, reply: Reply) -> Verdict:
    """``pass@1``: whether the data's tests pass. Runs the code: see ``sandbox``."""
    return {"pass@1": [bool(reply.answer) and run_code(program(item, reply.answer)).passed]}


def program(item: Item, answer: str) -> tuple[str, ...]:
    """What is run, part after part in one namespace; only the last may raise by itself.

    A block that defines the function replaces the prompt's unfinished one; any other is taken for
    its body.
    """
    prompt, name = str(item.row["prompt"]), str(item.row["entry_point"])
    block = block_with_function(answer, name)
    written = (prompt, block) if defines(block, name) else (prompt + block,)
    return (*written, str(item.row["test"]), f"check({name})\n")
