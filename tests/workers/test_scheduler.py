"""Scheduling policy: pure pieces against brute force, steps, choices, ends and the check."""

from __future__ import annotations

from collections.abc import Sequence as Items

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_pio.workers.kv.block import IntegrityError
from inference_pio.workers.scheduler import (
    Scheduler,
    choose_victims,
    share_budget,
    worst_case_blocks,
)
from inference_pio.workers.sequence import SequenceStatus

from .scheduler_bench import Bench

# --- pure pieces --------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 12), max_size=8), st.integers(8, 40))
def test_the_budget_goes_to_decode_rows_then_to_the_shortest(
    pending: list[int], budget: int
) -> None:
    shares = share_budget(pending, budget)
    assert sum(shares) == min(sum(pending), budget)  # nothing is left lying
    for share, count in zip(shares, pending, strict=True):
        assert 0 <= share <= count
        if count == 1:
            assert share == 1
    for i, count in enumerate(pending):
        for j, other in enumerate(pending):
            before = (count, i) < (other, j)
            assert not (before and count > 1 and shares[i] < count and shares[j] > 0)


def test_more_decode_rows_than_budget_is_an_error() -> None:
    with pytest.raises(ValueError, match="3 decode rows exceed the budget of 2"):
        share_budget([1, 1, 1], 2)


@given(st.integers(1, 30), st.integers(0, 30), st.integers(1, 5), st.integers(1, 8))
def test_the_worst_case_counts_blocks_as_forked_sequences_fill_them(
    prompt: int, output: int, choices: int, size: int
) -> None:
    slots = {
        ("all", position // size)
        if position // size < prompt // size
        else (choice, position // size)
        for choice in range(choices)
        for position in range(prompt + output)
    }
    assert worst_case_blocks(prompt, prompt + output, choices, size) == len(slots)


@given(st.lists(st.integers(0, 5), max_size=7), st.integers(0, 25))
def test_victims_are_leading_and_none_of_them_is_needless(gains: list[int], need: int) -> None:
    candidates = [(number, gain) for number, gain in enumerate(gains)]

    def enough(victims: Items[tuple[int, int]]) -> bool:
        return sum(gain for _, gain in victims) >= need

    victims = choose_victims(candidates, enough)
    leading = next((k for k in range(len(gains) + 1) if sum(gains[:k]) >= need), 0)
    assert set(victims) <= set(candidates[:leading])
    if leading:
        assert enough(victims)
        assert all(not enough([v for v in victims if v != victim]) for victim in victims)


# --- steps --------------------------------------------------------------------------------------


def test_a_long_prompt_is_computed_in_chunks_beside_decode_rows() -> None:
    bench = Bench()
    bench.add("short", prompt=4)
    bench.step()
    long = bench.add("long", prompt=36)
    shares, samples = [], []
    for _ in range(3):
        batch = bench.step()
        shares.append(bench.names(batch))
        samples.append([item.samples for item in batch.sequences])
    assert shares[0] == {"short": 1, "long": 15}
    assert shares[1] == {"short": 1, "long": 15}
    assert shares[2] == {"short": 1, "long": 6}
    assert samples == [[True, False], [True, False], [True, True]]
    assert long.num_output_tokens == 1
    assert long.admitted_at == 1.0


def test_several_prompts_share_a_step_and_the_last_is_cut() -> None:
    bench = Bench()
    for name, prompt in (("a", 6), ("b", 6), ("c", 9)):
        bench.add(name, prompt=prompt)
    assert bench.names(bench.step()) == {"a": 6, "b": 6, "c": 4}
    assert bench.names(bench.step()) == {"a": 1, "b": 1, "c": 5}


def test_forced_tokens_are_a_chunk_that_goes_before_a_long_prompt() -> None:
    bench = Bench()
    forced = bench.add("forced", max_tokens=20)
    bench.step()
    for _ in range(4):
        forced.append(7)
    bench.add("long", prompt=30)
    batch = bench.step()
    assert bench.names(batch) == {"forced": 5, "long": 11}
    assert {item.sequence.request_id for item in batch.sequences if item.samples} == {"forced"}
    for _ in range(4):
        forced.append(7)
    assert bench.names(bench.step()) == {"forced": 5, "long": 11}


def test_decode_rows_stand_first_in_the_batch() -> None:
    bench = Bench()
    forced = bench.add("forced", max_tokens=20)
    bench.add("decode")
    bench.step()
    forced.append(7)
    bench.add("prompt")
    batch = bench.step()
    assert list(bench.names(batch).items()) == [("decode", 1), ("forced", 2), ("prompt", 4)]


# --- several choices ----------------------------------------------------------------------------


def test_choices_share_the_prompt_and_run_on_their_own() -> None:
    bench = Bench(num_blocks=7)
    parent = bench.add("many", prompt=9, max_tokens=3, n=3)
    assert bench.names(bench.step()) == {"many": 9}
    assert [s.index for s in bench.scheduler.running] == [0, 1, 2]
    assert bench.kv.num_used_blocks == 3
    batch = bench.step()
    assert len(batch.sequences) == 3
    assert len(batch.block_copies) == 2
    assert bench.kv.num_used_blocks == 5
    assert parent.block_table[:2] == bench.scheduler.running[2].block_table[:2]
    while bench.scheduler.has_work:
        bench.step()
    assert bench.kv.num_used_blocks == 0


def test_a_request_waits_until_all_its_choices_have_a_place() -> None:
    bench = Bench(max_num_seqs=4)
    bench.add("one")
    bench.add("two")
    bench.add("three", n=3)
    assert bench.names(bench.step()) == {"one": 4, "two": 4}
    assert [s.request_id for s in bench.scheduler.waiting] == ["three"]
    bench.scheduler.abort("one")
    assert bench.names(bench.step()) == {"two": 1, "three": 4}
    assert bench.scheduler.num_running == 4


# --- ends ---------------------------------------------------------------------------------------


def test_finish_and_abort_commute_and_repeat() -> None:
    bench = Bench()
    running = bench.add("running", n=2)
    bench.step()
    waiting = bench.add("waiting", prompt=30)
    child = bench.scheduler.running[1]
    bench.scheduler.finish(running)
    assert bench.scheduler.abort("running") == [child]
    assert bench.scheduler.abort("running") == []
    bench.scheduler.finish(running)
    assert bench.scheduler.abort("waiting") == [waiting]
    bench.scheduler.finish(waiting)
    assert bench.scheduler.abort("never seen") == []
    bench.scheduler.check_integrity()
    assert not bench.scheduler.has_work
    assert bench.kv.num_available == 16


def test_a_sequence_that_ends_during_its_step_is_not_committed() -> None:
    bench = Bench()
    gone, stays = bench.add("gone"), bench.add("stays")
    batch = bench.scheduler.schedule(0.0)
    bench.scheduler.abort("gone")
    bench.scheduler.commit(batch)
    bench.scheduler.check_integrity()
    assert (gone.num_computed_tokens, stays.num_computed_tokens) == (0, 4)
    assert gone.status is SequenceStatus.FINISHED


# --- the check ----------------------------------------------------------------------------------


def test_the_check_finds_disagreeing_books() -> None:
    def busy() -> Scheduler:
        bench = Bench()
        bench.add("a")
        bench.add("b")
        bench.step()
        bench.add("c")
        return bench.scheduler

    slots = busy()
    slots._num_slots_used += 1
    with pytest.raises(IntegrityError, match="3 of 4 slots are booked, 2 are in use"):
        slots.check_integrity()
    order = busy()
    order._running.reverse()
    with pytest.raises(IntegrityError, match="running list is out of order"):
        order.check_integrity()
    status = busy()
    status._running[0].status = SequenceStatus.FINISHED
    with pytest.raises(IntegrityError, match="running list says otherwise"):
        status.check_integrity()
    lost = busy()
    lost._waiting.clear()
    with pytest.raises(IntegrityError, match="sequences by request"):
        lost.check_integrity()
    holder = busy()
    holder._waiting[0].num_computed_tokens = 1
    with pytest.raises(IntegrityError, match="waiting sequence holds blocks"):
        holder.check_integrity()
    waiter = busy()
    waiter._waiting[0].num_awaited_tokens = 1
    with pytest.raises(IntegrityError, match="waiting sequence awaits tokens"):
        waiter.check_integrity()
    greedy = busy()
    greedy._running[0].num_awaited_tokens = 40
    with pytest.raises(IntegrityError, match="awaits more tokens than its blocks hold"):
        greedy.check_integrity()
