"""KV tickets through Ray's object store.

1. The prefill replica puts a ticket into its node's object store and yields the reference from a
   streaming call that was made *by reference*, so that Ray counts who holds it.
2. Where the nodes differ, the caller's node fetches it; the caller reads it in place.
3. Nobody refers to it any more once the engine has copied it into its blocks, and Ray frees it.

The prefill replica owns its tickets: with it die those that nobody has fetched, and the decode side
computes them itself. Yielded as they are, the decode replica would own them; and what is yielded to
an owner that has just died, Ray 2.60 keeps in the store for ever (measured: every such item, also
after its producer has ended).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

import ray
from ray.serve.handle import DeploymentHandle

from ..workers.kv.ticket import Buffer
from ..workers.types import PrefillRequest
from .kv_transport import Arrival
from .prefill_calls import PrefillCalls, bytes_behind
from .wire import RouteHints


class ObjectStoreTransport(PrefillCalls):
    """The decode side: tickets as references in a Serve stream."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        super().__init__(handle, "object_store")

    async def pull(
        self, request: PrefillRequest, hints: RouteHints
    ) -> AsyncGenerator[str | Arrival, None]:
        """See ``KVTransport.pull``."""
        async with self._stream(request, hints) as (replica_id, items):
            yield replica_id
            async for item in items:
                (ticket,) = await item
                asked = time.monotonic()
                buffer = await bytes_behind(ticket)
                yield Arrival(buffer, time.monotonic() - asked)

    def close(self) -> None:
        """See ``KVTransport.close``: what is left is Ray's to free."""


class ObjectStorePost:
    """The prefill side of one stream; Ray counts who still reads."""

    on_read: None = None

    async def send(self, buffer: Buffer) -> list[Any]:
        """See ``TicketPost.send``."""
        # In a thread, for it copies; in a list, for Ray would resolve a bare reference.
        return [await asyncio.to_thread(ray.put, buffer)]

    def close(self) -> None:
        """See ``TicketPost.close``: with the stream its references go."""
