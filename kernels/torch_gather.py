"""Rows that torch's attention takes together, and the blocks it copies side by side for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .context import ForwardContext
from .kv_layer import KVLayer, gather_heads, layer_shape

# A further group of decode rows costs about as much as this many blocks of padding.
BLOCKS_PER_GROUP = 4
# Cached tokens gathered at once for a group: bounds the scratch memory at long contexts.
MAX_GATHERED_TOKENS = 16384
# Blocks whose bounds are looked at together: likewise.
MAX_BOUNDED_BLOCKS = 2048

Scratch = Callable[[int, torch.dtype, torch.device], Tensor]


@dataclass(frozen=True, slots=True)
class Row:
    """One new token: its row in the step, and its place in its sequence."""

    sequence: int
    row: int
    position: int


def seen_blocks(context: ForwardContext, row: Row) -> list[int]:
    """Numbers of the blocks in which a token sees keys; before it selects any."""
    return context.pattern.block_numbers(row.position, row.position, context.block_size)


class BlockGather:
    """Copies some blocks of some sequences side by side, padded with each one's last block.

    ``runs`` are sequences with numbers of their blocks. ``positions_BL`` tells where in its
    sequence each gathered token stands; those of the padding lie behind every token.
    """

    def __init__(
        self,
        context: ForwardContext,
        runs: Sequence[tuple[int, Sequence[int]]],
        scratch: Scratch,
    ) -> None:
        device, size = context.positions_T.device, context.block_size
        tables = [[context.block_tables[i][n] for n in numbers] for i, numbers in runs]
        self._blocks_BM = torch.tensor(padded(tables), device=device)
        behind = [[*numbers, len(context.block_tables[i])] for i, numbers in runs]
        numbers_BM = torch.tensor(padded(behind), device=device)[:, : self._blocks_BM.shape[1]]
        offsets_S = torch.arange(size, device=device)
        self.positions_BL = (numbers_BM[:, :, None] * size + offsets_S).flatten(1)
        self._rows: Tensor | None = None
        self._scratch = scratch

    def __call__(self, kv_N2KSD: KVLayer, dtype: torch.dtype) -> Tensor:
        """[2, B, K, L, D] of ``dtype``, L the padded length; valid until the next gather."""
        _, heads, block_size, dim = layer_shape(kv_N2KSD)
        batch, longest = self._blocks_BM.shape
        if self._rows is None:
            self._rows = self._row_index(heads)
        out = gather_rows(kv_N2KSD, self._rows, dtype, self._scratch)
        return out.view(2, batch, heads, longest * block_size, dim)

    def _row_index(self, heads: int) -> Tensor:
        """Rows of one head in one block, in the order (key or value, sequence, head, block)."""
        device = self._blocks_BM.device
        kinds = torch.arange(2, device=device).view(2, 1, 1, 1) * heads
        head = torch.arange(heads, device=device).view(1, 1, heads, 1)
        return (self._blocks_BM[None, :, None] * (2 * heads) + kinds + head).flatten()


def gather_rows(kv_N2KSD: KVLayer, rows: Tensor, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """Tokens of one head in one block, [rows, S, D]; a block's rows are K of keys, K of values."""
    _, _, block_size, dim = layer_shape(kv_N2KSD)
    count = rows.shape[0]
    out = scratch(count * block_size * dim, dtype, kv_N2KSD.device).view(count, block_size, dim)
    gather_heads(kv_N2KSD, rows, out)
    return out


def padded(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Of one length, each with its last number again."""
    longest = max(map(len, rows))
    return [[*row, *[row[-1]] * (longest - len(row))] for row in rows]


def decode_groups(context: ForwardContext, rows: Sequence[Row]) -> list[list[Row]]:
    """Splits decode rows so that padding and scratch memory stay small.

    Rows of a group are in batch order.
    """
    blocks = {row: len(seen_blocks(context, row)) for row in rows}
    by_length = sorted(rows, key=lambda row: -blocks[row])
    groups: list[list[Row]] = []
    longest = 0
    for index, row in enumerate(by_length):
        padding = (len(by_length) - index) * (longest - blocks[row])
        tokens = (len(groups[-1]) + 1) * longest * context.block_size if groups else 0
        if not groups or padding > BLOCKS_PER_GROUP or tokens > MAX_GATHERED_TOKENS:
            groups.append([])
            longest = blocks[row]
        groups[-1].append(row)
    return [sorted(group, key=lambda row: row.row) for group in groups]


def selecting_groups(context: ForwardContext, rows: Sequence[Row]) -> list[list[Row]]:
    """Splits rows that select pages so that the scratch memory stays small."""
    groups: list[list[Row]] = []
    longest = 0
    for row in rows:
        longest = max(longest, row.position // context.block_size + 1)
        assert context.pattern.num_pages is not None
        gathered = context.pattern.num_pages * context.block_size
        most = min(MAX_BOUNDED_BLOCKS // longest, MAX_GATHERED_TOKENS // gathered)
        if not groups or len(groups[-1]) >= most:
            groups.append([])
        groups[-1].append(row)
    return groups
