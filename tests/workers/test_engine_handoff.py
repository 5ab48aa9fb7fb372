"""Two engines in one process: one computes prompts, the other goes on with their KV."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from inference_pio.workers.kv.ticket import read_header
from inference_pio.workers.types import (
    FinishReason,
    PrefillRequest,
    RemoteQuery,
    RequestError,
    Resumption,
)

from .kv.ticket_samples import encoded

MakeDriver = Callable[..., Any]
Prompt = Callable[..., list[int]]

PLAIN = {"ignore_eos": True, "loop_guard": False}
# Without the penalty the random model repeats itself, whatever its KV.
GREEDY = PLAIN | {"temperature": 0.0, "repetition_penalty": 1.5}


class Pair:
    """A decode engine that wants every prompt computed by a prefill engine, and the way between."""

    def __init__(self, make_driver: MakeDriver, prefill: dict[str, Any], **decode: Any) -> None:
        self.decode = make_driver(**decode)
        self.prefill = make_driver(**(decode | prefill))
        self.queries: list[RemoteQuery] = []
        self.tickets: list[Any] = []
        self.unwanted: list[tuple[str, int]] = []
        self.decode.engine.remote_prefill = self._decide

    def _decide(self, query: RemoteQuery) -> bool:
        self.queries.append(query)
        return True

    def step(self) -> None:
        """A step of each engine; what came out of one goes into the other at once."""
        self.wanted()
        self.carry()

    def wanted(self) -> list[PrefillRequest]:
        """A step of the decode engine; what it wants goes to the other one."""
        self.decode.step()
        output = self.decode.output
        for request in output.wanted:
            self.prefill.engine.add_prefill(request)
        for name in output.unwanted:
            self.prefill.engine.abort_prefill(*name)
        self.unwanted += output.unwanted
        return list(output.wanted)

    def carry(self) -> None:
        """A step of the prefill engine; its tickets and ends go to the other one."""
        self.prefill.step()
        for ticket in self.prefill.output.tickets:
            self.tickets.append(ticket)
            self.decode.engine.import_ticket(ticket.request_id, ticket.attempt, ticket.buffer)
        for end in self.prefill.output.prefill_ends:
            reason = None if end.error is None else end.error.code
            self.decode.engine.end_import(end.request_id, end.attempt, reason)
        self.decode.engine.check_integrity()

    def run(self) -> None:
        while self.decode.engine.has_work or self.prefill.engine.has_work:
            self.step()
        for driver in (self.decode, self.prefill):
            driver.run()
            stats = driver.engine.stats()
            assert (stats.kv_imports_running, stats.kv_exports_running) == (0, 0)

    @property
    def ends(self) -> dict[str, int]:
        found: dict[str, int] = self.decode.engine.stats().kv_import_ends
        return found


MakePair = Callable[..., Pair]


@pytest.fixture
def make_pair(make_driver: MakeDriver) -> MakePair:
    def make(prefill: dict[str, Any] | None = None, **decode: Any) -> Pair:
        return Pair(make_driver, prefill or {}, **decode)

    return make


def alone(make_driver: MakeDriver, prompt: list[int], **params: Any) -> list[int]:
    """What one engine without a past gives."""
    driver = make_driver(num_blocks=400)
    driver.add("r", prompt, **params)
    driver.run()
    tokens: list[int] = driver.tokens("r")
    return tokens


def count_tokens(monkeypatch: pytest.MonkeyPatch, driver: Any) -> list[int]:
    """The tokens of each forward pass from now on."""
    executor, counts = driver.engine.executor, []
    plain = executor.forward

    def forward(inputs: Any) -> Any:
        counts.append(len(inputs.token_ids))
        return plain(inputs)

    monkeypatch.setattr(executor, "forward", forward)
    return counts


# --- the handoff ----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 16, 17, 33, 100])
def test_the_prompt_is_computed_there_and_the_text_is_the_same(
    make_pair: MakePair,
    make_driver: MakeDriver,
    prompt: Prompt,
    monkeypatch: pytest.MonkeyPatch,
    length: int,
) -> None:
    pair = make_pair({"max_batched_tokens": 32})
    counts = count_tokens(monkeypatch, pair.decode)
    pair.decode.add("r", prompt(length), max_tokens=12, **GREEDY)
    pair.run()
    assert counts == [1] * 12, "the last prompt token, and one for each but the last output token"
    assert pair.decode.tokens("r") == alone(make_driver, prompt(length), max_tokens=12, **GREEDY)
    assert pair.ends == {"done": 1}
    here, there = pair.decode.engine.stats(), pair.prefill.engine.stats()
    assert here.kv_imported_tokens == there.kv_exported_tokens == length - 1
    assert (here.prefill_tokens_per_s, there.generated_tokens) == (0.0, 0)
    assert pair.unwanted == []


def test_the_text_depends_on_the_kv_that_came(
    make_pair: MakePair, make_driver: MakeDriver, prompt: Prompt
) -> None:
    """The control: tickets that hold other numbers, properly signed, change the text."""
    pair = make_pair()
    pair.decode.add("r", prompt(60), max_tokens=12, **GREEDY)
    (request,) = pair.wanted()
    while pair.prefill.engine.has_work:
        for ticket in pair.prefill.engine.step().tickets:
            header = read_header(ticket.buffer)
            blank = np.zeros(header.layout.shape(header.num_blocks), header.layout.words)
            forged = encoded(header, blank)
            pair.decode.engine.import_ticket(request.request_id, request.attempt, forged)
    pair.run()
    assert pair.ends == {"done": 1}
    assert pair.decode.tokens("r") != alone(make_driver, prompt(60), max_tokens=12, **GREEDY)


def test_tickets_come_while_the_rest_is_computed(make_pair: MakePair, prompt: Prompt) -> None:
    """One for each step that completed a block; only the last holds a part of one."""
    pair = make_pair({"max_batched_tokens": 40})
    pair.decode.add("r", prompt(150), max_tokens=2, **GREEDY)
    pair.wanted()
    spans = []
    while pair.prefill.engine.has_work:
        pair.carry()
        spans += [
            (header.start, header.end)
            for header in (read_header(t.buffer) for t in pair.prefill.output.tickets)
        ]
        (sequence,) = pair.decode.engine._scheduler.running
        assert sequence.num_computed_tokens == spans[-1][1]
    assert spans == [(0, 32), (32, 80), (80, 112), (112, 149)]
    pair.run()


def test_rows_behind_the_end_are_zero_on_both_sides(make_pair: MakePair, prompt: Prompt) -> None:
    pair = make_pair(num_blocks=8)
    for driver in (pair.decode, pair.prefill):  # what earlier owners of the blocks left behind
        driver.engine.executor.cache.blocks_LN2KSD.fill_(torch.nan)
    pair.decode.add("r", prompt(40), max_tokens=5, **GREEDY)
    pair.wanted()
    pair.carry()
    (sequence,) = pair.decode.engine._scheduler.running
    assert sequence.num_computed_tokens == 39
    last = pair.decode.engine.executor.cache.blocks_LN2KSD[:, sequence.block_table[2]]
    assert not last[..., 7:, :].any()
    assert last[..., :7, :].all()
    pair.run()
    assert len(pair.decode.tokens("r")) == 5


def test_hits_here_are_not_sent_and_hits_there_are(
    make_pair: MakePair, make_driver: MakeDriver, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair()
    shared, tail = prompt(64), prompt(30, seed=2)
    pair.decode.engine.remote_prefill = None
    pair.decode.add("here", shared[:34], max_tokens=1, **GREEDY)
    pair.run()
    pair.prefill.add("there", shared, max_tokens=1, **GREEDY)
    pair.prefill.run()
    pair.decode.engine.remote_prefill = pair._decide
    counts = count_tokens(monkeypatch, pair.prefill)
    pair.decode.add("r", shared + tail, max_tokens=9, **GREEDY)
    pair.run()
    assert pair.queries == [RemoteQuery("r", 94, 32, 0)]
    assert counts == [93 - 64], "what the prefill side knows is not computed again"
    assert pair.decode.engine.stats().kv_imported_tokens == 93 - 32
    assert pair.decode.last("r").usage.cached_tokens == 32
    assert pair.decode.tokens("r") == alone(make_driver, shared + tail, max_tokens=9, **GREEDY)


def test_both_sides_keep_what_was_computed_in_their_prefix_caches(
    make_pair: MakePair, prompt: Prompt
) -> None:
    pair = make_pair()
    for number, driver in enumerate((pair.decode, pair.prefill)):
        pair.decode.add(str(number), prompt(50, seed=number), max_tokens=1, **GREEDY)
        pair.run()
        pair.decode.engine.remote_prefill = None
        driver.add("again", prompt(50, seed=number), max_tokens=1, **GREEDY)
        driver.run()
        assert driver.last("again").usage.cached_tokens == 48
        pair.decode.engine.remote_prefill = pair._decide
        driver.chunks.clear()


def test_another_salt_is_another_prompt(make_pair: MakePair, prompt: Prompt) -> None:
    """The chain in a ticket names the tenant: nothing of one is imported for another."""
    pair = make_pair()
    pair.decode.add("r", prompt(50), cache_salt="a", max_tokens=3, **GREEDY)
    (request,) = pair.wanted()
    pair.prefill.engine.abort_prefill(request.request_id, request.attempt)
    pair.prefill.run()
    other = PrefillRequest(
        "r", request.attempt, request.epoch, request.token_ids, 0, cache_salt="b", deadline_s=9
    )
    pair.prefill.engine.add_prefill(other)
    pair.run()
    assert pair.ends == {"wrong_chain": 1}
    assert len(pair.decode.tokens("r")) == 3


def test_all_choices_of_a_request_fork_from_what_came(
    make_pair: MakePair, make_driver: MakeDriver, prompt: Prompt
) -> None:
    params = PLAIN | {"n": 3, "temperature": 1.0, "seed": 4, "max_tokens": 10}
    pair, single = make_pair(), make_driver()
    for driver in (pair.decode, single):
        driver.add("r", prompt(45), **params)
    pair.run()
    single.run()
    assert pair.ends == {"done": 1}
    for index in range(3):
        assert pair.decode.tokens("r", index) == single.tokens("r", index)


def test_a_resumed_request_imports_its_output_too(
    make_pair: MakePair, make_driver: MakeDriver, prompt: Prompt
) -> None:
    whole = alone(make_driver, prompt(20), max_tokens=40, **GREEDY)
    pair = make_pair()
    resume = (Resumption(0, tuple(whole[:25])),)
    pair.decode.add("r", prompt(20), resume=resume, max_tokens=40, **GREEDY)
    pair.run()
    assert pair.queries == [RemoteQuery("r", 45, 0, 0)]
    assert pair.ends == {"done": 1}
    assert pair.decode.engine.stats().kv_imported_tokens == 44
    assert pair.decode.tokens("r") == whole[25:]


# --- when it is not asked for ---------------------------------------------------------------------


def test_nobody_is_asked_for_what_only_this_engine_can_give(
    make_pair: MakePair, prompt: Prompt
) -> None:
    pair = make_pair()
    pair.decode.add("scored", prompt(40), prompt_logprobs=1, max_tokens=2, **GREEDY)
    pair.decode.add("one token", prompt(1), max_tokens=2, **GREEDY)
    pair.run()
    assert pair.queries == []
    pair.decode.add("first", prompt(40, seed=1), max_tokens=2, **GREEDY)
    pair.run()
    pair.decode.add("half cached", prompt(40, seed=1), max_tokens=2, **GREEDY)
    pair.run()
    assert [query.num_cached_tokens for query in pair.queries] == [0, 32]


def test_the_question_tells_what_is_queued(make_pair: MakePair, prompt: Prompt) -> None:
    pair = make_pair(max_batched_tokens=32, max_num_seqs=4)
    pair.decode.engine.remote_prefill = lambda query: bool(pair.queries.append(query))
    for number, length in enumerate((50, 60, 70)):
        pair.decode.add(str(number), prompt(length, seed=number), max_tokens=2, **GREEDY)
    assert pair.decode.engine.stats().queued_prefill_tokens == 180
    pair.run()
    assert [query.num_queued_tokens for query in pair.queries] == [130, 88, 15]
    assert pair.decode.engine.stats().queued_prefill_tokens == 0


def test_a_decision_that_raises_is_a_no(
    make_pair: MakePair, prompt: Prompt, caplog: pytest.LogCaptureFixture
) -> None:
    pair = make_pair()

    def decide(_: RemoteQuery) -> bool:
        raise ZeroDivisionError("injected")

    pair.decode.engine.remote_prefill = decide
    pair.decode.add("r", prompt(30), max_tokens=2, **GREEDY)
    with caplog.at_level(logging.CRITICAL):
        pair.run()
    assert len(pair.decode.tokens("r")) == 2
    assert pair.ends == {}


# --- waiting --------------------------------------------------------------------------------------


def test_an_engine_whose_sequences_all_wait_has_no_work(
    make_pair: MakePair, prompt: Prompt
) -> None:
    pair = make_pair(max_num_seqs=2)
    for number in range(4):  # the queue's head waits for a place
        pair.decode.add(str(number), prompt(40, seed=number), max_tokens=3, **GREEDY)
    assert pair.decode.engine.has_work
    assert len(pair.wanted()) == 2
    engine = pair.decode.engine
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_imports_running, stats.steps) == (2, 2, 2, 0)
    assert not engine.has_work
    assert engine.next_deadline() is not None
    pair.carry()
    assert engine.has_work, "a complete prompt goes on"
    pair.run()
    assert pair.ends == {"done": 4}


def test_others_run_while_one_waits(make_pair: MakePair, prompt: Prompt) -> None:
    pair = make_pair()
    pair.decode.add("waits", prompt(40), max_tokens=3, **GREEDY)
    pair.wanted()
    pair.decode.engine.remote_prefill = None
    pair.decode.add("runs", prompt(40, seed=1), max_tokens=9, **GREEDY)
    while pair.decode.engine.has_work:
        pair.decode.step()
    assert pair.decode.end("runs") is FinishReason.LENGTH
    assert ("waits", 0) not in pair.decode.chunks
    pair.run()
    assert len(pair.decode.tokens("waits")) == 3


# --- how a wait ends early ------------------------------------------------------------------------


def after_one_ticket(pair: Pair, prompt: list[int], **params: Any) -> PrefillRequest:
    """A request of which the first 48 of 99 tokens have come."""
    pair.decode.add("r", prompt, max_tokens=8, **GREEDY, **params)
    (request,) = pair.wanted()
    pair.carry()
    (sequence,) = pair.decode.engine._scheduler.running
    assert (sequence.num_computed_tokens, len(request.token_ids)) == (48, 99)
    return request


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


# --- the prefill side -----------------------------------------------------------------------------


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

    def fail(argument: Any, *_: Any) -> Any:
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
