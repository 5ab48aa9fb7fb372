"""The scheduler under random loads, with a cache that remembers what was written where."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from inference_pio.kernels.pattern import FULL, AttentionPattern
from inference_pio.workers.batch import BatchBuilder, ScheduledBatch
from inference_pio.workers.config import EngineConfig
from inference_pio.workers.kv.manager import NO_BLOCK, KVManager
from inference_pio.workers.scheduler import Scheduler
from inference_pio.workers.sequence import Sequence, SequenceStatus
from inference_pio.workers.types import BlockId, GenerateRequest, SamplingParams

Written = tuple[str, tuple[int, ...]]
"""What a token's K and V depend on: the tenant's model, and every token up to this one."""


class TracedCache:
    """Stands where the KV tensors are: each slot keeps what its K and V were computed from."""

    def __init__(self, block_size: int, pattern: AttentionPattern) -> None:
        self.block_size = block_size
        self.pattern = pattern
        self.slots: dict[tuple[BlockId, int], Written | None] = {}

    def run(self, batch: ScheduledBatch) -> None:
        """Copy blocks, then write and read as one forward pass does; fails on any wrong K or V."""
        self._copy(batch.block_copies)
        inputs = BatchBuilder.from_batch(batch)
        fresh: dict[tuple[BlockId, int], Written] = {}
        row = 0
        for item, scheduled in zip(inputs.items, batch.sequences, strict=True):
            sequence = scheduled.sequence
            for position in range(item.num_computed, item.num_computed + item.num_new):
                assert inputs.token_ids[row] == sequence.token_ids[position]
                slot = self._slot(sequence, position)
                assert slot not in fresh, "two sequences write to one slot"
                fresh[slot] = (sequence.cache_salt, tuple(sequence.token_ids[: position + 1]))
                row += 1
        self.slots.update(fresh)
        for scheduled in batch.sequences:
            self.check(scheduled.sequence, scheduled.start, scheduled.end)

    def receive(self, sequence: Sequence, end: int) -> None:
        """Write what another engine computed up to ``end``."""
        for position in range(sequence.num_computed_tokens, end):
            written = (sequence.cache_salt, tuple(sequence.token_ids[: position + 1]))
            self.slots[self._slot(sequence, position)] = written

    def check(self, sequence: Sequence, start: int, length: int) -> None:
        """Every position below ``length`` that a token from ``start`` on sees holds what this
        sequence's own prefix gives."""
        hidden = self.pattern.hidden_blocks(start, self.block_size)
        for position in range(length):
            if position // self.block_size in hidden:
                continue
            expected = (sequence.cache_salt, tuple(sequence.token_ids[: position + 1]))
            assert self.slots.get(self._slot(sequence, position)) == expected

    def _slot(self, sequence: Sequence, position: int) -> tuple[BlockId, int]:
        return sequence.block_table[position // self.block_size], position % self.block_size

    def _copy(self, pairs: tuple[tuple[BlockId, BlockId], ...]) -> None:
        """In order, and all reads before all writes: both must give the same."""
        before, together = dict(self.slots), dict(self.slots)
        for source, target in pairs:
            for offset in range(self.block_size):
                self.slots[target, offset] = self.slots.get((source, offset))
                together[target, offset] = before.get((source, offset))
        assert together == self.slots


class SchedulerMachine(RuleBasedStateMachine):
    """Random adds, steps and aborts; sizes so small that everything runs short all the time."""

    @initialize(
        num_blocks=st.integers(3, 16),
        block_size=st.integers(1, 4),
        slots=st.integers(1, 5),
        spare_tokens=st.integers(0, 12),
        reservation=st.integers(1, 6),
        prefix_caching=st.booleans(),
        named_only=st.booleans(),
        remote=st.sampled_from([0.0, 0.5, 1.0]),
        pattern=st.just(FULL)
        | st.builds(AttentionPattern, window=st.integers(1, 12), sinks=st.integers(0, 6)),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        slots: int,
        spare_tokens: int,
        reservation: int,
        prefix_caching: bool,
        named_only: bool,
        remote: float = 0.0,
        pattern: AttentionPattern = FULL,
    ) -> None:
        self.config = EngineConfig(
            max_num_seqs=slots,
            max_batched_tokens=slots + spare_tokens,
            default_reservation=reservation,
            aging_seconds=10.0,
        )
        self.pattern = pattern
        self.kv = KVManager(
            num_blocks, block_size, b"model", prefix_caching=prefix_caching, pattern=pattern
        )
        self.scheduler = Scheduler(self.config, self.kv)
        self.scheduler.await_remote = self._await_remote
        self.remote = remote
        self.deciding = random.Random(block_size)
        self.cache = TracedCache(block_size, pattern)
        self.named_only = named_only
        self.now = 0.0
        self.added = 0
        self.unended: dict[tuple[str, int], Sequence] = {}
        self.tokens: dict[Sequence, list[int]] = {}  # what each should have

    # --- rules ----------------------------------------------------------------------------------

    @rule(seed=st.integers(0, 2**32), count=st.integers(1, 6))
    def add(self, seed: int, count: int) -> None:
        rng = random.Random(seed)
        for _ in range(count):
            self._add_one(rng)

    def _add_one(self, rng: random.Random) -> None:
        capacity = self.kv.capacity_tokens
        if self._most_held(3 * capacity) <= self.kv.num_blocks:
            capacity *= 3  # what does not lie in the window is given back on the way
        length = rng.randrange(1, max(2, capacity // 2))
        prompt = [0] * rng.randrange(length + 1)  # what many of them begin with
        prompt += [rng.randrange(2) for _ in range(length - len(prompt))]
        max_tokens = rng.randrange(1, max(2, capacity // 2))
        named = self.named_only or rng.random() < 0.3
        n = min(rng.choice([1, 1, 1, 2, 3]), self.config.max_num_seqs)
        params = SamplingParams(max_tokens=max_tokens if named else None, n=n)
        if self.scheduler.refusal(length, params) is not None:
            return
        request = GenerateRequest(
            str(self.added), tuple(prompt), params, rng.randrange(3), rng.choice(["", "", "salt"])
        )
        self.now += rng.random()
        sequence = Sequence.from_request(
            request, arrival=self.now, max_len=min(capacity, length + max_tokens)
        )
        self.scheduler.add(sequence)
        self.added += 1
        for index in range(n):
            self.unended[request.request_id, index] = sequence
        self.tokens[sequence] = prompt

    @precondition(lambda self: self.unended)
    @rule(kind=st.sampled_from(["abort", "finish", "preempt", "fail"]), data=st.data())
    def disturb(self, kind: str, data: st.DataObject) -> None:
        if kind == "fail":  # the forward failed: the whole batch ends, the others go on
            for item in self.scheduler.schedule(self.now).sequences:
                self._end(item.sequence)
            return
        sequence = data.draw(st.sampled_from(self._live()))
        if kind == "abort":
            self._abort(sequence.request_id)
        elif kind == "finish":
            self._end(sequence)
        elif sequence.status is SequenceStatus.RUNNING:
            # Whoever it is: no policy would, but recomputing must never go wrong.
            self.scheduler._preempt(sequence)
            self.named_only = False

    def _most_held(self, length: int) -> int:
        chunk = self.config.max_batched_tokens
        return self.pattern.most_blocks(0, length, chunk, self.kv.block_size)

    def _abort(self, name: str) -> None:
        live = {s for s in self._live() if s.request_id == name}
        assert set(self.scheduler.abort(name)) == live
        assert self.scheduler.abort(name) == []
        self.unended = {key: s for key, s in self.unended.items() if key[0] != name}

    @rule(seed=st.integers(0, 2**32), steps=st.integers(1, 8))
    def step(self, seed: int, steps: int) -> None:
        rng = random.Random(seed)
        for _ in range(steps):
            self._step(rng)

    @rule()
    def fail(self) -> None:
        """A step whose forward failed: every sequence in it ends, the others go on."""
        for item in self.scheduler.schedule(self.now).sequences:
            self._end(item.sequence)

    def _await_remote(self, sequence: Sequence) -> int:
        assert sequence.num_preemptions == 0
        assert sequence.status is SequenceStatus.RUNNING
        return sequence.num_tokens - 1 if self.deciding.random() < self.remote else 0

    @precondition(lambda self: any(s.is_awaiting for s in self._live()))
    @rule(data=st.data(), blocks=st.integers(0, 4))
    def receive(self, data: st.DataObject, blocks: int) -> None:
        """Some blocks of another engine arrive, or (0) it gives up."""
        sequence = data.draw(st.sampled_from([s for s in self._live() if s.is_awaiting]))
        self._receive(sequence, blocks)

    def _receive(self, sequence: Sequence, blocks: int) -> None:
        if blocks == 0:
            self.scheduler.stop_awaiting(sequence)
            return
        start, size = sequence.num_computed_tokens, self.kv.block_size
        end = min(sequence.num_awaited_tokens, start + blocks * size)
        self.cache.receive(sequence, end)
        self.scheduler.receive(sequence, end - start)
        self.scheduler.check_integrity()

    # --- one step -------------------------------------------------------------------------------

    def _step(self, rng: random.Random) -> None:
        awaiting = {s for s in self.scheduler.running if s.is_awaiting}
        before = {s: s.num_uncomputed_tokens for s in self.scheduler.running}
        batch = self.scheduler.schedule(self.now)
        self._check_batch(batch, before)
        assert awaiting.isdisjoint(item.sequence for item in batch.sequences)
        self.cache.run(batch)
        self.scheduler.commit(batch)
        for item in batch.sequences:
            assert item.start + item.num_new_tokens == item.sequence.num_computed_tokens
            assert item.samples == (item.sequence.num_uncomputed_tokens == 0)
            if item.samples:
                self._sample(item.sequence, rng)
        self.now += 0.5
        self.scheduler.check_integrity()

    def _check_batch(self, batch: ScheduledBatch, before: dict[Sequence, int]) -> None:
        scheduled = [item.sequence for item in batch.sequences]
        waiting = self.scheduler.waiting
        assert batch.num_tokens <= self.config.max_batched_tokens
        assert len(set(scheduled)) == len(scheduled) <= self.config.max_num_seqs
        assert scheduled or batch.preempted or not self.scheduler.has_work, "nothing gets on"
        for sequence, uncomputed in before.items():
            if uncomputed == 1 and sequence not in batch.preempted:
                assert sequence in scheduled, "a decode row was left out"
        admitted = [s for s in scheduled if s not in before]
        passed_over = [s for s in waiting if s not in batch.preempted]
        assert all(a.rank < w.rank for a in admitted for w in passed_over), "overtaken"
        for sequence in set(batch.preempted).intersection(scheduled):
            assert sequence.num_priority_preemptions, "out for want of blocks, yet back at once"
        if before:
            first = min(before, key=lambda s: s.rank)
            assert first not in batch.preempted or first.num_priority_preemptions
        for sequence in batch.preempted:
            assert sequence.num_priority_preemptions <= 1
        if self.named_only:
            preempted = [s for s in self._live() if s.num_preemptions]
            assert all(s.num_preemptions == s.num_priority_preemptions for s in preempted)

    def _sample(self, sequence: Sequence, rng: random.Random) -> None:
        group = [sequence]
        if sequence.num_pending_choices:
            group += [sequence.fork(i) for i in range(1, 1 + sequence.num_pending_choices)]
            self.scheduler.fork(sequence, group[1:])
            for child in group[1:]:
                self.unended[child.request_id, child.index] = child
                self.tokens[child] = list(child.token_ids)
        for choice in group:
            for _ in range(min(choice.room, rng.choice([1, 1, 1, 1, 3]))):
                token = rng.randrange(2)
                choice.append(token)
                self.tokens[choice].append(token)
            if choice.room == 0 or rng.random() < 0.03:
                self._end(choice)

    def _end(self, sequence: Sequence) -> None:
        assert sequence.token_ids == self.tokens[sequence]
        pending = range(sequence.num_pending_choices + 1)
        self.scheduler.finish(sequence)
        assert sequence.status is SequenceStatus.FINISHED
        for offset in pending:
            del self.unended[sequence.request_id, sequence.index + offset]

    def _live(self) -> list[Sequence]:
        return [*self.scheduler.running, *self.scheduler.waiting]

    # --- always ---------------------------------------------------------------------------------

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        if not self.scheduler.is_empty and not any(s.is_awaiting for s in self._live()):
            assert self.scheduler.has_work, "asleep with nothing to wait for"
        assert {(s.request_id, s.index) for s in self._live()} <= set(self.unended)
        assert set(self.unended.values()) == set(self._live())
        for sequence in self.scheduler.running:
            computed = sequence.num_computed_tokens
            self.cache.check(sequence, computed, computed)
            table = sequence.block_table[
                : self.kv.blocks_for(computed)
            ]  # what is awaited is behind
            held = sum(block != NO_BLOCK for block in table)
            assert held <= self._most_held(sequence.num_tokens)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        rng = random.Random(0)
        left = sum(s.max_len * (1 + s.num_pending_choices) for s in self._live())
        for _ in range(20 * (left + 1)):
            for sequence in [s for s in self._live() if s.is_awaiting]:
                self._receive(sequence, rng.randrange(3))
            if self.scheduler.is_empty:
                break
            self._step(rng)
        assert self.scheduler.is_empty, "some sequence never ends"
        assert not self.unended
        assert self.kv.num_used_blocks == 0
        assert self.kv.num_available == self.kv.num_blocks


SchedulerMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None
)
TestSchedulerMachine = SchedulerMachine.TestCase


@pytest.mark.parametrize("seed", range(12))
def test_a_saturated_engine_keeps_its_books(seed: int) -> None:
    """The same checks under a queue that never runs dry, then to the end."""
    rng = random.Random(seed)
    machine = SchedulerMachine()
    machine.start(
        num_blocks=rng.randrange(8, 30),
        block_size=rng.randrange(1, 5),
        slots=rng.randrange(2, 8),
        spare_tokens=rng.randrange(12),
        reservation=rng.randrange(1, 6),
        prefix_caching=seed % 4 != 0,
        named_only=seed % 3 == 0,
        remote=seed % 2 * 0.7,
        pattern=AttentionPattern(1 + seed, seed % 5) if seed % 4 >= 2 else FULL,
    )
    for _ in range(150):
        if machine.scheduler.num_waiting < 4:
            machine._add_one(rng)
        machine._step(rng)
        for sequence in [s for s in machine._live() if s.is_awaiting]:
            if rng.random() < 0.5:
                machine._receive(sequence, rng.randrange(3))
        machine.books_agree()
        if machine.unended and rng.random() < 0.05:
            machine._abort(rng.choice(sorted(machine.unended))[0])
    machine.teardown()


# --- fairness -----------------------------------------------------------------------------------


def _steps_until_the_low_priority_ends(aging_seconds: float, seed: int) -> int | None:
    """Better priorities arrive faster than they are served; ``None`` after 400 steps of 1 s."""
    rng = random.Random(seed)
    config = EngineConfig(max_num_seqs=3, max_batched_tokens=8, aging_seconds=aging_seconds)
    kv = KVManager(12, 4, b"model")
    scheduler = Scheduler(config, kv)

    def add(name: str, priority: int, now: float) -> Sequence:
        prompt = tuple(rng.randrange(9) for _ in range(rng.randrange(1, 20)))
        params = SamplingParams(max_tokens=rng.randrange(1, 12))
        request = GenerateRequest(name, prompt, params, priority)
        sequence = Sequence.from_request(request, arrival=now, max_len=kv.capacity_tokens)
        scheduler.add(sequence)
        return sequence

    for number in range(6):
        add(f"first {number}", 0, 0.0)
    low = add("low", 8, 0.0)
    for step in range(400):
        add(f"better {step}", 0, float(step))
        batch = scheduler.schedule(float(step))
        scheduler.commit(batch)
        for item in batch.sequences:
            if item.samples:
                item.sequence.append(0)
                if item.sequence.room == 0:
                    scheduler.finish(item.sequence)
        if low.status is SequenceStatus.FINISHED:
            return step
    return None


@pytest.mark.parametrize("seed", range(5))
def test_no_waiting_request_starves(seed: int) -> None:
    """Its 8 levels are made up for after 8 agings: only what came before then goes first."""
    assert _steps_until_the_low_priority_ends(aging_seconds=2.0, seed=seed) is not None


@pytest.mark.parametrize("seed", range(5))
def test_the_same_load_starves_a_request_that_does_not_age(seed: int) -> None:
    """The control: without aging the test above would fail."""
    assert _steps_until_the_low_priority_ends(aging_seconds=1e9, seed=seed) is None
