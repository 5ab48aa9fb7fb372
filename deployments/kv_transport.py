"""How KV tickets come from a prefill replica: the seam; nothing here knows Ray.

A pull begins with the name of the replica that serves it, to which acknowledgements are aimed, and
goes on with the tickets. The reader acknowledges each; the prefill replica sends on while at most
``WINDOW_BYTES`` are unacknowledged, so a slow reader fills no memory between the two.

A transport is two things of one name in ``RemotePrefillConfig.transport``: a ``KVTransport`` in the
decode replica, and in the prefill replica a ``TicketPost`` for each stream.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np

from ..workers.kv.ticket import Buffer
from ..workers.types import PrefillRequest
from .config import PoolConfig, ServiceConfig
from .handoff_stats import PeerReport
from .wire import RouteHints

WINDOW_BYTES = 128 * 2**20
"""Bytes of one pull that may be sent and unread; a single ticket may be larger."""
MAX_PULLS = 8
"""Pulls of one decode replica in flight; further ones wait for a place until their deadline."""
MAX_FETCHES = 4 * MAX_PULLS
"""Reads of another process's memory that may be open: those of all pulls, and some that nobody
waits for any longer."""
_MAX_REPLICA_ID_BYTES = 256


REFUSED = {
    "nccl": (
        "a transfer that fails under it makes Ray kill both replicas with all their requests, "
        "where a failed handoff may cost no request; use nixl or object_store"
    ),
    "cuda_ipc": (
        "it carries GPU memory, and KV tickets are made and checked in host memory; use "
        "object_store, by which they stay in their node's memory where both replicas share one"
    ),
}
"""Transports that no build has, and why."""


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """One ticket, and the seconds it took from where it was made to here."""

    buffer: Buffer
    seconds: float


class TransferError(RuntimeError):
    """A ticket did not come from the memory that holds it; the message says why."""


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

    def close(self) -> None:
        """Give back what the transport holds in this process; pulls have ended."""
        ...


class TicketPost(Protocol):
    """How the tickets of one stream leave a prefill replica."""

    @property
    def on_read(self) -> Callable[[], None] | None:
        """Called when the oldest ticket that was sent and not read has been read, where this side
        keeps tickets until then; the stream then lasts until all have been read."""
        ...

    async def send(self, buffer: Buffer) -> Any:
        """What stands for a ticket in the stream, once there is room for it."""
        ...

    def close(self) -> None:
        """The stream has ended: nobody will read what was not read yet."""
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
    """Raise ``ValueError`` for a pool whose transport cannot work here, and say why."""
    for pool in config.pools:
        obstacle = refusal(pool) or missing_package(pool)
        if obstacle is not None:
            raise ValueError(f"pool {pool.name!r}: {obstacle}")


def refusal(pool: PoolConfig) -> str | None:
    """Why no build has a pool's transport; ``None`` where it is there."""
    if pool.prefill is None or pool.prefill.transport not in REFUSED:
        return None
    name = pool.prefill.transport
    return f"prefill.transport {name!r} is refused: {REFUSED[name]}"


def missing_package(pool: PoolConfig) -> str | None:
    """What a pool's transport needs and this Python environment lacks."""
    if pool.prefill is None or pool.prefill.transport != "nixl" or find_spec("nixl") is not None:
        return None
    return "prefill.transport 'nixl' needs the package nixl: pip install 'inference-pio[nixl]'"


def transports_from(config: ServiceConfig, source: PoolConfig) -> list[str]:
    """The transports by which decode pools take KV from a prefill pool."""
    takers = [pool.prefill for pool in config.pools if pool.prefill is not None]
    return sorted({taker.transport for taker in takers if taker.pool == source.name})
