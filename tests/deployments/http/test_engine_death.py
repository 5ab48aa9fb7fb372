"""An engine process that dies: its streams go on at its successor, without a gap or a repeat."""

from __future__ import annotations

import json
from typing import Any

import httpx
import psutil

CHAT = "/v1/chat/completions"
TOKENS = 1500
LONG: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hi"}],
    "ignore_eos": True,
    "max_tokens": TOKENS,
    "temperature": 1.0,
    "seed": 7,
    "stream": True,
    "stream_options": {"include_usage": True},
}


def engine_process() -> psutil.Process:
    """The one engine replica among the processes that this test run has started."""
    (found,) = [
        process
        for process in psutil.Process().children(recursive=True)
        if " ".join(process.cmdline()).startswith("ray::ServeReplica:test:engine")
    ]
    return found


def test_a_stream_survives_the_death_of_its_engine(client: httpx.Client) -> None:
    with client.stream("POST", CHAT, json=LONG) as answer:
        lines = (line for line in answer.iter_lines() if line)
        for _ in range(20):
            next(lines)
        engine = engine_process()
        engine.kill()
        rest = list(lines)
    assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE
    assert rest[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in rest[:-1]]
    assert not [event for event in events if "error" in event]
    # The numbering is checked where the chunks arrive; a gap or repeat would be an error event.
    assert events[-1]["usage"]["completion_tokens"] == TOKENS
    ends = [choice["finish_reason"] for event in events for choice in event["choices"]]
    assert ends[-1] == "length"
    assert set(ends[:-1]) <= {None}
    assert engine_process().pid != engine.pid
    migrations = [
        line
        for line in client.get("/metrics").text.splitlines()
        if line.startswith("inference_pio_migrations_total") and not line.endswith(" 0.0")
    ]
    assert migrations, "the stream went on without having been migrated"
