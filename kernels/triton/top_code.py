"""Device code of the best tokens of each row, in canonical order; see ``key_of``.

Three launches behind ``chunk_best_kernel``: a threshold that enough tokens reach, a list of those
that do, and the best of the list one after the other. Where there is no room for the list, each is
looked for in the row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sampling_code import id_of, key_of, kth_of_chunks

NOTHING = tl.constexpr(-(1 << 62))
"""Below every key."""


@triton.jit
def threshold_kernel(
    best_ptr, thresholds_ptr, counts_ptr, num_wanted, CHUNKS: tl.constexpr,
    CHUNKS_TILE: tl.constexpr,
):  # fmt: skip
    """Zeroes the counts as well."""
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, CHUNKS_TILE)
    best_C = tl.load(best_ptr + row * CHUNKS + chunks, mask=chunks < CHUNKS, other=float("-inf"))
    tl.store(thresholds_ptr + row, kth_of_chunks(best_C, chunks, CHUNKS, num_wanted))
    tl.store(counts_ptr + row, 0)


@triton.jit
def list_kernel(
    logits_ptr, best_ptr, thresholds_ptr, counts_ptr, found_ptr, row_stride,
    NUM_TOKENS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """What finds no room is counted all the same."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    threshold = tl.load(thresholds_ptr + row)
    if tl.load(best_ptr + row * CHUNKS + chunk) >= threshold:
        ids = chunk * CHUNK + tl.arange(0, CHUNK)
        there = ids < NUM_TOKENS
        logits = tl.load(logits_ptr + row * row_stride + ids, mask=there, other=float("-inf"))
        reaches = there & (logits >= threshold)
        number = reaches.to(tl.int32)
        start = tl.atomic_add(counts_ptr + row, tl.sum(number, axis=0))
        places = start + tl.cumsum(number, axis=0) - 1
        tl.store(found_ptr + row * ROOM + places, ids, mask=reaches & (places < ROOM))


@triton.jit
def top_kernel(
    logits_ptr, best_ptr, thresholds_ptr, counts_ptr, found_ptr, ids_ptr, row_stride, num_wanted,
    NUM_TOKENS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """``num_wanted`` ids of each row; 0 for those that a row with NaN lacks."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    count = tl.load(counts_ptr + row)
    threshold = tl.load(thresholds_ptr + row)
    has_room = count <= ROOM
    places = tl.arange(0, ROOM)
    there = has_room & (places < count)
    ids = tl.load(found_ptr + row * ROOM + places, mask=there, other=0)
    logits = tl.load(row_ptr + ids, mask=there, other=0.0)
    keys = tl.where(there, key_of(logits, ids), NOTHING)
    first_id = tl.zeros((), dtype=tl.int32)
    above = key_of(tl.full((), float("inf"), dtype=tl.float32), first_id) + 1
    for place in range(num_wanted):
        best = tl.max(tl.where(keys < above, keys, NOTHING), axis=0)
        if has_room == 0:
            for chunk in range(CHUNKS):
                if tl.load(best_ptr + row * CHUNKS + chunk) >= threshold:
                    chunk_ids = chunk * CHUNK + tl.arange(0, CHUNK)
                    inside = chunk_ids < NUM_TOKENS
                    values = tl.load(row_ptr + chunk_ids, mask=inside, other=float("-inf"))
                    chunk_keys = key_of(values, chunk_ids)
                    inside = inside & (values == values) & (chunk_keys < above)
                    best = tl.maximum(best, tl.max(tl.where(inside, chunk_keys, NOTHING), axis=0))
        above = best
        found = tl.where(best > NOTHING, id_of(best), 0)
        tl.store(ids_ptr + row * num_wanted + place, found)
