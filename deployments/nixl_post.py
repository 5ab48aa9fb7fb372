"""Tickets that a prefill replica keeps for readers with NIXL; see ``nixl_transport``."""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from typing import Any

from ..workers.kv.ticket import HEADER_BYTES, Buffer, KVLayout
from ..workers.types import RequestError
from .arena import ALIGNMENT
from .kv_transport import WINDOW_BYTES
from .nixl_link import NixlLink


def lend_bytes(layout: KVLayout, step_tokens: int) -> int:
    """Memory that a prefill replica sets aside for tickets: room for two of the largest, or two
    windows where that is more, so that one is made while another travels."""
    blocks = layout.num_blocks(0, step_tokens) + 1  # what completes its last block
    largest = HEADER_BYTES + blocks * layout.bytes_per_block
    return 2 * -(-max(largest, WINDOW_BYTES) // ALIGNMENT) * ALIGNMENT


class LendingDesk:
    """The tickets that a prefill replica keeps for all its readers; lives in one event loop."""

    def __init__(self, link: NixlLink) -> None:
        self._link = link
        self._turn = asyncio.Lock()
        self._room = asyncio.Event()

    async def lend(self, key: str, buffer: Buffer) -> Any:
        """What a reader needs; waits for room, in the order of calling, so that many small tickets
        do not keep a large one waiting for ever. Raises ``ValueError`` for one larger than all of
        the memory."""
        if buffer.nbytes > self._link.lend_bytes:
            raise ValueError(
                f"a ticket of {buffer.nbytes} bytes; {self._link.lend_bytes} are set aside for all"
            )
        async with self._turn:
            while True:
                self._room.clear()  # before asking: what is freed from now on is heard of
                metadata = await self._link.lend(key, buffer)
                if metadata is not None:
                    return metadata
                await self._room.wait()

    def take_back(self, key: str) -> None:
        """Free a place."""
        self._link.take_back(key)
        self._room.set()  # whoever asks now asks behind it


class NixlPost:
    """The prefill side of one stream."""

    def __init__(self, desk: LendingDesk, deadline_s: float) -> None:
        self._desk = desk
        self._deadline = asyncio.get_running_loop().time() + deadline_s
        self._unread: deque[str] = deque()

    async def send(self, buffer: Buffer) -> Any:
        """See ``TicketPost.send``. Raises ``RequestError`` where there is no room in time."""
        # Noted before lending, so that ``close`` frees also what is being lent just now.
        key = uuid.uuid4().hex
        self._unread.append(key)
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._desk.lend(key, buffer)
        except TimeoutError:
            raise RequestError(
                f"no room for a ticket of {buffer.nbytes} bytes in time", code="deadline_exceeded"
            ) from None
        finally:
            if key not in self._unread:  # acknowledged before it was sent: a reader that lies
                self._desk.take_back(key)

    def on_read(self) -> None:
        """See ``TicketPost.on_read``."""
        self._desk.take_back(self._unread.popleft())

    def close(self) -> None:
        """See ``TicketPost.close``."""
        while self._unread:
            self.on_read()
