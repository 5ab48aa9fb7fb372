"""KV tickets through NIXL: the decode replica reads them where the prefill replica keeps them.

1. The prefill replica copies a ticket into memory that is registered with NIXL and yields where it
   lies: a few hundred bytes.
2. The decode replica reads it, by RDMA where there is some, else through shared memory or TCP, and
   acknowledges it once its engine has taken it.
3. The place is free again with the acknowledgement, or when the stream ends for whatever reason.
   What was still being read then is not what its checksum says, and is refused.

Nothing passes through Ray's object store. The prefill replica's memory for tickets is bounded; a
ticket for which there is no room waits, those before it first, until its stream ends.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

from ray.serve.handle import DeploymentHandle

from ..workers.types import PrefillRequest
from .kv_transport import Arrival
from .nixl_link import open_link
from .prefill_calls import PrefillCalls
from .wire import RouteHints


class NixlTransport(PrefillCalls):
    """The decode side."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        """Raises what ``open_link`` raises."""
        super().__init__(handle, "nixl")
        self._link = open_link()

    async def pull(
        self, request: PrefillRequest, hints: RouteHints
    ) -> AsyncGenerator[str | Arrival, None]:
        """See ``KVTransport.pull``."""
        async with self._stream(request, hints) as (replica_id, items):
            yield replica_id
            async for item in items:
                asked = time.monotonic()
                buffer = await self._link.fetch(await item)
                yield Arrival(buffer, time.monotonic() - asked)

    def close(self) -> None:
        """See ``KVTransport.close``."""
        self._link.close()
