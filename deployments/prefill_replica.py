"""A prefill engine as a Ray Serve deployment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from ..workers.config import EngineConfig
from ..workers.kv.ticket import Buffer
from ..workers.types import PrefillRequest
from .handoff_stats import PeerReport
from .rank_actor import ActorRanks
from .replica_port import listen_on_node_address
from .wire import RouteHints

if TYPE_CHECKING:
    from .prefill_service import PrefillService


class PrefillReplica:
    """One engine that computes KV for decode replicas; it owns no request of a client."""

    def __init__(self, config: EngineConfig, health_timeout_s: float) -> None:
        # Imported here, for the process that only builds the application has no use for torch.
        from ..workers.async_engine import build_engine
        from .prefill_service import PrefillService

        # First, since __del__ runs after a failure here too.
        self._watch: asyncio.Task[None] | None = None
        listen_on_node_address()
        replica_id = serve.get_replica_context().replica_id.unique_id
        self._health_timeout_s = health_timeout_s
        launcher = ActorRanks() if config.parallel.num_ranks > 1 else None
        self._service = PrefillService(build_engine(config, launcher), replica_id)

    async def check_health(self) -> None:
        """Serve restarts a replica whose engine loop takes no turn."""
        await self._running().health(self._health_timeout_s)

    def record_routing_stats(self) -> dict[str, Any]:
        """What Serve carries to the request routers."""
        return self._service.routing_stats().as_dict()

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

    def _running(self) -> PrefillService:
        """The service, started in the loop that serves calls, which the constructor has not."""
        if self._watch is None:
            from .engine_watch import watch_engine

            self._service.start()
            self._watch = watch_engine(self._service.health)
        return self._service

    def __del__(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._service.stop()
