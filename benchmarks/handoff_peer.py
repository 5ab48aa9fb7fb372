"""A prefill engine in a process of its own, whose tickets come through the object store."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..workers.config import EngineConfig
from ..workers.kv.ticket import Buffer
from ..workers.types import PrefillRequest

STORE_BYTES = 4 * 2**30
"""Holds the KV of a few long prompts, so that no ticket waits for room."""


class PrefillPeer:
    """An engine that prefills for another; a Ray actor."""

    def __init__(self, config: EngineConfig) -> None:
        # Imported here: only the actor's process needs the model.
        from ..workers.engine import Engine

        self._engine = Engine(config)
        self._filler: Buffer = np.ones(1, dtype=np.uint8)

    def ready(self) -> bool:
        """Answers once the engine is loaded."""
        return True

    def prefill(self, request: PrefillRequest, hold: bool) -> Iterator[Buffer]:
        """Tickets as they are made, or with ``hold`` all of them after the last was made.

        Raises ``RequestError`` where the engine ends the prefill with one.
        """
        self._engine.add_prefill(request)
        held: list[Buffer] = []
        while True:
            output = self._engine.step()
            for ticket in output.tickets:
                if hold:
                    held.append(ticket.buffer)
                else:
                    yield ticket.buffer
            for end in output.prefill_ends:
                while held:
                    yield held.pop(0)
                if end.error is not None:
                    raise end.error
                return

    def send(self, count: int, num_bytes: int) -> Iterator[Buffer]:
        """``count`` arrays that cost nothing to make: what moving a ticket takes."""
        if self._filler.nbytes != num_bytes:
            self._filler = np.ones(num_bytes, dtype=np.uint8)
        for _ in range(count):
            yield self._filler


@contextmanager
def prefill_peer(config: EngineConfig) -> Iterator[Any]:
    """A ``PrefillPeer`` actor in a Ray of its own, for the block."""
    import ray

    # Ray's socket paths have 107 characters at most, which longer temporary folders exceed.
    with tempfile.TemporaryDirectory(prefix="pio-", dir="/tmp") as folder:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=folder,
            # As the server sets it: by default the peer would give way to the engine beside it.
            _system_config={"worker_niceness": 0},
        )
        try:
            actor: Any = ray.remote(PrefillPeer)
            peer = actor.remote(config)
            ray.get(peer.ready.remote())
            yield peer
        finally:
            ray.shutdown()
