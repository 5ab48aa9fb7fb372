"""What ends a wait for the KV of another engine early: it costs time and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from inference_pio.workers.types import FinishReason

from .engine_pair import (
    GREEDY,
    MakeDriver,
    MakePair,
    Pair,
    Prompt,
    after_one_ticket,
    alone,
    count_tokens,
)


def corrupt(pair: Pair) -> None:
    pair.prefill.step()
    (ticket,) = pair.prefill.output.tickets
    damaged = ticket.buffer.copy()
    damaged[-1000] ^= 16
    pair.decode.engine.import_ticket(ticket.request_id, ticket.attempt, damaged)


def truncate(pair: Pair) -> None:
    pair.prefill.step()
    (ticket,) = pair.prefill.output.tickets
    pair.decode.engine.import_ticket(ticket.request_id, ticket.attempt, ticket.buffer[:-1])


def lose_one(pair: Pair) -> None:
    pair.prefill.step()
    pair.carry()


def be_late(pair: Pair) -> None:
    (incoming,) = pair.decode.engine._imports._open.values()
    incoming.deadline = 0.0


def be_late_with_a_ticket(pair: Pair) -> None:
    be_late(pair)
    pair.carry()


def fail_to_write(pair: Pair) -> None:
    executor = pair.decode.engine.executor
    plain, executor.write_blocks = executor.write_blocks, None
    pair.carry()
    executor.write_blocks = plain


def preempt(pair: Pair) -> None:
    (sequence,) = pair.decode.engine._scheduler.running
    pair.decode.engine._scheduler._preempt(sequence)
    pair.decode.engine._imports.drop((sequence,), "preempted")


@pytest.mark.parametrize(
    ("disturb", "reason"),
    [
        (corrupt, "bad_payload_checksum"),
        (truncate, "truncated"),
        (lose_one, "wrong_span"),
        (be_late, "deadline"),
        (be_late_with_a_ticket, "deadline"),
        (fail_to_write, "write_failed"),
        (preempt, "preempted"),
    ],
)
def test_what_ends_a_wait_costs_time_and_nothing_else(
    make_pair: MakePair,
    make_driver: MakeDriver,
    prompt: Prompt,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    disturb: Callable[[Pair], None],
    reason: str,
) -> None:
    pair = make_pair({"max_batched_tokens": 48}, num_blocks=20)
    request = after_one_ticket(pair, prompt(100))
    counts = count_tokens(monkeypatch, pair.decode)
    with caplog.at_level(logging.CRITICAL):
        disturb(pair)
        pair.decode.engine.check_integrity()
        pair.run()
    assert pair.ends == {reason: 1}
    assert pair.unwanted == [("r", request.attempt)]
    # The good blocks stay; a preemption finds them in the prefix cache.
    assert sum(counts) == 100 - 48 + 7
    assert pair.decode.tokens("r") == alone(make_driver, prompt(100), max_tokens=8, **GREEDY)
    assert pair.decode.engine.stats().kv_imported_tokens == 48


@pytest.mark.parametrize(("told", "reason"), [(None, "incomplete"), ("object_lost", "object_lost")])
def test_the_far_side_ends_a_wait(
    make_pair: MakePair, make_driver: MakeDriver, prompt: Prompt, told: str | None, reason: str
) -> None:
    pair = make_pair({"max_batched_tokens": 48})
    request = after_one_ticket(pair, prompt(100))
    pair.decode.engine.end_import("r", request.attempt, told)
    pair.decode.engine.end_import("r", request.attempt, "again")
    pair.run()
    assert pair.ends == {reason: 1}
    assert pair.unwanted == [], "it knows"
    assert pair.decode.tokens("r") == alone(make_driver, prompt(100), max_tokens=8, **GREEDY)


def test_a_client_that_leaves_ends_both_sides(make_pair: MakePair, prompt: Prompt) -> None:
    pair = make_pair({"max_batched_tokens": 48})
    request = after_one_ticket(pair, prompt(100))
    pair.decode.engine.abort("r")
    pair.decode.engine.check_integrity()
    pair.run()
    assert pair.decode.end("r") is FinishReason.ABORT
    assert pair.ends == {"request_ended": 1}
    assert pair.unwanted == [("r", request.attempt)]
    # A ticket that was on its way already.
    pair.decode.engine.import_ticket("r", request.attempt, pair.tickets[-1].buffer)
    assert pair.decode.engine.stats().kv_tickets_ignored == {"unknown": 1}


def test_a_requests_own_deadline_ends_it_while_it_waits(
    make_pair: MakePair, prompt: Prompt
) -> None:
    pair = make_pair({"max_batched_tokens": 48})
    request = after_one_ticket(pair, prompt(100), deadline_s=20.0)
    (sequence,) = pair.decode.engine._scheduler.running
    left = sequence.deadline - sequence.admitted_at
    assert request.deadline_s == left, "nobody computes for longer than it is of use"
    assert pair.decode.engine.next_deadline() == sequence.deadline
    sequence.deadline = 0.0
    pair.run()
    assert pair.decode.last("r").error.code == "deadline_exceeded"
    assert pair.ends == {"request_ended": 1}


def test_tickets_of_others_are_counted_and_passed_over(
    make_pair: MakePair, make_driver: MakeDriver, prompt: Prompt
) -> None:
    pair = make_pair({"max_batched_tokens": 48})
    request = after_one_ticket(pair, prompt(100))
    (first,) = pair.tickets
    offer = pair.decode.engine.import_ticket
    offer("r", request.attempt, first.buffer)
    offer("r", request.attempt + 1, first.buffer)
    offer("never known", request.attempt, first.buffer)
    pair.run()
    offer("r", request.attempt, first.buffer)
    ignored = pair.decode.engine.stats().kv_tickets_ignored
    assert ignored == {"duplicate": 1, "unknown": 3}
    assert pair.ends == {"done": 1}
    assert pair.decode.tokens("r") == alone(make_driver, prompt(100), max_tokens=8, **GREEDY)


def test_blocks_of_a_refused_ticket_are_no_prefix_hits(make_pair: MakePair, prompt: Prompt) -> None:
    pair = make_pair({"max_batched_tokens": 48})
    after_one_ticket(pair, prompt(100))
    corrupt(pair)
    assert pair.decode.engine.stats().kv_blocks_cached == 3
    pair.decode.engine.abort("r")
    pair.decode.run()
    assert pair.decode.engine.stats().kv_blocks_cached == 3


def test_a_wait_makes_room_for_a_better_priority(
    make_pair: MakePair, make_driver: MakeDriver, prompt: Prompt
) -> None:
    pair = make_pair(num_blocks=9)
    pair.decode.add("low", prompt(100), max_tokens=8, priority=5, **GREEDY)
    (request,) = pair.wanted()
    pair.decode.engine.remote_prefill = None
    pair.decode.add("high", prompt(100, seed=1), max_tokens=8, **GREEDY)
    assert pair.decode.engine.has_work
    pair.run()
    assert pair.unwanted == [("low", request.attempt)]
    assert pair.ends == {"preempted": 1}
    assert pair.decode.tokens("low") == alone(make_driver, prompt(100), max_tokens=8, **GREEDY)
