"""A streaming HTTP client that costs next to nothing while it measures.

While an answer arrives only its bytes and their arrival times are kept; chunked encoding, events
and JSON are read afterwards. A client that parsed as it went would take the CPU that the server
under test needs, on the same machine.
"""

from __future__ import annotations

import asyncio
import bisect
import json
import time
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any
from urllib.parse import urlsplit


class StreamError(RuntimeError):
    """A request of a benchmark failed; its figures would be worth nothing."""


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event, when its last byte came."""

    time: float
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer. Times are ``time.perf_counter()`` seconds."""

    sent: float
    first_token: float
    first_answer_token: float | None
    last_token: float
    completion_tokens: int
    gaps: tuple[float, ...]
    """Seconds between one event with text and the next."""


@dataclass(frozen=True, slots=True)
class Recording:
    """What came, as it came."""

    sent: float
    pieces: tuple[tuple[float, bytes], ...]


class _Recorder(asyncio.Protocol):
    def __init__(self, request: bytes) -> None:
        self._request = request
        self.sent = 0.0
        self.pieces: list[tuple[float, bytes]] = []
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self.sent = time.perf_counter()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)


async def post(url: str, body: dict[str, Any]) -> Recording:
    """Send one request on a connection of its own and record the answer to its end."""
    parts = urlsplit(url)
    payload = json.dumps(body).encode()
    head = (
        f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        "Content-Type: application/json\r\nConnection: close\r\n"
        f"Content-Length: {len(payload)}\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    host, port = parts.hostname or "localhost", parts.port or 80
    try:
        transport, recorder = await loop.create_connection(
            lambda: _Recorder(head.encode() + payload), host, port
        )
    except OSError as error:
        raise StreamError(f"no connection to {parts.netloc}: {error}") from error
    try:
        await recorder.closed
    finally:
        transport.close()
    return Recording(recorder.sent, tuple(recorder.pieces))


def read_answer(recording: Recording) -> Answer:
    """The figures of one recorded chat completion stream.

    Raises ``StreamError`` for another status than 200, an error event, a stream without end or
    without text.
    """
    events = read_events(recording)
    with_text: list[float] = []
    first_answer: float | None = None
    tokens = 0
    for event in events:
        if "error" in event.data:
            raise StreamError(f"the server sent an error: {event.data['error']}")
        if event.data.get("usage"):
            tokens = int(event.data["usage"]["completion_tokens"])
        for choice in event.data["choices"]:
            delta = choice["delta"]
            if delta.get("content") and first_answer is None:
                first_answer = event.time
            if any(delta.get(k) for k in ("content", "reasoning_content", "tool_calls")):
                with_text.append(event.time)
    if not with_text:
        raise StreamError("the answer has no text")
    gaps = tuple(b - a for a, b in pairwise(with_text))
    return Answer(recording.sent, with_text[0], first_answer, with_text[-1], tokens, gaps)


def read_events(recording: Recording) -> list[Event]:
    """Undo chunked encoding and split events; an event's time is that of its last byte."""
    raw = b"".join(data for _, data in recording.pieces)
    head, separator, _ = raw.partition(b"\r\n\r\n")
    status = head.split(b"\r\n", 1)[0].decode(errors="replace")
    if not separator or " 200 " not in f"{status} ":
        raise StreamError(f"the server answered {status!r}: {raw[len(head) : len(head) + 300]!r}")
    if b"transfer-encoding: chunked" not in head.lower():
        raise StreamError("the answer is not a stream")
    body, offsets = _unchunk(raw, len(head) + 4)
    ends = list(accumulate(len(data) for _, data in recording.pieces))
    events: list[Event] = []
    position = 0
    while (end := body.find(b"\n\n", position)) >= 0:
        data = body[position:end].removeprefix(b"data: ")
        if data == b"[DONE]":
            return events
        piece = bisect.bisect_right(ends, _raw_offset(offsets, end + 1))
        events.append(Event(recording.pieces[piece][0], json.loads(data)))
        position = end + 2
    raise StreamError("the stream was cut before its end")


def _unchunk(raw: bytes, start: int) -> tuple[bytes, list[tuple[int, int]]]:
    """The body, and for each chunk where it begins in the body and in ``raw``."""
    parts: list[bytes] = []
    offsets: list[tuple[int, int]] = []
    length = 0
    while (line_end := raw.find(b"\r\n", start)) >= 0:
        size = int(raw[start:line_end].split(b";")[0], 16)
        if size == 0:
            break
        begin = line_end + 2
        offsets.append((length, begin))
        parts.append(raw[begin : begin + size])
        length += size
        start = begin + size + 2
    return b"".join(parts), offsets


def _raw_offset(offsets: list[tuple[int, int]], position: int) -> int:
    chunk = bisect.bisect_right(offsets, position, key=lambda pair: pair[0]) - 1
    in_body, in_raw = offsets[chunk]
    return in_raw + position - in_body
