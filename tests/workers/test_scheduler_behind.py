"""Steps that are planned behind one under way: what they count on, and when there is none."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from inference_pio.workers.batch import ScheduledBatch
from inference_pio.workers.sequence import Sequence, SequenceStatus

from .scheduler_bench import Bench


def collect(bench: Bench, batch: ScheduledBatch) -> None:
    """What an engine does once a step's tokens are there."""
    bench.scheduler.commit(batch)
    for item in batch.sequences:
        if item.samples and item.sequence.status is SequenceStatus.RUNNING:
            item.sequence.append(0)
            if item.sequence.room == 0:
                bench.scheduler.finish(item.sequence)
    bench.scheduler.check_integrity()


def test_a_decode_row_goes_on_with_the_token_that_is_not_known() -> None:
    bench = Bench()
    bench.add("a", prompt=4, max_tokens=4)
    batch = bench.scheduler.schedule(0.0)
    behind = bench.scheduler.schedule_behind(batch, 1.0)
    assert behind is not None
    (item,) = behind.sequences
    assert (item.start, item.num_new_tokens, item.samples) == (4, 1, True)
    assert len(item.sequence.block_table) == 2, "the token has a slot of its own"
    assert item.sequence.num_computed_tokens == 0, "nothing is counted yet"
    collect(bench, batch)
    collect(bench, behind)
    assert item.sequence.num_output_tokens == 2


def test_a_prompt_goes_on_where_the_chunk_under_way_ends() -> None:
    bench = Bench()
    bench.add("a", prompt=40)
    first = bench.scheduler.schedule(0.0)
    second = bench.scheduler.schedule_behind(first, 0.0)
    assert second is not None
    collect(bench, first)
    third = bench.scheduler.schedule_behind(second, 0.0)
    assert third is not None
    places = [(i.start, i.num_new_tokens, i.samples) for b in (first, second, third)
              for i in b.sequences]  # fmt: skip
    assert places == [(0, 16, False), (16, 16, False), (32, 8, True)]


def test_a_sequence_with_room_for_one_token_is_left_out() -> None:
    bench = Bench()
    bench.add("last", max_tokens=1)
    bench.add("more", max_tokens=2)
    batch = bench.scheduler.schedule(0.0)
    behind = bench.scheduler.schedule_behind(batch, 0.0)
    assert behind is not None
    assert bench.names(behind) == {"more": 1}


def test_arrivals_are_admitted_behind_a_step() -> None:
    bench = Bench()
    bench.add("a")
    batch = bench.scheduler.schedule(0.0)
    new = bench.add("b", prompt=30)
    behind = bench.scheduler.schedule_behind(batch, 7.0)
    assert behind is not None
    assert bench.names(behind) == {"a": 1, "b": 15}
    assert new.admitted_at == 7.0


def test_nobody_is_preempted_behind_a_step_and_nothing_changes() -> None:
    bench = Bench(num_blocks=5, default_reservation=1)
    for name in "ab":
        bench.add(name, prompt=7, max_tokens=None)
    assert bench.names(bench.step()) == {"a": 7, "b": 7}
    batch = bench.scheduler.schedule(0.0)
    tables = [list(s.block_table) for s in bench.scheduler.running]
    assert bench.scheduler.schedule_behind(batch, 0.0) is None, "one block is left for two"
    assert [s.block_table for s in bench.scheduler.running] == tables
    collect(bench, batch)
    bench.step()
    assert bench.scheduler.num_preemptions == 1


def test_a_better_priority_waits_until_the_step_is_committed() -> None:
    bench = Bench(max_num_seqs=1)
    bench.add("low", priority=5, max_tokens=9)
    batch = bench.scheduler.schedule(0.0)
    bench.add("high", priority=0)
    assert bench.scheduler.schedule_behind(batch, 0.0) is None
    collect(bench, batch)
    assert bench.names(bench.step()) == {"high": 4}


@settings(deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 30), st.none() | st.integers(1, 12), st.integers(0, 6)),
        min_size=1,
        max_size=6,
    ),
    blocks=st.integers(12, 30),
    budget=st.integers(4, 20),
    dropped=st.sets(st.integers(0, 40)),
)
def test_every_token_is_computed_once_and_in_order(
    requests: list[tuple[int, int | None, int]], blocks: int, budget: int, dropped: set[int]
) -> None:
    """Whatever is thrown away is computed again; steps behind others are as those of ``schedule``.

    ``dropped`` are the numbers of rows that turn out not to hold.
    """
    bench = Bench(blocks, max_batched_tokens=budget, default_reservation=1)
    sequences: list[Sequence] = []
    computed: Counter[tuple[str, int]] = Counter()
    before: ScheduledBatch | None = None
    number = num_rows = num_behind = 0
    while number <= 6 or before is not None or not bench.scheduler.is_empty:
        for prompt, max_tokens, start in requests:
            if start == number:
                sequences.append(bench.add(f"r{len(sequences)}", prompt, max_tokens))
                sequences[-1].max_len = min(sequences[-1].max_len, prompt + 12)
        behind = None
        if before is not None:
            behind = bench.scheduler.schedule_behind(before, float(number))
            collect(bench, before)
            for item in before.sequences:
                places = range(item.start, item.end)
                computed.update((item.sequence.request_id, place) for place in places)
        if behind is not None:
            kept = []
            for item in behind.sequences:
                num_rows += 1
                if item.sequence.status is SequenceStatus.RUNNING and num_rows not in dropped:
                    kept.append(item)
            num_behind += bool(kept)
            behind = ScheduledBatch(tuple(kept))
        if behind is None or not behind.sequences:
            behind = bench.scheduler.schedule(float(number))
            for gone in behind.preempted:
                for place in range(len(gone.token_ids)):
                    computed.pop((gone.request_id, place), None)
        assert sum(item.num_new_tokens for item in behind.sequences) <= budget
        before = behind if behind.sequences else None
        number += 1
        assert number < 3000, "no progress"
    assert set(computed.values()) <= {1}
    for sequence in sequences:
        assert sequence.status is SequenceStatus.FINISHED
        assert sequence.room == 0
        # The last token is the only one that nobody computes.
        places = {place for name, place in computed if name == sequence.request_id}
        assert places == set(range(sequence.num_tokens - 1))
    assert bench.kv.num_used_blocks == 0
    if len(requests) == 1 and (requests[0][1] or 12) > 2 and not dropped:
        assert num_behind > 0
