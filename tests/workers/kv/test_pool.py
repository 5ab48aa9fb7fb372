"""The block pool against a model in plain lists."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from inference_pio.workers.kv.block import IntegrityError, chain_hash, root_hash
from inference_pio.workers.kv.pool import BlockPool
from inference_pio.workers.types import BlockHash, BlockId

ROOT = root_hash(b"model", "")


def _name(content: bytes) -> BlockHash:
    return chain_hash(ROOT, content)


class PoolMachine(RuleBasedStateMachine):
    """Random life of blocks; owners, index and LRU order are kept in the naive way beside it."""

    SIZE = 5

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.SIZE)
        self.owners: list[BlockId] = []  # one entry a reference
        self.content: dict[BlockId, bytes] = {}  # indexed blocks
        self.unused: list[BlockId] = []  # indexed without an owner, oldest first
        self.epochs = dict.fromkeys(map(BlockId, range(self.SIZE)), 0)

    @precondition(lambda self: len(set(self.owners)) < self.SIZE)
    @rule()
    def allocate(self) -> None:
        empty = [b for b in self.epochs if b not in self.owners and b not in self.content]
        block = self.pool.allocate()
        if empty:
            assert block in empty
        else:
            assert block == self.unused.pop(0)
            del self.content[block]
        self.owners.append(block)
        self.epochs[block] += 1

    @precondition(lambda self: len(set(self.owners)) == self.SIZE)
    @rule()
    def allocate_from_a_full_pool(self) -> None:
        with pytest.raises(IndexError, match="all 5 KV blocks"):
            self.pool.allocate()

    @precondition(lambda self: self.owners or self.unused)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted({*self.owners, *self.unused})))
        self.pool.share(block)
        self.owners.append(block)
        if block in self.unused:
            self.unused.remove(block)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.owners))
        self.pool.release(block)
        self.owners.remove(block)
        if block not in self.owners and block in self.content:
            self.unused.append(block)

    @precondition(lambda self: not set(self.owners) <= set(self.content))
    @rule(data=st.data(), content=st.binary(min_size=1, max_size=1))
    def register(self, data: st.DataObject, content: bytes) -> None:
        block = data.draw(st.sampled_from(sorted(set(self.owners) - set(self.content))))
        known = content in self.content.values()
        assert self.pool.register(block, _name(content), content) is not known
        if not known:
            self.content[block] = content

    @rule(content=st.binary(min_size=1, max_size=1))
    def lookup(self, content: bytes) -> None:
        found = [b for b, held in self.content.items() if held == content]
        assert self.pool.lookup(_name(content), content) == (found[0] if found else None)
        assert self.pool.lookup(_name(content), content + b"?") is None

    @invariant()
    def books_agree(self) -> None:
        self.pool.check_integrity(self.owners)
        assert self.pool.num_used == len(set(self.owners))
        assert self.pool.num_free == self.SIZE - len(set(self.owners))
        assert self.pool.num_indexed == len(self.content)
        assert all(self.pool.epoch(b) == epoch for b, epoch in self.epochs.items())

    def teardown(self) -> None:
        for block in self.owners:
            self.pool.release(block)
        self.pool.check_integrity(())
        assert self.pool.num_free == self.SIZE


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase


def test_eviction_takes_the_block_whose_last_use_is_longest_ago() -> None:
    pool = BlockPool(3)
    blocks = [pool.allocate() for _ in range(3)]
    for number, block in enumerate(blocks):
        pool.register(block, _name(bytes([number])), bytes([number]))
    for block in blocks:
        pool.release(block)
    pool.share(blocks[0])
    pool.release(blocks[0])
    assert [pool.allocate() for _ in range(3)] == [blocks[1], blocks[2], blocks[0]]
    assert pool.num_indexed == 0


def test_misuse_is_named() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    pool.register(block, _name(b"x"), b"x")
    with pytest.raises(IntegrityError, match="already in the index"):
        pool.register(block, _name(b"y"), b"y")
    pool.release(block)
    with pytest.raises(IntegrityError, match="no owner"):
        pool.release(block)
    with pytest.raises(KeyError):
        pool.share(BlockId(1 - block))
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(0)


def test_the_check_finds_a_reference_that_no_table_holds() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    pool.share(block)
    pool.check_integrity([block, block])
    with pytest.raises(IntegrityError, match="counts 2 owners, block tables name it 1 times"):
        pool.check_integrity([block])


def test_the_check_finds_damaged_books() -> None:
    twice = BlockPool(2)
    twice._empty.append(twice._empty[0])
    with pytest.raises(IntegrityError, match="free twice"):
        twice.check_integrity()
    lost = BlockPool(2)
    lost._empty.pop()
    with pytest.raises(IntegrityError, match="without an owner"):
        lost.check_integrity()
    stale = BlockPool(2)
    block = stale.allocate()
    stale.register(block, _name(b"x"), b"x")
    stale._index.clear()
    with pytest.raises(IntegrityError, match="prefix index"):
        stale.check_integrity()
