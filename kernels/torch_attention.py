"""Paged attention in plain torch operations, on any device.

Query heads that share a key/value head become the rows of one small attention per key/value head,
so each key and value is read once. Sequences that prefill are taken one by one; rows with a single
new token (decode) are gathered together, padded to the longest of their group. Blocks that the
context's pattern hides are not gathered.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .context import ForwardContext
from .kv_layer import KVLayer, layer_shape
from .pattern import choose_pages, page_scores
from .torch_gather import (
    BlockGather,
    Row,
    Scratch,
    decode_groups,
    gather_rows,
    padded,
    seen_blocks,
    selecting_groups,
)

# Query rows of a prompt taken at once: scores above the diagonal are wasted, smaller ones are slow.
QUERY_CHUNK = 128
# Scores held at once where a chunk's keys are many: key heads are then taken in turns.
MAX_SCORES = 8 * 2**20


class PagedAttention:
    """One step's attention, made of a part for each prefill chunk and each group of single rows."""

    def __init__(self, context: ForwardContext, scratch: Scratch) -> None:
        self._parts: list[PrefillChunk | DecodeGroup | SelectingGroup] = []
        single: list[Row] = []
        selecting: list[Row] = []
        for i, start in enumerate(context.query_starts[:-1]):
            positions = context.positions(i)
            split = len(positions) - context.num_selecting(i)
            if split == 1:
                single.append(Row(i, start, positions[0]))
            elif split > 1:
                self._parts.append(PrefillChunk(context, i, split, scratch))
            selecting += [Row(i, start + n, positions[n]) for n in range(split, len(positions))]
        for group in decode_groups(context, single):
            self._parts.append(DecodeGroup(context, group, scratch))
        for group in selecting_groups(context, selecting):
            self._parts.append(SelectingGroup(context, group, scratch))

    def __call__(
        self, q_THD: Tensor, kv_N2KSD: KVLayer, bounds_N2KD: Tensor | None = None
    ) -> Tensor:
        if len(self._parts) == 1:
            return self._parts[0](q_THD, kv_N2KSD, bounds_N2KD)
        out_TC = q_THD.new_empty(q_THD.shape[0], q_THD.shape[1] * q_THD.shape[2])
        for part in self._parts:
            out_TC[part.rows] = part(q_THD[part.rows], kv_N2KSD, bounds_N2KD)
        return out_TC


class PrefillChunk:
    """The first ``count`` new tokens of one sequence against all of the keys that they see.

    Two batched products in the cache's dtype: on CPUs without AMX they are three to five times as
    fast as torch's fused attention.
    """

    def __init__(
        self, context: ForwardContext, sequence: int, count: int, scratch: Scratch
    ) -> None:
        start = context.query_starts[sequence]
        self.rows = slice(start, start + count)
        self._pattern, self._block_size = context.pattern, context.block_size
        self._first = context.positions(sequence).start
        self._numbers = self._pattern.block_numbers(
            self._first, self._first + count - 1, self._block_size
        )
        self._gather = BlockGather(context, [(sequence, self._numbers)], scratch)
        size = min(QUERY_CHUNK, count)
        self._causal_TT = torch.full(
            (size, size), float("-inf"), device=context.positions_T.device
        ).triu(1)

    def __call__(self, q_THD: Tensor, kv_N2KSD: KVLayer, _: Tensor | None = None) -> Tensor:
        num_tokens, num_heads, head_dim = q_THD.shape
        kv_2KLD = self._gather(kv_N2KSD, q_THD.dtype)[:, 0]
        num_kv_heads = kv_2KLD.shape[1]
        self._causal_TT = self._causal_TT.to(q_THD.dtype)  # sums of mixed dtypes are slow
        q_KGTD = q_THD.view(num_tokens, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        out_KGTD = out_THD.view(num_tokens, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        for start in range(0, num_tokens, QUERY_CHUNK):
            end = min(start + QUERY_CHUNK, num_tokens)
            (keys_KLD, values_KLD), mask_TM = self._seen(kv_2KLD, start, end)
            scores_per_head = (end - start) * num_heads // num_kv_heads * keys_KLD.shape[1]
            step = max(1, min(num_kv_heads, MAX_SCORES // scores_per_head))
            for head in range(0, num_kv_heads, step):
                heads = slice(head, head + step)
                out_KGTD[heads, :, start:end] = self._attend(
                    q_KGTD[heads, :, start:end], keys_KLD[heads], values_KLD[heads], mask_TM
                )
        return out_THD.view(num_tokens, num_heads * head_dim)

    def _seen(self, kv_2KLD: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values that these rows see, and what to add to the scores of the last ones."""
        first, last = self._first + start, self._first + end - 1
        window, size = self._pattern.window, self._block_size
        if window is None or last < window:  # all that lies before them
            return kv_2KLD[:, :, : last + 1], self._causal_TT[: end - start, : end - start]
        blocks = self._pattern.block_numbers(first, last, size)
        begin = max(0, first - window + 1) // size
        sinks = blocks.index(begin) * size
        column = self._numbers.index(begin) * size
        columns = [slice(0, sinks), slice(column, column + last + 1 - begin * size)]
        positions_L = torch.cat([self._gather.positions_BL[0, run] for run in columns])
        rows_T = torch.arange(first, last + 1, device=positions_L.device)
        hidden_TL = ~self._pattern.visible(rows_T[:, None], positions_L)
        mask_TL = torch.zeros(hidden_TL.shape, dtype=kv_2KLD.dtype, device=kv_2KLD.device)
        mask_TL.masked_fill_(hidden_TL, float("-inf"))
        seen = [kv_2KLD[:, :, run] for run in columns if run.stop > run.start]
        return seen[0] if len(seen) == 1 else torch.cat(seen, dim=2), mask_TL

    def _attend(
        self, q_KGTD: Tensor, keys_KLD: Tensor, values_KLD: Tensor, mask_TM: Tensor
    ) -> Tensor:
        heads, group, count, head_dim = q_KGTD.shape
        scores_KRL = torch.bmm(
            q_KGTD.reshape(heads, group * count, head_dim), keys_KLD.transpose(1, 2)
        )
        scores_KRL.view(heads, group, count, -1)[..., -mask_TM.shape[1] :].add_(mask_TM)
        out_KRD = torch.bmm(scores_KRL.softmax(dim=-1), values_KLD)
        return out_KRD.view(heads, group, count, head_dim)


class DecodeGroup:
    """Single new tokens of several sequences, padded to the one that sees most blocks."""

    def __init__(self, context: ForwardContext, rows: Sequence[Row], scratch: Scratch) -> None:
        device = context.positions_T.device
        self.rows = torch.tensor([row.row for row in rows], device=device)
        self._gather = BlockGather(
            context, [(row.sequence, seen_blocks(context, row)) for row in rows], scratch
        )
        positions_B1 = torch.tensor([[row.position] for row in rows], device=device)
        seen_BL = context.pattern.visible(positions_B1, self._gather.positions_BL)
        self._hidden_B11L = ~seen_BL[:, None, None]

    def __call__(self, q_THD: Tensor, kv_N2KSD: KVLayer, _: Tensor | None = None) -> Tensor:
        return attend_single_rows(q_THD, self._gather(kv_N2KSD, q_THD.dtype), self._hidden_B11L)


class SelectingGroup:
    """Single tokens that each see as many blocks, chosen by their queries for each KV head."""

    def __init__(self, context: ForwardContext, rows: Sequence[Row], scratch: Scratch) -> None:
        device, size = context.positions_T.device, context.block_size
        assert context.pattern.pages is not None
        assert context.pattern.num_pages is not None
        self._pages = context.pattern.pages
        self.rows = torch.tensor([row.row for row in rows], device=device)
        positions_R = torch.tensor([row.position for row in rows], device=device)
        self._last_R = positions_R // size
        tables = [context.block_tables[row.sequence][: row.position // size + 1] for row in rows]
        self._table_RC = torch.tensor(padded(tables), device=device)
        last_key_R = (context.pattern.num_pages - 1) * size + positions_R % size
        keys_L = torch.arange(context.pattern.num_pages * size, device=device)
        self._hidden_R11L = (keys_L > last_key_R[:, None])[:, None, None]
        self._scratch = scratch

    def __call__(
        self, q_RHD: Tensor, kv_N2KSD: KVLayer, bounds_N2KD: Tensor | None = None
    ) -> Tensor:
        assert bounds_N2KD is not None, "whoever has a pattern with pages keeps their bounds"
        num_rows, _, head_dim = q_RHD.shape
        num_kv_heads = layer_shape(kv_N2KSD).kv_heads
        scores_RKC = page_scores(
            q_RHD.reshape(num_rows, num_kv_heads, -1, head_dim), bounds_N2KD[self._table_RC]
        )
        numbers_RKM = choose_pages(scores_RKC, self._last_R, self._pages)
        table_RKC = self._table_RC[:, None].expand(-1, num_kv_heads, -1)
        blocks_RKM = table_RKC.gather(2, numbers_RKM)
        heads_K1 = torch.arange(num_kv_heads, device=q_RHD.device)[:, None]
        keys = (blocks_RKM * (2 * num_kv_heads) + heads_K1).flatten()
        rows = torch.cat((keys, keys + num_kv_heads))
        kv_2RKLD = gather_rows(kv_N2KSD, rows, q_RHD.dtype, self._scratch)
        return attend_single_rows(
            q_RHD, kv_2RKLD.view(2, num_rows, num_kv_heads, -1, head_dim), self._hidden_R11L
        )


def attend_single_rows(q_BHD: Tensor, kv_2BKLD: Tensor, hidden_B11L: Tensor) -> Tensor:
    """Each row over keys of its own, [B, H * D]."""
    batch, num_heads, head_dim = q_BHD.shape
    num_kv_heads = kv_2BKLD.shape[2]
    # One product per sequence and key head: (G, D) x (D, L), then (G, L) x (L, D).
    keys_PLD, values_PLD = kv_2BKLD.flatten(1, 2)
    q_PGD = q_BHD.reshape(batch * num_kv_heads, -1, head_dim)
    scores_PGL = torch.bmm(q_PGD, keys_PLD.transpose(1, 2))
    scores_PGL.view(batch, num_kv_heads, -1, scores_PGL.shape[2]).masked_fill_(
        hidden_B11L, float("-inf")
    )
    out_PGD = torch.bmm(scores_PGL.softmax(dim=-1), values_PLD)
    return out_PGD.view(batch, num_heads * head_dim)
