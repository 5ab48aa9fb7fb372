"""The engine as a Ray Serve deployment."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from ..workers.config import EngineConfig
from ..workers.model_source import resolve_model
from ..workers.types import EngineStats, GenerateRequest
from .config import RemotePrefillConfig
from .rank_actor import ActorRanks
from .replica_port import listen_on_node_address
from .wire import ModelFacts, PackedBatch, RouteHints, SubmitReply, pack_batches

if TYPE_CHECKING:
    import asyncio

    from .engine_service import EngineService


class EngineReplica:
    """One engine in its own thread; user code shares the replica's loop and never blocks it."""

    def __init__(
        self,
        config: EngineConfig,
        health_timeout_s: float,
        remote: RemotePrefillConfig | None = None,
        prefill: DeploymentHandle[Any] | None = None,
    ) -> None:
        """``remote`` says when the replicas behind ``prefill`` compute prompts for this engine."""
        # Imported here, for the process that only builds the application has no use for torch.
        from ..workers.async_engine import AsyncEngine, build_engine
        from .engine_service import EngineService
        from .kv_source import KVSource
        from .object_store_transport import ObjectStoreTransport

        # First, since __del__ runs after a failure here too.
        self._watch: asyncio.Task[None] | None = None
        listen_on_node_address()
        replica_id = serve.get_replica_context().replica_id.unique_id
        self._health_timeout_s = health_timeout_s
        launcher = ActorRanks() if config.parallel.num_ranks > 1 else None
        engine = build_engine(config, launcher)
        open_source: Callable[[AsyncEngine], KVSource] | None = None
        if remote is not None and prefill is not None:
            transport = ObjectStoreTransport(prefill)
            open_source = partial(KVSource, config=remote, transport=transport)
        self._service = EngineService(
            engine, replica_id, str(resolve_model(config.model)), open_source
        )

    async def check_health(self) -> None:
        """Serve restarts a replica whose engine loop takes no turn."""
        await self._running().health(self._health_timeout_s)

    def record_routing_stats(self) -> dict[str, Any]:
        """What Serve carries to the request routers."""
        return self._service.routing_stats().as_dict()

    async def submit(
        self, stream_id: str, requests: Sequence[GenerateRequest], *, hints: RouteHints
    ) -> SubmitReply:
        return await self._running().submit(stream_id, requests, hints)

    async def subscribe(
        self, stream_id: str, *, replica_id: str
    ) -> AsyncGenerator[PackedBatch, None]:
        batches = self._running().subscribe(stream_id, replica_id=replica_id)
        async with aclosing(pack_batches(batches)) as packed:
            async for batch in packed:
                yield batch

    async def abort(self, stream_id: str, request_ids: Sequence[str], *, replica_id: str) -> None:
        await self._running().abort(stream_id, request_ids, replica_id=replica_id)

    async def facts(self) -> ModelFacts:
        return await self._running().facts()

    async def health(self, timeout: float) -> None:
        await self._running().health(timeout)

    async def stats(self, *, replica_id: str) -> EngineStats:
        return await self._running().stats(replica_id=replica_id)

    def _running(self) -> EngineService:
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
