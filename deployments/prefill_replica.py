"""A prefill engine as a Ray Serve deployment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import ray

from ..workers.config import EngineConfig
from ..workers.kv.ticket import Buffer
from ..workers.types import PrefillRequest
from .engine_host import EngineHost
from .handoff_stats import PeerReport
from .wire import RouteHints

if TYPE_CHECKING:
    from .prefill_service import PrefillService  # noqa: F401 - the parameter of the base class


class PrefillReplica(EngineHost["PrefillService"]):
    """One engine that computes KV for decode replicas; it owns no request of a client."""

    def __init__(self, config: EngineConfig, health_timeout_s: float) -> None:
        # Imported here, for the process that only builds the application has no use for torch.
        from .prefill_service import PrefillService

        super().__init__(config, health_timeout_s, PrefillService)

    async def prefill(
        self, request: PrefillRequest, *, hints: RouteHints
    ) -> AsyncGenerator[Buffer | list[Any], None]:
        """This replica's name, then a reference to each ticket; to be called by reference."""
        # Closed here and now when the caller goes: what it holds is not left to the collector.
        async with aclosing(self._running().prefill(request)) as stream:
            yield await anext(stream)
            async for buffer in stream:
                # In a thread, for it copies; in a list, for Ray would resolve a bare reference.
                yield [await asyncio.to_thread(ray.put, buffer)]

    async def acknowledge(
        self, request_id: str, attempt: int, epoch: int, count: int, *, replica_id: str
    ) -> None:
        await self._running().acknowledge(request_id, attempt, epoch, count, replica_id=replica_id)

    async def report(self) -> PeerReport:
        return self._running().report()
