"""The life of an engine in a Serve replica: what every replica with an engine does.

1. The constructor loads the engine, in a thread that Serve takes for it.
2. The first call or health check starts it in the loop that serves calls, and has it watched.
3. A replica whose engine has died ends its process (``engine_watch``); one whose engine hangs fails
   Serve's health check.
4. ``__del__``, which Serve calls once a replica has drained, ends the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ray import serve

from ..workers.config import EngineConfig
from .process_heap import keep_for_good
from .rank_actor import ActorRanks
from .replica_port import listen_on_node_address

if TYPE_CHECKING:
    from ..workers.engine import Engine
    from .served_engine import ServedEngine

Service = TypeVar("Service", bound="ServedEngine")


class EngineHost(Generic[Service]):
    """Base of the replicas; user code shares the replica's loop and never blocks it."""

    # Of the class, since __del__ runs after a failure in the constructor too.
    _watch: asyncio.Task[None] | None = None

    def __init__(
        self,
        config: EngineConfig,
        health_timeout_s: float,
        open_service: Callable[[Engine, str], Service],
    ) -> None:
        """``open_service`` takes the loaded engine and this replica's id."""
        # Imported here, for the process that only builds the application has no use for torch.
        from ..workers.async_engine import build_engine

        listen_on_node_address()
        replica_id = serve.get_replica_context().replica_id.unique_id
        self._health_timeout_s = health_timeout_s
        launcher = ActorRanks() if config.parallel.num_ranks > 1 else None
        self._service = open_service(build_engine(config, launcher), replica_id)
        keep_for_good()

    async def check_health(self) -> None:
        """Serve restarts a replica whose engine loop takes no turn."""
        await self._running().health(self._health_timeout_s)

    def record_routing_stats(self) -> dict[str, Any]:
        """What Serve carries to the request routers."""
        return self._service.routing_stats().as_dict()

    def _running(self) -> Service:
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
