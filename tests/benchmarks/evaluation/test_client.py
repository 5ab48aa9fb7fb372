"""The client against answers as servers give them, over real HTTP on loopback."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from inference_pio.benchmarks.evaluation import client as client_module
from inference_pio.benchmarks.evaluation.client import ApiClient, read_reply
from inference_pio.benchmarks.evaluation.item import Item, Reply, ToolCall
from inference_pio.benchmarks.evaluation.sampling import MODEL_CARD, sampling_for
from inference_pio.benchmarks.http_stream import StreamError

ITEM = Item("gsm8k", "x", ({"role": "user", "content": "2+2?"},), {}, ({"type": "function"},))
COMPLETION = {
    "choices": [{"message": {"content": "4"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2},
}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "LONGEST_PAUSE_S", 0.0)


@contextmanager
def server(*answers: tuple[int, object]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Gives one answer after another, the last for ever; keeps the bodies that came."""
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(200, {"data": [{"id": "the-model"}]})

        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.answer(*answers[min(len(bodies), len(answers)) - 1])

        def answer(self, status: int, document: object) -> None:
            content = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        # It looks so often whether it is to end.
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}", bodies
        finally:
            http.shutdown()
            thread.join()


def ask(url: str, max_tokens: int | None = 50, temperature: float | None = None) -> Reply:
    async def run() -> Reply:
        async with ApiClient(url, max_tokens=max_tokens, timeout_s=5) as client:
            assert client.model == "the-model"
            return await client.ask(ITEM, "thinking", sampling_for("thinking", temperature), 7)

    return asyncio.run(run())


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_the_request_says_all_that_decides_the_answer(suffix: str) -> None:
    with server((200, COMPLETION)) as (url, bodies):
        assert ask(url + suffix).content == "4"
    assert bodies == [
        {
            "model": "the-model",
            "messages": [{"role": "user", "content": "2+2?"}],
            "seed": 7,
            "chat_template_kwargs": {"enable_thinking": True},
            "temperature": 0.6,
            "top_p": 0.95,
            "top_k": 20,
            "min_p": 0.0,
            "tools": [{"type": "function"}],
            "max_tokens": 50,
        }
    ]


def test_a_temperature_of_ones_own_comes_alone() -> None:
    with server((200, COMPLETION)) as (url, bodies):
        ask(url, max_tokens=None, temperature=0.0)
    assert bodies[0]["temperature"] == 0.0
    assert not {"top_p", "top_k", "min_p", "max_tokens"} & bodies[0].keys()


def test_the_modes_of_the_model_card() -> None:
    assert MODEL_CARD["non-thinking"].fields() == {
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "min_p": 0.0,
    }


def test_what_passes_is_waited_out() -> None:
    with server((503, {}), (429, {}), (200, COMPLETION)) as (url, bodies):
        assert ask(url).content == "4"
    assert len(bodies) == 3


def test_a_request_that_cannot_be_served_is_the_items_own() -> None:
    with server((400, {"error": {"message": "too long"}})) as (url, bodies):
        assert ask(url) == Reply(refusal="400: too long")
    assert len(bodies) == 1


@pytest.mark.parametrize(("status", "requests"), [(401, 1), (404, 1), (500, 1), (503, 6)])
def test_a_server_that_fails_ends_the_run(status: int, requests: int) -> None:
    with (
        server((status, {"error": {"message": "no"}})) as (url, bodies),
        pytest.raises(StreamError, match=f"x got no answer: {status}: no"),
    ):
        ask(url)
    assert len(bodies) == requests


def test_no_server() -> None:
    with pytest.raises(StreamError, match="no OpenAI-compatible server answers"):
        ask("http://127.0.0.1:9")


def test_a_reply_with_thought_and_calls() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = {"content": None, "reasoning_content": "hm", "tool_calls": [call]}
    usage = {"completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 4}}
    document = {"choices": [{"message": message, "finish_reason": "tool_calls"}], "usage": usage}
    reply = read_reply(json.dumps(document).encode(), 1.5)
    assert reply == Reply("", "hm", (ToolCall("f", "{}"),), "tool_calls", 0, 9, 4, 1.5)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"choices": []}', b'{"choices": [3]}'])
def test_what_is_no_completion_ends_the_run(content: bytes) -> None:
    with pytest.raises(StreamError, match="is no chat completion"):
        read_reply(content, 0.0)


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ("4", "4"),
        ("<think>\nhm\n</think>\n\n4", "4"),
        ("hm\n</think>\n4", "4"),  # the template opened the thought
        ("<think>\nhm", ""),
    ],
)
def test_tags_that_a_server_left_are_no_answer(content: str, answer: str) -> None:
    assert Reply(content=content).answer == answer
