"""The engine's thread: many callers, a health check that means something, and how it ends."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from inference_pio.workers.async_engine import AsyncEngine, EngineDeadError
from inference_pio.workers.types import (
    FinishReason,
    GenerateRequest,
    QueueFullError,
    RequestError,
    SamplingParams,
    StepOutput,
    TokenChunk,
)

MakeDriver = Callable[..., Any]
Prompt = Callable[..., list[int]]

WAIT_S = 60.0
"""Far longer than anything here takes; only a test that fails waits so long."""


class Client:
    """Submits requests and files their chunks by choice."""

    def __init__(self, engine: Any) -> None:
        self.engine = AsyncEngine(engine, self._on_step)
        self._arrived = threading.Condition()
        self._chunks: dict[tuple[str, int], list[TokenChunk]] = {}

    def _on_step(self, output: StepOutput) -> None:
        with self._arrived:
            for chunk in output.chunks:
                self._chunks.setdefault((chunk.request_id, chunk.index), []).append(chunk)
            self._arrived.notify_all()

    def submit(self, name: str, prompt: list[int], **params: Any) -> None:
        options = {"ignore_eos": True, "loop_guard": False, "temperature": 0.0} | params
        self.engine.submit(GenerateRequest(name, tuple(prompt), SamplingParams(**options)))

    def first_chunk(self, name: str, index: int = 0) -> TokenChunk:
        with self._arrived:
            assert self._arrived.wait_for(lambda: (name, index) in self._chunks, WAIT_S)
            return self._chunks[name, index][0]

    def finished(self, name: str, index: int = 0) -> list[TokenChunk]:
        """All chunks of a choice, when it has ended."""

        def ended() -> bool:
            chunks = self._chunks.get((name, index), [])
            return bool(chunks) and chunks[-1].finish_reason is not None

        with self._arrived:
            assert self._arrived.wait_for(ended, WAIT_S), f"{name}[{index}] did not end"
            return self._chunks[name, index]

    def tokens(self, name: str, index: int = 0) -> list[int]:
        return [token for chunk in self.finished(name, index) for token in chunk.token_ids]

    def assert_quiet(self) -> None:
        engine = self.engine.engine
        engine.check_integrity()
        stats = self.engine.stats()
        assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)


class Gate:
    """A forward pass that stands still until told; what a hung device looks like."""

    def __init__(self, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()
        model = client.engine.engine.loaded.model
        plain = model.forward

        def forward(*args: Any) -> Any:
            self.entered.set()
            assert self.open.wait(WAIT_S)
            return plain(*args)

        monkeypatch.setattr(model, "forward", forward)


@pytest.fixture
def make_client(make_driver: MakeDriver) -> Iterator[Callable[..., Client]]:
    clients: list[Client] = []

    def make(**options: Any) -> Client:
        client = Client(make_driver(**options).engine)
        client.engine.start()
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.engine.stop()
        assert not client.engine._thread.is_alive()


@pytest.fixture
def client(make_client: Callable[..., Client]) -> Client:
    return make_client()


def test_requests_from_many_threads(
    client: Client, make_driver: MakeDriver, prompt: Prompt
) -> None:
    failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

    def submit_some(thread: int) -> None:
        try:
            for number in range(5):
                client.submit(f"{thread}.{number}", prompt(5 + thread + number), max_tokens=6)
        except BaseException as error:
            failures.put(error)

    threads = [threading.Thread(target=submit_some, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert failures.empty()
    alone = make_driver()
    for length in range(5, 17):
        alone.add(
            str(length), prompt(length), max_tokens=6, temperature=0.0, ignore_eos=True,
            loop_guard=False,
        )  # fmt: skip
    alone.run()
    for thread in range(8):
        for number in range(5):
            chunks = client.finished(f"{thread}.{number}")
            firsts = [chunk.first for chunk in chunks]
            assert firsts == sorted(set(firsts))
            tokens = client.tokens(f"{thread}.{number}")
            assert tokens == alone.tokens(str(5 + thread + number))
    client.assert_quiet()


def test_abort_mid_stream(make_client: Callable[..., Client], prompt: Prompt) -> None:
    client = make_client(num_blocks=400)
    client.submit("r", prompt(10), n=2, max_tokens=1500)
    client.submit("other", prompt(11), max_tokens=30)
    client.first_chunk("r", 1)
    client.engine.abort("r")
    for index in range(2):
        chunks = client.finished("r", index)
        assert chunks[-1].finish_reason is FinishReason.ABORT
        assert 0 < len(client.tokens("r", index)) < 1500
    assert len(client.tokens("other")) == 30
    client.engine.abort("r")
    client.engine.abort("never known")
    asyncio.run(client.engine.health(WAIT_S))
    client.assert_quiet()


def test_refusals_are_raised_where_submit_is_called(client: Client, prompt: Prompt) -> None:
    with pytest.raises(RequestError, match="the prompt is empty"):
        client.submit("r", [])
    client.submit("r", prompt(5), max_tokens=3)
    assert len(client.tokens("r")) == 3


def test_an_id_in_use_is_refused_whether_handed_over_or_running(
    client: Client, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(client, monkeypatch)
    client.submit("running", prompt(5), max_tokens=3)
    assert gate.entered.wait(WAIT_S)
    client.submit("handed over", prompt(5), max_tokens=3)
    for name in ("running", "handed over"):
        with pytest.raises(RequestError, match=f"request id '{name}' is in use") as caught:
            client.submit(name, prompt(6), max_tokens=3)
        assert caught.value.param == "request_id"
    gate.open.set()
    for name in ("running", "handed over"):
        assert len(client.tokens(name)) == 3
    client.submit("running", prompt(5), max_tokens=3)  # the name is free again


def test_the_queue_is_bounded(
    make_client: Callable[..., Client], prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client(max_waiting=3, max_num_seqs=1)
    gate = Gate(client, monkeypatch)
    client.submit("running", prompt(5), max_tokens=2)
    assert gate.entered.wait(WAIT_S)
    for number in range(3):
        client.submit(f"waits {number}", prompt(5), max_tokens=2)
    for _ in range(2):
        with pytest.raises(QueueFullError, match="3 requests are waiting and max_waiting is 3"):
            client.submit("too many", prompt(5), max_tokens=2)
    gate.open.set()
    for number in range(3):
        client.finished(f"waits {number}")
    client.submit("too many", prompt(5), max_tokens=2)
    assert len(client.tokens("too many")) == 2
    client.assert_quiet()


def test_health_is_a_turn_of_the_loop(
    client: Client, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.run(client.engine.health(WAIT_S))  # idle
    gate = Gate(client, monkeypatch)
    client.submit("r", prompt(5), max_tokens=3)
    assert gate.entered.wait(WAIT_S)
    with pytest.raises(TimeoutError):
        asyncio.run(client.engine.health(0.05))
    assert client.engine._thread.is_alive()
    gate.open.set()
    asyncio.run(client.engine.health(WAIT_S))
    client.finished("r")


def test_a_request_that_cannot_be_queued_fails_alone(
    client: Client,
    prompt: Prompt,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = Gate(client, monkeypatch)
    client.submit("running", prompt(5), max_tokens=3)
    assert gate.entered.wait(WAIT_S)
    engine = client.engine.engine
    plain = engine.add

    def add(request: GenerateRequest) -> None:
        if request.request_id == "bad":
            raise ZeroDivisionError("injected")
        plain(request)

    monkeypatch.setattr(engine, "add", add)
    for name in ("bad", "after"):
        client.submit(name, prompt(6), n=2, max_tokens=3)
    with caplog.at_level(logging.CRITICAL, "inference_pio"):
        gate.open.set()
        for index in range(2):
            (chunk,) = client.finished("bad", index)
            assert chunk.finish_reason is FinishReason.ERROR
            assert chunk.error is not None
            assert chunk.error.code == "internal_error"
    for name in ("running", "after"):
        assert len(client.tokens(name)) == 3
    client.assert_quiet()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_loop_tells_everybody(
    make_client: Callable[..., Client], prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client(max_num_seqs=2)
    gate = Gate(client, monkeypatch)
    client.submit("running", prompt(5), n=2, max_tokens=30)
    assert gate.entered.wait(WAIT_S)
    client.submit("handed over", prompt(6), n=2, max_tokens=30)

    # The step under way fails: one request is in the engine, the other not yet.
    monkeypatch.setattr(client.engine.engine._scheduler, "commit", None)
    gate.open.set()
    for name in ("running", "handed over"):
        for index in range(2):
            last = client.finished(name, index)[-1]
            assert last.finish_reason is FinishReason.ERROR
            assert last.error is not None
            assert last.error.code == "engine_dead"
            assert "TypeError" in last.error.message
    client.engine._thread.join(WAIT_S)
    assert not client.engine._thread.is_alive()
    with pytest.raises(EngineDeadError, match="the engine loop ended"):
        asyncio.run(client.engine.health(WAIT_S))
    with pytest.raises(EngineDeadError):
        client.submit("late", prompt(5))
    client.engine.abort("running")


def test_stop_aborts_what_is_open_and_what_was_handed_over(
    make_client: Callable[..., Client], prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client(max_num_seqs=1)
    gate = Gate(client, monkeypatch)
    client.submit("running", prompt(5), max_tokens=30)
    assert gate.entered.wait(WAIT_S)
    client.submit("handed over", prompt(6), max_tokens=30)
    stopper = threading.Thread(target=client.engine.stop)
    stopper.start()
    while not client.engine._stopping:
        stopper.join(0.001)
    gate.open.set()
    for name in ("running", "handed over"):
        assert client.finished(name)[-1].finish_reason is FinishReason.ABORT
    stopper.join(WAIT_S)
    with pytest.raises(EngineDeadError, match="stopping"):
        client.submit("late", prompt(5))
    client.assert_quiet()


def test_an_idle_engine_takes_no_steps(client: Client, prompt: Prompt) -> None:
    client.submit("r", prompt(5), max_tokens=2)
    client.finished("r")
    for _ in range(20):
        asyncio.run(client.engine.health(WAIT_S))
    assert client.engine.stats().steps == 2
