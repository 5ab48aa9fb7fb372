"""Server-sent events over ASGI, and the end of work when the client has left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


class ClientLeftError(Exception):
    """The client closed the connection before its answer was complete."""


def event(data: Any) -> bytes:
    """One ``data:`` event with JSON."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Await ``work``; cancel it as soon as the client disconnects.

    The body must have been read. Raises ``ClientLeftError`` then.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeftError
        return task.result()
    finally:
        for pending in (task, watcher):
            if not pending.done():
                pending.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


class EventStream(Response):
    """Sends what ``events`` yields; raises ``ClientLeftError`` when the client disconnects.

    ``events`` has been started already, so that an error before its first event still is a plain
    HTTP answer. Errors later become an ``error`` event, through ``to_error``.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        first: bytes,
        events: AsyncGenerator[bytes, None],
        to_error: Callable[[Exception], ApiError],
        headers: Mapping[str, str],
    ) -> None:
        own = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(headers={**own, **headers})
        del self.headers["content-length"]
        self._first = first
        self._events = events
        self._to_error = to_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await while_connected(Request(scope, receive), self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            await send(_body(self._first))
            async for piece in self._events:
                await send(_body(piece))
        except Exception as error:
            await send(_body(event(self._to_error(error).body())))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def started(
    events: AsyncGenerator[bytes, None],
    to_error: Callable[[Exception], ApiError],
    headers: Mapping[str, str],
) -> EventStream:
    """Wait for the first event, then answer 200; what is raised before it goes to the caller."""
    try:
        first = await anext(events)
    except BaseException:
        await events.aclose()
        raise
    return EventStream(first, events, to_error, headers)


def _body(piece: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": piece, "more_body": True}


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
