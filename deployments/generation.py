"""The reading end of one client's request: its chunks, checked for gaps and bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ..workers.types import FinishReason, GenerateRequest, RequestError, TokenChunk

Choice = tuple[str, int]


class Generation:
    """Chunks of one or more engine requests that one client waits for.

    Iterating gives, as lists, everything that arrived since the last turn, and ends when every
    choice has finished. Raises ``RequestError`` when the engine, the stream to it or the reader's
    own slowness ended the request early, or when ``deadline_s`` seconds have passed.
    """

    def __init__(
        self, requests: Sequence[GenerateRequest], max_buffered_tokens: int, deadline_s: float
    ) -> None:
        self.request_ids = tuple(request.request_id for request in requests)
        self.replica_id: str | None = None
        self._max_buffered = max_buffered_tokens
        self._deadline_s = deadline_s
        self._deadline = asyncio.get_running_loop().time() + deadline_s
        self._next: dict[Choice, int] = {
            (request.request_id, index): 0
            for request in requests
            for index in range(request.params.n)
        }
        self._chunks: list[TokenChunk] = []
        self._buffered = 0
        self._error: RequestError | None = None
        self._ready = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Whether no more chunk will come."""
        return self._error is not None or not self._next

    @property
    def is_finished(self) -> bool:
        """Whether every choice came to its own end."""
        return not self._next

    def deliver(self, chunk: TokenChunk) -> None:
        """Take a chunk from the stream; what is wrong with it becomes the request's error."""
        if self.is_over:
            return
        error = self._objection(chunk)
        if error is not None:
            self.fail(error)
            return
        choice = (chunk.request_id, chunk.index)
        self._next[choice] += len(chunk.token_ids)
        if chunk.finish_reason is not None:
            del self._next[choice]
        self._chunks.append(chunk)
        self._buffered += len(chunk.token_ids)
        self._ready.set()

    def fail(self, error: RequestError) -> None:
        """End the request with an error, once."""
        if not self.is_over:
            self._error = error
            self._ready.set()

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> list[TokenChunk]:
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if not self._next:
                raise StopAsyncIteration
            await self._wait()
        chunks, self._chunks, self._buffered = self._chunks, [], 0
        return chunks

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout_at(self._deadline):
                await self._ready.wait()
        except TimeoutError:
            message = f"the request took longer than {self._deadline_s:g} s"
            self.fail(RequestError(message, code="deadline_exceeded"))
        self._ready.clear()

    def _objection(self, chunk: TokenChunk) -> RequestError | None:
        if chunk.error is not None:
            return chunk.error
        if chunk.finish_reason is FinishReason.ABORT:
            return RequestError("the request was aborted by the server", code="aborted")
        if chunk.finish_reason is FinishReason.ERROR:
            return RequestError("the engine failed on this request", code="internal_error")
        expected = self._next.get((chunk.request_id, chunk.index))
        if chunk.first != expected:
            return RequestError(
                f"the stream of choice {chunk.index} is broken: token {expected} was expected, "
                f"{chunk.first} came",
                code="stream_lost",
            )
        if self._buffered + len(chunk.token_ids) > self._max_buffered:
            return RequestError(
                f"the client reads too slowly: {self._buffered} tokens wait for it",
                code="slow_client",
            )
        return None
