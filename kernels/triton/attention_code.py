"""Device code of attention over a paged cache.

The query heads that share a key/value head are rows of one tile, so each key and value is read
once. Row r of a tile is query head ``r % GROUP_TILE`` of its group, of token ``r // GROUP_TILE``.
Softmax is online (Milakov and Gimelshein, arXiv 1805.02867), with powers of two.

A long row of keys is split among programs (flash-decoding). Where it is split depends on its own
length alone and parts are joined by one fixed sum, so a token's result does not depend on its
batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attend(
    q,
    acc,
    top,
    total,
    last,
    keys_ptr,
    table_ptr,
    start,
    stop,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Takes the keys from ``start`` to ``stop`` into the running softmax of each row.

    ``last`` is each row's last visible key. Without ``MASKED``, every key is visible to all rows
    and the count is a multiple of the tile. Keys past ``stop`` are never loaded: the cache may hold
    anything there.
    """
    channels = tl.arange(0, DIM_TILE)
    in_head = channels < HEAD_DIM
    for first in tl.range(start, stop, KEY_TILE):
        keys = first + tl.arange(0, KEY_TILE)
        there = keys < stop
        if BLOCK_SIZE % KEY_TILE == 0:
            block = tl.load(table_ptr + first // BLOCK_SIZE).to(tl.int64)
            entries = block * (2 * KV_HEADS * BLOCK_SIZE) + keys % BLOCK_SIZE
        else:
            blocks = tl.load(table_ptr + keys // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
            entries = blocks * (2 * KV_HEADS * BLOCK_SIZE) + keys % BLOCK_SIZE
        places = keys_ptr + entries[:, None] * HEAD_DIM + channels[None, :]
        loaded = in_head[None, :]
        if MASKED:
            loaded = loaded & there[:, None]
        if MASKED or DIM_TILE != HEAD_DIM:
            k = tl.load(places, mask=loaded, other=0.0)
        else:
            k = tl.load(places)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * LOG2E
        if MASKED:
            visible = (keys[None, :] <= last[:, None]) & there[None, :]
            scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        shrink = tl.exp2(top - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        top = higher
        values = places + KV_HEADS * BLOCK_SIZE * HEAD_DIM
        if MASKED or DIM_TILE != HEAD_DIM:
            v = tl.load(values, mask=loaded, other=0.0)
        else:
            v = tl.load(values)
        acc = tl.dot(weights.to(v.dtype), v, acc=acc * shrink[:, None], input_precision=PRECISION)
    return acc, top, total


# The arrays of a batch are slices of one: where they start says nothing about their alignment.
@triton.jit(
    do_not_specialize_on_alignment=[
        *("query_starts_ptr", "num_new_ptr", "seq_lens_ptr", "table_starts_ptr", "tables_ptr")
    ]
)
def prefill_kernel(
    q_ptr,
    cache_ptr,
    out_ptr,
    query_starts_ptr,
    num_new_ptr,
    seq_lens_ptr,
    table_starts_ptr,
    tables_ptr,
    q_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Neighbouring tokens of one sequence and one key/value head: causal, behind cached keys."""
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2)
    num_new = tl.load(num_new_ptr + sequence)
    # The last tokens see most keys: they start first.
    tokens_together = ROW_TILE // GROUP_TILE
    num_tiles = (num_new + tokens_together - 1) // tokens_together
    if tl.program_id(0) >= num_tiles:
        return
    first_token = (num_tiles - 1 - tl.program_id(0)) * tokens_together
    seq_len = tl.load(seq_lens_ptr + sequence)
    query_start = tl.load(query_starts_ptr + sequence).to(tl.int64)
    table_ptr = tables_ptr + tl.load(table_starts_ptr + sequence)
    keys_ptr = cache_ptr + kv_head.to(tl.int64) * (BLOCK_SIZE * HEAD_DIM)

    rows = tl.arange(0, ROW_TILE)
    tokens = first_token + rows // GROUP_TILE
    members = rows % GROUP_TILE
    channels = tl.arange(0, DIM_TILE)
    inside = ((tokens < num_new) & (members < GROUP))[:, None] & (channels < HEAD_DIM)[None, :]
    head_places = (kv_head * GROUP + members)[:, None] * HEAD_DIM + channels[None, :]
    q_places = (query_start + tokens)[:, None] * q_stride + head_places
    q = tl.load(q_ptr + q_places, mask=inside, other=0.0)

    num_computed = seq_len - num_new
    last = num_computed + tokens
    stop = tl.minimum(seq_len, num_computed + first_token + tokens_together)
    seen_by_all = (num_computed + first_token + 1) // KEY_TILE * KEY_TILE
    acc = tl.zeros((ROW_TILE, DIM_TILE), tl.float32)
    top = tl.full((ROW_TILE,), float("-inf"), tl.float32)
    total = tl.zeros((ROW_TILE,), tl.float32)
    acc, top, total = _attend(
        q, acc, top, total, last, keys_ptr, table_ptr, 0, seen_by_all,
        KV_HEADS, HEAD_DIM, DIM_TILE, BLOCK_SIZE, KEY_TILE, False, PRECISION,
    )  # fmt: skip
    acc, top, total = _attend(
        q, acc, top, total, last, keys_ptr, table_ptr, seen_by_all, stop,
        KV_HEADS, HEAD_DIM, DIM_TILE, BLOCK_SIZE, KEY_TILE, True, PRECISION,
    )  # fmt: skip
    out = acc / total[:, None]
    out_places = (query_start + tokens)[:, None] * (KV_HEADS * GROUP * HEAD_DIM) + head_places
    tl.store(out_ptr + out_places, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _split_length(
    seq_len, SPLIT_TILE: tl.constexpr, MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr
):
    """Keys of each part of a sequence; ``attention.split_length`` is the same on the host."""
    even = (seq_len + MAX_SPLITS - 1) // MAX_SPLITS
    return tl.maximum(MIN_SPLIT, (even + SPLIT_TILE - 1) // SPLIT_TILE * SPLIT_TILE)


@triton.jit(
    do_not_specialize_on_alignment=[*("rows_ptr", "seq_lens_ptr", "table_starts_ptr", "tables_ptr")]
)
def decode_kernel(
    q_ptr,
    cache_ptr,
    out_ptr,
    partial_ptr,
    sums_ptr,
    rows_ptr,
    seq_lens_ptr,
    table_starts_ptr,
    tables_ptr,
    q_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_TILE: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One new token of one sequence, one key/value head, one part of the keys.

    With one split the result is written at once; else unnormalised sums, which ``join_kernel``
    joins. A sequence of length 0 fills a batch up: its row is zero.
    """
    number = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    seq_len = tl.load(seq_lens_ptr + number)
    length = _split_length(seq_len, SPLIT_TILE, MIN_SPLIT, MAX_SPLITS)
    start = split * length
    if SPLITS == 1 or start < seq_len:
        stop = tl.minimum(start + length, seq_len)
        row = tl.load(rows_ptr + number).to(tl.int64)
        table_ptr = tables_ptr + tl.load(table_starts_ptr + number)
        keys_ptr = cache_ptr + kv_head.to(tl.int64) * (BLOCK_SIZE * HEAD_DIM)
        members = tl.arange(0, ROW_TILE)
        channels = tl.arange(0, DIM_TILE)
        inside = (members < GROUP)[:, None] & (channels < HEAD_DIM)[None, :]
        heads = kv_head * GROUP + members
        head_places = heads[:, None] * HEAD_DIM + channels[None, :]
        q = tl.load(q_ptr + row * q_stride + head_places, mask=inside, other=0.0)

        last = tl.zeros((ROW_TILE,), tl.int32) + seq_len
        whole_tiles = start + (stop - start) // KEY_TILE * KEY_TILE
        acc = tl.zeros((ROW_TILE, DIM_TILE), tl.float32)
        top = tl.full((ROW_TILE,), float("-inf"), tl.float32)
        total = tl.zeros((ROW_TILE,), tl.float32)
        acc, top, total = _attend(
            q, acc, top, total, last, keys_ptr, table_ptr, start, whole_tiles,
            KV_HEADS, HEAD_DIM, DIM_TILE, BLOCK_SIZE, KEY_TILE, False, PRECISION,
        )  # fmt: skip
        acc, top, total = _attend(
            q, acc, top, total, last, keys_ptr, table_ptr, whole_tiles, stop,
            KV_HEADS, HEAD_DIM, DIM_TILE, BLOCK_SIZE, KEY_TILE, True, PRECISION,
        )  # fmt: skip
        if SPLITS == 1:
            out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
            out_places = row * (KV_HEADS * GROUP * HEAD_DIM) + head_places
            tl.store(out_ptr + out_places, out.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            part = (number * (KV_HEADS * GROUP) + heads) * SPLITS + split
            part_places = part[:, None] * HEAD_DIM + channels[None, :]
            tl.store(partial_ptr + part_places, acc, mask=inside)
            tl.store(sums_ptr + part * 2, top, mask=members < GROUP)
            tl.store(sums_ptr + part * 2 + 1, total, mask=members < GROUP)


@triton.jit(do_not_specialize_on_alignment=["rows_ptr", "seq_lens_ptr"])
def join_kernel(
    partial_ptr,
    sums_ptr,
    out_ptr,
    rows_ptr,
    seq_lens_ptr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_TILE: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Joins the parts of one token and one query head.

    Always sums over ``MAX_SPLITS`` places, whatever was launched: one order for every batch.
    """
    number = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    seq_len = tl.load(seq_lens_ptr + number)
    length = _split_length(seq_len, SPLIT_TILE, MIN_SPLIT, MAX_SPLITS)
    splits = tl.arange(0, MAX_SPLITS)
    there = splits * length < seq_len
    channels = tl.arange(0, DIM_TILE)
    parts = (number * HEADS + head) * SPLITS + splits
    top = tl.load(sums_ptr + parts * 2, mask=there, other=float("-inf"))
    total = tl.load(sums_ptr + parts * 2 + 1, mask=there, other=0.0)
    places = parts[:, None] * HEAD_DIM + channels[None, :]
    loaded = there[:, None] & (channels < HEAD_DIM)[None, :]
    acc = tl.load(partial_ptr + places, mask=loaded, other=0.0)
    shares = tl.where(there, tl.exp2(top - tl.max(top, axis=0)), 0.0)
    whole = tl.sum(shares * total, axis=0)
    out = tl.sum(shares[:, None] * acc, axis=0) / tl.where(whole == 0.0, 1.0, whole)
    row = tl.load(rows_ptr + number).to(tl.int64)
    out_places = (row * HEADS + head) * HEAD_DIM + channels
    tl.store(out_ptr + out_places, out.to(out_ptr.dtype.element_ty), mask=channels < HEAD_DIM)
