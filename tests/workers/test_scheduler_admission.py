"""Who gets a place in the batch, who loses it, and who is refused."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_pio.workers.sequence import Sequence, SequenceStatus
from inference_pio.workers.types import GenerateRequest, SamplingParams

from .scheduler_bench import Bench

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
