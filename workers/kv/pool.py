"""The block pool: ids, reference counts, the prefix index and its least-recently-used order.

A block's life:
1. free and empty: on the free stack;
2. handed out by ``allocate`` with one reference and a new epoch; ``share`` adds references;
3. once full and computed, ``register`` enters it in the prefix index;
4. the last ``release`` puts it back on the free stack, or, where the index points at it, at the
   young end of the LRU order, from which ``share`` revives it;
5. ``allocate`` takes from the free stack first, then the oldest of the LRU order, whose entry in
   the index goes; where evictions are kept, it is noted for ``take_evicted``.

Only ids live here; the tensors are the model's. Every operation is O(1).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from ..types import BlockHash, BlockId
from .block import Block, EvictedBlock, IntegrityError


class BlockPool:
    """A fixed number of KV blocks.

    ``keep_evictions`` asks for a note of every indexed block that is handed out anew.
    """

    def __init__(self, num_blocks: int, *, keep_evictions: bool = False) -> None:
        if num_blocks < 1:
            raise ValueError(f"a block pool has at least one block, got {num_blocks}")
        self._blocks = [Block() for _ in range(num_blocks)]
        self._empty = [BlockId(i) for i in reversed(range(num_blocks))]
        self._unused: OrderedDict[BlockId, None] = OrderedDict()  # indexed, no owner; oldest first
        self._index: dict[BlockHash, BlockId] = {}
        self._keep_evictions = keep_evictions
        self._evicted: list[EvictedBlock] = []

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return len(self._blocks)

    @property
    def num_free(self) -> int:
        """Blocks that ``allocate`` can still give, cached ones without an owner included."""
        return len(self._empty) + len(self._unused)

    @property
    def num_used(self) -> int:
        """Blocks with an owner."""
        return len(self._blocks) - self.num_free

    @property
    def num_indexed(self) -> int:
        """Blocks in the prefix index, with or without an owner."""
        return len(self._index)

    def ref_count(self, block_id: BlockId) -> int:
        """Owners of a block."""
        return self._blocks[block_id].ref_count

    def epoch(self, block_id: BlockId) -> int:
        """How often the block has been handed out."""
        return self._blocks[block_id].epoch

    def hash_of(self, block_id: BlockId) -> BlockHash | None:
        """The name under which the prefix index knows the block, if it does."""
        return self._blocks[block_id].hash

    def allocate(self) -> BlockId:
        """Hand out a block with one reference. Raises ``IndexError`` when none is free."""
        if self._empty:
            block_id = self._empty.pop()
        elif self._unused:
            block_id, _ = self._unused.popitem(last=False)
            if self._keep_evictions:
                self._note_eviction(block_id)
            self.forget(block_id)
        else:
            raise IndexError(f"all {len(self._blocks)} KV blocks have an owner")
        block = self._blocks[block_id]
        block.ref_count = 1
        block.epoch += 1
        return block_id

    def _note_eviction(self, block_id: BlockId) -> None:
        block = self._blocks[block_id]
        assert block.hash is not None, "the LRU order holds indexed blocks"
        self._evicted.append(EvictedBlock(block_id, block.hash, block.tokens))

    def take_evicted(self) -> list[EvictedBlock]:
        """The evictions since it was last called, in order; due before anything is written."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def share(self, block_id: BlockId) -> None:
        """Add an owner to a block that has one, or that the prefix index kept."""
        block = self._blocks[block_id]
        if block.ref_count == 0:
            # A block on the free stack has no content to share: KeyError.
            del self._unused[block_id]
        block.ref_count += 1

    def release(self, block_id: BlockId) -> None:
        """Take one owner away; the last one frees the block."""
        block = self._blocks[block_id]
        if block.ref_count == 0:
            raise IntegrityError(f"block {block_id} is released but has no owner")
        block.ref_count -= 1
        if block.ref_count:
            return
        if block.hash is None:
            self._empty.append(block_id)
        else:
            self._unused[block_id] = None

    def register(self, block_id: BlockId, name: BlockHash, tokens: bytes) -> bool:
        """Enter a full, computed block in the prefix index.

        Where the index has another block of that name, that one stays and this one is not
        entered (``False``): it keeps its owner's content and is freed with its owner.
        """
        block = self._blocks[block_id]
        if block.ref_count == 0 or block.hash is not None:
            raise IntegrityError(
                f"block {block_id} cannot be indexed: {block.ref_count} owners, "
                f"{'already' if block.hash else 'not yet'} in the index"
            )
        if name in self._index:
            return False
        self._index[name] = block_id
        block.hash = name
        block.tokens = tokens
        return True

    def lookup(self, name: BlockHash, tokens: bytes) -> BlockId | None:
        """The block of that name whose token ids are these too, or ``None``."""
        block_id = self._index.get(name)
        if block_id is None or self._blocks[block_id].tokens != tokens:
            return None
        return block_id

    def forget(self, block_id: BlockId) -> None:
        """Take a block that is not in the LRU order out of the prefix index, if it is there."""
        block = self._blocks[block_id]
        if block.hash is None:
            return
        del self._index[block.hash]
        block.hash = None
        block.tokens = b""

    def forget_name(self, name: BlockHash) -> None:
        """Take the block of that name out of the prefix index, if there is one."""
        block_id = self._index.get(name)
        if block_id is None:
            return
        self.forget(block_id)
        if self._blocks[block_id].ref_count == 0:
            del self._unused[block_id]
            self._empty.append(block_id)

    def check_integrity(self, owned: Iterable[BlockId] | None = None) -> None:
        """Raise ``IntegrityError`` where the books do not add up.

        ``owned`` lists every reference there should be, one entry an owner.
        """
        free = [*self._empty, *self._unused]
        if len(set(free)) != len(free):
            raise IntegrityError("a block is free twice")
        hashes = {i: block.hash for i, block in enumerate(self._blocks) if block.hash is not None}
        if hashes != {block_id: name for name, block_id in self._index.items()}:
            raise IntegrityError("the prefix index and the blocks' hashes differ")
        without_owner = {i for i, b in enumerate(self._blocks) if b.ref_count == 0}
        if without_owner != set(free):
            raise IntegrityError(
                f"blocks without an owner {sorted(without_owner)}, free blocks {sorted(free)}"
            )
        for block_id in self._empty:
            if self._blocks[block_id].hash is not None:
                raise IntegrityError(f"block {block_id} is on the free stack and in the index")
        for block_id in self._unused:
            if self._blocks[block_id].hash is None:
                raise IntegrityError(f"block {block_id} is in the LRU order but not in the index")
        if owned is not None:
            self._check_owners(Counter(owned))

    def _check_owners(self, owned: Counter[BlockId]) -> None:
        for index, block in enumerate(self._blocks):
            if block.ref_count != owned[BlockId(index)]:
                raise IntegrityError(
                    f"block {index} counts {block.ref_count} owners, "
                    f"block tables name it {owned[BlockId(index)]} times"
                )
