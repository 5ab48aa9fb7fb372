"""Two engine threads that hand KV to each other, and a loop that sleeps while it waits for KV."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from inference_pio.workers.async_engine import AsyncEngine, EngineDeadError
from inference_pio.workers.types import (
    GenerateRequest,
    PrefillEnd,
    PrefillRequest,
    QueueFullError,
    RequestError,
    Resumption,
    SamplingParams,
    StepOutput,
)

MakeDriver = Callable[..., Any]
Prompt = Callable[..., list[int]]

WAIT_S = 60.0
"""Far longer than anything here takes; only a test that fails waits so long."""

PARAMS = {
    "ignore_eos": True,
    "loop_guard": False,
    "temperature": 0.0,
    "repetition_penalty": 1.5,
}


class Side:
    """One engine in its thread. What other engines should hear goes to ``peer``, if any."""

    def __init__(self, engine: Any) -> None:
        self.engine = AsyncEngine(engine, self._on_step)
        self.peer: AsyncEngine | None = None
        self.output = StepOutput()
        self._came = threading.Condition()

    def _on_step(self, output: StepOutput) -> None:
        if self.peer is not None:
            for request in output.wanted:
                self.peer.add_prefill(request)
            for name in output.unwanted:
                self.peer.abort_prefill(*name)
            for ticket in output.tickets:
                self.peer.import_ticket(ticket.request_id, ticket.attempt, ticket.buffer)
            for end in output.prefill_ends:
                reason = None if end.error is None else end.error.code
                self.peer.end_import(end.request_id, end.attempt, reason)
        with self._came:
            for kind in ("chunks", "tickets", "prefill_ends", "wanted", "unwanted"):
                getattr(self.output, kind).extend(getattr(output, kind))
            self._came.notify_all()

    def wait_for(self, condition: Callable[[StepOutput], Any]) -> Any:
        with self._came:
            assert self._came.wait_for(lambda: condition(self.output), WAIT_S)
            return condition(self.output)

    def submit(self, name: str, prompt: list[int], resume: Any = (), **params: Any) -> None:
        settings = SamplingParams(**PARAMS, **params)
        self.engine.submit(GenerateRequest(name, tuple(prompt), settings, resume=resume))

    def tokens(self, name: str) -> list[int]:
        """All tokens of a request of one choice, when it has ended."""

        def ended(output: StepOutput) -> bool:
            return any(c.request_id == name and c.finish_reason for c in output.chunks)

        self.wait_for(ended)
        return [t for c in self.output.chunks if c.request_id == name for t in c.token_ids]

    def the_end(self) -> PrefillEnd:
        """The first end of a prefill."""
        self.wait_for(lambda output: output.prefill_ends)
        return self.output.prefill_ends[0]

    def turn(self) -> None:
        """Until everything handed over so far has been heard."""
        asyncio.run(self.engine.health(WAIT_S))

    def assert_quiet(self) -> None:
        self.turn()
        self.engine.engine.check_integrity()
        stats = self.engine.stats()
        assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
        assert (stats.kv_imports_running, stats.kv_exports_running) == (0, 0)


MakeSide = Callable[..., Side]


@pytest.fixture
def make_side(make_driver: MakeDriver) -> Iterator[MakeSide]:
    sides: list[Side] = []

    def make(**options: Any) -> Side:
        side = Side(make_driver(**options).engine)
        sides.append(side)
        return side

    yield make
    for side in sides:
        side.engine.stop()
        assert not side.engine._thread.is_alive()


@pytest.fixture
def pair(make_side: MakeSide) -> tuple[Side, Side]:
    """A decode and a prefill side, running, that know each other."""
    decode, prefill = make_side(), make_side()
    decode.peer, prefill.peer = prefill.engine, decode.engine
    decode.engine.engine.remote_prefill = lambda _: True
    for side in (decode, prefill):
        side.engine.start()
    return decode, prefill


@pytest.fixture
def waiting(make_side: MakeSide, prompt: Prompt) -> Side:
    """A side whose only request waits for KV that nobody computes."""
    side = make_side()
    side.engine.engine.remote_prefill = lambda _: True
    side.engine.start()
    side.submit("r", prompt(40), max_tokens=4)
    side.wait_for(lambda output: output.wanted)
    return side


@pytest.fixture
def expected(make_driver: MakeDriver, prompt: Prompt) -> list[int]:
    driver = make_driver()
    driver.add("r", prompt(40), max_tokens=4, **PARAMS)
    driver.run()
    tokens: list[int] = driver.tokens("r")
    return tokens


def prefill_request(tokens: list[int], **changes: Any) -> PrefillRequest:
    fields: dict[str, Any] = {
        "request_id": "p",
        "attempt": 7,
        "epoch": 1,
        "token_ids": tuple(tokens),
        "start": 0,
        "cache_salt": "",
        "deadline_s": WAIT_S,
    }
    return PrefillRequest(**(fields | changes))


def test_two_threads_hand_over(
    pair: tuple[Side, Side], make_driver: MakeDriver, prompt: Prompt
) -> None:
    decode, prefill = pair
    alone = make_driver()
    for number in range(6):
        decode.submit(str(number), prompt(30 + 9 * number, seed=number), max_tokens=8)
        alone.add(str(number), prompt(30 + 9 * number, seed=number), max_tokens=8, **PARAMS)
    alone.run()
    for number in range(6):
        assert decode.tokens(str(number)) == alone.tokens(str(number))
    for side in (prefill, decode):
        side.assert_quiet()
    stats = decode.engine.stats()
    assert stats.kv_import_ends == {"done": 6}
    assert stats.kv_imported_tokens == sum(30 + 9 * number - 1 for number in range(6))


def test_a_waiting_engine_sleeps_and_still_answers(waiting: Side) -> None:
    turns = []
    plain = waiting.engine.engine.step
    waiting.engine.engine.step = lambda: turns.append(plain()) or turns[-1]
    for _ in range(10):
        waiting.turn()
    assert len(turns) == 10, "a turn for each question, and none of its own accord"
    assert waiting.engine.stats().steps == 0


def test_the_deadline_wakes_a_sleeping_engine(
    make_side: MakeSide, prompt: Prompt, expected: list[int]
) -> None:
    side = make_side()
    engine = side.engine.engine
    engine.remote_prefill = lambda _: True
    engine.import_deadline_s = 0.05
    side.engine.start()
    side.submit("r", prompt(40), max_tokens=4)
    assert side.tokens("r") == expected
    assert engine.stats().kv_import_ends == {"deadline": 1}
    assert [request.deadline_s for request in side.output.wanted] == [pytest.approx(0.05)]
    side.assert_quiet()


def test_news_of_the_far_side_wakes_a_sleeping_engine(waiting: Side, expected: list[int]) -> None:
    (request,) = waiting.output.wanted
    waiting.engine.end_import("r", request.attempt, "actor_died")
    assert waiting.tokens("r") == expected
    assert waiting.engine.stats().kv_import_ends == {"actor_died": 1}
    waiting.assert_quiet()


def test_an_abort_wakes_a_sleeping_engine(waiting: Side) -> None:
    (request,) = waiting.output.wanted
    waiting.engine.abort("r")
    assert waiting.tokens("r") == []
    waiting.wait_for(lambda output: output.unwanted)
    assert waiting.output.unwanted == [("r", request.attempt)]
    waiting.assert_quiet()


def test_a_client_that_leaves_ends_the_prefill(pair: tuple[Side, Side], prompt: Prompt) -> None:
    decode, prefill = pair
    gate = threading.Event()
    executor = prefill.engine.engine.executor
    plain = executor.forward
    executor.forward = lambda inputs: plain(inputs) if gate.wait(WAIT_S) else None
    decode.submit("r", prompt(400), max_tokens=4)
    decode.wait_for(lambda output: output.wanted)
    decode.engine.abort("r")
    decode.wait_for(lambda output: output.unwanted)
    gate.set()
    end = prefill.the_end()
    assert end.error is not None
    assert end.error.code == "aborted"
    for side in (decode, prefill):
        side.assert_quiet()


def test_what_is_wrong_with_a_prefill_shows_as_its_end(make_side: MakeSide) -> None:
    side = make_side()
    side.engine.start()
    side.engine.add_prefill(prefill_request([1, 2, 497]))
    end = side.the_end()
    assert end.error is not None
    assert "the prefill holds id 497" in end.error.message


def test_an_attempt_in_use_and_a_full_queue_are_refused_at_once(
    make_side: MakeSide, prompt: Prompt
) -> None:
    side = make_side(max_waiting=2)
    side.engine.add_prefill(prefill_request(prompt(40)))
    with pytest.raises(RequestError, match="attempt 7 of prefill 'p' is in use"):
        side.engine.add_prefill(prefill_request(prompt(40)))
    side.submit("r", prompt(5), max_tokens=1)
    with pytest.raises(QueueFullError):
        side.engine.add_prefill(prefill_request(prompt(40), attempt=8))
    side.engine.start()
    assert side.the_end().error is None
    side.tokens("r")
    side.assert_quiet()


def test_a_prefill_that_cannot_be_queued_fails_alone(
    make_side: MakeSide, prompt: Prompt, caplog: pytest.LogCaptureFixture
) -> None:
    side = make_side()
    side.engine.engine.add_prefill = None  # the call raises
    side.engine.add_prefill(prefill_request(prompt(40)))
    side.submit("r", prompt(5), max_tokens=2)
    side.engine.start()
    error = side.the_end().error
    assert error is not None
    assert error.code == "internal_error"
    assert len(side.tokens("r")) == 2


def test_a_resumption_that_is_not_ours_is_told_in_full(make_side: MakeSide, prompt: Prompt) -> None:
    side = make_side()
    side.engine.start()
    resume = (Resumption(0, (5, 6, 7)),)
    side.submit("r", prompt(9), resume=resume, stop_token_ids=(5,), max_tokens=9)
    side.tokens("r")
    (chunk,) = side.output.chunks
    assert chunk.error is not None
    assert chunk.error.code == "resume_mismatch"
    assert chunk.first == 3
    side.assert_quiet()


def test_stop_ends_prefills_and_waits(waiting: Side, make_side: MakeSide, prompt: Prompt) -> None:
    (request,) = waiting.output.wanted
    waiting.engine.stop()
    assert waiting.output.unwanted == [("r", request.attempt)]
    side = make_side()
    side.engine.add_prefill(prefill_request(prompt(40)))
    side.engine._stopping = True  # before the first turn, so that it is only an arrival
    side.engine.start()
    error = side.the_end().error
    assert error is not None
    assert error.code == "aborted"
    with pytest.raises(EngineDeadError):
        side.engine.add_prefill(prefill_request(prompt(40), attempt=8))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_loop_ends_prefills_and_waits(waiting: Side, prompt: Prompt) -> None:
    engine = waiting.engine.engine
    (wanted,) = waiting.output.wanted
    plain = engine._scheduler.schedule

    def fail(now: float) -> Any:
        # One is in the engine; the other is handed over while the step is under way.
        waiting.engine.add_prefill(prefill_request(prompt(40), attempt=8))
        plain(now)
        raise ZeroDivisionError("injected")

    engine._scheduler.schedule = fail
    waiting.engine.add_prefill(prefill_request(prompt(40)))
    waiting.wait_for(lambda output: len(output.prefill_ends) == 2)
    for end in waiting.output.prefill_ends:
        assert end.error is not None
        assert end.error.code == "engine_dead"
    assert waiting.output.unwanted == [("r", wanted.attempt)]
    waiting.engine._thread.join(WAIT_S)
