"""An engine that only prefills, for decode replicas; knows nothing of Ray.

1. ``prefill`` hands a request to the engine and names this replica.
2. The engine thread runs steps; the tickets of a step enter this loop in one wake-up and wait in
   the request's shipment.
3. ``prefill`` yields them in order while the reader keeps up: at most ``window_bytes`` are
   unacknowledged, and at most ``MAX_WAITING_BYTES`` wait here, all requests together.
4. The stream ends behind the last ticket, with the error that the engine told, or at the request's
   deadline. A reader that leaves earlier closes it. Whatever ends it frees everything at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator

from ..workers.engine import Engine
from ..workers.kv.block import IntegrityError
from ..workers.kv.ticket import Buffer
from ..workers.types import PrefillEnd, PrefillRequest, RequestError, StepOutput
from .handoff_stats import PeerReport
from .kv_transport import WINDOW_BYTES, encode_replica_id
from .served_engine import ServedEngine

MAX_WAITING_BYTES = 2**30
"""KV that is computed and not yet taken by its readers; beyond that the next one is cut."""

Name = tuple[str, int]


class Shipment:
    """The tickets of one request on their way out."""

    def __init__(self, request: PrefillRequest, window_bytes: int) -> None:
        self.epoch = request.epoch
        self.waiting_bytes = 0
        """In tickets that were not yielded yet."""
        self._deadline_s = request.deadline_s
        self._deadline = asyncio.get_running_loop().time() + request.deadline_s
        self._window_bytes = window_bytes
        self._waiting: deque[Buffer] = deque()
        self._unread: deque[int] = deque()  # sizes of yielded tickets, oldest first
        self._num_read = 0
        self._end: PrefillEnd | None = None
        self._changed = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Whether the engine has ended the request."""
        return self._end is not None

    def put(self, buffer: Buffer) -> None:
        """Add a ticket behind the others."""
        self._waiting.append(buffer)
        self.waiting_bytes += buffer.nbytes
        self._changed.set()

    def end(self, end: PrefillEnd) -> None:
        """No more tickets come; an error takes back those that wait. The first end stays."""
        if self._end is None:
            self._end = end
            if end.error is not None:
                self._waiting.clear()
                self.waiting_bytes = 0
            self._changed.set()

    def acknowledge(self, count: int) -> None:
        """The reader has the first ``count`` tickets; counts may come late or twice."""
        while self._unread and self._num_read < count:
            self._unread.popleft()
            self._num_read += 1
        self._changed.set()

    async def take(self) -> Buffer | None:
        """The next ticket as soon as the window lets it through; ``None`` behind the last.

        Raises ``RequestError`` for the engine's error, or when the deadline has passed.
        """
        while not self._may_send():
            if self._end is not None and not self._waiting:
                if self._end.error is not None:
                    raise self._end.error
                return None
            await self._wait()
        buffer = self._waiting.popleft()
        self.waiting_bytes -= buffer.nbytes
        self._unread.append(buffer.nbytes)
        return buffer

    def _may_send(self) -> bool:
        if not self._waiting:
            return False
        unread = sum(self._unread)
        return unread == 0 or unread + self._waiting[0].nbytes <= self._window_bytes

    async def _wait(self) -> None:
        self._changed.clear()
        try:
            async with asyncio.timeout_at(self._deadline):
                await self._changed.wait()
        except TimeoutError:
            raise RequestError(
                f"the prefill was not taken within {self._deadline_s:g} s",
                code="deadline_exceeded",
            ) from None

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` where the counted bytes are not those that wait."""
        waiting = sum(buffer.nbytes for buffer in self._waiting)
        if waiting != self.waiting_bytes:
            raise IntegrityError(f"{self.waiting_bytes} bytes are counted, {waiting} wait")


class PrefillService(ServedEngine):
    """One engine behind ``prefill``; lives in one event loop."""

    def __init__(
        self, engine: Engine, replica_id: str, *, window_bytes: int = WINDOW_BYTES
    ) -> None:
        super().__init__(engine, replica_id)
        self._window_bytes = window_bytes
        self._shipments: dict[Name, Shipment] = {}

    @property
    def num_shipments(self) -> int:
        """Requests whose reader is still there."""
        return len(self._shipments)

    def report(self) -> PeerReport:
        """What decode replicas decide by."""
        engine = self._engine.engine
        return PeerReport(
            replica_id=self.replica_id,
            layout=engine.kv_layout,
            chunk_tokens=engine.config.max_batched_tokens,
            stats=self._engine.stats(),
        )

    async def prefill(self, request: PrefillRequest) -> AsyncGenerator[Buffer, None]:
        """This replica's name, then the request's tickets.

        Raises ``RequestError`` for what the engine refuses or fails on, for a name that is in use,
        and at the deadline.
        """
        name = (request.request_id, request.attempt)
        if name in self._shipments:
            raise RequestError(f"attempt {name[1]} of {name[0]} is in use", code="duplicate")
        shipment = Shipment(request, self._window_bytes)
        self._shipments[name] = shipment
        try:
            self._engine.add_prefill(request)
            yield encode_replica_id(self.replica_id)
            while (buffer := await shipment.take()) is not None:
                yield buffer
        finally:
            del self._shipments[name]
            if not shipment.is_over:
                self._engine.abort_prefill(*name)

    async def acknowledge(
        self, request_id: str, attempt: int, epoch: int, count: int, *, replica_id: str
    ) -> None:
        """The reader of a stream has its first ``count`` tickets.

        Raises ``WrongReplicaError`` when the caller means another replica.
        """
        self._require_me(replica_id)
        shipment = self._shipments.get((request_id, attempt))
        # One that has ended needs no acknowledgement, and another life's is not meant for this.
        if shipment is not None and shipment.epoch == epoch:
            shipment.acknowledge(count)

    def _distribute(self, output: StepOutput) -> None:
        for ticket in output.tickets:
            name = (ticket.request_id, ticket.attempt)
            shipment = self._shipments.get(name)
            if shipment is None or shipment.is_over:
                continue  # its reader has left
            waiting = sum(other.waiting_bytes for other in self._shipments.values())
            if shipment.waiting_bytes and waiting + ticket.buffer.nbytes > MAX_WAITING_BYTES:
                message = f"{waiting} bytes of computed KV wait for their readers"
                shipment.end(PrefillEnd(*name, RequestError(message, code="reader_too_slow")))
                self._engine.abort_prefill(*name)
            else:
                shipment.put(ticket.buffer)
        for end in output.prefill_ends:
            shipment = self._shipments.get((end.request_id, end.attempt))
            if shipment is not None:
                shipment.end(end)

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` where a shipment's books are wrong."""
        for shipment in self._shipments.values():
            shipment.check_integrity()
