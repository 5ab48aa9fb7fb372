"""The engine as a Ray Serve deployment."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ray.serve.handle import DeploymentHandle

from ..workers.config import EngineConfig
from ..workers.model_source import resolve_model
from ..workers.types import EngineStats, GenerateRequest
from .config import RemotePrefillConfig
from .engine_host import EngineHost
from .wire import ModelFacts, Packed, RouteHints, SubmitReply, pack

if TYPE_CHECKING:
    from .engine_service import EngineService  # noqa: F401 - the parameter of the base class


class EngineReplica(EngineHost["EngineService"]):
    """One engine that owns the requests it was given until they end."""

    def __init__(
        self,
        config: EngineConfig,
        health_timeout_s: float,
        remote: RemotePrefillConfig | None = None,
        prefill: DeploymentHandle[Any] | None = None,
    ) -> None:
        """``remote`` says when the replicas behind ``prefill`` compute prompts for this engine."""
        # Imported here, for the process that only builds the application has no use for torch.
        from ..workers.async_engine import AsyncEngine
        from .engine_service import EngineService
        from .kv_source import KVSource
        from .object_store_transport import ObjectStoreTransport

        open_source: Callable[[AsyncEngine], KVSource] | None = None
        if remote is not None and prefill is not None:
            transport = ObjectStoreTransport(prefill)
            open_source = partial(KVSource, config=remote, transport=transport)
        checkpoint = str(resolve_model(config.model))
        super().__init__(
            config,
            health_timeout_s,
            partial(EngineService, checkpoint=checkpoint, open_source=open_source),
        )

    async def submit(
        self, stream_id: str, requests: Sequence[GenerateRequest], *, hints: RouteHints
    ) -> SubmitReply:
        return await self._running().submit(stream_id, requests, hints)

    async def subscribe(
        self, stream_id: str, *, replica_id: str
    ) -> AsyncGenerator[list[Packed], None]:
        async for batch in self._running().subscribe(stream_id, replica_id=replica_id):
            yield [pack(chunk) for chunk in batch]

    async def abort(self, stream_id: str, request_ids: Sequence[str], *, replica_id: str) -> None:
        await self._running().abort(stream_id, request_ids, replica_id=replica_id)

    async def facts(self) -> ModelFacts:
        return await self._running().facts()

    async def health(self, timeout: float) -> None:
        await self._running().health(timeout)

    async def stats(self, *, replica_id: str) -> EngineStats:
        return await self._running().stats(replica_id=replica_id)
