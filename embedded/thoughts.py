"""The steps a thought writes down, one pure function a task.

Every step names all it needs, so that one attention hop finds it: the model has four or five
layers, and what it cannot look up it has to guess.
"""

from collections.abc import Sequence

WIDTH = 4
"""Digits in a column sum: six operands of 999 and one more stay below 10 000."""

_LABELS = "abcdefgh"


def column_sum(operands: Sequence[int]) -> str:
    """Running total of signed operands, each added column by column from the ones upward.

    A line is `label, columns, > total`. A column is `digit, sign, digit = digit`, then `'` for a
    carry or borrow into the next column and `,` for none. A borrow out of the last column means
    that the sign of the total turns over. Example for 417 + 58: `a+0417`, then
    `b7+8=5'1+5=7,4+0=4,0+0=0,>+0475`.
    """
    total = operands[0]
    lines = [f"{_LABELS[0]}{_signed(total)}"]
    for label, operand in zip(_LABELS[1:], operands[1:], strict=False):
        same_sign = (total < 0) == (operand < 0)
        carry = 0
        columns = ""
        for place in range(WIDTH):
            upper = abs(total) // 10**place % 10
            lower = abs(operand) // 10**place % 10
            digit = upper + lower + carry if same_sign else upper - lower - carry
            carry = 0 if 0 <= digit <= 9 else 1
            mark = "'" if carry else ","
            columns += f"{upper}{'+' if same_sign else '-'}{lower}={digit % 10}{mark}"
        total += operand
        lines.append(f"{label}{columns}>{_signed(total)}")
    return "\n".join(lines)


def _signed(value: int) -> str:
    return f"{'-' if value < 0 else '+'}{abs(value):0{WIDTH}d}"


def selection_sort(numbers: Sequence[int], descending: bool) -> str:
    """Selection sort: each line has the numbers that are left and the one that is taken."""
    left = list(numbers)
    lines = []
    while left:
        taken = max(left) if descending else min(left)
        lines.append(f"{' '.join(f'{number:03d}' for number in left)}>{taken:03d}")
        left.remove(taken)
    return "\n".join(lines)


def digit_comparison(first: int, second: int) -> str:
    """Both numbers with leading zeros, then their digits pairwise up to the first difference."""
    steps = ""
    for upper, lower in zip(f"{first:03d}", f"{second:03d}", strict=True):
        sign = "=" if upper == lower else ">" if upper > lower else "<"
        steps += f"\n{upper}{sign}{lower}"
        if sign != "=":
            break
    return f"{first:03d}\n{second:03d}{steps}"


def letter_count(word: str, letter: str) -> str:
    """The word letter by letter, each followed by how often `letter` has been seen so far."""
    seen = 0
    steps = ""
    for current in word:
        seen += current == letter
        steps += f"{current}{seen}"
    return f"{letter}:\n{steps}"


def indexed_spelling(word: str) -> str:
    """The word spelled with the last digit of each position, forwards and then backwards."""
    spelled = [f"{position % 10}{letter}" for position, letter in enumerate(word, 1)]
    return f"{''.join(spelled)}\n{''.join(reversed(spelled))}"
