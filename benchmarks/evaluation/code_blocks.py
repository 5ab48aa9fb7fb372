"""The program in an answer that explains itself."""

from __future__ import annotations

import re

_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+-]*)[^\n]*$")


def code_blocks(text: str) -> list[str]:
    """What stands between fences, in order; a block that was cut reaches to the end."""
    blocks: list[list[str]] = []
    fence = ""
    for line in text.split("\n"):
        found = _FENCE.match(line)
        if not fence and found:
            fence = found[1]
            blocks.append([])
        elif fence and line.strip() == fence:
            fence = ""
        elif fence:
            blocks[-1].append(line)
    return ["\n".join(lines) + "\n" for lines in blocks]


def block_with_function(text: str, name: str) -> str:
    """The last block that defines the function, else the longest; without any the text."""
    blocks = code_blocks(text)
    defining = [block for block in blocks if defines(block, name)]
    if defining:
        return defining[-1]
    return max(blocks, key=len, default=text)


def defines(code: str, name: str) -> bool:
    """Whether a function of that name is defined on the outermost level."""
    return re.search(rf"^(?:async )?def {re.escape(name)}\b", code, re.MULTILINE) is not None
