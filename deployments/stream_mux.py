"""The ingress side of the multiplexed stream: one subscription an engine replica, many requests.

1. ``open`` registers the request's ids, then submits it; the reply names the replica.
2. The first request a replica takes opens the subscription to it; its chunks go to the
   waiting ``Generation`` by id.
3. Leaving ``open``'s block early (disconnect, deadline, error) aborts at that replica.
4. A subscription that breaks or falls silent fails every request of its replica with a typed error;
   one that has been idle is ended, so that a draining replica is not held up.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, Protocol, TypeVar

from ..workers.types import EngineStats, GenerateRequest, RequestError, TokenChunk
from .generation import Generation
from .wire import HEARTBEAT_S, ModelFacts, SubmitReply

SILENCE_S = 10 * HEARTBEAT_S
"""A subscription that yields nothing for this long, heartbeats included, is broken."""
SUBMIT_S = 30.0
"""How long a request waits for a replica that takes it, as while one restarts."""
_REMEMBERED = 4096
T = TypeVar("T")

logger = logging.getLogger(__name__)


class EngineTransport(Protocol):
    """Calls to engine replicas; ``replica_id`` aims a call at one of them."""

    async def submit(self, stream_id: str, requests: Sequence[GenerateRequest]) -> SubmitReply: ...

    def subscribe(
        self, stream_id: str, *, replica_id: str
    ) -> AsyncGenerator[list[TokenChunk], None]: ...

    async def abort(self, request_ids: Sequence[str], *, replica_id: str) -> None: ...

    async def facts(self) -> ModelFacts: ...

    async def health(self, timeout: float) -> None: ...

    async def stats(self, *, replica_id: str) -> EngineStats: ...


class StreamMux:
    """Shares one stream per engine replica between all requests of this ingress."""

    def __init__(
        self, transport: EngineTransport, *, max_buffered_tokens: int, idle_s: float
    ) -> None:
        self.stream_id = uuid.uuid4().hex
        self.unknown_chunks = 0
        """Chunks for requests that were never opened here: always a fault."""
        self._transport = transport
        self._max_buffered = max_buffered_tokens
        self._idle_s = idle_s
        self._open: dict[str, Generation] = {}
        self._readers: dict[str, asyncio.Task[None]] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._known: set[str] = set()
        self._left: OrderedDict[str, None] = OrderedDict()

    @property
    def num_open(self) -> int:
        """Engine requests that wait for chunks."""
        return len(self._open)

    @asynccontextmanager
    async def open(
        self, requests: Sequence[GenerateRequest], *, deadline_s: float
    ) -> AsyncIterator[Generation]:
        """Submit requests for the block; what has not finished at its end is aborted.

        Raises ``RequestError`` when no replica takes them.
        """
        generation = Generation(requests, self._max_buffered, deadline_s)
        # Registered first: with a subscription open, chunks may come before the reply.
        self._open.update(dict.fromkeys(generation.request_ids, generation))
        submit = _detached(self._transport.submit(self.stream_id, requests))
        try:
            await self._accept(generation, submit)
            yield generation
        finally:
            finished = generation.is_finished
            self._forget(generation)
            if not finished:
                self._in_background(self._abort(generation, submit))

    async def stats(self) -> dict[str, EngineStats]:
        """The engine's numbers by replica; a replica that is gone drops out."""
        found: dict[str, EngineStats] = {}
        for replica_id in sorted(self._known):
            try:
                found[replica_id] = await self._transport.stats(replica_id=replica_id)
            except Exception as error:
                logger.info("no statistics from %s: %s", replica_id, error)
                self._known.discard(replica_id)
        return found

    def know(self, replica_id: str) -> None:
        """Include a replica in ``stats`` before it has served a request."""
        self._known.add(replica_id)

    async def close(self) -> None:
        """End every subscription and fail what still waits."""
        readers = list(self._readers.values())
        for task in readers:
            task.cancel()
        await asyncio.gather(*readers, *self._background, return_exceptions=True)

    async def _accept(self, generation: Generation, submit: asyncio.Task[SubmitReply]) -> None:
        try:
            async with asyncio.timeout(SUBMIT_S):
                reply = await asyncio.shield(submit)
        except TimeoutError:
            raise RequestError(
                f"no engine took the request within {SUBMIT_S:g} s", code="engine_unavailable"
            ) from None
        except RequestError:
            raise
        except Exception as error:
            logger.warning("submit failed: %s", error)
            raise RequestError(
                "the engine is not available; try again later", code="engine_unavailable"
            ) from error
        if reply.error is not None:
            raise reply.error
        generation.replica_id = reply.replica_id
        self._known.add(reply.replica_id)
        if reply.replica_id not in self._readers:
            self._readers[reply.replica_id] = _detached(self._read(reply.replica_id))

    async def _read(self, replica_id: str) -> None:
        reason = "the stream from the engine was closed"
        try:
            stream = self._transport.subscribe(self.stream_id, replica_id=replica_id)
            async with aclosing(stream):
                await self._pump(replica_id, stream)
        except TimeoutError:
            reason = f"the engine was silent for {SILENCE_S:g} s"
        except Exception as error:
            reason = "the stream from the engine broke"
            logger.warning("%s (%s): %s", reason, replica_id, error)
        finally:
            del self._readers[replica_id]
            for generation in self._of(replica_id):
                generation.fail(RequestError(reason, code="stream_lost"))

    async def _pump(self, replica_id: str, stream: AsyncGenerator[list[TokenChunk], None]) -> None:
        used = time.monotonic()
        while True:
            async with asyncio.timeout(SILENCE_S):
                batch = await anext(stream, None)
            if batch is None:
                return
            for chunk in batch:
                self._deliver(chunk)
            now = time.monotonic()
            if batch or self._of(replica_id):
                used = now
            elif now - used > self._idle_s:
                return

    def _deliver(self, chunk: TokenChunk) -> None:
        generation = self._open.get(chunk.request_id)
        if generation is not None:
            self._hand_over(generation, chunk)
        elif chunk.request_id not in self._left:
            self.unknown_chunks += 1
            logger.warning("a chunk came for the unknown request %s", chunk.request_id)

    def _hand_over(self, generation: Generation, chunk: TokenChunk) -> None:
        was_over = generation.is_over
        generation.deliver(chunk)
        failed = generation.is_over and not generation.is_finished
        if failed and not was_over and generation.replica_id is not None:
            # Aborted here, for a reader that is too slow may not leave its block for long.
            ids = generation.request_ids
            self._in_background(self._tell_abort(ids, generation.replica_id))

    def _of(self, replica_id: str) -> list[Generation]:
        return [g for g in self._open.values() if g.replica_id == replica_id]

    def _forget(self, generation: Generation) -> None:
        for request_id in generation.request_ids:
            del self._open[request_id]
            self._left[request_id] = None
        while len(self._left) > _REMEMBERED:
            self._left.popitem(last=False)

    async def _abort(self, generation: Generation, submit: asyncio.Task[SubmitReply]) -> None:
        try:
            reply = await submit  # until then nobody knows which replica to tell
        except Exception:
            return  # no replica took it, which its client has been told
        if reply.error is None:
            await self._tell_abort(generation.request_ids, reply.replica_id)

    async def _tell_abort(self, request_ids: Sequence[str], replica_id: str) -> None:
        try:
            await self._transport.abort(request_ids, replica_id=replica_id)
        except Exception as error:
            # The replica is gone, and the requests with it.
            logger.info("abort of %s not delivered: %s", request_ids[0], error)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = _detached(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _detached(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Start a task outside the context of the request that happens to be served.

    Serve notes in that context which calls a request makes and cancels them with it; the shared
    subscription and an abort must outlive the request that started them.
    """
    return asyncio.create_task(work, context=contextvars.Context())
