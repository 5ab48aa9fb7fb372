"""A prefill engine as a Ray Serve deployment."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any

from ..workers.config import EngineConfig
from ..workers.types import PrefillRequest
from .engine_host import EngineHost
from .handoff_stats import PeerReport
from .kv_transport import TicketPost
from .object_store_transport import ObjectStorePost
from .wire import RouteHints

if TYPE_CHECKING:
    from ..workers.engine import Engine
    from .nixl_link import NixlLink
    from .prefill_service import PrefillService


class PrefillReplica(EngineHost["PrefillService"]):
    """One engine that computes KV for decode replicas; it owns no request of a client."""

    # Of the class, since __del__ runs after a failure in the constructor too.
    _link: NixlLink | None = None

    def __init__(
        self, config: EngineConfig, health_timeout_s: float, transports: Collection[str]
    ) -> None:
        """``transports`` are those by which decode pools take from here."""
        # Imported here, for the process that only builds the application has no use for torch.
        from .prefill_service import PrefillService

        def open_service(engine: Engine, replica_id: str) -> PrefillService:
            if "nixl" in transports:
                from .nixl_link import open_link
                from .nixl_post import LendingDesk, lend_bytes

                self._link = open_link(lend_bytes(engine.kv_layout, config.max_batched_tokens))
                self._desk = LendingDesk(self._link)
            return PrefillService(engine, replica_id)

        super().__init__(config, health_timeout_s, open_service)

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

    def __del__(self) -> None:
        super().__del__()
        if self._link is not None:
            self._link.close()
