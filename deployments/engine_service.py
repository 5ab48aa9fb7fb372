"""The engine side of the multiplexed stream; knows nothing of Ray.

1. An ingress ``submit``s requests under its stream id; the reply names this replica.
2. The engine thread runs steps; all chunks of a step enter this loop in one wake-up.
3. They wait in the outbox of the stream that sent their request; ``subscribe`` yields everything
   that came since its last turn: one yield an engine step for all requests of an ingress.
4. A stream that nobody reads for ``ORPHAN_S`` belongs to a dead ingress: its requests are aborted.
5. Where the pool has prefill replicas, what a step wants from them goes to the ``KVSource``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence

from ..workers.async_engine import AsyncEngine, EngineDeadError
from ..workers.engine import Engine
from ..workers.types import (
    EngineStats,
    FinishReason,
    GenerateRequest,
    RequestError,
    StepOutput,
    TokenChunk,
)
from .handoff_stats import DecodeStats
from .kv_source import KVSource
from .served_engine import ServedEngine
from .wire import (
    HEARTBEAT_S,
    ModelFacts,
    RouteHints,
    StreamSweptError,
    SubmitReply,
)

ORPHAN_S = 10.0


class Outbox:
    """Chunks on their way to one ingress."""

    def __init__(self) -> None:
        self.requests: set[str] = set()
        self.reader: object | None = None
        self._chunks: list[TokenChunk] = []
        self._ready = asyncio.Event()

    def put(self, chunk: TokenChunk) -> None:
        """Add a chunk and wake the reader."""
        self._chunks.append(chunk)
        self._ready.set()

    def take(self) -> list[TokenChunk]:
        """Everything since the last turn."""
        chunks, self._chunks = self._chunks, []
        self._ready.clear()
        return chunks

    def attach(self) -> object:
        """Make the caller the only reader; an earlier one ends."""
        self.reader = object()
        self._ready.set()
        return self.reader

    async def wait(self, timeout: float) -> None:
        """Return when there is something to take, at the latest after ``timeout`` seconds."""
        if self._ready.is_set():
            return
        try:
            async with asyncio.timeout(timeout):
                await self._ready.wait()
        except TimeoutError:
            return


class EngineService(ServedEngine):
    """One engine behind ``submit``, ``subscribe`` and ``abort``; lives in one event loop."""

    def __init__(
        self,
        engine: Engine,
        replica_id: str,
        checkpoint: str,
        open_source: Callable[[AsyncEngine], KVSource] | None = None,
    ) -> None:
        """``open_source`` gives what prefills elsewhere, where something does."""
        super().__init__(engine, replica_id)
        self._checkpoint = checkpoint
        self._source = open_source(self._engine) if open_source is not None else None
        self._outboxes: dict[str, Outbox] = {}
        self._swept: set[str] = set()  # ids are never used again, and sweeps are rare
        self._stream_of: dict[str, str] = {}
        self._open_choices: dict[str, int] = {}

    def start(self) -> None:
        """Launch the engine thread; called in the loop that serves the other methods."""
        super().start()
        if self._source is not None:
            self._source.start()

    def stop(self) -> None:
        """End the engine thread; open requests are aborted and told so."""
        if self._source is not None:
            self._source.stop()
        super().stop()

    async def facts(self) -> ModelFacts:
        """What was loaded, and its limits."""
        engine = self._engine.engine
        return ModelFacts(
            replica_id=self.replica_id,
            checkpoint=self._checkpoint,
            max_model_len=engine.max_model_len,
            num_tokens=engine.loaded.tokenizer.num_tokens,
            kernels=engine.loaded.model.kernels.name,
            attention=engine.config.attention.label,
        )

    async def stats(self, *, replica_id: str) -> EngineStats:
        """Sizes and totals, as of the last step."""
        self._require_me(replica_id)
        stats, source = self._engine.stats(), self._source
        return stats if source is None else DecodeStats.of(stats, source.stats(), source.peers())

    def has_replica(self) -> bool:
        """Whether the engine runs: a caller in this process has no other replica."""
        return self._engine.is_alive

    async def submit(
        self, stream_id: str, requests: Sequence[GenerateRequest], hints: RouteHints
    ) -> SubmitReply:
        """Hand over all of ``requests``, or none and say why; ``hints`` were the router's."""
        outbox = self._outbox(stream_id)
        taken: list[str] = []
        try:
            for request in requests:
                if request.request_id in self._stream_of:
                    raise RequestError(
                        f"request id {request.request_id!r} is in use already", param="request_id"
                    )
                self._register(request, stream_id, outbox)
                taken.append(request.request_id)
                self._engine.submit(request)
        except RequestError as error:
            self._withdraw(taken)
            return SubmitReply(self.replica_id, error)
        except EngineDeadError as error:
            # Named, so that the request can go elsewhere while this replica is replaced.
            self._withdraw(taken)
            return SubmitReply(self.replica_id, RequestError(str(error), code="engine_dead"))
        except BaseException:
            self._withdraw(taken)
            raise
        return SubmitReply(self.replica_id)

    async def subscribe(
        self, stream_id: str, *, replica_id: str
    ) -> AsyncGenerator[list[TokenChunk], None]:
        """All chunks for one ingress, one yield a step; an empty batch when it has been quiet.

        Raises ``WrongReplicaError`` when the caller means another replica, ``StreamSweptError``
        when requests of this stream were ended because it came too late.
        """
        self._require_me(replica_id)
        if stream_id in self._swept:
            self._swept.discard(stream_id)
            raise StreamSweptError(f"nobody read {stream_id} for {ORPHAN_S:g} s")
        outbox = self._outbox(stream_id)
        me = outbox.attach()
        try:
            while True:
                await outbox.wait(HEARTBEAT_S)
                if outbox.reader is not me:
                    return
                yield outbox.take()
        finally:
            if outbox.reader is me:
                outbox.reader = None
                self._watch(stream_id)

    async def abort(self, stream_id: str, request_ids: Sequence[str], *, replica_id: str) -> None:
        """End requests of one stream; their remaining chunks go nowhere.

        Ended ones are left as they are, and so is one that has come again through another stream:
        a late abort must not end the attempt after the one that it was meant for.
        """
        self._require_me(replica_id)
        self._withdraw([name for name in request_ids if self._stream_of.get(name) == stream_id])

    def _outbox(self, stream_id: str) -> Outbox:
        outbox = self._outboxes.get(stream_id)
        if outbox is None:
            outbox = self._outboxes[stream_id] = Outbox()
            self._watch(stream_id)
        return outbox

    def _watch(self, stream_id: str) -> None:
        asyncio.get_running_loop().call_later(ORPHAN_S, self._drop_if_orphaned, stream_id)

    def _drop_if_orphaned(self, stream_id: str) -> None:
        outbox = self._outboxes.get(stream_id)
        if outbox is not None and outbox.reader is None:
            del self._outboxes[stream_id]
            if outbox.requests:
                self._swept.add(stream_id)
                self._withdraw(tuple(outbox.requests))

    def _register(self, request: GenerateRequest, stream_id: str, outbox: Outbox) -> None:
        self._stream_of[request.request_id] = stream_id
        self._open_choices[request.request_id] = len(request.choice_indices)
        outbox.requests.add(request.request_id)

    def _withdraw(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._forget(request_id)
            self._engine.abort(request_id)

    def _forget(self, request_id: str) -> None:
        self._open_choices.pop(request_id, None)
        outbox = self._outboxes.get(self._stream_of.pop(request_id, ""))
        if outbox is not None:
            outbox.requests.discard(request_id)

    def _distribute(self, output: StepOutput) -> None:
        if self._source is not None:
            self._source.take(output.wanted, output.unwanted)
        for chunk in output.chunks:
            stream_id = self._stream_of.get(chunk.request_id)
            if stream_id is None:
                continue  # withdrawn: its reader has left
            self._outboxes[stream_id].put(chunk)
            if chunk.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
                # A request may end so before its other choices exist: one such end ends it all.
                self._forget(chunk.request_id)
            elif chunk.finish_reason is not None:
                self._open_choices[chunk.request_id] -= 1
                if self._open_choices[chunk.request_id] == 0:
                    self._forget(chunk.request_id)
