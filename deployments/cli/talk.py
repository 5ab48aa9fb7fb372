"""Conversations with a model, loaded here or behind a server, as streams of pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Piece:
    """What came since the last one: thought, answer, or both."""

    reasoning: str = ""
    content: str = ""


@dataclass(frozen=True, slots=True)
class Manner:
    """How a reply is made; ``None`` leaves it to the model."""

    thinking: bool | None = None
    budget: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None


class Talker(Protocol):
    """Something that answers conversations."""

    name: str

    def reply(self, messages: Sequence[Message], manner: Manner) -> Iterator[Piece]:
        """Answer the last turn, piece by piece. Raises ``CommandError`` or ``ValueError``."""
