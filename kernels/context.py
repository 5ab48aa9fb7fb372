"""What one forward pass is told about its batch: positions, cache slots and block tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .host_copy import copied_to
from .pattern import FULL, AttentionPattern

ALL_PROMPT = 2**31 - 1
"""The prompt length of a sequence without generated tokens, whatever its length."""
NO_BLOCK = -1
"""In a block table, in the place of a block that its pattern hides from all new tokens."""


@dataclass(frozen=True, slots=True)
class ContextItem:
    """One sequence's share of a step: ``num_new`` tokens behind ``num_computed`` cached ones.

    ``block_table`` may have ``NO_BLOCK`` for blocks of which no new token sees a key.
    Tokens behind the first ``prompt_len`` of the sequence were generated.
    """

    block_table: Sequence[int]
    num_computed: int
    num_new: int
    prompt_len: int = ALL_PROMPT


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """One step's batch, sequence after sequence along ``T``.

    ``block_tables`` stay on the host: every kernel derives the form it needs once a step, in
    ``plan_attention``.
    """

    positions_T: Tensor
    """int64 [T], the position of each new token in its sequence."""
    slots_T: Tensor
    """int64 [T], block_id * block_size + offset, where the token's key and value are written."""
    query_starts: tuple[int, ...]
    """B + 1 prefix sums of new tokens."""
    seq_lens: tuple[int, ...]
    """B lengths after this step: computed plus new."""
    block_tables: tuple[tuple[int, ...], ...]
    """B tables, cut to the blocks that ``seq_lens`` needs."""
    block_size: int
    pattern: AttentionPattern = FULL
    select_starts: tuple[int, ...] = ()
    """B positions from which a sequence's tokens select pages; empty where the pattern has none."""

    @property
    def num_sequences(self) -> int:
        """Sequences in the batch."""
        return len(self.seq_lens)

    @property
    def last_token_rows(self) -> tuple[int, ...]:
        """Row of each sequence's last new token: the one whose logits are sampled."""
        return tuple(start - 1 for start in self.query_starts[1:])

    def positions(self, sequence: int) -> range:
        """Of a sequence's new tokens."""
        count = self.query_starts[sequence + 1] - self.query_starts[sequence]
        end = self.seq_lens[sequence]
        return range(end - count, end)

    def num_selecting(self, sequence: int) -> int:
        """How many of a sequence's last new tokens select pages."""
        if not self.select_starts:
            return 0
        positions = self.positions(sequence)
        return len(range(max(positions.start, self.select_starts[sequence]), positions.stop))

    @property
    def new_partial_blocks(self) -> tuple[int, ...]:
        """Blocks that this step enters and leaves partly filled."""
        blocks = []
        for i, end in enumerate(self.seq_lens):
            start = self.positions(i).start
            last_block_start = end // self.block_size * self.block_size
            if start <= last_block_start < end:
                blocks.append(self.block_tables[i][-1])
        return tuple(blocks)

    @property
    def filled_blocks(self) -> tuple[int, ...]:
        """Blocks whose last token is among the new ones."""
        blocks: list[int] = []
        for i, end in enumerate(self.seq_lens):
            start = self.positions(i).start
            blocks += self.block_tables[i][start // self.block_size : end // self.block_size]
        return tuple(blocks)


def build_context(
    items: Sequence[ContextItem],
    block_size: int,
    device: torch.device,
    pattern: AttentionPattern = FULL,
) -> ForwardContext:
    """The context of one step.

    Raises ``ValueError`` for an empty item, and for a block table that is too short for its tokens
    or lacks a block that one of them sees.
    """
    positions: list[int] = []
    slots: list[int] = []
    query_starts = [0]
    seq_lens = []
    tables = []
    select_starts: list[int] = []
    for row, item in enumerate(items):
        end = item.num_computed + item.num_new
        num_blocks = -(-end // block_size)
        if item.num_new < 1 or item.num_computed < 0:
            raise ValueError(
                f"sequence {row} has {item.num_new} new tokens behind {item.num_computed}; "
                "at least one new token is needed"
            )
        if len(item.block_table) < num_blocks:
            raise ValueError(
                f"sequence {row} needs {num_blocks} blocks of {block_size} for {end} tokens, "
                f"its table has {len(item.block_table)}"
            )
        table = tuple(item.block_table[:num_blocks])
        hidden = pattern.hidden_blocks(item.num_computed, block_size)
        if NO_BLOCK in table[: hidden.start] or NO_BLOCK in table[hidden.stop :]:
            raise ValueError(
                f"sequence {row} lacks a block that its tokens from {item.num_computed} on see"
            )
        positions.extend(range(item.num_computed, end))
        slots.extend(_slots(table, item.num_computed, end, block_size))
        query_starts.append(query_starts[-1] + item.num_new)
        seq_lens.append(end)
        tables.append(table)
        if (select_start := pattern.selects_from(item.prompt_len, block_size)) is not None:
            select_starts.append(select_start)
    return ForwardContext(
        positions_T=copied_to(positions, torch.int64, device),
        slots_T=copied_to(slots, torch.int64, device),
        query_starts=tuple(query_starts),
        seq_lens=tuple(seq_lens),
        block_tables=tuple(tables),
        block_size=block_size,
        pattern=pattern,
        select_starts=tuple(select_starts),
    )


def _slots(table: tuple[int, ...], start: int, end: int, block_size: int) -> list[int]:
    slots: list[int] = []
    position = start
    while position < end:
        block, offset = divmod(position, block_size)
        count = min(block_size - offset, end - position)
        first = table[block] * block_size + offset
        slots.extend(range(first, first + count))
        position += count
    return slots
