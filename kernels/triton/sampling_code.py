"""Device code of sampling: draws among the best tokens, without a sort of the vocabulary.

Four launches for all rows, each reading what the one before it wrote:
1. ``chunk_best_kernel``: the best logit of each chunk of each row.
2. ``find_kernel``: faults, greedy tokens, and a threshold that k logits of the row reach at least.
3. ``collect_kernel``: the tokens that reach it, in any order.
4. ``draw_kernel``: sorts those, filters and draws.

Probabilities are the whole numbers of ``sampling/weights.py``, step by step: launch 4 without
contraction of products and sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

NAN = tl.constexpr(-1)
INFINITY = tl.constexpr(-2)
NO_TOKEN = tl.constexpr(-3)
UNDECIDED = tl.constexpr(-100)
"""In the place of a token: the row is to be drawn another way."""
TO_WHOLE = tl.constexpr(6755399441055744.0)  # 1.5 * 2 ** 52
UNIT_BITS = tl.constexpr(44)


@triton.jit
def chunk_best_kernel(
    logits_ptr, best_ptr, row_stride, NUM_TOKENS: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """NaN where the chunk has one."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    there = ids < NUM_TOKENS
    logits = tl.load(logits_ptr + row * row_stride + ids, mask=there, other=float("-inf"))
    num_nan = tl.sum((logits != logits).to(tl.int32), axis=0)
    best = tl.max(tl.where(logits != logits, float("-inf"), logits), axis=0)
    tl.store(best_ptr + row * CHUNKS + chunk, tl.where(num_nan > 0, float("nan"), best))


@triton.jit
def find_kernel(
    logits_ptr, best_ptr, early_ptr, settings_ptr, tokens_ptr, rows_best_ptr, thresholds_ptr,
    counts_ptr, row_stride, NUM_TOKENS: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS_TILE: tl.constexpr, MAX_TOP_K: tl.constexpr,
):  # fmt: skip
    """``early`` are the chunks' best logits before edits: a fault there stays one.

    The threshold is infinity where the row is done.
    """
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, CHUNKS_TILE)
    there = chunks < CHUNKS
    best_C = tl.load(best_ptr + row * CHUNKS + chunks, mask=there, other=float("-inf"))
    early_C = tl.load(early_ptr + row * CHUNKS + chunks, mask=there, other=float("-inf"))
    early = _fault(early_C)
    late = _fault(best_C)
    fault = tl.where(early != 0, early, late)
    best = tl.max(tl.where(best_C != best_C, float("-inf"), best_C), axis=0)

    first = tl.min(tl.where(best_C == best, chunks, CHUNKS), axis=0)
    ids = first * CHUNK + tl.arange(0, CHUNK)
    logits = tl.load(
        logits_ptr + row * row_stride + ids, mask=ids < NUM_TOKENS, other=float("-inf")
    )
    greedy = tl.min(tl.where((logits == best) & (ids < NUM_TOKENS), ids, NUM_TOKENS), axis=0)

    is_greedy = tl.load(settings_ptr + row * 5) == 0.0
    top_k = tl.load(settings_ptr + row * 5 + 1).to(tl.int32)
    # The k-th best of the chunks' best logits: so many tokens reach it at least.
    ordered_C = tl.sort(
        tl.where(there & (best_C == best_C), best_C, float("-inf")), descending=True
    )
    kth = tl.max(tl.where(chunks == top_k - 1, ordered_C, float("-inf")), axis=0)
    drawn = (fault == 0) & (is_greedy == 0) & (top_k > 0) & (top_k <= MAX_TOP_K)
    token = tl.where(is_greedy, greedy, UNDECIDED)
    tl.store(tokens_ptr + row, tl.where(fault != 0, fault, token).to(tl.int64))
    tl.store(rows_best_ptr + row, best)
    tl.store(thresholds_ptr + row, tl.where(drawn, kth, float("inf")))
    tl.store(counts_ptr + row, 0)


@triton.jit
def _fault(best_C):
    """Of a row with these best logits; 0 where it has none."""
    num_nan = tl.sum((best_C != best_C).to(tl.int32), axis=0)
    best = tl.max(tl.where(best_C != best_C, float("-inf"), best_C), axis=0)
    infinite = tl.where(best == float("inf"), INFINITY, 0)
    infinite = tl.where(best == float("-inf"), NO_TOKEN, infinite)
    return tl.where(num_nan > 0, NAN, infinite)


@triton.jit
def collect_kernel(
    logits_ptr, best_ptr, thresholds_ptr, counts_ptr, found_ptr, row_stride,
    NUM_TOKENS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Ids of tokens that reach the row's threshold, in places taken from its count.

    What finds no room is counted all the same. Minus infinity has no weight and is left out.
    """
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    threshold = tl.load(thresholds_ptr + row)
    if tl.load(best_ptr + row * CHUNKS + chunk) >= threshold:
        ids = chunk * CHUNK + tl.arange(0, CHUNK)
        logits = tl.load(
            logits_ptr + row * row_stride + ids, mask=ids < NUM_TOKENS, other=float("-inf")
        )
        reaches = (logits >= threshold) & (logits > float("-inf")) & (logits < float("inf"))
        number = reaches.to(tl.int32)
        start = tl.atomic_add(counts_ptr + row, tl.sum(number, axis=0))
        places = start + tl.cumsum(number, axis=0) - 1
        tl.store(found_ptr + row * ROOM + places, ids, mask=reaches & (places < ROOM))


@triton.jit
def draw_kernel(
    logits_ptr, rows_best_ptr, thresholds_ptr, counts_ptr, found_ptr, settings_ptr, tokens_ptr,
    row_stride, ROOM: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr,
    P4: tl.constexpr, P5: tl.constexpr, P6: tl.constexpr, P7: tl.constexpr,
):  # fmt: skip
    """Draws a row's token among those that were found; leaves a row of more than had room."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + row)
    threshold = tl.load(thresholds_ptr + row)
    if (threshold < float("inf")) & (count <= ROOM):
        places = tl.arange(0, ROOM)
        there = places < count
        ids = tl.load(found_ptr + row * ROOM + places, mask=there, other=0)
        logits = tl.load(logits_ptr + row * row_stride + ids, mask=there, other=0.0)
        # Canonical order in whole numbers: best first, zeros of both signs equal, equals by id.
        bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)
        rank = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64)
        key = (rank << 32) + (0x7FFFFFFF - ids).to(tl.int64)
        key = tl.where(there, key, -0x7FFFFFFFFFFFFFFF)
        key = tl.sort(key, descending=True)
        ids = 0x7FFFFFFF - (key & 0x7FFFFFFF)
        rank_bits = (key >> 32).to(tl.int32)
        bits = tl.where(rank_bits >= 0, rank_bits, rank_bits ^ 0x7FFFFFFF)
        values = tl.where(there, bits.to(tl.float32, bitcast=True), float("-inf"))

        scale = tl.load(settings_ptr + row * 5)
        top_k = tl.load(settings_ptr + row * 5 + 1).to(tl.int32)
        top_p = tl.load(settings_ptr + row * 5 + 2)
        floor = tl.load(settings_ptr + row * 5 + 3)
        uniform = tl.load(settings_ptr + row * 5 + 4)
        best = tl.load(rows_best_ptr + row).to(tl.float64)
        kth = tl.max(tl.where(places == top_k - 1, values, float("-inf")), axis=0)
        exponents = tl.where(there, (values.to(tl.float64) - best) * scale, -64.0)
        weights = _weights(exponents, P1, P2, P3, P4, P5, P6, P7)
        weights = tl.where(there & (values >= kth), weights, 0)
        sums = tl.cumsum(weights, axis=0)
        total = tl.sum(weights, axis=0)
        limit = tl.maximum(tl.ceil(total.to(tl.float64) * top_p).to(tl.int64), 1)
        limit = tl.where(top_p >= 1.0, total + 1, limit)
        kept = (sums - weights < limit) & (exponents >= floor)
        weights = tl.where(kept, weights, 0)
        sums = tl.cumsum(weights, axis=0)
        mass = tl.sum(weights, axis=0)
        drawn = tl.minimum((mass.to(tl.float64) * uniform).to(tl.int64), mass - 1)
        place = tl.sum((sums <= drawn).to(tl.int32), axis=0)
        tl.store(tokens_ptr + row, tl.sum(tl.where(places == place, ids, 0), axis=0))


@triton.jit
def _weights(
    exponents, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr, P4: tl.constexpr,
    P5: tl.constexpr, P6: tl.constexpr, P7: tl.constexpr,
):  # fmt: skip
    """``weights_of`` of ``sampling/weights.py``: the same operations in the same order."""
    clamped = tl.maximum(exponents, -64.0)
    shifted = clamped + TO_WHOLE
    rest = clamped - (shifted - TO_WHOLE)
    power = rest * P7
    power = (power + P6) * rest
    power = (power + P5) * rest
    power = (power + P4) * rest
    power = (power + P3) * rest
    power = (power + P2) * rest
    power = (power + P1) * rest
    power = power + 1.0
    whole = (shifted.to(tl.int64, bitcast=True) + UNIT_BITS) << 52
    scaled = (whole + power.to(tl.int64, bitcast=True)).to(tl.float64, bitcast=True)
    # Half to even; a float64 of this size has no room for a fraction beside 1.5 * 2 ** 52.
    return ((scaled + TO_WHOLE) - TO_WHOLE).to(tl.int64)
