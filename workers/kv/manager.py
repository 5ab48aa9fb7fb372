"""KV blocks by sequence: prefix hits, reservations, growth, forks and copy-on-write.

A sequence's blocks:
1. ``admit`` takes the leading full blocks that the prefix index has and reserves the worst case;
   of those that the attention's pattern hides from all that is to come, it needs none;
2. ``extend`` makes room for the next tokens before each step; a block that siblings share is
   copied before the first of them writes to it, and the last of them writes in place;
3. ``commit`` counts the step's tokens as computed and indexes the blocks they filled; tokens that
   another engine computed are counted so too, once their blocks are checked and written. Blocks
   that are hidden from now on are given back: the table has ``NO_BLOCK`` in their places, and the
   prefix index keeps them as long as nobody needs their room;
4. ``fork`` lets children share every block of their parent;
5. ``free`` gives all of them back, the tail first, so that the LRU order evicts tails first.

Where a tier behind the pool keeps what is evicted (``keep_evictions``), ``take_evicted`` names it,
``names_behind`` what a sequence may find there, and ``take_forgotten`` what must go from there.

Reservations are accounts, not blocks: ``num_available`` is what is free and promised to nobody.
A running sequence that outgrows its reservation takes any free block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from itertools import chain

from ...kernels.context import NO_BLOCK as NO_BLOCK_OF_KERNELS
from ...kernels.pattern import FULL, AttentionPattern
from ..sequence import Sequence
from ..types import BlockHash, BlockId
from .block import EvictedBlock, IntegrityError, chain_hash, pack_tokens, root_hash
from .pool import BlockPool

BlockCopy = tuple[BlockId, BlockId]
"""Source and destination of a whole block."""
NO_BLOCK = BlockId(NO_BLOCK_OF_KERNELS)
"""In a block table, in the place of a block that the sequence needs no more."""
_NONE = range(0)


class KVManager:
    """The block pool as sequences see it."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        fingerprint: bytes,
        *,
        prefix_caching: bool = True,
        keep_evictions: bool = False,
        only_prompts: bool = False,
        pattern: AttentionPattern = FULL,
    ) -> None:
        """``fingerprint`` names the model whose K and V these are, ``pattern`` what it attends to.

        ``only_prompts`` keeps blocks with generated tokens out of the prefix index: in a later
        prompt the same tokens would have other K and V.
        """
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._only_prompts = only_prompts
        self._pattern = pattern
        self.prefix_query_tokens = 0
        """Tokens looked up at first admissions, since start."""
        self.prefix_hit_tokens = 0
        """Those that were found."""
        self._pool = BlockPool(num_blocks, keep_evictions=keep_evictions)
        self._keep_evictions = keep_evictions
        self._forgotten: list[BlockHash] = []
        self._fingerprint = fingerprint
        self._reserved: dict[Sequence, int] = {}  # every sequence that holds blocks or a promise
        self._num_promised = 0  # sum of _unused_reservation over them
        self._num_copies_due = 0  # copies that shared, partly filled blocks will need

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return self._pool.num_blocks

    @property
    def num_used_blocks(self) -> int:
        """Blocks in some sequence's block table."""
        return self._pool.num_used

    @property
    def num_cached_blocks(self) -> int:
        """Blocks in the prefix index, in use or not."""
        return self._pool.num_indexed

    @property
    def capacity_tokens(self) -> int:
        """Tokens that the empty pool holds."""
        return self._pool.num_blocks * self.block_size

    @property
    def num_available(self) -> int:
        """Free blocks less the unused part of every reservation; negative after outgrowth."""
        return self._pool.num_free - self._num_promised - self._num_copies_due

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def most_blocks(self, start: int, end: int, chunk: int) -> int:
        """The most that a sequence holds at once while it grows from ``start`` computed tokens to
        ``end``, at most ``chunk`` tokens a step."""
        return self._pattern.most_blocks(start, end, chunk, self.block_size)

    def room(self, sequence: Sequence) -> int:
        """Tokens up to which an admitted sequence can grow at once, without what is promised to
        others, though it gives nothing back on the way."""
        free = self._unused_reservation(sequence) + max(0, self.num_available)
        return (len(sequence.block_table) + min(free, self._pool.num_free)) * self.block_size

    def shortfall(
        self, sequence: Sequence, num_blocks: int, without: Collection[Sequence] = ()
    ) -> int:
        """Blocks missing to admit ``sequence`` with ``num_blocks`` reserved; 0 if none.

        ``without`` asks what would be missing if those sequences were freed first. Prefix hits
        that others use cost nothing; cached blocks that nobody uses are free blocks.
        """
        left = Counter(block_id for other in without for block_id in _held(other.block_table))
        missing = num_blocks - self.num_available - self._gain(without, left)
        if missing <= 0:
            return 0
        ref_count = self._pool.ref_count
        hits = _held(self._prefix_hits(sequence))
        return max(0, missing - sum(ref_count(hit) > left[hit] for hit in hits))

    def admit(self, sequence: Sequence, num_blocks: int) -> bool:
        """Take the prefix hits and reserve ``num_blocks`` in all; ``False`` if they do not fit."""
        assert not sequence.block_table, "only a sequence without blocks is admitted"
        assert sequence not in self._reserved, "a sequence is admitted once"
        if self.shortfall(sequence, num_blocks):
            return False
        hits = self._prefix_hits(sequence)
        for block_id in _held(hits):
            self._pool.share(block_id)
        sequence.block_table = hits
        sequence.num_computed_tokens = len(hits) * self.block_size
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = min(
                sequence.num_computed_tokens, sequence.num_prompt_tokens
            )
            self.prefix_query_tokens += sequence.num_tokens
            self.prefix_hit_tokens += sequence.num_computed_tokens
        self._reserved[sequence] = num_blocks
        self._num_promised += self._unused_reservation(sequence)
        return True

    def fit(self, ends: Iterable[tuple[Sequence, int]]) -> bool:
        """Whether the free blocks suffice for ``extend`` of all, each up to so many tokens."""
        needed = sum(
            self._missing(sequence, end) + self._shares_next_write(sequence)
            for sequence, end in ends
        )
        return needed <= self._pool.num_free

    def extend(
        self, sequence: Sequence, num_new_tokens: int, *, num_under_way: int = 0
    ) -> list[BlockCopy] | None:
        """Make room to write ``num_new_tokens`` after the computed ones and ``num_under_way``.

        Returns the block copies to run before the write, or ``None``, with nothing changed, where
        the free blocks do not suffice.
        """
        table = sequence.block_table
        start = sequence.num_computed_tokens
        missing = self._missing(sequence, start + num_under_way + num_new_tokens)
        shared = self._shares_next_write(sequence)
        if missing == 0 and not shared:
            return []
        if missing + shared > self._pool.num_free:
            return None
        copies: list[BlockCopy] = []
        if shared:
            # With tokens under way the block is the sequence's own: they are written to it first.
            copies.append(self._copy_on_write(table, start // self.block_size))
        if missing > 0:
            before = self._unused_reservation(sequence)
            table.extend(self._pool.allocate() for _ in range(missing))
            self._num_promised += self._unused_reservation(sequence) - before
        return copies

    def commit(self, sequence: Sequence, num_new_tokens: int) -> None:
        """Count tokens as computed, index the blocks they filled, give back what is hidden now.

        A block whose content the index already has, computed by another sequence at the same
        time, is not entered: it stays the sequence's own.
        """
        start, table = sequence.num_computed_tokens, sequence.block_table
        end = start + num_new_tokens
        if self.prefix_caching:
            last = min(end, sequence.num_prompt_tokens) if self._only_prompts else end
            for number in range(start // self.block_size, last // self.block_size):
                name, tokens = self._name(sequence, number), self._packed_block(sequence, number)
                self._pool.register(table[number], name, tokens)
        before, hidden = self._hidden(sequence, start), self._hidden(sequence, end)
        newly_hidden = range(max(before.stop, hidden.start), hidden.stop)
        if not newly_hidden:
            sequence.num_computed_tokens = end
            return
        promised = self._unused_reservation(sequence)
        sequence.num_computed_tokens = end
        # A step under way behind this one starts at ``end``: nothing reads these any more.
        for number in newly_hidden:
            self._pool.release(table[number])
            table[number] = NO_BLOCK
        self._num_promised += self._unused_reservation(sequence) - promised

    def fork(self, parent: Sequence, children: list[Sequence], num_blocks: int) -> None:
        """Let every child share all blocks of ``parent``; each reserves ``num_blocks`` in all."""
        assert parent.num_computed_tokens == parent.num_tokens, "a fork comes after the prompt"
        self._num_promised -= self._unused_reservation(parent)
        for child in children:
            assert child not in self._reserved, "a child has no blocks of its own yet"
            child.block_table = list(parent.block_table)
            child.num_computed_tokens = parent.num_computed_tokens
            for block_id in _held(child.block_table):
                self._pool.share(block_id)
        for sequence in (parent, *children):
            self._reserved[sequence] = num_blocks
            self._num_promised += self._unused_reservation(sequence)
        if parent.num_computed_tokens % self.block_size:
            self._num_copies_due += len(children)

    def free(self, sequence: Sequence) -> None:
        """Give back all blocks and the reservation; nothing happens if there are none."""
        if sequence not in self._reserved:
            return
        self._num_promised -= self._unused_reservation(sequence)
        self._num_copies_due -= self._shares_next_write(sequence)
        del self._reserved[sequence]
        for block_id in _held(reversed(sequence.block_table)):
            self._pool.release(block_id)
        sequence.block_table = []
        sequence.num_computed_tokens = 0

    def forget(self, sequence: Sequence) -> None:
        """Take a sequence's blocks out of the prefix index: nobody may hit what they hold.

        Those that it has given back too.
        """
        for block_id in _held(sequence.block_table):
            self._pool.forget(block_id)
        for number in self._hidden(sequence, sequence.num_computed_tokens):
            self._pool.forget_name(self._name(sequence, number))
        if self._keep_evictions:
            self._forgotten.extend(sequence.block_hashes)

    def take_evicted(self) -> list[EvictedBlock]:
        """Blocks that left the prefix index since it was last called, oldest first.

        Their content is there until the step's copies and writes.
        """
        return self._pool.take_evicted()

    def take_forgotten(self) -> list[BlockHash]:
        """Names that nobody may hit any more, since it was last called."""
        forgotten, self._forgotten = self._forgotten, []
        return forgotten

    def names_behind(self, sequence: Sequence) -> Iterator[tuple[BlockHash, bytes]]:
        """Name and packed token ids of each full block behind an admitted sequence's hits.

        Short of the last token, whose logits are needed; none where all logits are.
        """
        if sequence.params.prompt_logprobs is not None:
            return
        first = sequence.num_computed_tokens // self.block_size
        for number in range(first, (sequence.num_tokens - 1) // self.block_size):
            yield self._name(sequence, number), self._packed_block(sequence, number)

    def count_cached(self, sequence: Sequence, num_tokens: int) -> None:
        """Note tokens of a first admission that were found behind the pool."""
        if sequence.num_preemptions == 0:
            cached = sequence.num_cached_tokens + num_tokens
            sequence.num_cached_tokens = min(cached, sequence.num_prompt_tokens)

    def _gain(self, others: Collection[Sequence], left: Counter[BlockId]) -> int:
        """Growth of ``num_available`` if ``others``, whose references ``left`` counts, go."""
        ref_count = self._pool.ref_count
        unused = sum(self._unused_reservation(other) for other in others)
        freed = sum(ref_count(block_id) == count for block_id, count in left.items())
        sharers = Counter(
            other.block_table[other.num_computed_tokens // self.block_size]
            for other in others
            if self._shares_next_write(other)
        )
        copies = sum(min(count, ref_count(block_id) - 1) for block_id, count in sharers.items())
        return unused + freed + copies

    def _missing(self, sequence: Sequence, end: int) -> int:
        return max(0, self.blocks_for(end) - len(sequence.block_table))

    def _unused_reservation(self, sequence: Sequence) -> int:
        held = len(sequence.block_table) - len(self._hidden(sequence, sequence.num_computed_tokens))
        return max(0, self._reserved[sequence] - held)

    def _hidden(self, sequence: Sequence, num_computed: int) -> range:
        """Numbers of the blocks that a sequence with so many computed tokens needs no more."""
        if self._pattern.window is None:
            return _NONE
        hidden = self._pattern.hidden_blocks(num_computed, self.block_size)
        if sequence.sends_from is None:
            return hidden
        # Another engine gets what lies behind, of which its own tokens may see more.
        end = min(hidden.stop, max(hidden.start, sequence.sends_from // self.block_size))
        return range(hidden.start, end)

    def _shares_next_write(self, sequence: Sequence) -> bool:
        """Whether the block that the next token goes to belongs to siblings too."""
        table = sequence.block_table
        number = sequence.num_computed_tokens // self.block_size
        return number < len(table) and self._pool.ref_count(table[number]) > 1

    def _copy_on_write(self, table: list[BlockId], number: int) -> BlockCopy:
        source = table[number]
        table[number] = self._pool.allocate()
        self._pool.release(source)
        self._num_copies_due -= 1
        return source, table[number]

    def _prefix_hits(self, sequence: Sequence) -> list[BlockId]:
        """The longest table of full blocks whose visible ones are all in the index.

        Short of the last token, whose logits are needed. A block that is missing ends the search
        behind it, so that of windows only those before it are left to look at; those parts of them
        that were seen to be there are not looked up again.
        """
        if not self.prefix_caching or sequence.params.prompt_logprobs is not None:
            return []
        found: dict[int, BlockId] = {}
        end = known = (sequence.num_tokens - 1) // self.block_size  # [known, end) is found
        while True:
            hidden = self._hidden(sequence, end * self.block_size)
            for number in chain(range(hidden.start), range(hidden.stop, known)):
                if number in found:
                    continue
                name, tokens = self._name(sequence, number), self._packed_block(sequence, number)
                block_id = self._pool.lookup(name, tokens)
                if block_id is None:
                    end, known = number, min(hidden.stop, number)
                    break
                found[number] = block_id
            else:
                return [found.get(number, NO_BLOCK) for number in range(end)]

    def _packed_block(self, sequence: Sequence, number: int) -> bytes:
        start = number * self.block_size
        return pack_tokens(sequence.token_ids[start : start + self.block_size])

    def _name(self, sequence: Sequence, number: int) -> BlockHash:
        """Name of a full block, worked out once together with those before it."""
        names = sequence.block_hashes
        while len(names) <= number:
            parent = names[-1] if names else root_hash(self._fingerprint, sequence.cache_salt)
            names.append(chain_hash(parent, self._packed_block(sequence, len(names))))
        return names[number]

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` where blocks, tables, reservations and index disagree."""
        self._pool.check_integrity(block for s in self._reserved for block in _held(s.block_table))
        promised = sum(self._unused_reservation(s) for s in self._reserved)
        if promised != self._num_promised:
            raise IntegrityError(f"{self._num_promised} blocks promised, reservations: {promised}")
        writers = [s for s in self._reserved if self._shares_next_write(s)]
        shared = {s.block_table[s.num_computed_tokens // self.block_size] for s in writers}
        if len(writers) - len(shared) != self._num_copies_due:
            raise IntegrityError(
                f"{self._num_copies_due} block copies due, but {len(writers)} sequences "
                f"share {len(shared)} partly filled blocks"
            )
        for sequence in self._reserved:
            self._check_sequence(sequence)

    def _check_sequence(self, sequence: Sequence) -> None:
        who = f"sequence {sequence.request_id}[{sequence.index}]"
        table = sequence.block_table
        if sequence.num_computed_tokens > min(sequence.num_tokens, len(table) * self.block_size):
            raise IntegrityError(
                f"{who} has {sequence.num_computed_tokens} computed tokens, "
                f"{sequence.num_tokens} tokens and {len(table)} blocks"
            )
        gaps = [number for number, block_id in enumerate(table) if block_id == NO_BLOCK]
        hidden = self._hidden(sequence, sequence.num_computed_tokens)
        if gaps != list(hidden):
            raise IntegrityError(f"{who} lacks the blocks {gaps} where it needs all but {hidden}")
        full = sequence.num_computed_tokens // self.block_size
        for number, block_id in enumerate(table):
            if block_id == NO_BLOCK:
                continue
            name = self._pool.hash_of(block_id)
            if name is not None and (number >= full or name != self._name(sequence, number)):
                raise IntegrityError(f"{who}: block {block_id} is indexed under another content")


def _held(table: Iterable[BlockId]) -> Iterator[BlockId]:
    """The blocks of a table that are there."""
    return (block_id for block_id in table if block_id != NO_BLOCK)
