from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_pio.benchmarks.http_stream import (
    Recording,
    StreamError,
    post,
    read_answer,
    read_events,
)

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"delta": fields}]}


EVENTS: list[dict[str, Any]] = [
    delta(role="assistant", content=""),
    delta(reasoning_content="4 + 5 ü"),
    delta(reasoning_content="\n"),
    delta(content="9"),
    {"choices": [], "usage": {"completion_tokens": 17}},
]
BODY = b"".join(f"data: {json.dumps(event)}\n\n".encode() for event in EVENTS)


def chunked(body: bytes, cuts: list[int]) -> bytes:
    edges = [0, *sorted({cut % len(body) for cut in cuts} - {0}), len(body)]
    parts = [body[a:b] for a, b in itertools.pairwise(edges)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def arriving(raw: bytes, cuts: list[int]) -> Recording:
    edges = [0, *sorted({cut % len(raw) for cut in cuts} - {0}), len(raw)]
    parts = [raw[a:b] for a, b in itertools.pairwise(edges)]
    return Recording(0.0, tuple((float(time), part) for time, part in enumerate(parts, 1)))


cut_lists = st.lists(st.integers(0, 2000), max_size=12)


@given(chunk_cuts=cut_lists, packet_cuts=cut_lists)
def test_events_survive_every_split_into_chunks_and_packets(
    chunk_cuts: list[int], packet_cuts: list[int]
) -> None:
    raw = HEAD + chunked(BODY + b"data: [DONE]\n\n", chunk_cuts)
    recording = arriving(raw, packet_cuts)
    events = read_events(recording)
    assert [event.data for event in events] == EVENTS
    times = [event.time for event in events]
    assert times == sorted(times)
    # An event is there no earlier than its last byte is.
    for number, event in enumerate(events):
        got = b"".join(part for time, part in recording.pieces if time <= event.time)
        assert len(got) >= len(HEAD) + sum(len(json.dumps(e)) + 8 for e in EVENTS[: number + 1])


def test_an_answer_is_told_apart_by_thought_and_answer() -> None:
    pieces = [(1.0, HEAD)]
    for time, event in enumerate([*EVENTS, None], 2):
        data = b"[DONE]" if event is None else json.dumps(event).encode()
        line = b"data: " + data + b"\n\n"
        pieces.append((float(time), b"%x\r\n%s\r\n" % (len(line), line)))
    answer = read_answer(Recording(0.5, tuple(pieces)))
    assert answer.sent == 0.5
    assert (answer.first_token, answer.first_answer_token, answer.last_token) == (3.0, 5.0, 5.0)
    assert answer.completion_tokens == 17
    assert answer.gaps == (1.0, 1.0)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\nfull", "503"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", "not a stream"),
        (b"", "answered"),
        (HEAD + chunked(BODY, []), "cut before its end"),
        (HEAD + chunked(b'data: {"error": {"message": "x"}}\n\ndata: [DONE]\n\n', []), "error"),
        (HEAD + chunked(b"data: [DONE]\n\n", []), "no text"),
    ],
)
def test_a_failed_request_is_never_a_figure(raw: bytes, reason: str) -> None:
    with pytest.raises(StreamError, match=reason):
        read_answer(Recording(0.0, ((1.0, raw),) if raw else ()))


def with_server(
    answer: bytes, use: Callable[[str], Awaitable[Recording]]
) -> tuple[Recording, bytes]:
    received = b""

    async def run() -> Recording:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal received
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            received = head + await reader.readexactly(length)
            writer.write(answer)
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await use(f"http://127.0.0.1:{port}")

    return asyncio.run(run()), received


def test_post_sends_json_and_records_to_the_end() -> None:
    answer = HEAD + chunked(BODY + b"data: [DONE]\n\n", [40, 90])
    recording, received = with_server(answer, lambda url: post(f"{url}/v1/x", {"a": [1]}))
    assert b"".join(part for _, part in recording.pieces) == answer
    assert received.startswith(b"POST /v1/x HTTP/1.1\r\n")
    assert received.endswith(b'\r\n\r\n{"a": [1]}')
    assert recording.sent <= recording.pieces[0][0]


def test_no_server_is_an_error_with_its_address() -> None:
    with pytest.raises(StreamError, match=r"no connection to 127\.0\.0\.1:9"):
        asyncio.run(post("http://127.0.0.1:9/v1/x", {}))
