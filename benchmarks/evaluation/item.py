"""What is asked, what came back, and what a scorer says of it: plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ...embedded.problem import visible_answer

Mode = Literal["thinking", "non-thinking"]
MODES: tuple[Mode, ...] = ("thinking", "non-thinking")

Verdict = Mapping[str, Sequence[bool]]
"""By measure: one judgement for most, one for each instruction where a prompt has several."""


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt of a task set."""

    task: str
    id: str
    messages: tuple[Mapping[str, Any], ...]
    row: Mapping[str, Any]
    """The row of the data, for the scorer."""
    tools: tuple[Mapping[str, Any], ...] = ()
    category: str = ""
    """The part of the task set that it belongs to, where that has parts."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function call as the API gives it; ``arguments`` is JSON as text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer of the server. ``refusal`` says why there is none."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = field(default=())
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int | None = None
    """Of the completion; ``None`` where the server does not count them."""
    seconds: float = 0.0
    refusal: str = ""

    @property
    def answer(self) -> str:
        """The text behind the thought; empty where the thought did not end.

        Servers without a reasoning parser leave the tags in the content.
        """
        return visible_answer(self.content)
