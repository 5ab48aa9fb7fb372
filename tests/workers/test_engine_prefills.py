"""An engine that computes prompts for others: its tickets, ends and rates."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from inference_pio.workers.kv.ticket import read_header
from inference_pio.workers.types import PrefillRequest, RequestError

from .engine_pair import GREEDY, MakeDriver, MakePair, Prompt, after_one_ticket


def prefill_request(tokens: list[int], **changes: Any) -> PrefillRequest:
    fields: dict[str, Any] = {
        "request_id": "p",
        "attempt": 7,
        "epoch": 1,
        "token_ids": tuple(tokens),
        "start": 0,
        "cache_salt": "",
        "deadline_s": 60.0,
    }
    return PrefillRequest(**(fields | changes))


def the_end(driver: Any) -> RequestError | None:
    """How the only prefill of the last steps ended."""
    ends = []
    while driver.engine.has_work:
        driver.step()
        ends += driver.output.prefill_ends
    (end,) = ends
    assert (end.request_id, end.attempt) == ("p", 7)
    driver.run()
    error: RequestError | None = end.error
    return error


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"start": 8}, "invalid_value", "tokens 8 to 40; a span begins at a multiple of the block"),
        ({"start": 48}, "invalid_value", "tokens 48 to 40"),
        ({"start": -16}, "invalid_value", "tokens -16 to 40"),
        ({"token_ids": ()}, "invalid_value", "tokens 0 to 0"),
        ({"token_ids": (1, 497)}, "invalid_value", "id 497; the model's tokens are 0 to 496"),
        (
            {"token_ids": (1,) * 129},
            "context_length_exceeded",
            "the context limit is 128 tokens; 129 are to be computed",
        ),
    ],
)
def test_a_prefill_that_cannot_be_computed_ends_with_its_reason(
    make_driver: MakeDriver, prompt: Prompt, changes: dict[str, Any], code: str, message: str
) -> None:
    driver = make_driver(num_blocks=8)
    driver.engine.add_prefill(prefill_request(prompt(40), **changes))
    error = the_end(driver)
    assert error is not None
    assert error.code == code
    assert message in error.message


def test_a_prefill_may_fill_the_whole_cache(make_driver: MakeDriver, prompt: Prompt) -> None:
    driver = make_driver(num_blocks=8)
    driver.engine.add_prefill(prefill_request(prompt(128)))
    assert the_end(driver) is None


def test_an_attempt_in_use_is_refused_and_the_first_goes_on(
    make_driver: MakeDriver, prompt: Prompt
) -> None:
    driver = make_driver()
    driver.engine.add_prefill(prefill_request(prompt(40)))
    with pytest.raises(ValueError, match="attempt 7 of prefill p is in the engine"):
        driver.engine.add_prefill(prefill_request(prompt(41)))
    driver.engine.add_prefill(prefill_request(prompt(41), attempt=8))
    driver.engine.abort_prefill("p", 8)
    driver.engine.abort_prefill("p", 9)
    assert driver.engine.is_prefilling("p", 7)
    assert not driver.engine.is_prefilling("p", 8)
    driver.step()
    ends = {end.attempt: end.error for end in driver.output.prefill_ends}
    assert ends[7] is None
    assert ends[8].code == "aborted"
    driver.run()


def test_a_full_queue_refuses_prefills(make_driver: MakeDriver, prompt: Prompt) -> None:
    driver = make_driver(max_waiting=1)
    driver.engine.add_prefill(prefill_request(prompt(40), request_id="first"))
    driver.engine.add_prefill(prefill_request(prompt(40)))
    driver.step()
    ends = {end.request_id: end.error for end in driver.output.prefill_ends}
    assert ends["first"] is None
    assert ends["p"].code == "queue_full"


def test_a_late_prefill_ends_with_what_it_reached(make_driver: MakeDriver, prompt: Prompt) -> None:
    driver = make_driver(max_batched_tokens=32)
    driver.engine.add_prefill(prefill_request(prompt(100)))
    driver.step()
    assert driver.engine.next_deadline() is not None
    (export,) = driver.engine._exports._open.values()
    export.deadline = 0.0
    error = the_end(driver)
    assert error is not None
    assert error.code == "deadline_exceeded"
    assert "after 32 of 100 tokens" in error.message


@pytest.mark.parametrize("method", ["forward", "read_blocks"])
def test_a_prefill_that_raises_fails_alone(
    make_driver: MakeDriver,
    prompt: Prompt,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    method: str,
) -> None:
    driver = make_driver()
    driver.add("other", prompt(20), max_tokens=5, **GREEDY)
    driver.step()
    executor = driver.engine.executor
    plain = getattr(executor, method)

    def fail(argument: Any) -> Any:
        if method == "forward" and len(argument.token_ids) == 1:
            return plain(argument)
        raise ZeroDivisionError("injected")

    monkeypatch.setattr(executor, method, fail)
    driver.engine.add_prefill(prefill_request(prompt(40)))
    before = driver.engine.stats().kv_blocks_cached
    with caplog.at_level(logging.CRITICAL):
        error = the_end(driver)
    assert error is not None
    assert (error.code, error.message) == (
        "internal_error",
        "the engine failed on this prefill: ZeroDivisionError",
    )
    assert len(driver.tokens("other")) == 5
    assert driver.engine.stats().kv_blocks_cached == before


def test_prefills_run_beside_requests_by_priority(make_driver: MakeDriver, prompt: Prompt) -> None:
    driver = make_driver(max_num_seqs=1, max_batched_tokens=64)
    driver.add("late", prompt(20, seed=1), max_tokens=2, priority=2, **GREEDY)
    driver.engine.add_prefill(prefill_request(prompt(40), priority=1))
    driver.step()
    assert [end.error for end in driver.output.prefill_ends] == [None]
    driver.run()
    assert len(driver.tokens("late")) == 2


def test_a_preempted_prefill_sends_nothing_twice(make_driver: MakeDriver, prompt: Prompt) -> None:
    driver = make_driver(num_blocks=8, max_batched_tokens=48, prefix_caching=False)
    driver.engine.add_prefill(prefill_request(prompt(120), priority=5))
    spans = []

    def step() -> None:
        driver.step()
        headers = [read_header(ticket.buffer) for ticket in driver.output.tickets]
        spans.extend((header.start, header.end) for header in headers)

    step()
    driver.add("better", prompt(40, seed=1), max_tokens=3, **GREEDY)
    while driver.engine.has_work:
        step()
    assert driver.engine.stats().preemptions == 1
    assert spans == [(0, 48), (48, 96), (96, 120)]


def test_long_hits_travel_in_several_tickets(make_driver: MakeDriver, prompt: Prompt) -> None:
    """A whole prompt out of the prefix cache is no reason for one giant array."""
    driver = make_driver(max_batched_tokens=40)
    for _ in range(2):
        driver.engine.add_prefill(prefill_request(prompt(200)))
        sizes = []
        while driver.engine.has_work:
            driver.step()
            headers = [read_header(ticket.buffer) for ticket in driver.output.tickets]
            sizes += [header.end - header.start for header in headers]
        assert sum(sizes) == 200
        assert max(sizes) <= 48
    assert driver.engine.stats().prefix_hit_tokens == 192


def test_ends_of_a_broken_engine_name_every_prefill(
    make_driver: MakeDriver, prompt: Prompt
) -> None:
    driver = make_driver(max_batched_tokens=32)
    driver.engine.add_prefill(prefill_request(prompt(100)))
    driver.step()
    output = driver.engine.fail_all("broken", also_prefills=[prefill_request([1], attempt=9)])
    assert [(e.attempt, e.error.code) for e in output.prefill_ends] == [
        (7, "engine_dead"),
        (9, "engine_dead"),
    ]


def test_abort_all_ends_prefills_and_waits(make_pair: MakePair, prompt: Prompt) -> None:
    pair = make_pair({"max_batched_tokens": 48})
    request = after_one_ticket(pair, prompt(100))
    assert pair.decode.engine.abort_all().unwanted == [("r", request.attempt)]
    (end,) = pair.prefill.engine.abort_all().prefill_ends
    assert end.error.code == "aborted"
    for driver in (pair.decode, pair.prefill):
        driver.engine.check_integrity()
        assert not driver.engine.has_work


# --- the measured rate ----------------------------------------------------------------------------


def test_the_prefill_rate_counts_prefill_steps_alone(
    make_driver: MakeDriver, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = make_driver(max_batched_tokens=64)
    clock = [100.0]

    def tick() -> float:
        clock[0] += 0.5
        return clock[0]

    monkeypatch.setattr("inference_pio.workers.engine.time.monotonic", tick)
    driver.add("r", prompt(64), max_tokens=1, **GREEDY)
    driver.run()
    rate = driver.engine.stats().prefill_tokens_per_s
    assert 0 < rate <= 64 / 0.5
    driver.add("decodes", prompt(1), max_tokens=9, **GREEDY)
    driver.run()
    assert driver.engine.stats().prefill_tokens_per_s == rate
