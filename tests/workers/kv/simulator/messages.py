"""What travels between decode and prefill engines in the simulator, and waits to be sent."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from inference_pio.workers.kv.ticket import Buffer
from inference_pio.workers.types import PrefillEnd, PrefillRequest

Name = tuple[str, int]
"""A request's id and the attempt."""


@dataclass(eq=False, slots=True)
class Message:
    """One of them."""

    kind: Literal["ask", "cancel", "ack", "ticket", "end"]
    """The first three go to the prefill engine, the others to a decode engine."""
    node: int
    """The decode engine at the one end, whichever life it is in when the message comes."""
    name: Name
    epoch: int
    """The life of the decode engine that asked."""
    request: PrefillRequest | None = None
    buffer: Buffer | None = None
    made_for: tuple[int, Name] | None = None
    """Whom a ticket was computed for: epoch and name; ``None`` for a label that is false."""
    damaged: bool = False
    """Whether a ticket's bytes were changed on the way."""
    reason: str | None = None


@dataclass(eq=False, slots=True)
class Shipment:
    """Tickets of one prefill on their way out of its engine, as the prefill service holds them."""

    node: int
    epoch: int
    deadline: float
    tickets: deque[Buffer] = field(default_factory=deque)
    num_unread: int = 0
    end: PrefillEnd | None = None
