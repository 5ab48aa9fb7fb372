"""From engine chunks to one HTTP answer, whole or streamed; the same for every completion API."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.responses import Response

from ...workers.types import GenerateRequest, TokenChunk
from ..wire import RouteHints
from .errors import ApiError, json_response
from .protocol import StreamOptions
from .routes import Routed
from .service import Service
from .sse import DONE, event, started
from .usage import UsageMeter


class AnswerChoice(Protocol):
    """One choice of an answer: fed with its chunks, it gives the JSON of its API."""

    def feed(self, chunk: TokenChunk) -> None: ...

    def whole(self) -> dict[str, Any]: ...

    def stream(self, chunk: TokenChunk) -> Iterator[dict[str, Any]]: ...


@dataclass(frozen=True, slots=True)
class Answer:
    """What is sent to the engine, and who reads what comes back.

    ``head`` holds the fields that every event and the whole answer begin with; ``choices`` are
    keyed by request id and index, in the order in which they are sent. ``arrived`` is when the
    client's request came, on the monotonic clock.
    """

    service: Service
    routed: Routed
    hints: RouteHints
    arrived: float
    requests: Sequence[GenerateRequest]
    choices: Mapping[tuple[str, int], AnswerChoice]
    head: dict[str, Any]

    async def whole(self) -> Response:
        """Wait for everything and answer at once."""
        usage = UsageMeter()
        async with aclosing(self._chunks()) as batches:
            async for chunks in batches:
                for chunk in chunks:
                    usage.see(chunk)
                    self.choices[chunk.request_id, chunk.index].feed(chunk)
        choices = [choice.whole() for choice in self.choices.values()]
        content = {**self.head, "choices": choices, "usage": usage.as_json()}
        return json_response(content, headers=self.routed.headers)

    async def stream(self, options: StreamOptions) -> Response:
        """Answer with events from the first chunk on; an error before it is a plain answer."""
        events = self._events(options)
        return await started(events, self.service.to_api_error, self.routed.headers)

    async def _chunks(self) -> AsyncGenerator[list[TokenChunk], None]:
        pool = self.routed.pool
        timer = pool.metrics.timer(self.arrived)
        deadline_s = self.service.config.api.request_timeout_s
        opened = pool.mux.open(self.requests, deadline_s=deadline_s, hints=self.hints)
        try:
            async with opened as generation:
                self.service.metrics.routed(self.routed.route, pool.name)
                async for chunks in generation:
                    for chunk in chunks:
                        timer.see(chunk)
                    yield chunks
        except Exception as error:
            if _is_ours(self.service.to_api_error(error)):
                timer.fail()
            raise
        timer.finish()

    async def _events(self, options: StreamOptions) -> AsyncGenerator[bytes, None]:
        usage = UsageMeter()
        async with aclosing(self._chunks()) as batches:
            async for chunks in batches:
                events: list[bytes] = []
                for chunk in chunks:
                    usage.see(chunk)
                    for piece in self.choices[chunk.request_id, chunk.index].stream(chunk):
                        events.append(self._event(piece, usage, options))
                if events:
                    yield b"".join(events)
        if options.include_usage:
            yield event({**self.head, "choices": [], "usage": usage.as_json()})
        yield DONE

    def _event(self, piece: dict[str, Any], usage: UsageMeter, options: StreamOptions) -> bytes:
        data = {**self.head, "choices": [piece]}
        if options.continuous_usage_stats:
            data["usage"] = usage.as_json()
        elif options.include_usage:
            data["usage"] = None  # as OpenAI sends it in every chunk but the last
        return event(data)


def _is_ours(error: ApiError) -> bool:
    """Whether the service failed, and not the request or its reader."""
    return error.status >= 500 and error.code != "slow_client"
