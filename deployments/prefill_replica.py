"""A prefill engine as a Ray Serve deployment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any

from ray import serve

from ..workers.config import EngineConfig
from ..workers.types import PrefillRequest
from .handoff_stats import PeerReport
from .kv_transport import TicketPost
from .object_store_transport import ObjectStorePost
from .rank_actor import ActorRanks
from .replica_port import listen_on_node_address
from .wire import RouteHints

if TYPE_CHECKING:
    from .nixl_link import NixlLink
    from .prefill_service import PrefillService


class PrefillReplica:
    """One engine that computes KV for decode replicas; it owns no request of a client."""

    def __init__(
        self, config: EngineConfig, health_timeout_s: float, transports: Collection[str]
    ) -> None:
        """``transports`` are those by which decode pools take from here."""
        # Imported here, for the process that only builds the application has no use for torch.
        from ..workers.async_engine import build_engine
        from .prefill_service import PrefillService

        # First, since __del__ runs after a failure here too.
        self._watch: asyncio.Task[None] | None = None
        self._link: NixlLink | None = None
        listen_on_node_address()
        replica_id = serve.get_replica_context().replica_id.unique_id
        self._health_timeout_s = health_timeout_s
        launcher = ActorRanks() if config.parallel.num_ranks > 1 else None
        engine = build_engine(config, launcher)
        self._service = PrefillService(engine, replica_id)
        if "nixl" in transports:
            from .nixl_link import open_link
            from .nixl_post import LendingDesk, lend_bytes

            self._link = open_link(lend_bytes(engine.kv_layout, config.max_batched_tokens))
            self._desk = LendingDesk(self._link)

    async def check_health(self) -> None:
        """Serve restarts a replica whose engine loop takes no turn."""
        await self._running().health(self._health_timeout_s)

    def record_routing_stats(self) -> dict[str, Any]:
        """What Serve carries to the request routers."""
        return self._service.routing_stats().as_dict()

    async def prefill(
        self, request: PrefillRequest, *, hints: RouteHints, transport: str
    ) -> AsyncGenerator[Any, None]:
        """This replica's name, then what stands for each ticket under ``transport``; to be called
        by reference."""
        service = self._running()
        # Closed here and now when the caller goes: what it holds is not left to the collector.
        with closing(self._post(transport, request)) as post:
            async with aclosing(service.prefill(request, post.on_read)) as stream:
                yield await anext(stream)
                async for buffer in stream:
                    yield await post.send(buffer)

    def _post(self, transport: str, request: PrefillRequest) -> TicketPost:
        if transport == "object_store":
            return ObjectStorePost()
        if transport == "nixl" and self._link is not None:
            from .nixl_post import NixlPost

            return NixlPost(self._desk, request.deadline_s)
        raise ValueError(f"this replica was not started to send by {transport!r}")

    async def acknowledge(
        self, request_id: str, attempt: int, epoch: int, count: int, *, replica_id: str
    ) -> None:
        await self._running().acknowledge(request_id, attempt, epoch, count, replica_id=replica_id)

    async def report(self) -> PeerReport:
        lent = self._link.lent_bytes if self._link is not None else 0
        return self._running().report(lent)

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
        if self._link is not None:
            self._link.close()
