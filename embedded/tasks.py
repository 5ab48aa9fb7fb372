"""Generated problems: what the model is trained on, and what it is measured on.

Standard library only, so that servers and tests can ask the same problems without torch.
A problem of the test split never occurs in training, in any wording, nor inside a history.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence

from . import thoughts, wordings
from .problem import (
    Message,
    Problem,
    Split,
    Tool,
    is_correct,
    split_of,
    visible_answer,
)
from .words import any_word, foreign_word

__all__ = [
    "KINDS",
    "NO_STEP_KINDS",
    "Problem",
    "Split",
    "arithmetic",
    "calculator_tool",
    "generate",
    "is_correct",
    "problems",
    "split_of",
    "visible_answer",
]

LARGEST = 999
"""Largest operand of a sum, and largest number to sort or compare."""

SMALL = 50
"""Largest operand of a sum that needs no steps."""


def _number(rng: random.Random) -> int:
    """0 to 999, with one- and two-digit numbers often enough to be learned."""
    choice = rng.random()
    if choice < 0.6:
        return rng.randint(100, LARGEST)
    return rng.randint(10, 99) if choice < 0.88 else rng.randint(0, 9)


def _expression(operands: Sequence[int], minus: Sequence[bool], signs: tuple[str, str]) -> str:
    text = str(operands[0])
    for operand, is_minus in zip(operands[1:], minus[1:], strict=True):
        text += f"{signs[is_minus]}{operand}"
    return text


def _sum_content(operands: Sequence[int]) -> str:
    """Neither the order of operands nor the wording makes another sum."""
    return "sum " + " ".join(map(str, sorted(operands)))


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _listed(items: Sequence[object], rng: random.Random) -> str:
    texts = [str(item) for item in items]
    if rng.random() < 0.3:
        return f"{', '.join(texts[:-1])} and {texts[-1]}"
    return ", ".join(texts)


def _sum_question(rng: random.Random, operands: Sequence[int], minus: Sequence[bool]) -> str:
    if not any(minus) and rng.random() < 0.25:
        return rng.choice(wordings.ADDITION).format(list=_listed(operands, rng))
    choice = rng.random()
    signs = (
        (" + ", " - ") if choice < 0.8 else ("+", "-") if choice < 0.9 else (" plus ", " minus ")
    )
    wording = wordings.EXPRESSION[0] if rng.random() < 0.3 else rng.choice(wordings.EXPRESSION)
    return wording.format(e=_expression(operands, minus, signs))


def _sum_problem(
    kind: str, rng: random.Random, operands: Sequence[int], minus: Sequence[bool]
) -> Problem:
    signed = [-value if sign else value for value, sign in zip(operands, minus, strict=True)]
    return Problem(
        kind=kind,
        content=_sum_content(signed),
        messages=(_user(_sum_question(rng, operands, minus)),),
        answer=str(sum(signed)),
        thought=thoughts.column_sum(signed),
    )


def arithmetic(rng: random.Random, operand_count: int, kind: str = "arithmetic") -> Problem:
    """A sum or difference of `operand_count` numbers of 0 to 999."""
    operands = [_number(rng) for _ in range(operand_count)]
    only_plus = rng.random() < 0.2
    minus = [False] + [not only_plus and rng.random() < 0.5 for _ in operands[1:]]
    return _sum_problem(kind, rng, operands, minus)


def _several_numbers(rng: random.Random) -> Problem:
    return arithmetic(rng, rng.randint(3, 6))


def _two_numbers(rng: random.Random) -> Problem:
    return arithmetic(rng, 2, kind="two_numbers")


def _small_sum(rng: random.Random) -> Problem:
    operands = [rng.randint(0, SMALL), rng.randint(0, SMALL)]
    return _sum_problem("small_sum", rng, operands, [False, False])


def _follow_up(rng: random.Random) -> Problem:
    """A sum, its answer, and a second turn that adds to it or takes from it.

    The first sum has to be of the same split as the whole: `generate` checks the content of the
    whole only, so this draws until the first sum agrees.
    """
    while True:
        first = arithmetic(rng, rng.randint(2, 5))
        operand = _number(rng)
        is_minus = rng.random() < 0.5
        start = int(first.answer)
        earlier = [int(value) for value in first.content.split()[1:]]
        signed = -operand if is_minus else operand
        content = _sum_content([*earlier, signed])
        step = _sum_content([start, signed])
        if len({split_of(first.content), split_of(content), split_of(step)}) == 1:
            break
    wording = rng.choice(wordings.FOLLOW_UP_MINUS if is_minus else wordings.FOLLOW_UP_PLUS)
    return Problem(
        kind="follow_up",
        content=content,
        messages=(
            *first.messages,
            {"role": "assistant", "content": first.answer},
            _user(wording.format(n=operand)),
        ),
        answer=str(start + signed),
        thought=thoughts.column_sum([start, signed]),
    )


def _sort(rng: random.Random) -> Problem:
    numbers: list[int] = []
    wanted = rng.randint(3, 6)
    while len(numbers) < wanted:
        number = _number(rng)
        if number not in numbers:
            numbers.append(number)
    descending = rng.random() < 0.4
    wording = rng.choice(wordings.SORT_DESCENDING if descending else wordings.SORT_ASCENDING)
    ordered = sorted(numbers, reverse=descending)
    return Problem(
        kind="sort",
        content=f"sort {sorted(numbers)}",
        messages=(_user(wording.format(list=_listed(numbers, rng))),),
        answer=", ".join(map(str, ordered)),
        thought=thoughts.selection_sort(numbers, descending),
    )


def _compare(rng: random.Random) -> Problem:
    first = _number(rng)
    second = first
    while second == first:
        close = rng.random() < 0.4
        near = first + rng.randint(-30, 30)
        second = min(max(near, 0), LARGEST) if close else _number(rng)
    wants_larger = rng.random() < 0.6
    if rng.random() < 0.65:
        wording = wordings.COMPARE_LARGER if wants_larger else wordings.COMPARE_SMALLER
        answer = str(max(first, second) if wants_larger else min(first, second))
    else:
        wording = wordings.COMPARE_IS_LARGER if wants_larger else wordings.COMPARE_IS_SMALLER
        answer = "Yes" if (first > second) == wants_larger else "No"
    return Problem(
        kind="compare",
        content=f"compare {sorted((first, second))}",
        messages=(_user(rng.choice(wording).format(a=first, b=second)),),
        answer=answer,
        thought=thoughts.digit_comparison(first, second),
    )


def _count_letters(rng: random.Random) -> Problem:
    word = any_word(rng, 3, 12)
    letter = rng.choice(word) if rng.random() < 0.8 else rng.choice("abcdefghijklmnopqrstuvwxyz")
    if rng.random() < 0.3:
        letter = max(word, key=word.count)
    return Problem(
        kind="count_letters",
        content=f"count {letter} {word}",
        messages=(_user(rng.choice(wordings.COUNT_LETTERS).format(c=letter, w=word)),),
        answer=str(word.count(letter)),
        thought=thoughts.letter_count(word, letter),
    )


def _reverse(kind: str, rng: random.Random, shortest: int, longest: int) -> Problem:
    word = any_word(rng, shortest, longest)
    return Problem(
        kind=kind,
        content=f"reverse {word}",
        messages=(_user(rng.choice(wordings.REVERSE).format(w=word)),),
        answer=word[::-1],
        thought=thoughts.indexed_spelling(word),
    )


def _reverse_word(rng: random.Random) -> Problem:
    return _reverse("reverse_word", rng, 6, 10)


def _reverse_short(rng: random.Random) -> Problem:
    return _reverse("reverse_short", rng, 3, 5)


def _copy_item(rng: random.Random) -> str:
    choice = rng.random()
    if choice < 0.3:
        return str(_number(rng))
    if choice < 0.4:
        return foreign_word(rng)
    word = any_word(rng, 2, 8)
    if choice < 0.55:
        return word.upper() if rng.random() < 0.3 else word.capitalize()
    return word


def _copy(rng: random.Random) -> Problem:
    text = " ".join(_copy_item(rng) for _ in range(rng.randint(1, 5)))
    return Problem(
        kind="copy",
        content=f"copy {text}",
        messages=(_user(rng.choice(wordings.COPY).format(t=text)),),
        answer=text,
        thought=wordings.NO_STEPS_THOUGHT,
    )


def calculator_tool(rng: random.Random) -> Tool:
    """JSON schema of the calculator, in one of its descriptions."""
    expression = {"type": "string"}
    if rng.random() < 0.5:
        expression["description"] = rng.choice(wordings.EXPRESSION_DESCRIPTIONS)
    return {
        "type": "function",
        "function": {
            "name": "calculator",
            "description": rng.choice(wordings.CALCULATOR_DESCRIPTIONS),
            "parameters": {
                "type": "object",
                "properties": {"expression": expression},
                "required": ["expression"],
            },
        },
    }


def _other_tool(rng: random.Random) -> Tool:
    name, description, argument = rng.choice(wordings.OTHER_TOOLS)
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {argument: {"type": "string"}},
                "required": [argument],
            },
        },
    }


def toolbox(rng: random.Random) -> tuple[Tool, ...]:
    """The calculator, at times next to a tool that no task needs."""
    tools = [calculator_tool(rng)]
    if rng.random() < 0.15:
        tools.insert(rng.randint(0, 1), _other_tool(rng))
    return tuple(tools)


def _call_expression(rng: random.Random) -> str:
    text = str(_number(rng))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        text += f" {rng.choice('***/+-')} {_number(rng)}"
    return text


def _call_question(rng: random.Random, expression: str) -> str:
    if rng.random() < 0.6:
        return rng.choice(wordings.USE_CALCULATOR).format(e=expression)
    return rng.choice(wordings.EXPRESSION).format(e=expression)


def _arguments(expression: str) -> str:
    return json.dumps({"expression": expression})


def _tool_call(rng: random.Random) -> Problem:
    expression = _call_expression(rng)
    return Problem(
        kind="tool_call",
        content=f"call {expression}",
        messages=(_user(_call_question(rng, expression)),),
        answer="<tool_call>\n"
        f'{{"name": "calculator", "arguments": {_arguments(expression)}}}\n</tool_call>',
        thought=wordings.TOOL_CALL_THOUGHT,
        tools=toolbox(rng),
    )


def _tool_answer(rng: random.Random) -> Problem:
    expression = _call_expression(rng)
    result = str(rng.choice((1, 1, 1, -1)) * rng.randint(0, 10 ** rng.randint(1, 6) - 1))
    if rng.random() < 0.2:
        result += f".{rng.randint(1, 999)}"
    response = result if rng.random() < 0.7 else f'{{"result": {result}}}'
    call = {
        "type": "function",
        "function": {"name": "calculator", "arguments": _arguments(expression)},
    }
    turn: dict[str, object] = {"role": "assistant", "content": "", "tool_calls": [call]}
    if rng.random() < 0.5:
        turn["reasoning_content"] = wordings.TOOL_CALL_THOUGHT
    return Problem(
        kind="tool_answer",
        content=f"call {expression}",
        messages=(
            _user(_call_question(rng, expression)),
            turn,
            {"role": "tool", "content": response},
        ),
        answer=result,
        thought=wordings.TOOL_ANSWER_THOUGHT,
        tools=toolbox(rng),
    )


def _no_tool(rng: random.Random) -> Problem:
    """A calculator is asked for, or needed, but none is given."""
    if rng.random() < 0.5:
        expression = _call_expression(rng)
        question = rng.choice(wordings.USE_CALCULATOR).format(e=expression)
    else:
        expression = f"{_number(rng)} {rng.choice('**/')} {_number(rng)}"
        question = rng.choice(wordings.EXPRESSION).format(e=expression)
    return Problem(
        kind="no_tool",
        content=f"call {expression}",
        messages=(_user(question),),
        answer=wordings.NO_TOOL_ANSWER,
        thought=wordings.NO_TOOL_THOUGHT,
    )


def _about(rng: random.Random) -> Problem:
    """Small talk with fixed answers; it has so few contents that it is the same in both splits."""
    questions, answer = rng.choice(
        (
            (wordings.GREETING, wordings.GREETING_ANSWER),
            (wordings.WHO, wordings.WHO_ANSWER),
            (wordings.THANKS, wordings.THANKS_ANSWER),
        )
    )
    return Problem(
        kind="about",
        content="about",
        messages=(_user(rng.choice(questions)),),
        answer=answer,
        thought=wordings.NO_STEPS_THOUGHT,
    )


KINDS: dict[str, Callable[[random.Random], Problem]] = {
    "arithmetic": _several_numbers,
    "two_numbers": _two_numbers,
    "follow_up": _follow_up,
    "sort": _sort,
    "count_letters": _count_letters,
    "reverse_word": _reverse_word,
    "small_sum": _small_sum,
    "compare": _compare,
    "reverse_short": _reverse_short,
    "copy": _copy,
    "tool_call": _tool_call,
    "tool_answer": _tool_answer,
    "no_tool": _no_tool,
    "about": _about,
}
"""What draws a problem of each kind, whatever its split."""

NO_STEP_KINDS = ("small_sum", "compare", "reverse_short", "copy")
"""Kinds that the model has to answer at once, without thinking."""


def draw(kind: str, split: Split, rng: random.Random) -> Problem:
    """One problem of a kind and split. Raises KeyError for an unknown kind."""
    make = KINDS[kind]
    while True:
        problem = make(rng)
        if kind == "about" or split_of(problem.content) == split:
            return problem


def problems(kind: str, split: Split, seed: int) -> Iterator[Problem]:
    """Endless problems of a kind and split, the same for the same seed."""
    rng = random.Random(f"{kind} {split} {seed}")
    while True:
        yield draw(kind, split, rng)


def generate(kind: str, split: Split, seed: int, count: int) -> list[Problem]:
    """`count` problems of a kind and split, the same for the same seed; kinds with few contents
    repeat. Raises KeyError for an unknown kind."""
    stream = problems(kind, split, seed)
    return [next(stream) for _ in range(count)]
