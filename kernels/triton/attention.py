"""Attention over the paged cache, on torch tensors: plans of a batch and launches.

A plan is one vector of int32 that goes to the device in one copy: for each sequence where its
queries, its length and its block table are, then all tables one behind the other. Sequences with
one new token (decode) come first in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
import triton
from torch import Tensor

from ..context import ForwardContext
from ..host_copy import copied_to
from ..kv_layer import KVLayer
from ..pattern import FULL, AttentionPattern
from .attention_code import decode_kernel, join_kernel, prefill_kernel
from .launch import OPTIONS

MIN_SPLIT = 128
"""Keys that are worth a program of their own."""
MAX_SPLITS = 32
"""Programs that share one sequence's keys at most: 8 KV heads then keep 256 of them busy."""
SPLIT_TILE = 64
"""Splits end at multiples of this, which every key tile divides."""
SPLIT_BUCKETS = (1, 4, 16, MAX_SPLITS)
"""How many splits are launched: no result depends on it."""
MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """Sequences with one new token each, as the device reads them; all int32.

    ``num_splits`` is at least ``splits_of`` every length.
    """

    rows_B: Tensor
    """Row of each token among the queries."""
    seq_lens_B: Tensor
    """0 for a sequence that fills the batch up."""
    table_starts_B: Tensor
    tables: Tensor
    num_splits: int


@dataclass(frozen=True, slots=True)
class PrefillBatch:
    """Sequences with any number of new tokens; all int32."""

    query_starts_B: Tensor
    num_new_B: Tensor
    seq_lens_B: Tensor
    table_starts_B: Tensor
    tables: Tensor
    most_new: int
    longest: int
    """The largest of ``seq_lens_B``."""
    rows: slice | None
    """Of all their tokens, where those lie one behind the other in this order."""


def takes(
    kv_N2KSD: KVLayer, pattern: AttentionPattern, dtype: torch.dtype, qk_heads: int
) -> TypeGuard[Tensor]:
    """Whether these kernels attend in a pattern over a cache. See ``takes_cache``."""
    return pattern == FULL and takes_cache(kv_N2KSD, dtype, qk_heads)


def takes_cache(kv_N2KSD: KVLayer, dtype: torch.dtype, qk_heads: int) -> TypeGuard[Tensor]:
    """Whether these kernels write and read a cache: in the queries' own float dtype, without gaps.

    ``qk_heads`` counts query and KV heads. All else is torch's.
    """
    if not isinstance(kv_N2KSD, Tensor):
        return False
    _, _, kv_heads, _, head_dim = kv_N2KSD.shape
    return (
        kv_N2KSD.dtype == dtype
        and dtype in (torch.float32, torch.bfloat16, torch.float16)
        and head_dim <= MAX_HEAD_DIM
        and qk_heads % kv_heads == 0
        and kv_N2KSD.is_contiguous()
    )


def split_length(seq_len: int) -> int:
    """Keys of each part of a sequence; the device computes the same."""
    even = -(-seq_len // MAX_SPLITS)
    return max(MIN_SPLIT, -(-even // SPLIT_TILE) * SPLIT_TILE)


def split_bucket(seq_lens: Sequence[int]) -> int:
    """How many splits are launched for sequences of these lengths."""
    longest = max(seq_lens)
    needed = -(-longest // split_length(longest))
    return next(bucket for bucket in SPLIT_BUCKETS if bucket >= needed)


def plan_batches(context: ForwardContext) -> tuple[DecodeBatch | None, PrefillBatch | None]:
    """The two kinds of sequences of a step, on the context's device."""
    starts, lens, tables = context.query_starts, context.seq_lens, context.block_tables
    num_new = [starts[i + 1] - starts[i] for i in range(context.num_sequences)]
    order = sorted(range(context.num_sequences), key=lambda i: num_new[i] > 1)
    ordered_tables = [tables[i] for i in order]
    table_ends = itertools.accumulate(map(len, ordered_tables), initial=0)
    columns = [
        [starts[i] for i in order],
        [num_new[i] for i in order],
        [lens[i] for i in order],
        list(table_ends)[:-1],
    ]
    vector = copied_to(
        [*itertools.chain(*columns, *ordered_tables)], torch.int32, context.slots_T.device
    )
    size = len(order)
    rows_B, num_new_B, seq_lens_B, table_starts_B = vector[: 4 * size].view(4, size)
    flat = vector[4 * size :]
    count = sum(new == 1 for new in num_new)
    decode, prefill = None, None
    if count:
        bucket = split_bucket(columns[2][:count])
        decode = DecodeBatch(
            rows_B[:count], seq_lens_B[:count], table_starts_B[:count], flat, bucket
        )
    if count < size:
        prefill = PrefillBatch(
            rows_B[count:],
            num_new_B[count:],
            seq_lens_B[count:],
            table_starts_B[count:],
            flat,
            max(num_new),
            max(columns[2][count:]),
            _joined_rows(*(column[count:] for column in columns[:2])),
        )
    return decode, prefill


def attend_decode(q_THD: Tensor, kv_N2KSD: Tensor, batch: DecodeBatch, out_TC: Tensor) -> None:
    """Writes the rows of the batch's tokens; over what ``takes_cache``."""
    _, num_heads, head_dim = q_THD.shape
    _, _, kv_heads, block_size, _ = kv_N2KSD.shape
    size, splits, group = len(batch.rows_B), batch.num_splits, num_heads // kv_heads
    partial = out_TC
    sums = out_TC
    if splits > 1:
        parts = size * num_heads * splits
        partial = torch.empty(parts * head_dim, dtype=torch.float32, device=out_TC.device)
        sums = torch.empty(parts * 2, dtype=torch.float32, device=out_TC.device)
    splitting = {
        "SPLITS": splits,
        "SPLIT_TILE": SPLIT_TILE,
        "MIN_SPLIT": MIN_SPLIT,
        "MAX_SPLITS": MAX_SPLITS,
    }
    dim_tile = _dim_tile(head_dim)
    decode_kernel[(size, kv_heads, splits)](
        q_THD,
        kv_N2KSD,
        out_TC,
        partial,
        sums,
        batch.rows_B,
        batch.seq_lens_B,
        batch.table_starts_B,
        batch.tables,
        q_THD.stride(0),
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        DIM_TILE=dim_tile,
        BLOCK_SIZE=block_size,
        ROW_TILE=max(16, triton.next_power_of_2(group)),
        KEY_TILE=_key_tile(q_THD.dtype, dim_tile),
        PRECISION="ieee",
        num_warps=4,
        num_stages=2,
        **splitting,
        **OPTIONS,
    )
    if splits > 1:
        join_kernel[(size, num_heads)](
            partial,
            sums,
            out_TC,
            batch.rows_B,
            batch.seq_lens_B,
            HEADS=num_heads,
            HEAD_DIM=head_dim,
            DIM_TILE=dim_tile,
            num_warps=4,
            **splitting,
            **OPTIONS,
        )


def attend_prefill(q_THD: Tensor, kv_N2KSD: Tensor, batch: PrefillBatch, out_TC: Tensor) -> None:
    """Writes the rows of the batch's tokens; over what ``takes_cache``."""
    _, num_heads, head_dim = q_THD.shape
    _, _, kv_heads, block_size, _ = kv_N2KSD.shape
    group = num_heads // kv_heads
    group_tile = triton.next_power_of_2(group)
    dim_tile = _dim_tile(head_dim)
    row_tile = _row_tile(q_THD.dtype, dim_tile, batch.most_new * group_tile, group_tile)
    num_tiles = triton.cdiv(batch.most_new, row_tile // group_tile)
    prefill_kernel[(num_tiles, kv_heads, len(batch.num_new_B))](
        q_THD,
        kv_N2KSD,
        out_TC,
        batch.query_starts_B,
        batch.num_new_B,
        batch.seq_lens_B,
        batch.table_starts_B,
        batch.tables,
        q_THD.stride(0),
        KV_HEADS=kv_heads,
        GROUP=group,
        GROUP_TILE=group_tile,
        HEAD_DIM=head_dim,
        DIM_TILE=dim_tile,
        BLOCK_SIZE=block_size,
        ROW_TILE=row_tile,
        KEY_TILE=_key_tile(q_THD.dtype, dim_tile),
        PRECISION="ieee",
        num_warps=8 if row_tile == 128 else 4,
        num_stages=2,
        **OPTIONS,
    )


def _joined_rows(starts: Sequence[int], counts: Sequence[int]) -> slice | None:
    """The rows of neighbours that follow each other; ``None`` where some lie apart."""
    ends = [start + count for start, count in zip(starts, counts, strict=True)]
    return slice(starts[0], ends[-1]) if list(starts[1:]) == ends[:-1] else None


def _dim_tile(head_dim: int) -> int:
    """A head's channels as a tile: tensor cores take 16 at least."""
    return max(16, int(triton.next_power_of_2(head_dim)))


def _key_tile(dtype: torch.dtype, dim_tile: int) -> int:
    """Two stages of keys and values then fit the 99 KiB that the smallest devices have."""
    return 32 if dtype == torch.float32 or dim_tile > 128 else 64


def _row_tile(dtype: torch.dtype, dim_tile: int, num_rows: int, group_tile: int) -> int:
    """Rows of a prefill tile: few for a short chunk, else as many as registers hold."""
    largest = 32 if dtype == torch.float32 or dim_tile > 128 else 128
    return max(16 if num_rows <= 16 else largest, group_tile)
