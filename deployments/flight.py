"""One client's request under way: which attempt counts, and which replicas have failed it.

Every attempt runs under a stream id of its own, so that what a lost attempt still says is told from
what the next one says, even where both run on the same replica.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..workers.types import GenerateRequest, TokenChunk
from .generation import Generation
from .wire import RouteHints


class Source(NamedTuple):
    """Where chunks come from: one stream of one replica."""

    stream_id: str
    replica_id: str


@dataclass(slots=True, eq=False)
class Flight:
    """A generation and the attempt that serves it now.

    ``stream_id`` is that of the attempt under way, ``None`` between two; ``replica_id`` names who
    took it, ``None`` until the reply has come. ``early`` keeps chunks that came before the reply.
    """

    generation: Generation
    hints: RouteHints
    stream_id: str | None = None
    replica_id: str | None = None
    early: list[tuple[Source, TokenChunk]] = field(default_factory=list)
    num_lost: int = 0
    """Attempts that ended with their replica."""
    streams: set[str] = field(default_factory=set)
    """Stream ids of all attempts."""
    told: set[Source] = field(default_factory=set)
    """Sources of stale chunks that have been told to stop."""
    mover: asyncio.Task[None] | None = None
    """Finds the next replica."""

    @property
    def source(self) -> Source | None:
        """Where its chunks come from; ``None`` while nobody has taken it."""
        if self.stream_id is None or self.replica_id is None:
            return None
        return Source(self.stream_id, self.replica_id)

    def begin(self, stream_id: str) -> None:
        """An attempt starts."""
        assert stream_id not in self.streams, "every attempt has a stream of its own"
        self.streams.add(stream_id)
        self.stream_id, self.replica_id = stream_id, None

    def end(self) -> None:
        """The attempt has failed; what it still says is stale."""
        self.stream_id = self.replica_id = None
        self.early.clear()

    def avoid(self, replica_id: str) -> None:
        """Ask for another replica from now on; the last one named is the last choice."""
        others = [name for name in self.hints.avoid if name != replica_id]
        self.hints = replace(self.hints, avoid=(*others, replica_id))

    def hints_for(self, requests: Sequence[GenerateRequest]) -> RouteHints:
        """What the router is told about ``requests``."""
        return replace(self.hints, sequences=sum(len(r.choice_indices) for r in requests))
