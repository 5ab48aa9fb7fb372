"""What a problem is, which split it belongs to, and when an answer to it is right."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Split = Literal["train", "test"]
Message = Mapping[str, Any]
Tool = Mapping[str, Any]

TEST_SHARE = 10
"""One content in this many belongs to the test split."""

_TOOL_CALL = re.compile(r"<tool_call>\s*(\{.*\})\s*</tool_call>", re.DOTALL)


@dataclass(frozen=True)
class Problem:
    """One conversation that waits for an assistant turn, with the turn that is right."""

    kind: str
    """Name of the task, one of `tasks.KINDS`."""

    content: str
    """What is asked, whatever the wording; the split depends on nothing else."""

    messages: tuple[Message, ...]
    """OpenAI-style turns, the last of which is a user's or a tool's."""

    answer: str
    """The right answer; for a tool call the whole Hermes block."""

    thought: str
    """The steps that lead to the answer, without the tags."""

    tools: tuple[Tool, ...] = ()
    """Tools offered in this conversation, as JSON schemas."""


def split_of(content: str) -> Split:
    """Split that a content belongs to, decided by its hash, so that no list has to be kept."""
    digest = hashlib.sha256(content.encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") % TEST_SHARE == 0 else "train"


def visible_answer(text: str) -> str:
    """The part of a completion after its thought; empty where a thought never ends."""
    if "</think>" in text:
        return text.rpartition("</think>")[2].strip()
    return "" if "<think>" in text else text.strip()


def is_correct(problem: Problem, answer_text: str) -> bool:
    """Whether a completion (with or without its thought) answers the problem.

    A tool call counts as right when its name and arguments are equal as JSON; every other answer
    must be equal as text once the surrounding white space is gone.
    """
    got = visible_answer(answer_text).removesuffix("<|im_end|>").strip()
    wanted_call = _parsed_call(problem.answer)
    if wanted_call is not None:
        return _parsed_call(got) == wanted_call
    return got == problem.answer


def _parsed_call(text: str) -> object | None:
    match = _TOOL_CALL.fullmatch(text)
    if match is None:
        return None
    try:
        call: object = json.loads(match[1])
    except json.JSONDecodeError:
        return None
    return call
