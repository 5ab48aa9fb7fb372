"""Blocks by sequence: hits against brute force, reservations, forks and copy-on-write."""

from __future__ import annotations

import copy

import pytest
import torch
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
from inference_pio.workers.kv.block import IntegrityError
from inference_pio.workers.kv.manager import NO_BLOCK, KVManager
from inference_pio.workers.sequence import Sequence
from inference_pio.workers.types import BlockId, GenerateRequest, SamplingParams

SIZE = 2
BLOCKS = 9
MAX_LEN = SIZE * BLOCKS
Prefix = tuple[str, tuple[int, ...]]


def new_sequence(prompt: list[int], salt: str = "", prompt_logprobs: int | None = None) -> Sequence:
    params = SamplingParams(prompt_logprobs=prompt_logprobs)
    request = GenerateRequest("r", tuple(prompt), params, cache_salt=salt)
    return Sequence.from_request(request, arrival=0.0, max_len=MAX_LEN)


def compute(kv: KVManager, sequence: Sequence) -> list[tuple[BlockId, BlockId]]:
    """Extend and commit all that is uncomputed."""
    count = sequence.num_uncomputed_tokens
    copies = kv.extend(sequence, count)
    assert copies is not None
    kv.commit(sequence, count)
    return copies


def held(table: list[BlockId]) -> list[BlockId]:
    return [block for block in table if block != NO_BLOCK]


def can_fork(sequence: Sequence) -> bool:
    return sequence.num_uncomputed_tokens == 0 and sequence.sends_from is None


class ManagerMachine(RuleBasedStateMachine):
    """Random sequences over two token ids and two salts, so that prefixes meet all the time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: list[Sequence] = []
        self.content: dict[tuple[BlockId, int], Prefix] = {}  # by block and epoch

    @initialize(
        pattern=st.just(FULL)
        | st.builds(AttentionPattern, window=st.integers(1, 7), sinks=st.integers(0, 5))
    )
    def start(self, pattern: AttentionPattern) -> None:
        self.pattern = pattern
        self.kv = KVManager(BLOCKS, SIZE, b"model", pattern=pattern)

    def _indexed(self) -> dict[Prefix, BlockId]:
        """What the index should find, from the content that was really computed."""
        pool = self.kv._pool
        return {
            self.content[block, pool.epoch(block)]: block
            for block in map(BlockId, range(BLOCKS))
            if pool.hash_of(block) is not None
        }

    def _expected_hits(self, sequence: Sequence) -> list[BlockId]:
        """The longest table whose blocks are in the index, but for those that are needed no more:
        every length is tried."""
        best: list[BlockId] = []
        indexed = self._indexed()
        if sequence.params.prompt_logprobs is not None:
            return best
        for count in range((sequence.num_tokens - 1) // SIZE + 1):
            hidden = self._hidden(sequence, count * SIZE)
            table = [
                NO_BLOCK
                if number in hidden
                else indexed.get(
                    (sequence.cache_salt, tuple(sequence.token_ids[: (number + 1) * SIZE]))
                )
                for number in range(count)
            ]
            if None not in table:
                best = [block for block in table if block is not None]
        return best

    def _hidden(self, sequence: Sequence, position: int) -> set[int]:
        """Blocks that no token from ``position`` on sees, and that nobody else is to get."""
        end = position if sequence.sends_from is None else min(position, sequence.sends_from)
        return {
            number
            for number in range(end // SIZE)
            if not self.pattern.visible(
                torch.arange(position, position + 20)[:, None],
                torch.arange(number * SIZE, (number + 1) * SIZE),
            ).any()
        }

    def _draw_live(self, data: st.DataObject) -> Sequence:
        return data.draw(st.sampled_from(self.live))

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        salt=st.sampled_from(["a", "b"]),
        logprobs=st.sampled_from([None, None, 0]),
        extra=st.integers(0, 3),
        sends_from=st.sampled_from([None, None, 0, 2, 4]),
    )
    def admit(
        self,
        prompt: list[int],
        salt: str,
        logprobs: int | None,
        extra: int,
        sends_from: int | None,
    ) -> None:
        sequence = new_sequence(prompt, salt, logprobs)
        sequence.sends_from = sends_from
        blocks = self.kv.blocks_for(len(prompt)) + extra
        hits = self._expected_hits(sequence)
        used = {block for other in self.live for block in held(other.block_table)}
        fits = blocks - len(used.intersection(hits)) <= self.kv.num_available
        assert self.kv.admit(sequence, blocks) == fits
        if fits:
            room = self.kv.room(sequence) // SIZE - len(hits)
            assert max(0, blocks - len(held(hits))) <= room <= BLOCKS - self.kv.num_used_blocks
            assert sequence.block_table == hits
            assert sequence.num_cached_tokens == sequence.num_computed_tokens == len(hits) * SIZE
            self.live.append(sequence)
        else:
            assert sequence.block_table == []

    @precondition(lambda self: self.live)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), max_size=4))
    def append(self, data: st.DataObject, tokens: list[int]) -> None:
        sequence = self._draw_live(data)
        for token in tokens[: sequence.room]:
            sequence.append(token)

    @precondition(lambda self: any(s.num_uncomputed_tokens for s in self.live))
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        sequence = data.draw(
            st.sampled_from([s for s in self.live if s.num_uncomputed_tokens]), label="sequence"
        )
        count = data.draw(st.integers(1, sequence.num_uncomputed_tokens), label="tokens")
        before, free = list(sequence.block_table), BLOCKS - self.kv.num_used_blocks
        copies = self.kv.extend(sequence, count)
        if copies is None:
            assert sequence.block_table == before
            assert BLOCKS - self.kv.num_used_blocks == free
            return
        first = sequence.num_computed_tokens // SIZE
        table = sequence.block_table
        assert table[:first] == before[:first]
        assert copies == (
            [(before[first], table[first])]
            if before[: first + 1] != table[: first + 1] and first < len(before)
            else []
        )
        others = [b for s in self.live if s is not sequence for b in held(s.block_table)]
        assert not set(table[first:]).intersection(others), "it writes to a block of another"
        written = list(table)
        self.kv.commit(sequence, count)
        for number in range(first, sequence.num_computed_tokens // SIZE):
            prefix = tuple(sequence.token_ids[: (number + 1) * SIZE])
            key = written[number], self.kv._pool.epoch(written[number])
            self.content[key] = (sequence.cache_salt, prefix)

    @precondition(lambda self: any(can_fork(s) for s in self.live))
    @rule(data=st.data(), count=st.integers(1, 3), extra=st.integers(0, 2))
    def fork(self, data: st.DataObject, count: int, extra: int) -> None:
        parent = data.draw(st.sampled_from([s for s in self.live if can_fork(s)]))
        children = [parent.fork(index) for index in range(1, count + 1)]
        used = self.kv.num_used_blocks
        self.kv.fork(parent, children, len(parent.block_table) + extra)
        assert self.kv.num_used_blocks == used
        assert all(child.block_table == parent.block_table for child in children)
        self.live.extend(children)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        sequence = self._draw_live(data)
        self.live.remove(sequence)
        self.kv.free(sequence)
        self.kv.free(sequence)
        assert sequence.block_table == []
        assert sequence.num_computed_tokens == 0

    @rule(
        data=st.data(),
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        extra=st.integers(0, BLOCKS),
    )
    def ask_what_if(self, data: st.DataObject, prompt: list[int], extra: int) -> None:
        """``without`` answers as if those sequences had really been freed."""
        sequence, blocks = new_sequence(prompt, "a"), self.kv.blocks_for(len(prompt)) + extra
        numbers = data.draw(st.sets(st.integers(0, max(0, len(self.live) - 1))))
        gone = [s for number, s in enumerate(self.live) if number in numbers]
        asked = self.kv.shortfall(sequence, blocks, without=gone)
        kv, gone = copy.deepcopy((self.kv, gone))
        for other in gone:
            kv.free(other)
        assert asked == kv.shortfall(sequence, blocks)
        assert kv.admit(sequence, blocks) == (asked == 0)

    @invariant()
    def books_agree(self) -> None:
        self.kv.check_integrity()
        used = {block for sequence in self.live for block in held(sequence.block_table)}
        assert self.kv.num_used_blocks == len(used)
        for sequence in self.live:
            gaps = {n for n, block in enumerate(sequence.block_table) if block == NO_BLOCK}
            assert gaps == self._hidden(sequence, sequence.num_computed_tokens)
            for number in range(sequence.num_computed_tokens // SIZE):
                prefix = tuple(sequence.token_ids[: (number + 1) * SIZE])
                key = (
                    sequence.block_table[number],
                    self.kv._pool.epoch(sequence.block_table[number]),
                )
                assert number in gaps or self.content[key] == (sequence.cache_salt, prefix)

    def teardown(self) -> None:
        for sequence in self.live:
            self.kv.free(sequence)
        self.kv.check_integrity()
        assert self.kv.num_used_blocks == 0
        assert self.kv.num_available == BLOCKS


ManagerMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestManagerMachine = ManagerMachine.TestCase


def test_a_fully_cached_prompt_still_computes_its_last_block() -> None:
    kv = KVManager(8, 4, b"model")
    for cached in (0, 4):
        sequence = new_sequence([1, 2, 3, 4, 5, 6, 7, 8])
        assert kv.admit(sequence, 2)
        assert sequence.num_cached_tokens == cached
        compute(kv, sequence)
        kv.free(sequence)
    assert (kv.prefix_query_tokens, kv.prefix_hit_tokens) == (16, 4)


@pytest.mark.parametrize("other", ["salt", "prompt_logprobs", "off", "model"])
def test_no_hits_across_salts_for_prompt_logprobs_or_when_off(other: str) -> None:
    kv = KVManager(8, 2, b"model", prefix_caching=other != "off")
    first = new_sequence([1, 2, 3, 4, 5])
    assert kv.admit(first, 3)
    compute(kv, first)
    if other == "model":
        kv._fingerprint = b"another"
    second = new_sequence(
        [1, 2, 3, 4, 5],
        "x" if other == "salt" else "",
        0 if other == "prompt_logprobs" else None,
    )
    assert kv.admit(second, 3)
    assert second.num_cached_tokens == 0
    third = new_sequence([1, 2, 3, 4, 5])
    assert kv.admit(third, 2)
    assert third.num_cached_tokens == (0 if other in ("off", "model") else 4)


def test_equal_blocks_computed_at_the_same_time_are_indexed_once() -> None:
    kv = KVManager(8, 2, b"model")
    twins = [new_sequence([1, 2, 3]), new_sequence([1, 2, 3])]
    for twin in twins:
        assert kv.admit(twin, 2)
    for twin in twins:
        compute(kv, twin)
    assert kv.num_cached_blocks == 1
    assert kv.num_used_blocks == 4
    kv.free(twins[0])
    kv.check_integrity()
    third = new_sequence([1, 2, 4])
    assert kv.admit(third, 2)
    assert third.num_cached_tokens == 2


def test_siblings_copy_a_partial_block_but_the_last_writes_in_place() -> None:
    kv = KVManager(10, 4, b"model")
    parent = new_sequence([1, 2, 3, 4, 5, 6])
    assert kv.admit(parent, 4)  # one shared block, three last blocks
    compute(kv, parent)
    children = [parent.fork(1), parent.fork(2)]
    kv.fork(parent, children, 2)
    assert kv.num_used_blocks == 2
    assert kv.num_available == 6
    shared = parent.block_table[1]
    copies = []
    for token, sequence in enumerate((parent, *children)):
        sequence.append(token)
        copies += compute(kv, sequence)
    assert copies == [(shared, parent.block_table[1]), (shared, children[0].block_table[1])]
    assert children[1].block_table[1] == shared
    assert len({s.block_table[0] for s in (parent, *children)}) == 1
    assert kv.num_used_blocks == 4
    assert kv.num_available == 6


def test_a_fork_at_a_block_border_copies_nothing() -> None:
    kv = KVManager(10, 2, b"model")
    parent = new_sequence([1, 2, 3, 4])
    assert kv.admit(parent, 4)
    compute(kv, parent)
    child = parent.fork(1)
    kv.fork(parent, [child], 3)
    for sequence in (parent, child):
        sequence.append(9)
        assert compute(kv, sequence) == []
    assert parent.block_table[:2] == child.block_table[:2]
    assert parent.block_table[2] != child.block_table[2]
    kv.check_integrity()


def test_growth_beyond_the_reservation_takes_free_blocks_until_none_is_left() -> None:
    kv = KVManager(4, 2, b"model")
    grown, other = new_sequence([1, 2]), new_sequence([3, 4])
    assert kv.admit(grown, 1)
    assert kv.admit(other, 3)
    assert kv.num_available == 0
    compute(kv, grown)
    compute(kv, other)
    for _ in range(4):
        grown.append(0)
    assert kv.extend(grown, 4) == []
    assert kv.num_available == -2
    kv.commit(grown, 4)
    grown.append(0)
    assert kv.extend(grown, 1) is None
    kv.free(other)
    assert kv.extend(grown, 1) == []


def test_hits_after_a_preemption_are_no_cached_prompt_tokens() -> None:
    kv = KVManager(6, 2, b"model")
    sequence = new_sequence([1, 2, 3, 4, 5])
    assert kv.admit(sequence, 3)
    compute(kv, sequence)
    kv.free(sequence)
    sequence.num_preemptions += 1
    assert kv.admit(sequence, 3)
    assert sequence.num_computed_tokens == 4
    assert sequence.num_cached_tokens == 0
    assert (kv.prefix_query_tokens, kv.prefix_hit_tokens) == (5, 0)


def test_what_a_free_would_bring_counts_shared_blocks_once() -> None:
    kv = KVManager(6, 2, b"model")
    parent = new_sequence([1, 2, 3])
    assert kv.admit(parent, 4)
    compute(kv, parent)
    child = parent.fork(1)
    kv.fork(parent, [child], 3)
    head = new_sequence([1, 2, 9, 9])  # the first block is a hit
    assert kv.num_available == 6 - 2 - 1 - 1 - 1  # two blocks, two promises, one copy due
    assert kv.shortfall(head, 6) == 6 - 1 - 1
    assert kv.shortfall(head, 6, without=[parent]) == 6 - 1 - 3
    assert kv.shortfall(head, 6, without=[parent, child]) == 0
    assert kv.shortfall(head, 7, without=[parent, child]) == 1


def windowed(num_blocks: int = 12, window: int = 5, sinks: int = 2) -> KVManager:
    return KVManager(num_blocks, 2, b"model", pattern=AttentionPattern(window, sinks))


def test_hidden_blocks_are_given_back_and_others_hit_them() -> None:
    kv, prompt = windowed(), list(range(1, 14))
    first = new_sequence(prompt)
    assert kv.admit(first, 7)
    compute(kv, first)
    # Token 13 sees tokens 9 to 13 and the first two.
    assert [n for n, block in enumerate(first.block_table) if block == NO_BLOCK] == [1, 2, 3]
    assert (kv.num_used_blocks, kv.num_cached_blocks, kv.num_available) == (4, 6, 12 - 7)
    second = new_sequence([*prompt[:9], 99, 98])
    assert kv.admit(second, 6)
    assert second.num_cached_tokens == 8
    assert [n for n, block in enumerate(second.block_table) if block == NO_BLOCK] == [1]
    assert second.block_table[0] == first.block_table[0]
    kv.free(first)
    kv.free(second)
    assert (kv.num_used_blocks, kv.num_available) == (0, 12)


def test_hits_need_the_sinks_and_the_window_alone() -> None:
    kv, prompt = windowed(), list(range(1, 14))
    first = new_sequence(prompt)
    assert kv.admit(first, 7)
    compute(kv, first)
    names = first.block_hashes
    kv.free(first)
    for number, cached in ((2, 12), (1, 12), (5, 10), (4, 2), (0, 0)):
        kv._pool.forget_name(names[number])
        again = new_sequence(prompt)
        assert kv.admit(again, 7)
        assert again.num_cached_tokens == cached, number
        kv.free(again)
        kv.check_integrity()


def test_what_a_failed_sequence_gave_back_is_forgotten_too() -> None:
    kv, prompt = windowed(), list(range(1, 14))
    first = new_sequence(prompt)
    assert kv.admit(first, 7)
    compute(kv, first)
    kv.forget(first)
    kv.check_integrity()
    kv.free(first)
    kv.check_integrity()
    assert kv.num_cached_blocks == 0


def test_what_is_sent_to_another_engine_is_kept() -> None:
    kv = windowed()
    sequence = new_sequence(list(range(1, 14)))
    sequence.sends_from = 4
    assert kv.admit(sequence, 7)
    compute(kv, sequence)
    assert [n for n, block in enumerate(sequence.block_table) if block == NO_BLOCK] == [1]


def test_eviction_takes_a_freed_prompt_from_its_tail() -> None:
    kv = KVManager(4, 2, b"model")
    first = new_sequence([1, 2, 3, 4, 5, 6])
    assert kv.admit(first, 3)
    compute(kv, first)
    kv.free(first)
    other = new_sequence([7, 8, 9])
    assert kv.admit(other, 2)
    compute(kv, other)
    again = new_sequence([1, 2, 3, 4, 5, 6])
    assert kv.admit(again, 2)
    assert again.num_cached_tokens == 4


def test_the_check_finds_a_reservation_and_a_table_that_were_changed() -> None:
    kv = KVManager(4, 2, b"model")
    sequence = new_sequence([1, 2, 3, 4])
    assert kv.admit(sequence, 3)
    compute(kv, sequence)
    kv.check_integrity()
    kv._num_promised += 1
    with pytest.raises(IntegrityError, match="promised"):
        kv.check_integrity()
    kv._num_promised -= 1
    kv._num_copies_due += 1
    with pytest.raises(IntegrityError, match="copies due"):
        kv.check_integrity()
    kv._num_copies_due -= 1
    sequence.block_table.reverse()
    with pytest.raises(IntegrityError, match="another content"):
        kv.check_integrity()
    sequence.block_table.reverse()
    sequence.num_computed_tokens = 5
    with pytest.raises(IntegrityError, match="5 computed tokens"):
        kv.check_integrity()
