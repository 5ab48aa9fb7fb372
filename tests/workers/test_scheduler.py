"""Scheduling policy: pure pieces against brute force, and the decisions one by one."""

from __future__ import annotations

import random
from collections.abc import Sequence as Items

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_pio.workers.batch import ScheduledBatch
from inference_pio.workers.config import EngineConfig
from inference_pio.workers.kv.block import IntegrityError
from inference_pio.workers.kv.manager import KVManager
from inference_pio.workers.scheduler import (
    Scheduler,
    choose_victims,
    share_budget,
    worst_case_blocks,
)
from inference_pio.workers.sequence import Sequence, SequenceStatus
from inference_pio.workers.types import GenerateRequest, PrefillRequest, SamplingParams


class Bench:
    """A scheduler on a small pool whose forward pass is a counter."""

    def __init__(self, num_blocks: int = 16, block_size: int = 4, **config: int | float) -> None:
        settings = {"max_num_seqs": 4, "max_batched_tokens": 16, "default_reservation": 8}
        self.config = EngineConfig.model_validate(settings | config)
        self.kv = KVManager(num_blocks, block_size, b"model", prefix_caching=False)
        self.scheduler = Scheduler(self.config, self.kv)
        self.now = 0.0

    def add(
        self,
        name: str,
        prompt: int = 4,
        max_tokens: int | None = 4,
        *,
        priority: int = 0,
        n: int = 1,
    ) -> Sequence:
        """Queue a request that comes now, with a prompt of so many tokens."""
        params = SamplingParams(max_tokens=max_tokens, n=n)
        request = GenerateRequest(name, tuple(range(prompt)), params, priority)
        sequence = Sequence.from_request(request, arrival=self.now, max_len=self.kv.capacity_tokens)
        self.scheduler.add(sequence)
        return sequence

    def step(self, finish: bool = True) -> ScheduledBatch:
        """Schedule, compute, fork, append one token where one is sampled; end what is full."""
        batch = self.scheduler.schedule(self.now)
        self.scheduler.commit(batch)
        for item in batch.sequences:
            group = [item.sequence]
            if item.samples and item.sequence.num_pending_choices:
                count = item.sequence.num_pending_choices
                group += [item.sequence.fork(index) for index in range(1, count + 1)]
                self.scheduler.fork(item.sequence, group[1:])
            for sequence in group if item.samples else ():
                sequence.append(0)
                if finish and sequence.room == 0:
                    self.scheduler.finish(sequence)
        self.scheduler.check_integrity()
        self.now += 1.0
        return batch

    def names(self, batch: ScheduledBatch) -> dict[str, int]:
        """Tokens of the step by request."""
        return {item.sequence.request_id: item.num_new_tokens for item in batch.sequences}


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


# --- admission ----------------------------------------------------------------------------------


def test_admission_reserves_the_named_output() -> None:
    bench = Bench(num_blocks=6)
    bench.add("a", prompt=4, max_tokens=8)
    bench.add("b", prompt=4, max_tokens=12)
    bench.add("c", prompt=4, max_tokens=1)
    assert bench.names(bench.step()) == {"a": 4}
    assert [s.request_id for s in bench.scheduler.waiting] == ["b", "c"], "c must not overtake b"


def test_without_a_named_output_the_default_is_reserved() -> None:
    bench = Bench(num_blocks=6, default_reservation=8)
    bench.add("a", max_tokens=None)
    bench.add("b", max_tokens=None)
    bench.add("c", max_tokens=None)
    assert bench.names(bench.step()) == {"a": 4, "b": 4}


def test_priority_orders_the_queue_and_waiting_makes_up_for_it() -> None:
    bench = Bench(max_num_seqs=1, aging_seconds=5.0)
    bench.add("old", priority=1)
    bench.now = 4.0
    bench.add("urgent", priority=0)
    bench.now = 6.0
    bench.add("late", priority=0)
    assert [s.request_id for s in bench.scheduler.waiting] == ["urgent", "old", "late"]


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.floats(0, 60)), min_size=2, max_size=6),
    st.floats(0.5, 20),
    st.floats(0, 100),
)
def test_rank_is_the_order_of_effective_priority_at_any_time(
    arrivals: list[tuple[int, float]], aging: float, later: float
) -> None:
    bench = Bench(aging_seconds=aging)
    for number, (priority, arrival) in enumerate(arrivals):
        bench.now = arrival
        bench.add(str(number), priority=priority)
    now = 60.0 + later
    effective = [s.priority - (now - s.arrival) / aging for s in bench.scheduler.waiting]
    assert effective == pytest.approx(sorted(effective))


def test_equal_requests_are_served_in_order_of_arrival() -> None:
    bench = Bench(max_num_seqs=2)
    for name in "abcd":
        bench.add(name)
    assert [s.request_id for s in bench.scheduler.waiting] == list("abcd")
    assert list(bench.names(bench.step())) == ["a", "b"]


def test_admission_time_is_kept_over_a_preemption() -> None:
    bench = Bench(num_blocks=4)
    bench.now = 3.0
    low = bench.add("low", prompt=4, max_tokens=12, priority=1)
    bench.step()
    high = bench.add("high", prompt=4, max_tokens=4)
    bench.step()
    assert (low.admitted_at, high.admitted_at) == (3.0, 4.0)
    assert low.status is SequenceStatus.WAITING
    while bench.scheduler.has_work:
        bench.step()
    assert low.admitted_at == 3.0


# --- preemption ---------------------------------------------------------------------------------


def test_outgrowth_preempts_the_last_ranked_and_nothing_is_lost() -> None:
    bench = Bench(num_blocks=8, default_reservation=4)
    first = bench.add("first", max_tokens=None)
    second = bench.add("second", max_tokens=None)
    while not second.num_preemptions:
        bench.step()
    kept = list(second.token_ids)
    assert second.status is SequenceStatus.WAITING
    assert second.block_table == []
    assert second.num_computed_tokens == 0
    assert bench.scheduler.num_preemptions == 1
    while bench.scheduler.has_work:
        bench.step()
    assert first.num_preemptions == 0
    assert second.token_ids[: len(kept)] == kept
    assert first.room == second.room == 0
    assert bench.kv.num_available == 8


def test_a_step_without_a_block_to_spare_admits_nobody() -> None:
    bench = Bench(num_blocks=4, default_reservation=1)
    bench.add("a", prompt=7, max_tokens=None)
    bench.add("b", prompt=7, max_tokens=None)
    bench.step()
    bench.step()
    batch = bench.step()
    assert [s.request_id for s in batch.preempted] == ["b"]
    assert bench.names(batch) == {"a": 1}
    assert [s.request_id for s in bench.scheduler.waiting] == ["b"]


def test_named_outputs_are_never_preempted_for_blocks() -> None:
    rng = random.Random(0)
    bench = Bench(num_blocks=12)
    for number in range(40):
        bench.add(str(number), rng.randrange(1, 12), rng.randrange(1, 10), n=rng.randrange(1, 4))
    while bench.scheduler.has_work:
        bench.step()
    assert bench.scheduler.num_preemptions == 0
    assert bench.kv.num_available == 12


def test_a_better_priority_takes_the_place_of_the_worst_once() -> None:
    bench = Bench(num_blocks=6)
    worst = bench.add("worst", max_tokens=8, priority=2)
    worse = bench.add("worse", max_tokens=8, priority=1)
    bench.step()
    bench.add("urgent", max_tokens=8, priority=0)
    batch = bench.step()
    assert batch.preempted == (worst,)
    assert bench.names(batch) == {"worse": 1, "urgent": 4}
    assert worse.num_preemptions == 0
    while worst.status is SequenceStatus.WAITING:
        bench.step()
    bench.add("again", max_tokens=20, priority=0)
    while bench.scheduler.has_work:
        assert worst not in bench.step().preempted
    assert worst.num_preemptions == worst.num_priority_preemptions == 1


@pytest.mark.parametrize("priority", [1, 2])
def test_an_equal_or_worse_priority_takes_no_place(priority: int) -> None:
    bench = Bench(num_blocks=3)
    bench.add("running", max_tokens=8, priority=1)
    bench.step()
    bench.add("waiting", max_tokens=8, priority=priority)
    batch = bench.step()
    assert batch.preempted == ()
    assert bench.names(batch) == {"running": 1}


def test_nobody_is_preempted_where_it_would_not_be_enough() -> None:
    bench = Bench(num_blocks=6)
    bench.add("same", max_tokens=8, priority=0)
    bench.add("worse", max_tokens=8, priority=1)
    bench.step()
    bench.add("big", prompt=8, max_tokens=8, priority=0)
    assert bench.step().preempted == ()


@pytest.mark.parametrize("forced", [2, 3])
def test_nobody_is_preempted_for_a_head_that_would_get_no_token(forced: int) -> None:
    bench = Bench(num_blocks=6, max_batched_tokens=4)
    same = bench.add("same", max_tokens=8, priority=0)
    worse = bench.add("worse", max_tokens=8, priority=1)
    while worse.num_output_tokens == 0:
        bench.step()
    for _ in range(forced):
        same.append(7)
    bench.add("urgent", max_tokens=8, priority=0)
    batch = bench.step()
    if forced == 2:
        assert batch.preempted == (worse,)
        assert bench.names(batch) == {"same": 3, "urgent": 1}
    else:
        assert batch.preempted == ()
        assert bench.names(batch) == {"same": 3, "worse": 1}


def test_an_aged_sequence_is_not_preempted_only_to_be_admitted_again() -> None:
    bench = Bench(num_blocks=3, aging_seconds=1.0)
    old = bench.add("old", max_tokens=8, priority=1)
    bench.step()
    bench.now = 5.0
    bench.add("urgent", max_tokens=8, priority=0)
    assert bench.step().preempted == ()
    assert old.num_computed_tokens == 5


def test_a_victim_that_turns_out_needless_is_spared() -> None:
    bench = Bench(num_blocks=6)
    big = bench.add("big", max_tokens=12, priority=1)
    bench.add("small", max_tokens=4, priority=2)
    bench.step()
    bench.add("urgent", max_tokens=12, priority=0)
    batch = bench.step()
    assert batch.preempted == (big,)
    assert bench.names(batch) == {"small": 1, "urgent": 4}


def test_slots_are_made_free_for_a_better_priority_too() -> None:
    bench = Bench(max_num_seqs=2)
    bench.add("a", priority=1)
    bench.add("b", priority=1)
    bench.step()
    bench.add("urgent", priority=0)
    batch = bench.step()
    assert [s.request_id for s in batch.preempted] == ["b"]
    assert bench.names(batch) == {"a": 1, "urgent": 4}


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


# --- refusals -----------------------------------------------------------------------------------


def test_a_refusal_gives_the_numbers() -> None:
    refusal = Bench(num_blocks=8).scheduler.refusal
    assert refusal(28, SamplingParams(max_tokens=4)) is None
    assert refusal(28, SamplingParams(max_tokens=5)) == (
        "a prompt of 28 tokens with 5 output tokens needs 9 KV blocks of 4 tokens; "
        "this engine has 8"
    )
    assert refusal(31, SamplingParams()) is None
    assert "needs 9 KV blocks" in (refusal(32, SamplingParams()) or "")
    assert refusal(8, SamplingParams(max_tokens=8, n=3)) is None
    assert "for each of 4 choices needs 10" in (refusal(8, SamplingParams(max_tokens=8, n=4)) or "")
    assert refusal(1, SamplingParams(max_tokens=1, n=5)) == (
        "n is 5; this engine runs at most 4 sequences at a time"
    )


def test_add_refuses_what_could_never_run() -> None:
    bench = Bench(num_blocks=2)
    bench.add("taken")
    with pytest.raises(ValueError, match=r"sequence taken\[0\]: a request of that id"):
        bench.add("taken")
    with pytest.raises(ValueError, match="needs 3 KV blocks"):
        bench.add("big", prompt=9, max_tokens=1)
    request = GenerateRequest("open", (1, 2), SamplingParams())
    with pytest.raises(ValueError, match="max_len is 9; the KV cache holds 8"):
        bench.scheduler.add(Sequence.from_request(request, arrival=0.0, max_len=9))
    assert bench.scheduler.num_waiting == 1
    bench.scheduler.check_integrity()


def test_an_open_output_for_many_choices_reserves_no_more_than_there_is() -> None:
    bench = Bench(num_blocks=4, default_reservation=100)
    bench.add("many", prompt=4, max_tokens=None, n=3)
    while bench.scheduler.has_work:
        bench.step()
    assert bench.kv.num_available == 4


# --- tokens that another engine computes ----------------------------------------------------------


def test_what_is_computed_elsewhere_waits_in_its_place() -> None:
    bench = Bench()
    asked = []

    def await_remote(sequence: Sequence) -> int:
        asked.append(sequence.request_id)
        return sequence.num_tokens - 1 if sequence.request_id == "remote" else 0

    bench.scheduler.await_remote = await_remote
    remote = bench.add("remote", prompt=11)
    assert bench.scheduler.num_queued_prefill_tokens == 11
    assert bench.names(bench.step()) == {}
    assert not bench.scheduler.has_work
    assert not bench.scheduler.is_empty
    assert (len(remote.block_table), bench.scheduler.num_queued_prefill_tokens) == (3, 0)
    bench.add("local", prompt=5, max_tokens=2)
    assert bench.names(bench.step()) == {"local": 5}
    bench.scheduler.receive(remote, 8)
    assert bench.names(bench.step()) == {"local": 1}
    assert not bench.scheduler.has_work
    bench.scheduler.receive(remote, 2)
    assert bench.names(bench.step()) == {"remote": 1}
    assert asked == ["remote", "local"]


def test_a_wait_that_is_given_up_goes_on_from_what_came() -> None:
    bench = Bench()
    bench.scheduler.await_remote = lambda sequence: sequence.num_tokens - 1
    remote = bench.add("remote", prompt=11)
    bench.step()
    bench.scheduler.receive(remote, 4)
    bench.scheduler.stop_awaiting(remote)
    assert bench.scheduler.num_queued_prefill_tokens == 7
    assert bench.names(bench.step()) == {"remote": 7}


def test_a_preempted_wait_is_over_and_nobody_is_asked_again() -> None:
    bench = Bench(num_blocks=5)
    bench.scheduler.await_remote = lambda sequence: sequence.num_tokens - 1
    remote = bench.add("remote", prompt=12, priority=2)
    bench.step()
    bench.scheduler.receive(remote, 8)
    bench.scheduler.await_remote = lambda _: 0
    bench.add("better", prompt=12)
    assert bench.scheduler.has_work, "it may take the place of what waits"
    batch = bench.step()
    assert batch.preempted == (remote,)
    assert not remote.is_awaiting
    bench.scheduler.await_remote = lambda _: pytest.fail("asked twice")  # type: ignore[misc]
    while bench.scheduler.has_work:
        bench.step()
    assert remote.num_output_tokens == 4


def test_what_is_awaited_takes_no_tokens_of_a_step_from_the_head() -> None:
    bench = Bench(num_blocks=10)
    bench.scheduler.await_remote = lambda sequence: 19 if sequence.num_tokens == 20 else 0
    bench.add("remote", prompt=20)
    low = bench.add("low", prompt=8, priority=2)
    bench.step()
    bench.add("better", prompt=8)
    batch = bench.step()
    assert batch.preempted == (low,)
    assert bench.names(batch) == {"better": 8}


def test_a_head_without_room_is_no_work_while_all_others_wait() -> None:
    bench = Bench(num_blocks=5)
    bench.scheduler.await_remote = lambda sequence: sequence.num_tokens - 1
    first = bench.add("first", prompt=12)
    bench.add("second", prompt=12)
    bench.step()
    assert bench.scheduler.num_waiting == 1
    assert not bench.scheduler.has_work
    bench.scheduler.finish(first)
    assert bench.scheduler.has_work


def test_a_sequence_without_room_is_computed_and_never_sampled() -> None:
    bench = Bench()
    request = PrefillRequest("p", 1, 1, tuple(range(20)), 0, "", deadline_s=9.0)
    sequence = Sequence.from_prefill(request, "p#1", arrival=0.0)
    bench.scheduler.add(sequence)
    for tokens in (16, 4):
        batch = bench.step()
        assert bench.names(batch) == {"p#1": tokens}
        assert not batch.sequences[0].samples
    assert bench.names(bench.step()) == {}


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
