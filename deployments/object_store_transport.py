"""KV tickets through Ray's object store.

1. The prefill replica puts a ticket into its node's object store and yields the reference from a
   streaming call that was made *by reference*, so that Ray counts who holds it.
2. Where the nodes differ, the caller's node fetches it; the caller reads it in place.
3. Nobody refers to it any more once the engine has copied it into its blocks, and Ray frees it.

The prefill replica owns its tickets: with it die those that nobody has fetched, and the decode side
computes them itself. Yielded as they are, the decode replica would own them; and what is yielded to
an owner that has just died, Ray 2.60 keeps in the store for ever (measured: every such item, also
after its producer has ended).
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

import numpy as np
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    OwnerDiedError,
    RayActorError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from ..workers.kv.ticket import Buffer
from ..workers.types import PrefillRequest, RequestError
from .handoff_stats import PeerReport
from .kv_transport import Arrival, decode_replica_id
from .wire import RouteHints, WrongReplicaError

POLL_TIMEOUT_S = 5.0

_REASONS: tuple[tuple[type[BaseException], str], ...] = (
    (OwnerDiedError, "owner_died"),
    (ObjectLostError, "object_lost"),
    (ObjectStoreFullError, "store_full"),
    (OutOfDiskError, "store_full"),
    (RayActorError, "peer_died"),
    (WorkerCrashedError, "peer_died"),
    (NodeDiedError, "peer_died"),
    (WrongReplicaError, "peer_died"),
    (DeploymentUnavailableError, "peer_died"),
    (TaskCancelledError, "cancelled"),
)


class ObjectStoreTransport:
    """Tickets as items of a Serve stream that is made by reference."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def pull(
        self, request: PrefillRequest, hints: RouteHints
    ) -> AsyncGenerator[str | Arrival, None]:
        """See ``KVTransport.pull``."""
        call = self._handle.options(stream=True, _by_reference=True).prefill.remote(
            request, hints=hints
        )
        assert isinstance(call, DeploymentResponseGenerator)  # what stream=True stands for
        try:
            items = await call._to_object_ref_gen()
            yield decode_replica_id(await _fetch(await anext(items)))
            async for item in items:
                (ticket,) = await item
                asked = time.monotonic()
                buffer = await _fetch(ticket)
                yield Arrival(buffer, time.monotonic() - asked)
        finally:
            call.cancel()  # type: ignore[no-untyped-call]

    async def acknowledge(self, request: PrefillRequest, count: int, *, replica_id: str) -> None:
        """See ``KVTransport.acknowledge``."""
        await self._handle.acknowledge.remote(
            request.request_id, request.attempt, request.epoch, count, replica_id=replica_id
        )

    async def reports(self) -> list[PeerReport]:
        """See ``KVTransport.reports``."""
        answers = await self._handle.broadcast("report").results_async(
            timeout_s=POLL_TIMEOUT_S, return_exceptions=True
        )
        return [answer for answer in answers if isinstance(answer, PeerReport)]

    def failure_reason(self, error: Exception) -> str:
        """See ``KVTransport.failure_reason``."""
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, RequestError):
            return cause.code
        for kind, reason in _REASONS:
            if isinstance(cause, kind):
                return reason
        return "peer_failed"


async def _fetch(ref: Any) -> Buffer:
    """The array behind a reference, in place; nothing but numpy's own format is accepted."""
    buffer = await ref
    if type(buffer) is not np.ndarray or buffer.dtype != np.uint8:
        raise TypeError(f"a ticket is an array of bytes, {type(buffer).__name__} came")
    return buffer
