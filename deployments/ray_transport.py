"""Calls from an ingress to engine replicas, through a Serve handle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from ..workers.types import EngineStats, GenerateRequest, TokenChunk
from .router_registry import has_replica
from .wire import ModelFacts, RouteHints, SubmitReply, unpack_batches


class RayTransport:
    """Calls to engine replicas through a Serve handle; see ``EngineTransport``."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def submit(
        self, stream_id: str, requests: Sequence[GenerateRequest], hints: RouteHints
    ) -> SubmitReply:
        # As a keyword: the request router of the handle reads it from there.
        reply: SubmitReply = await self._handle.submit.remote(
            stream_id, list(requests), hints=hints
        )
        return reply

    async def subscribe(
        self, stream_id: str, *, replica_id: str
    ) -> AsyncGenerator[list[TokenChunk], None]:
        call = self._handle.options(stream=True).subscribe.remote(stream_id, replica_id=replica_id)
        assert isinstance(call, DeploymentResponseGenerator)  # what stream=True stands for
        try:
            async for batch in unpack_batches(aiter(call)):
                yield batch
        finally:
            call.cancel()  # type: ignore[no-untyped-call]

    async def abort(self, stream_id: str, request_ids: Sequence[str], *, replica_id: str) -> None:
        await self._handle.abort.remote(stream_id, list(request_ids), replica_id=replica_id)

    def has_replica(self) -> bool:
        return has_replica(self._handle.app_name, self._handle.deployment_name)

    async def facts(self) -> ModelFacts:
        facts: ModelFacts = await self._handle.facts.remote()
        return facts

    async def health(self, timeout: float) -> None:
        async with asyncio.timeout(timeout):
            await self._handle.health.remote(timeout)

    async def stats(self, *, replica_id: str) -> EngineStats:
        stats: EngineStats = await self._handle.stats.remote(replica_id=replica_id)
        return stats
