"""How commands travel: one tensor of a fixed size, and a second one only for a longer message."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from .collectives import Group
from .command import HEAD_WORDS, Kind

FIXED_WORDS = 1024
"""8 KiB: a decode step of some 16 sequences of 2000 tokens in blocks of 64."""


@dataclass(frozen=True, slots=True)
class ControlCost:
    """Time that steps spent on being told, in seconds since the start.

    ``send_s`` is what rank 0 waited for its messages to be encoded and taken; ``receive_s`` goes
    from the start of encoding to the message being decoded, for the slowest other rank (both on one
    machine); ``step_s`` is the whole time of the steps.
    """

    steps: int = 0
    send_s: float = 0.0
    receive_s: float = 0.0
    step_s: float = 0.0

    def since(self, before: ControlCost) -> ControlCost:
        """What was added after ``before``."""
        return ControlCost(
            self.steps - before.steps,
            self.send_s - before.send_s,
            self.receive_s - before.receive_s,
            self.step_s - before.step_s,
        )

    @property
    def share(self) -> float:
        """Of the steps' time, by the larger of both costs."""
        return max(self.send_s, self.receive_s) / self.step_s if self.step_s else 0.0


def send_command(grid: Group, words: list[int]) -> None:
    """Rank 0's side."""
    short = torch.zeros(FIXED_WORDS, dtype=torch.int64)
    whole = torch.tensor(words, dtype=torch.int64)
    short[: min(len(words), FIXED_WORDS)] = whole[:FIXED_WORDS]
    grid.broadcast(short)
    if len(words) > FIXED_WORDS:
        grid.broadcast(whole)


def receive_command(grid: Group) -> tuple[Kind, int, list[int]]:
    """The next command on another rank: its kind, when it was sent, and its payload.

    Waits for as long as the group is whole.
    """
    message = grid.broadcast(torch.empty(FIXED_WORDS, dtype=torch.int64))
    length = int(message[0])
    if length > FIXED_WORDS:
        message = grid.broadcast(torch.empty(length, dtype=torch.int64))
    words: list[int] = message[:length].tolist()
    return Kind(words[1]), words[2], words[HEAD_WORDS:]


def microseconds_since(sent_ns: int) -> int:
    """By the clock that ranks on one machine share."""
    return (time.monotonic_ns() - sent_ns) // 1000
