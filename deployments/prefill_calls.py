"""A decode replica's Serve calls to the replicas of a prefill pool: what every transport shares."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
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
from .kv_transport import TransferError, decode_replica_id
from .wire import RouteHints, WrongReplicaError

POLL_TIMEOUT_S = 5.0

_REASONS: tuple[tuple[type[BaseException], str], ...] = (
    (TransferError, "transfer_failed"),
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


class PrefillCalls:
    """The part of a ``KVTransport`` that is the same whatever carries the tickets."""

    def __init__(self, handle: DeploymentHandle[Any], transport: str) -> None:
        """``transport`` names the post that the prefill replicas are to send by."""
        self._handle = handle
        self._transport = transport

    @asynccontextmanager
    async def _stream(
        self, request: PrefillRequest, hints: RouteHints
    ) -> AsyncIterator[tuple[str, AsyncGenerator[Any, None]]]:
        """The serving replica and references to what stands for its tickets; ends the call.

        It is made by reference, so that Ray counts who holds what the items refer to.
        """
        call = self._handle.options(stream=True, _by_reference=True).prefill.remote(
            request, hints=hints, transport=self._transport
        )
        assert isinstance(call, DeploymentResponseGenerator)  # what stream=True stands for
        try:
            items = await call._to_object_ref_gen()
            yield decode_replica_id(await bytes_behind(await anext(items))), items
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


async def bytes_behind(ref: Any) -> Buffer:
    """The array behind a reference, in place; nothing but numpy's own format is accepted."""
    buffer = await ref
    if type(buffer) is not np.ndarray or buffer.dtype != np.uint8:
        raise TypeError(f"a ticket is an array of bytes, {type(buffer).__name__} came")
    return buffer
