"""A prompt that another engine computes: what is asked for, what comes, and who waits."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from inference_pio.workers.kv.ticket import encode_ticket, read_header
from inference_pio.workers.types import FinishReason, PrefillRequest, RemoteQuery, Resumption

from .engine_pair import GREEDY, PLAIN, MakeDriver, MakePair, Prompt, alone, count_tokens

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
            forged = encode_ticket(header, blank)
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
