"""An engine process that dies: its requests end with a typed error, and the service comes back."""

from __future__ import annotations

import json
import time

import httpx
import psutil

CHAT = "/v1/chat/completions"
ENDLESS = {
    "messages": [{"role": "user", "content": "hi"}],
    "ignore_eos": True,
    "max_tokens": 3500,
    "temperature": 1.0,
}


def engine_process() -> psutil.Process:
    """The one engine replica among the processes that this test run has started."""
    (found,) = [
        process
        for process in psutil.Process().children(recursive=True)
        if " ".join(process.cmdline()).startswith("ray::ServeReplica:test:engine")
    ]
    return found


def test_a_killed_engine_is_an_error_event_and_comes_back(client: httpx.Client) -> None:
    with client.stream("POST", CHAT, json={**ENDLESS, "stream": True}) as answer:
        lines = (line for line in answer.iter_lines() if line)
        next(lines)
        engine = engine_process()
        engine.kill()
        rest = list(lines)
    assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE
    error = json.loads(rest[-1].removeprefix("data: "))["error"]
    assert error["code"] == "stream_lost"
    assert error["type"] == "overloaded_error"
    assert "[DONE]" not in "".join(rest)
    assert all('"finish_reason":null' in line for line in rest[:-1])
    end = time.monotonic() + 60
    question = {"messages": [{"role": "user", "content": "What is 12 + 30 + 5?"}], "seed": 1}
    while (again := client.post(CHAT, json=question)).status_code != 200:
        assert again.status_code == 503, again.text
        assert again.headers["retry-after"]
        assert time.monotonic() < end, "the engine did not come back"
        time.sleep(0.2)
    assert again.json()["choices"][0]["message"]["content"] == "47"
    assert engine_process().pid != engine.pid
