"""Paged attention in plain torch operations, on any device.

Query heads that share a key/value head become the rows of one small attention per key/value head,
so each key and value is read once. Sequences that prefill are taken one by one; rows with a single
new token (decode) are gathered together, padded to the longest of their group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .context import ForwardContext
from .kv_layer import KVLayer, gather_heads, layer_shape

# A further group of decode rows costs about as much as this many blocks of padding.
BLOCKS_PER_GROUP = 4
# Query rows of a prompt taken at once: scores above the diagonal are wasted, smaller ones are slow.
QUERY_CHUNK = 128
# Scores held at once where a chunk's keys are many: key heads are then taken in turns.
MAX_SCORES = 8 * 2**20
# Cached tokens gathered at once for a group: bounds the scratch memory at long contexts.
MAX_GATHERED_TOKENS = 16384

Scratch = Callable[[int, torch.dtype, torch.device], Tensor]


class PagedAttention:
    """One step's attention, made of a part for each prefill chunk and each group of decode rows."""

    def __init__(self, context: ForwardContext, scratch: Scratch) -> None:
        starts = context.query_starts
        new_tokens = [starts[i + 1] - starts[i] for i in range(context.num_sequences)]
        decoding = [i for i, count in enumerate(new_tokens) if count == 1]
        self._parts: list[PrefillChunk | DecodeGroup] = [
            PrefillChunk(context, i, scratch) for i, count in enumerate(new_tokens) if count > 1
        ]
        for group in decode_groups(context, decoding):
            self._parts.append(DecodeGroup(context, group, scratch))

    def __call__(self, q_THD: Tensor, kv_N2KSD: KVLayer) -> Tensor:
        if len(self._parts) == 1:
            return self._parts[0](q_THD, kv_N2KSD)
        out_TC = q_THD.new_empty(q_THD.shape[0], q_THD.shape[1] * q_THD.shape[2])
        for part in self._parts:
            out_TC[part.rows] = part(q_THD[part.rows], kv_N2KSD)
        return out_TC


class PrefillChunk:
    """New tokens of one sequence against all of its keys.

    Two batched products in the cache's dtype: on CPUs without AMX they are three to five times as
    fast as torch's fused attention.
    """

    def __init__(self, context: ForwardContext, sequence: int, scratch: Scratch) -> None:
        self.rows = slice(*context.query_starts[sequence : sequence + 2])
        self._num_computed = context.seq_lens[sequence] - (self.rows.stop - self.rows.start)
        self._gather = BlockGather(context, [sequence], scratch)
        size = min(QUERY_CHUNK, self.rows.stop - self.rows.start)
        self._causal_TT = torch.full(
            (size, size), float("-inf"), device=context.positions_T.device
        ).triu(1)

    def __call__(self, q_THD: Tensor, kv_N2KSD: KVLayer) -> Tensor:
        num_tokens, num_heads, head_dim = q_THD.shape
        keys_KLD, values_KLD = self._gather(kv_N2KSD, q_THD.dtype)[:, 0]
        num_kv_heads = keys_KLD.shape[0]
        self._causal_TT = self._causal_TT.to(q_THD.dtype)  # sums of mixed dtypes are slow
        q_KGTD = q_THD.view(num_tokens, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        out_KGTD = out_THD.view(num_tokens, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        for start in range(0, num_tokens, QUERY_CHUNK):
            end = min(start + QUERY_CHUNK, num_tokens)
            visible = self._num_computed + end
            scores_per_head = (end - start) * num_heads // num_kv_heads * visible
            step = max(1, min(num_kv_heads, MAX_SCORES // scores_per_head))
            for head in range(0, num_kv_heads, step):
                heads = slice(head, head + step)
                out_KGTD[heads, :, start:end] = self._attend(
                    q_KGTD[heads, :, start:end],
                    keys_KLD[heads, :visible],
                    values_KLD[heads, :visible],
                )
        return out_THD.view(num_tokens, num_heads * head_dim)

    def _attend(self, q_KGTD: Tensor, keys_KLD: Tensor, values_KLD: Tensor) -> Tensor:
        """The last query sees every key, the one before all but the last, and so on."""
        heads, group, count, head_dim = q_KGTD.shape
        scores_KRL = torch.bmm(
            q_KGTD.reshape(heads, group * count, head_dim), keys_KLD.transpose(1, 2)
        )
        diagonal_KGTT = scores_KRL.view(heads, group, count, -1)[..., -count:]
        diagonal_KGTT.add_(self._causal_TT[:count, :count])
        out_KRD = torch.bmm(scores_KRL.softmax(dim=-1), values_KLD)
        return out_KRD.view(heads, group, count, head_dim)


class DecodeGroup:
    """Single new tokens of several sequences, padded to the longest."""

    def __init__(self, context: ForwardContext, sequences: Sequence[int], scratch: Scratch) -> None:
        device = context.positions_T.device
        rows = [context.query_starts[i] for i in sequences]
        self.rows = torch.tensor(rows, device=device)
        self._gather = BlockGather(context, sequences, scratch)
        lengths_B = torch.tensor([context.seq_lens[i] for i in sequences], device=device)
        padded = torch.arange(self._gather.num_tokens, device=device)
        self._hidden_B11L = (padded >= lengths_B[:, None])[:, None, None]

    def __call__(self, q_THD: Tensor, kv_N2KSD: KVLayer) -> Tensor:
        batch, num_heads, head_dim = q_THD.shape
        num_kv_heads = layer_shape(kv_N2KSD).kv_heads
        # One product per sequence and key head: (G, D) x (D, L), then (G, L) x (L, D).
        keys_PLD, values_PLD = self._gather(kv_N2KSD, q_THD.dtype).flatten(1, 2)
        q_PGD = q_THD.reshape(batch * num_kv_heads, -1, head_dim)
        scores_PGL = torch.bmm(q_PGD, keys_PLD.transpose(1, 2))
        scores_PGL.view(batch, num_kv_heads, -1, scores_PGL.shape[2]).masked_fill_(
            self._hidden_B11L, float("-inf")
        )
        out_PGD = torch.bmm(scores_PGL.softmax(dim=-1), values_PLD)
        return out_PGD.view(batch, num_heads * head_dim)


class BlockGather:
    """Copies the blocks of some sequences side by side, padded with each one's last block."""

    def __init__(self, context: ForwardContext, sequences: Sequence[int], scratch: Scratch) -> None:
        tables = [context.block_tables[i] for i in sequences]
        longest = max(len(table) for table in tables)
        padded = [table + table[-1:] * (longest - len(table)) for table in tables]
        self._blocks_BM = torch.tensor(padded, device=context.positions_T.device)
        self._rows: Tensor | None = None
        self._scratch = scratch
        self.num_tokens = longest * context.block_size

    def __call__(self, kv_N2KSD: KVLayer, dtype: torch.dtype) -> Tensor:
        """[2, B, K, L, D] of ``dtype``, L the padded length; valid until the next gather."""
        _, heads, block_size, dim = layer_shape(kv_N2KSD)
        batch, longest = self._blocks_BM.shape
        if self._rows is None:
            self._rows = self._row_index(heads)
        count = self._rows.shape[0]
        out = self._scratch(count * block_size * dim, dtype, kv_N2KSD.device)
        gather_heads(kv_N2KSD, self._rows, out.view(count, block_size, dim))
        return out.view(2, batch, heads, longest * block_size, dim)

    def _row_index(self, heads: int) -> Tensor:
        """Rows of one head in one block, in the order (key or value, sequence, head, block)."""
        device = self._blocks_BM.device
        kinds = torch.arange(2, device=device).view(2, 1, 1, 1) * heads
        head = torch.arange(heads, device=device).view(1, 1, heads, 1)
        return (self._blocks_BM[None, :, None] * (2 * heads) + kinds + head).flatten()


def decode_groups(context: ForwardContext, rows: Sequence[int]) -> list[list[int]]:
    """Splits decode rows so that padding and scratch memory stay small.

    Rows of a group are in batch order.
    """
    blocks = {i: len(context.block_tables[i]) for i in rows}
    by_length = sorted(rows, key=lambda i: -blocks[i])
    groups: list[list[int]] = []
    longest = 0
    for index, row in enumerate(by_length):
        padding = (len(by_length) - index) * (longest - blocks[row])
        tokens = (len(groups[-1]) + 1) * longest * context.block_size if groups else 0
        if not groups or padding > BLOCKS_PER_GROUP or tokens > MAX_GATHERED_TOKENS:
            groups.append([])
            longest = blocks[row]
        groups[-1].append(row)
    return [sorted(group) for group in groups]
