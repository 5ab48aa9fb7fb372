"""How KV tickets come from a prefill replica: the seam; nothing here knows Ray.

A pull begins with the name of the replica that serves it, to which acknowledgements are aimed, and
goes on with the tickets. The reader acknowledges each; the prefill replica sends on while at most
``WINDOW_BYTES`` are unacknowledged, so a slow reader fills no memory between the two.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..workers.kv.ticket import Buffer
from ..workers.types import PrefillRequest
from .config import ServiceConfig
from .handoff_stats import PeerReport
from .wire import RouteHints

WINDOW_BYTES = 128 * 2**20
"""Bytes of one pull that may be sent and unread; a single ticket may be larger."""
MAX_PULLS = 8
"""Pulls of one decode replica in flight; further ones wait for a place until their deadline."""
_MAX_REPLICA_ID_BYTES = 256


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """One ticket, and the seconds it took from where it was made to here."""

    buffer: Buffer
    seconds: float


class KVTransport(Protocol):
    """Calls from a decode replica to the prefill replicas of one pool."""

    def pull(
        self, request: PrefillRequest, hints: RouteHints
    ) -> AsyncGenerator[str | Arrival, None]:
        """The serving replica's id, then the request's tickets in order.

        Closing it early ends the work at the other side. Raises what went wrong there or between.
        """
        ...

    async def acknowledge(self, request: PrefillRequest, count: int, *, replica_id: str) -> None:
        """Say that the first ``count`` tickets have been read."""
        ...

    async def reports(self) -> list[PeerReport]:
        """Every replica that answers now."""
        ...

    def failure_reason(self, error: Exception) -> str:
        """The stable word under which an error of ``pull`` is counted."""
        ...


def encode_replica_id(replica_id: str) -> Buffer:
    """The first item of a stream."""
    return np.frombuffer(replica_id.encode(), dtype=np.uint8)


def decode_replica_id(buffer: Buffer) -> str:
    """The replica that ``encode_replica_id`` named. Raises ``ValueError`` for anything else."""
    if buffer.nbytes > _MAX_REPLICA_ID_BYTES:
        raise ValueError(f"a replica's name has {buffer.nbytes} bytes")
    return buffer.tobytes().decode()


def require_transports(config: ServiceConfig) -> None:
    """Raise ``ValueError`` for a pool whose transport does not exist here."""
    for pool in config.pools:
        if pool.prefill is not None and pool.prefill.transport != "object_store":
            raise ValueError(
                f"pool {pool.name!r}: prefill.transport {pool.prefill.transport!r} needs GPUs and "
                "a build that has it. Ray Direct Transport carries single results of actors made "
                "for it, and Serve's replicas, whose results are streams, are not; "
                "use object_store"
            )
