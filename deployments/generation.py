"""The reading end of one client's request: its chunks, checked for gaps and bounded.

The stream goes on when the request moves to another replica: ``remaining`` says what is still to
come, and the chunks of the next attempt are numbered on from there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..workers.types import FinishReason, GenerateRequest, RequestError, TokenChunk
from .migration import all_choices, remaining_requests


@dataclass(slots=True)
class _Progress:
    """What has come of one open choice."""

    token_ids: list[int] = field(default_factory=list)
    cached_tokens: int | None = None
    """As its first chunk told; ``None`` before."""


class Generation:
    """Chunks of one or more engine requests that one client waits for.

    Iterating gives, as lists, everything that arrived since the last turn, and ends when every
    choice has finished. Raises ``RequestError`` when the engine, the stream to it or the reader's
    own slowness ended the request early, or when ``deadline_s`` seconds have passed.
    """

    def __init__(
        self, requests: Sequence[GenerateRequest], max_buffered_tokens: int, deadline_s: float
    ) -> None:
        self.requests = tuple(requests)
        self.request_ids = tuple(request.request_id for request in requests)
        self._max_buffered = max_buffered_tokens
        self._deadline_s = deadline_s
        self._deadline = asyncio.get_running_loop().time() + deadline_s
        self._open = {choice: _Progress() for choice in all_choices(requests)}
        self._timed: set[str] = set()
        self._chunks: list[TokenChunk] = []
        self._buffered = 0
        self._error: RequestError | None = None
        self._ready = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Whether no more chunk will come."""
        return self._error is not None or not self._open

    @property
    def is_finished(self) -> bool:
        """Whether every choice came to its own end."""
        return not self._open

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline."""
        return max(0.0, self._deadline - asyncio.get_running_loop().time())

    def deadline_error(self) -> RequestError:
        """How the request ends where its deadline has passed."""
        message = f"the request took longer than {self._deadline_s:g} s"
        return RequestError(message, code="deadline_exceeded")

    def remaining(self) -> list[GenerateRequest]:
        """The requests whose answers are what is still to come."""
        received = {
            choice: progress.token_ids if progress.cached_tokens is not None else None
            for choice, progress in self._open.items()
        }
        return remaining_requests(self.requests, received, self.remaining_s)

    def deliver(self, chunk: TokenChunk) -> None:
        """Take a chunk from the stream; what is wrong with it becomes the request's error."""
        if self.is_over:
            return
        error = self._objection(chunk)
        if error is not None:
            self.fail(error)
            return
        choice = (chunk.request_id, chunk.index)
        progress = self._open[choice]
        chunk = self._told_once(chunk, progress)
        progress.token_ids += chunk.token_ids
        progress.cached_tokens = chunk.usage.cached_tokens
        if chunk.timing is not None:
            self._timed.add(chunk.request_id)
        if chunk.finish_reason is not None:
            del self._open[choice]
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
            if not self._open:
                raise StopAsyncIteration
            await self._wait()
        chunks, self._chunks, self._buffered = self._chunks, [], 0
        return chunks

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout_at(self._deadline):
                await self._ready.wait()
        except TimeoutError:
            self.fail(self.deadline_error())
        self._ready.clear()

    def _told_once(self, chunk: TokenChunk, progress: _Progress) -> TokenChunk:
        """The chunk without what an earlier replica has told of its choice or request.

        Cached tokens stay those of the first attempt: a later one counts what is recomputed.
        """
        if chunk.timing is not None and chunk.request_id in self._timed:
            chunk = replace(chunk, timing=None)
        if progress.cached_tokens is None:
            return chunk
        if chunk.prompt_logprobs is not None:
            chunk = replace(chunk, prompt_logprobs=None)
        if chunk.usage.cached_tokens != progress.cached_tokens:
            usage = replace(chunk.usage, cached_tokens=progress.cached_tokens)
            chunk = replace(chunk, usage=usage)
        return chunk

    def _objection(self, chunk: TokenChunk) -> RequestError | None:
        if chunk.error is not None:
            return chunk.error
        if chunk.finish_reason is FinishReason.ERROR:
            return RequestError("the engine failed on this request", code="internal_error")
        progress = self._open.get((chunk.request_id, chunk.index))
        expected = None if progress is None else len(progress.token_ids)
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
