"""The ingress side of the multiplexed stream: one subscription an engine replica, many requests.

1. ``open`` registers the request's ids, then submits it; the reply names the replica.
2. The first request a replica takes opens the subscription to it; its chunks go to the
   waiting ``Generation`` by id.
3. A subscription that breaks, falls silent or cannot be opened loses its replica, and so does an
   engine that says its end: what is unfinished is submitted again with the tokens it has, at most
   ``max_migrations`` times a request, and goes on where it stood. After that it is a typed error.
4. Each attempt of a request has a stream id of its own. Chunks of any other attempt are dropped and
   counted, and whoever sends them is told to stop.
5. Leaving ``open``'s block early (disconnect, deadline, error) aborts at the replica.
6. A subscription that has been idle is ended, so that a draining replica is not held up.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, Protocol

from ..workers.types import (
    EngineStats,
    GenerateRequest,
    QueueFullError,
    RequestError,
    TokenChunk,
)
from .detached import detached
from .flight import Flight, Source
from .generation import Generation
from .migration import loses_its_replica, pause_s
from .wire import HEARTBEAT_S, ModelFacts, RouteHints, SubmitReply

SILENCE_S = 10 * HEARTBEAT_S
"""A subscription that yields nothing for this long, heartbeats included, is broken."""
SUBMIT_S = 30.0
"""How long a request waits for a replica that takes it, as while one restarts."""
ABORT_S = 10.0
"""How long an abort is tried; later the replica sweeps the request itself."""
STATS_S = 2.0
"""How long a scrape of the metrics waits for a replica's numbers."""
_REMEMBERED = 4096

logger = logging.getLogger(__name__)


class EngineTransport(Protocol):
    """Calls to engine replicas; ``replica_id`` aims a call at one of them."""

    async def submit(
        self, stream_id: str, requests: Sequence[GenerateRequest], hints: RouteHints
    ) -> SubmitReply: ...

    def subscribe(
        self, stream_id: str, *, replica_id: str
    ) -> AsyncGenerator[list[TokenChunk], None]: ...

    async def abort(
        self, stream_id: str, request_ids: Sequence[str], *, replica_id: str
    ) -> None: ...

    async def facts(self) -> ModelFacts: ...

    async def health(self, timeout: float) -> None: ...

    async def stats(self, *, replica_id: str) -> EngineStats: ...

    def has_replica(self) -> bool:
        """Whether a replica is known that would be asked now."""
        ...


class NotTakenError(RuntimeError):
    """No replica answered a submission in time."""


class StreamMux:
    """Shares one stream per engine replica between all requests of this ingress."""

    def __init__(
        self,
        transport: EngineTransport,
        *,
        max_buffered_tokens: int,
        idle_s: float,
        max_migrations: int,
    ) -> None:
        self.unknown_chunks = 0
        """Chunks for requests that were never opened here: always a fault."""
        self.stale_chunks = 0
        """Chunks of attempts that had been given up."""
        self.migrations: Counter[str] = Counter()
        """Requests that lost their replica, by what became of them: ``moved`` on, ``exhausted``
        (lost too often), ``refused`` by the next engine, ``not_taken`` by any in time, ``left`` by
        their client, or too late, meanwhile."""
        self._transport = transport
        self._max_buffered = max_buffered_tokens
        self._idle_s = idle_s
        self._max_migrations = max_migrations
        self._stream_id = uuid.uuid4().hex
        self._open: dict[str, Flight] = {}
        self._readers: dict[Source, asyncio.Task[None]] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._known: set[str] = set()
        self._last_stats: dict[str, EngineStats] = {}
        self._left: OrderedDict[str, None] = OrderedDict()

    @property
    def num_open(self) -> int:
        """Engine requests that wait for chunks."""
        return len(self._open)

    @asynccontextmanager
    async def open(
        self,
        requests: Sequence[GenerateRequest],
        *,
        deadline_s: float,
        hints: RouteHints | None = None,
    ) -> AsyncIterator[Generation]:
        """Submit requests for the block; what has not finished at its end is aborted.

        Raises ``RequestError`` when no replica takes them.
        """
        flight = Flight(Generation(requests, self._max_buffered, deadline_s), hints or RouteHints())
        # Registered first: with a subscription open, chunks may come before the reply.
        self._open.update(dict.fromkeys(flight.generation.request_ids, flight))
        try:
            await self._place(flight)
            yield flight.generation
        finally:
            self._forget(flight)

    async def stats(self) -> dict[str, EngineStats]:
        """The engine's numbers by replica; a replica that is gone drops out.

        For one that does not answer in time its last numbers stand: it may be busy, or its node
        lost and nobody has noticed yet.
        """
        await asyncio.gather(*[detached(self._ask_stats(name)) for name in list(self._known)])
        return dict(sorted(self._last_stats.items()))

    async def _ask_stats(self, replica_id: str) -> None:
        try:
            async with asyncio.timeout(STATS_S):
                stats = await self._transport.stats(replica_id=replica_id)
        except TimeoutError:
            logger.info("no statistics from %s within %g s", replica_id, STATS_S)
        except Exception as error:
            logger.info("no statistics from %s: %s", replica_id, error)
            self._known.discard(replica_id)
            self._last_stats.pop(replica_id, None)
        else:
            self._last_stats[replica_id] = stats

    def know(self, replica_id: str) -> None:
        """Include a replica in ``stats`` before it has served a request."""
        self._known.add(replica_id)

    async def close(self) -> None:
        """End every subscription and fail what still waits."""
        error = RequestError("the service is shutting down", code="shutting_down")
        for flight in dict.fromkeys(self._open.values()):
            flight.generation.fail(error)
        movers = [flight.mover for flight in self._open.values() if flight.mover is not None]
        await _end([*self._readers.values(), *movers])
        if self._background:  # aborts above all, which are worth a wait
            await asyncio.wait(self._background, timeout=ABORT_S)
        await _end(list(self._background))

    # --- finding a replica ----------------------------------------------------------------------

    async def _place(self, flight: Flight) -> None:
        """Submit for the first time; again a few times where the replica failed at it.

        Not for long: nothing has been told yet, so the client may be asked to come back.
        """
        generation = flight.generation
        for failures in range(1, self._max_migrations + 2):
            patience = min(SUBMIT_S, generation.remaining_s)
            try:
                reply = await self._attempt(flight, generation.requests, patience)
            except NotTakenError as error:
                if not generation.remaining_s:
                    raise generation.deadline_error() from None
                raise RequestError(str(error), code="engine_unavailable") from None
            except Exception as error:
                logger.warning("submit failed: %s", error)
            else:
                if reply.error is None:
                    return
                if not self._passes(flight, reply):
                    raise reply.error
            if failures <= self._max_migrations:
                await asyncio.sleep(pause_s(failures))
        raise RequestError(
            "the engine is not available; try again later", code="engine_unavailable"
        )

    async def _move(self, flight: Flight) -> None:
        """Find a replica that goes on with a request, as long as one may restart."""
        generation = flight.generation
        end = time.monotonic() + SUBMIT_S
        failures = flight.num_lost
        while (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(left, pause_s(failures)))
            failures += 1
            try:
                reply = await self._attempt(flight, generation.remaining(), end - time.monotonic())
            except NotTakenError:
                break
            except Exception as error:
                logger.warning("a request could not be moved yet: %s", error)
                continue
            refusal = reply.error
            if refusal is None:
                self.migrations["moved"] += 1
                return
            if not self._passes(flight, reply) and not isinstance(refusal, QueueFullError):
                self.migrations["refused"] += 1
                generation.fail(refusal)
                return
        self._give_up(flight, "not_taken", f"no engine went on with it within {SUBMIT_S:g} s")

    async def _attempt(
        self, flight: Flight, requests: Sequence[GenerateRequest], timeout: float
    ) -> SubmitReply:
        """Submit once. Raises ``NotTakenError`` without an answer in time, else what submit raises.

        A replica that takes the requests after all is told to drop them.
        """
        stream_id = self._stream_for(flight)
        flight.begin(stream_id)
        submit = detached(self._transport.submit(stream_id, requests, flight.hints_for(requests)))
        try:
            await asyncio.wait({submit}, timeout=max(0.0, timeout))
            if not submit.done():
                raise NotTakenError(f"no engine took the request within {timeout:g} s")
            if submit.cancelled():
                raise ConnectionError("the call was cancelled on its way")
            reply = submit.result()
        except BaseException:
            flight.end()
            self._in_background(self._disown(stream_id, flight.generation.request_ids, submit))
            raise
        if reply.error is None:
            self._settle(flight, Source(stream_id, reply.replica_id))
        else:
            flight.end()
        return reply

    def _passes(self, flight: Flight, reply: SubmitReply) -> bool:
        """Whether a refusal is one that passes: its reason is removed before the next attempt."""
        assert reply.error is not None
        if reply.error.code == "engine_dead":
            flight.avoid(reply.replica_id)
            return True
        if reply.error.param == "request_id" and len(flight.streams) > 1:
            # An attempt before has been taken there and has not ended yet.
            for stream_id in flight.streams:
                source = Source(stream_id, reply.replica_id)
                self._abort_later(source, flight.generation.request_ids)
            return True
        return False

    def _stream_for(self, flight: Flight) -> str:
        """A stream id that no attempt of this request has used; requests that can share one do."""
        if self._stream_id in flight.streams:
            self._stream_id = uuid.uuid4().hex
        return self._stream_id

    def _settle(self, flight: Flight, source: Source) -> None:
        flight.replica_id = source.replica_id
        self._known.add(source.replica_id)
        if source not in self._readers:
            self._readers[source] = detached(self._read(source))
        early, flight.early = flight.early, []
        for origin, chunk in early:
            self._deliver(origin, chunk)

    def _lose(self, flight: Flight, reason: str) -> None:
        """The replica of a request is gone: go on at another one, or end it."""
        if flight.generation.is_over:
            return
        assert flight.replica_id is not None
        flight.avoid(flight.replica_id)
        flight.end()
        if flight.num_lost >= self._max_migrations:
            self._give_up(flight, "exhausted", reason)
            return
        flight.num_lost += 1
        flight.mover = self._in_background(self._move(flight))

    def _give_up(self, flight: Flight, outcome: str, reason: str) -> None:
        self.migrations[outcome] += 1
        flight.generation.fail(RequestError(reason, code="stream_lost"))

    # --- reading --------------------------------------------------------------------------------

    async def _read(self, source: Source) -> None:
        reason = "the stream from the engine was closed"
        try:
            stream = self._transport.subscribe(source.stream_id, replica_id=source.replica_id)
            async with aclosing(stream):
                await self._pump(source, stream)
        except TimeoutError:
            reason = f"the engine was silent for {SILENCE_S:g} s"
        except Exception as error:
            reason = "the stream from the engine broke"
            logger.warning("%s (%s): %s", reason, source.replica_id, error)
        finally:
            # One that ended because it was idle has left the books already, and may have an heir.
            if self._readers.get(source) is asyncio.current_task():
                del self._readers[source]
                self._lose_all(source, reason)

    def _lose_all(self, source: Source, reason: str) -> None:
        flights = self._from(source)
        if flights:
            # It may only have been silent. Its copies must not run on beside their successors.
            ids = [name for flight in flights for name in flight.generation.request_ids]
            self._abort_later(source, ids)
        for flight in flights:
            self._lose(flight, reason)

    async def _pump(self, source: Source, stream: AsyncGenerator[list[TokenChunk], None]) -> None:
        used = time.monotonic()
        while True:
            async with asyncio.timeout(SILENCE_S):
                batch = await anext(stream, None)
            if batch is None:
                return
            for chunk in batch:
                self._deliver(source, chunk)
            now = time.monotonic()
            if batch or self._from(source):
                used = now
            elif now - used > self._idle_s:
                del self._readers[source]
                return

    def _deliver(self, source: Source, chunk: TokenChunk) -> None:
        flight = self._open.get(chunk.request_id)
        if flight is None:
            if chunk.request_id not in self._left:
                self.unknown_chunks += 1
                logger.warning("a chunk came for the unknown request %s", chunk.request_id)
        elif flight.source == source:
            self._hand_over(flight, source, chunk)
        elif flight.stream_id == source.stream_id and flight.replica_id is None:
            flight.early.append((source, chunk))
        else:
            self._drop_stale(flight, source, chunk)

    def _hand_over(self, flight: Flight, source: Source, chunk: TokenChunk) -> None:
        generation = flight.generation
        if generation.is_over:
            return
        if loses_its_replica(chunk):
            self._lose(flight, "the engine ended")
            return
        generation.deliver(chunk)
        if generation.is_over and not generation.is_finished:
            # Aborted here, for a reader that is too slow may not leave its block for long.
            self._abort_later(source, generation.request_ids)

    def _drop_stale(self, flight: Flight, source: Source, chunk: TokenChunk) -> None:
        self.stale_chunks += 1
        if chunk.finish_reason is None and source not in flight.told:
            flight.told.add(source)
            self._abort_later(source, flight.generation.request_ids)

    def _from(self, source: Source) -> list[Flight]:
        flights = dict.fromkeys(self._open.values())
        return [flight for flight in flights if flight.source == source]

    # --- leaving --------------------------------------------------------------------------------

    def _forget(self, flight: Flight) -> None:
        generation = flight.generation
        if flight.mover is not None and not flight.mover.done():
            flight.mover.cancel()
            self.migrations["left"] += 1
        for request_id in generation.request_ids:
            del self._open[request_id]
            self._left[request_id] = None
        while len(self._left) > _REMEMBERED:
            self._left.popitem(last=False)
        if flight.source is not None and not generation.is_finished:
            self._abort_later(flight.source, generation.request_ids)

    async def _disown(
        self, stream_id: str, request_ids: Sequence[str], submit: asyncio.Task[SubmitReply]
    ) -> None:
        try:
            reply = await submit  # until then nobody knows which replica to tell
        except Exception as error:
            logger.info("submit of %s failed: %s", request_ids[0], error)
            return
        if reply.error is None:
            await self._tell_abort(Source(stream_id, reply.replica_id), request_ids)

    def _abort_later(self, source: Source, request_ids: Sequence[str]) -> None:
        self._in_background(self._tell_abort(source, request_ids))

    async def _tell_abort(self, source: Source, request_ids: Sequence[str]) -> None:
        try:
            async with asyncio.timeout(ABORT_S):
                await self._transport.abort(
                    source.stream_id, request_ids, replica_id=source.replica_id
                )
        except Exception as error:
            # The replica is gone, and the requests with it.
            logger.info("abort of %s not delivered: %s", request_ids[0], error)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = detached(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
