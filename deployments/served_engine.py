"""What the engine services have in common: one engine whose steps enter one event loop."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod

from ..workers.async_engine import AsyncEngine
from ..workers.engine import Engine
from ..workers.types import StepOutput
from .wire import RoutingStats, WrongReplicaError


class ServedEngine(ABC):
    """An engine in a thread of its own, served by the methods of a subclass in one event loop."""

    def __init__(self, engine: Engine, replica_id: str) -> None:
        self.replica_id = replica_id
        self._engine = AsyncEngine(engine, self._on_step)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Launch the engine thread; called in the loop that serves the other methods."""
        self._loop = asyncio.get_running_loop()
        self._engine.start()

    def stop(self) -> None:
        """End the engine thread; open requests are aborted and told so."""
        self._engine.stop()

    async def health(self, timeout: float) -> None:
        """Return after a real turn of the engine loop.

        Raises ``EngineDeadError`` when it has ended, ``TimeoutError`` after ``timeout`` seconds.
        """
        await self._engine.health(timeout)

    def routing_stats(self) -> RoutingStats:
        """What the request routers choose by."""
        block_size = self._engine.engine.config.block_size
        return RoutingStats.of(self._engine.stats(), block_size, self.replica_id, time.time())

    def _require_me(self, replica_id: str) -> None:
        """Raise ``WrongReplicaError`` when the caller means another replica."""
        if replica_id != self.replica_id:
            raise WrongReplicaError(f"this is {self.replica_id}; {replica_id} is gone")

    def _on_step(self, output: StepOutput) -> None:
        """Runs in the engine thread, once a step."""
        loop = self._loop
        assert loop is not None
        # The loop is closed when the process ends before its engine: nobody is left to tell.
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._distribute, output)

    @abstractmethod
    def _distribute(self, output: StepOutput) -> None:
        """Take all that one step brought; runs in the loop."""
