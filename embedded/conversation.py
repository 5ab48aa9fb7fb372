"""Turns a problem into a conversation with a mode: histories, system turns, soft switches."""

import random
from dataclasses import dataclass
from typing import Literal

from . import wordings
from .chat import (
    OUT_OF_BUDGET,
    THOUGHT_CLOSES,
    THOUGHT_OPENS,
    TURN_ENDS,
    render_completion,
    render_prompt,
)
from .problem import Message, Problem, Split, Tool
from .tasks import draw, toolbox
from .words import any_word

Mode = Literal["think", "switched_off", "off"]
"""How the model has to answer: with a thought, after an empty thought of its own because of
/no_think, or at once because of `enable_thinking=false`."""

MODES: tuple[Mode, ...] = ("think", "switched_off", "off")

_CUT_SHARE = 0.04
_THINK = ("/think",)
_NO_THINK = ("/no_think", "/no_think", "/nothink")
_HISTORY_KINDS = (
    ("arithmetic", 4),
    ("two_numbers", 1),
    ("small_sum", 2),
    ("sort", 1),
    ("count_letters", 1),
    ("reverse_short", 1),
    ("reverse_word", 1),
    ("compare", 1),
    ("copy", 1),
    ("about", 1),
)
_SUM_KINDS = ("arithmetic", "two_numbers", "small_sum", "follow_up", "no_tool")


@dataclass(frozen=True)
class Conversation:
    """A prompt in all its parts, and the assistant turn that is right after it."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    enable_thinking: bool | None
    answer: str
    thought: str | None
    cut: int | None = None
    """Characters of the thought after which its budget is spent; `None`: it is never cut."""

    @property
    def prompt(self) -> str:
        """Text up to where the model begins to write, after a thought that was cut."""
        prompt = render_prompt(self.messages, self.tools, self.enable_thinking)
        if self.thought is None or self.cut is None:
            return prompt
        return prompt + THOUGHT_OPENS + self.thought[: self.cut] + OUT_OF_BUDGET + THOUGHT_CLOSES

    @property
    def completion(self) -> str:
        """Text that the model has to write, its end-of-turn tag included."""
        if self.cut is not None:
            return self.answer + TURN_ENDS
        return render_completion(self.answer, self.thought, self.enable_thinking is False)


def plain(problem: Problem, thinking: bool) -> Conversation:
    """The problem alone, in the mode that `enable_thinking` asks for."""
    return Conversation(
        messages=problem.messages,
        tools=problem.tools,
        enable_thinking=thinking,
        answer=problem.answer,
        thought=problem.thought if thinking else None,
    )


def varied(problem: Problem, mode: Mode, split: Split, rng: random.Random) -> Conversation:
    """The problem as part of a conversation that looks like those of real clients.

    Adds, at random: earlier turns of the same split, a system turn, tools that are not needed,
    and soft switches of which the last one agrees with `mode`. Some thoughts are cut, as by a
    budget, so that the model learns to answer from what it has.
    """
    tools = problem.tools
    if not tools and problem.kind not in _SUM_KINDS and rng.random() < 0.06:
        tools = toolbox(rng)
    messages = [*_history(tools, split, rng), *problem.messages]
    if rng.random() < 0.2:
        messages.insert(0, {"role": "system", "content": _system_text(rng)})
    enable_thinking: bool | None = rng.choice((None, True))
    if mode == "off":
        enable_thinking = False
        if rng.random() < 0.2:
            messages = _with_switches(messages, rng.choice((_THINK, _NO_THINK)), rng)
    elif mode == "switched_off":
        messages = _with_switches(messages, _NO_THINK, rng)
    elif rng.random() < 0.3:
        messages = _with_switches(messages, _THINK, rng)
    cut = mode == "think" and rng.random() < _CUT_SHARE
    return Conversation(
        messages=tuple(messages),
        tools=tools,
        enable_thinking=enable_thinking,
        answer=problem.answer,
        thought=problem.thought if mode == "think" else None,
        cut=rng.randrange(len(problem.thought)) if cut else None,
    )


def _history(tools: tuple[Tool, ...], split: Split, rng: random.Random) -> list[Message]:
    """Earlier turns: problems with their answers, whose thoughts a client does not send back."""
    messages: list[Message] = []
    if rng.random() >= 0.25:
        return messages
    kinds, weights = zip(*_HISTORY_KINDS, strict=True)
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.choices(kinds, weights)[0]
        if tools and kind in _SUM_KINDS:
            kind = "tool_answer"
        earlier = draw(kind, split, rng)
        messages += [*earlier.messages, {"role": "assistant", "content": earlier.answer}]
    return messages


def _system_text(rng: random.Random) -> str:
    choice = rng.random()
    if choice < 0.7:
        return rng.choice(wordings.SYSTEM)
    # Words without meaning teach the model to leave unknown instructions alone; the long ones
    # also teach it positions that short questions never reach.
    count = rng.randint(3, 12) if choice < 0.95 else rng.randint(20, 160)
    return " ".join(any_word(rng, 2, 9) for _ in range(count)).capitalize() + "."


def _with_switches(
    messages: list[Message], last: tuple[str, ...], rng: random.Random
) -> list[Message]:
    """Puts one to three soft switches into user and system turns; the last one is of `last`."""
    places = [
        index for index, message in enumerate(messages) if message["role"] in ("user", "system")
    ]
    if messages[0]["role"] != "system" and rng.random() < 0.25:
        messages = [{"role": "system", "content": ""}, *messages]
        places = [0, *(index + 1 for index in places)]
    count = min(rng.choice((1, 1, 2, 3)), len(places))
    chosen = rng.sample(places, count)
    if rng.random() < 0.6:
        chosen = sorted({*chosen[1:], places[-1]})
    chosen.sort()
    switched = list(messages)
    for index in chosen:
        switch = rng.choice(last if index == chosen[-1] else _THINK + _NO_THINK[1:])
        text = str(messages[index]["content"])
        if index == chosen[-1] and rng.random() < 0.1:
            other = rng.choice(_NO_THINK if last is _THINK else _THINK)
            text = f"{text} {other}".strip()
        elif text and rng.random() < 0.15:
            switched[index] = {**messages[index], "content": f"{switch} {text}"}
            continue
        joint = "\n" if rng.random() < 0.1 else " "
        switched[index] = {**messages[index], "content": f"{text}{joint}{switch}".strip()}
    return [message for message in switched if message["role"] != "system" or message["content"]]
