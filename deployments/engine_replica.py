"""The engine as a Ray Serve deployment."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING

from ray import serve

from ..workers.config import EngineConfig
from ..workers.model_source import resolve_model
from ..workers.types import EngineStats, GenerateRequest
from .replica_port import listen_on_node_address
from .wire import ModelFacts, Packed, SubmitReply, pack

if TYPE_CHECKING:
    from .engine_service import EngineService


class EngineReplica:
    """One engine in its own thread; user code shares the replica's loop and never blocks it."""

    def __init__(self, config: EngineConfig, health_timeout_s: float) -> None:
        # Imported here, for the process that only builds the application has no use for torch.
        from ..workers.async_engine import build_engine
        from .engine_service import EngineService

        listen_on_node_address()
        replica_id = serve.get_replica_context().replica_id.unique_id
        self._health_timeout_s = health_timeout_s
        engine = build_engine(config)
        self._service = EngineService(engine, replica_id, str(resolve_model(config.model)))
        self._started = False

    async def check_health(self) -> None:
        """Serve restarts a replica whose engine loop takes no turn."""
        await self._running().health(self._health_timeout_s)

    async def submit(self, stream_id: str, requests: Sequence[GenerateRequest]) -> SubmitReply:
        return await self._running().submit(stream_id, requests)

    async def subscribe(
        self, stream_id: str, *, replica_id: str
    ) -> AsyncGenerator[list[Packed], None]:
        async for batch in self._running().subscribe(stream_id, replica_id=replica_id):
            yield [pack(chunk) for chunk in batch]

    async def abort(self, request_ids: Sequence[str], *, replica_id: str) -> None:
        await self._running().abort(request_ids, replica_id=replica_id)

    async def facts(self) -> ModelFacts:
        return await self._running().facts()

    async def health(self, timeout: float) -> None:
        await self._running().health(timeout)

    async def stats(self, *, replica_id: str) -> EngineStats:
        return await self._running().stats(replica_id=replica_id)

    def _running(self) -> EngineService:
        """The service, started in the loop that serves calls, which the constructor has not."""
        if not self._started:
            self._service.start()
            self._started = True
        return self._service

    def __del__(self) -> None:
        if self._started:
            self._service.stop()
