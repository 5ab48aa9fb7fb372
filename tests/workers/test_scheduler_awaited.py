"""Tokens that another engine computes, as the scheduler sees them."""

from __future__ import annotations

import pytest

from inference_pio.workers.sequence import Sequence
from inference_pio.workers.types import PrefillRequest

from .scheduler_bench import Bench


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
