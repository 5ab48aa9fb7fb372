"""The engine as a Ray Serve deployment, and the calls that an ingress makes to it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from ..workers.config import EngineConfig
from ..workers.engine import Engine
from ..workers.model_source import resolve_model
from ..workers.types import EngineStats, GenerateRequest, TokenChunk
from .engine_service import EngineService
from .wire import ModelFacts, SubmitReply

logger = logging.getLogger(__name__)


class EngineReplica:
    """One engine in its own thread; user code shares the replica's loop and never blocks it."""

    def __init__(self, config: EngineConfig, health_timeout_s: float) -> None:
        replica_id = serve.get_replica_context().replica_id.unique_id
        self._health_timeout_s = health_timeout_s
        self._service = EngineService(Engine(config), replica_id, str(resolve_model(config.model)))
        self._started = False

    async def check_health(self) -> None:
        """Serve restarts a replica whose engine loop takes no turn."""
        await self._running().health(self._health_timeout_s)

    async def submit(self, stream_id: str, requests: Sequence[GenerateRequest]) -> SubmitReply:
        return await self._running().submit(stream_id, requests)

    async def subscribe(
        self, stream_id: str, *, replica_id: str
    ) -> AsyncGenerator[list[TokenChunk], None]:
        async for batch in self._running().subscribe(stream_id, replica_id=replica_id):
            yield batch

    async def abort(self, request_ids: Sequence[str], *, replica_id: str) -> None:
        await self._running().abort(request_ids, replica_id=replica_id)

    async def facts(self) -> ModelFacts:
        return self._running().facts()

    async def health(self, timeout: float) -> None:
        await self._running().health(timeout)

    async def stats(self, *, replica_id: str) -> EngineStats:
        return self._running().stats(replica_id=replica_id)

    def _running(self) -> EngineService:
        """The service, started in the loop that serves calls, which the constructor has not."""
        if not self._started:
            self._service.start()
            self._started = True
        return self._service

    def __del__(self) -> None:
        if self._started:
            self._service.stop()


class RayTransport:
    """Calls to engine replicas through a Serve handle; see ``EngineTransport``."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def submit(self, stream_id: str, requests: Sequence[GenerateRequest]) -> SubmitReply:
        reply: SubmitReply = await self._handle.submit.remote(stream_id, list(requests))
        return reply

    async def subscribe(
        self, stream_id: str, *, replica_id: str
    ) -> AsyncGenerator[list[TokenChunk], None]:
        call = self._handle.options(stream=True).subscribe.remote(stream_id, replica_id=replica_id)
        try:
            async for batch in call:
                yield batch
        finally:
            call.cancel()

    async def abort(self, request_ids: Sequence[str], *, replica_id: str) -> None:
        await self._handle.abort.remote(list(request_ids), replica_id=replica_id)

    async def facts(self) -> ModelFacts:
        facts: ModelFacts = await self._handle.facts.remote()
        return facts

    async def health(self, timeout: float) -> None:
        async with asyncio.timeout(timeout):
            await self._handle.health.remote(timeout)

    async def stats(self, *, replica_id: str) -> EngineStats:
        stats: EngineStats = await self._handle.stats.remote(replica_id=replica_id)
        return stats
