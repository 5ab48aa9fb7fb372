"""Device code of sampling: what of a row matters, without a sort of the vocabulary.

Launches for all rows, each reading what the ones before it wrote:
1. ``chunk_best_kernel``: the best and the lowest logit of each chunk of each row.
2. ``find_kernel``: faults, greedy tokens, and a threshold: what lies below it is never drawn.
3. ``field_kernel``: the tokens that reach it, as a list as long as they are few, and as bins.
4. the kernels of ``draw_code``, which take the token. Where there is no room for a row's list they
   ask for one bin of it after the other, which ``gather_kernel`` lists.

Probabilities are the whole numbers of ``sampling/weights.py``, step by step: whatever computes
weights is compiled without contraction of products and sums. Sums of whole numbers are exact in any
order, so it does not matter in which one programs add to them, nor in which places they list.

A row's numbers: ``settings`` float64 [R, 5], its ``Draw``; ``bounds`` float32 [R, 3], its best
logit, its threshold, and bins per two of logits; ``state`` int64 [R, 8], in the places below.
"""

from __future__ import annotations

import triton
import triton.language as tl

NAN = tl.constexpr(-1)
INFINITY = tl.constexpr(-2)
NO_TOKEN = tl.constexpr(-3)
TO_WHOLE = tl.constexpr(6755399441055744.0)  # 1.5 * 2 ** 52
UNIT_BITS = tl.constexpr(44)
VANISHED = tl.constexpr(-46.5)
"""Exponents as low as this have no weight."""
LARGEST = tl.constexpr(3.0e38)
"""Within float32."""

STAGE = tl.constexpr(0)
"""What is looked for: ``KTH``, ``NUCLEUS``, ``PICK``, or nothing any more."""
TARGET = tl.constexpr(1)
"""The measure (tokens for ``KTH``, else mass) that the tokens up to what is looked for exceed."""
KEPT = tl.constexpr(2)
"""Mass of the tokens that the filters so far have left."""
COUNT = tl.constexpr(3)
"""Tokens of the field."""
GATHERED = tl.constexpr(4)
"""Tokens of the bin that was asked for."""
BASE_MASS = tl.constexpr(5)
BASE_MEASURE = tl.constexpr(6)
"""Of the bins before it."""
FIELDS = tl.constexpr(8)

KTH = tl.constexpr(0)
NUCLEUS = tl.constexpr(1)
PICK = tl.constexpr(2)
DONE = tl.constexpr(3)

ID_BITS = tl.constexpr(18)
LAST_ID = tl.constexpr((1 << 18) - 1)


@triton.jit
def chunk_best_kernel(
    logits_ptr, best_ptr, lowest_ptr, row_stride, NUM_TOKENS: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The best is NaN where the chunk has one; the lowest is that above minus infinity."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    there = ids < NUM_TOKENS
    logits = tl.load(logits_ptr + row * row_stride + ids, mask=there, other=float("-inf"))
    num_nan = tl.sum((logits != logits).to(tl.int32), axis=0)
    best = tl.max(tl.where(logits != logits, float("-inf"), logits), axis=0)
    lowest = tl.min(tl.where(logits > float("-inf"), logits, float("inf")), axis=0)
    tl.store(best_ptr + row * CHUNKS + chunk, tl.where(num_nan > 0, float("nan"), best))
    tl.store(lowest_ptr + row * CHUNKS + chunk, lowest)


@triton.jit
def find_kernel(
    logits_ptr, best_ptr, lowest_ptr, early_ptr, settings_ptr, tokens_ptr, bounds_ptr, state_ptr,
    mass_bins_ptr, count_bins_ptr, row_stride, NUM_TOKENS: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS_TILE: tl.constexpr, BINS: tl.constexpr, HAS_BINS: tl.constexpr,
):  # fmt: skip
    """``early`` are the chunks' best logits before edits: a fault there stays one.

    The threshold is NaN, which nothing reaches, where the row is done.
    """
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, CHUNKS_TILE)
    there = chunks < CHUNKS
    best_C = tl.load(best_ptr + row * CHUNKS + chunks, mask=there, other=float("-inf"))
    early_C = tl.load(early_ptr + row * CHUNKS + chunks, mask=there, other=float("-inf"))
    lowest_C = tl.load(lowest_ptr + row * CHUNKS + chunks, mask=there, other=float("inf"))
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

    scale = tl.load(settings_ptr + row * 5)
    top_k = tl.load(settings_ptr + row * 5 + 1).to(tl.int32)
    top_p = tl.load(settings_ptr + row * 5 + 2)
    floor = tl.load(settings_ptr + row * 5 + 3)
    is_greedy = scale == 0.0
    kth = kth_of_chunks(best_C, chunks, CHUNKS, top_k)
    # Without top-p nothing below the floor counts; half an exponent is more than rounding.
    lowest_exponent = tl.where(top_p >= 1.0, tl.maximum(floor - 0.5, VANISHED), VANISHED)
    reach = best.to(tl.float64) + lowest_exponent / tl.where(is_greedy, 1.0, scale)
    reach = tl.maximum(reach, -LARGEST).to(tl.float32)
    low = tl.maximum(tl.maximum(kth, reach), tl.min(lowest_C, axis=0))
    low = tl.maximum(low, -LARGEST)
    # In halves, whose difference is finite; of a row at fault it does not matter.
    wide = tl.where(fault == 0, best, 0.0) * 0.5 - tl.where(fault == 0, low, 0.0) * 0.5
    wide = tl.where(wide > 0.0, wide, LARGEST)
    per_unit = tl.minimum(BINS / wide, LARGEST)

    drawn = (fault == 0) & (is_greedy == 0)
    unfiltered = (top_k == 0) & (top_p >= 1.0) & (floor == float("-inf"))
    tl.store(tokens_ptr + row, tl.where(fault != 0, fault, greedy).to(tl.int64))
    tl.store(bounds_ptr + row * 3, best)
    tl.store(bounds_ptr + row * 3 + 1, tl.where(drawn, low, float("nan")))
    tl.store(bounds_ptr + row * 3 + 2, per_unit)
    fields = tl.arange(0, FIELDS)
    stage = tl.where(drawn & (unfiltered == 0), KTH, DONE)
    tl.store(state_ptr + row * FIELDS + fields, tl.where(fields == STAGE, stage, 0).to(tl.int64))
    if HAS_BINS:
        bins = tl.arange(0, BINS)
        tl.store(mass_bins_ptr + row * BINS + bins, tl.zeros((BINS,), dtype=tl.int64))
        tl.store(count_bins_ptr + row * BINS + bins, tl.zeros((BINS,), dtype=tl.int32))


@triton.jit
def kth_of_chunks(best_C, chunks, CHUNKS: tl.constexpr, top_k):
    """The k-th best of the chunks' best logits: so many tokens reach it at least.

    Minus infinity where ``top_k`` is 0 or more than there are chunks.
    """
    ordered_C = tl.sort(
        tl.where((chunks < CHUNKS) & (best_C == best_C), best_C, float("-inf")), descending=True
    )
    return tl.max(tl.where(chunks == top_k - 1, ordered_C, float("-inf")), axis=0)


@triton.jit
def _fault(best_C):
    """Of a row with these best logits; 0 where it has none."""
    num_nan = tl.sum((best_C != best_C).to(tl.int32), axis=0)
    best = tl.max(tl.where(best_C != best_C, float("-inf"), best_C), axis=0)
    infinite = tl.where(best == float("inf"), INFINITY, 0)
    infinite = tl.where(best == float("-inf"), NO_TOKEN, infinite)
    return tl.where(num_nan > 0, NAN, infinite)


@triton.jit
def field_kernel(
    logits_ptr, best_ptr, bounds_ptr, settings_ptr, state_ptr, found_ptr, masses_ptr,
    floor_masses_ptr, mass_bins_ptr, count_bins_ptr, row_stride, NUM_TOKENS: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, ROOM: tl.constexpr, BINS: tl.constexpr,
    HAS_BINS: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr,
    P4: tl.constexpr, P5: tl.constexpr, P6: tl.constexpr, P7: tl.constexpr,
):  # fmt: skip
    """The tokens that reach the row's threshold, in places taken from its count.

    What finds no room is counted all the same. ``masses`` are their weights by chunk,
    ``floor_masses`` those of tokens that min-p leaves.
    """
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    low = tl.load(bounds_ptr + row * 3 + 1)
    mass = tl.zeros((), dtype=tl.int64)
    floor_mass = tl.zeros((), dtype=tl.int64)
    if tl.load(best_ptr + row * CHUNKS + chunk) >= low:
        best = tl.load(bounds_ptr + row * 3)
        scale = tl.load(settings_ptr + row * 5)
        floor = tl.load(settings_ptr + row * 5 + 3)
        ids = chunk * CHUNK + tl.arange(0, CHUNK)
        logits = tl.load(
            logits_ptr + row * row_stride + ids, mask=ids < NUM_TOKENS, other=float("-inf")
        )
        reaches = (logits >= low) & (logits < float("inf"))
        exponents = (tl.where(reaches, logits, best).to(tl.float64) - best.to(tl.float64)) * scale
        weights = weights_of(exponents, P1, P2, P3, P4, P5, P6, P7)
        weights = tl.where(reaches, weights, 0)
        mass = tl.sum(weights, axis=0)
        floor_mass = tl.sum(tl.where(exponents >= floor, weights, 0), axis=0)
        if tl.load(state_ptr + row * FIELDS + STAGE) != DONE:
            number = reaches.to(tl.int32)
            count = tl.sum(number, axis=0).to(tl.int64)
            start = tl.atomic_add(state_ptr + row * FIELDS + COUNT, count)
            places = start + tl.cumsum(number, axis=0) - 1
            tl.store(found_ptr + row * ROOM + places, ids, mask=reaches & (places < ROOM))
            if HAS_BINS:
                bins = _bin_of(logits, best, tl.load(bounds_ptr + row * 3 + 2), reaches, BINS)
                tl.atomic_add(mass_bins_ptr + row * BINS + bins, weights, mask=reaches)
                top_k = tl.load(settings_ptr + row * 5 + 1).to(tl.int32)
                counted = reaches & (top_k > 0)
                tl.atomic_add(count_bins_ptr + row * BINS + bins, number, mask=counted)
    tl.store(masses_ptr + row * CHUNKS + chunk, mass)
    tl.store(floor_masses_ptr + row * CHUNKS + chunk, floor_mass)


@triton.jit
def gather_kernel(
    logits_ptr, best_ptr, bounds_ptr, state_ptr, found_ptr, mass_bins_ptr, count_bins_ptr,
    row_stride, NUM_TOKENS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    ROOM: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """The tokens of the bin in which the row's measure passes its target."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    stage = tl.load(state_ptr + row * FIELDS + STAGE)
    chunk_best = tl.load(best_ptr + row * CHUNKS + chunk)
    low = tl.load(bounds_ptr + row * 3 + 1)
    if (stage != DONE) & ((chunk == 0) | (chunk_best >= low)):
        best = tl.load(bounds_ptr + row * 3)
        per_unit = tl.load(bounds_ptr + row * 3 + 2)
        bins = tl.arange(0, BINS)
        mass_B = tl.load(mass_bins_ptr + row * BINS + bins)
        measure_B = mass_B
        if stage == KTH:
            measure_B = tl.load(count_bins_ptr + row * BINS + bins).to(tl.int64)
        target = tl.load(state_ptr + row * FIELDS + TARGET)
        asked = tl.sum((tl.cumsum(measure_B, axis=0) <= target).to(tl.int32), axis=0)
        if chunk == 0:
            before = bins < asked
            base_mass = tl.sum(tl.where(before, mass_B, 0), axis=0)
            tl.store(state_ptr + row * FIELDS + BASE_MASS, base_mass)
            base_measure = tl.sum(tl.where(before, measure_B, 0), axis=0)
            tl.store(state_ptr + row * FIELDS + BASE_MEASURE, base_measure)
        ids = chunk * CHUNK + tl.arange(0, CHUNK)
        logits = tl.load(
            logits_ptr + row * row_stride + ids, mask=ids < NUM_TOKENS, other=float("-inf")
        )
        reaches = (logits >= low) & (logits < float("inf"))
        asked_for = reaches & (_bin_of(logits, best, per_unit, reaches, BINS) == asked)
        number = asked_for.to(tl.int32)
        count = tl.sum(number, axis=0).to(tl.int64)
        if count > 0:
            start = tl.atomic_add(state_ptr + row * FIELDS + GATHERED, count)
            places = start + tl.cumsum(number, axis=0) - 1
            tl.store(found_ptr + row * ROOM + places, ids, mask=asked_for & (places < ROOM))


@triton.jit
def _bin_of(logits, best, per_unit, reaches, BINS: tl.constexpr):
    """Better tokens come in earlier bins, equal ones in the same: every step is monotone."""
    below = best * 0.5 - tl.where(reaches, logits, best) * 0.5
    return tl.minimum(below * per_unit, BINS - 1.0).to(tl.int32)


@triton.jit
def key_of(logits, ids):
    """A whole number that orders tokens: best first, zeros of both signs equal, equals by id."""
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)
    rank = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64)
    return (rank << ID_BITS) + (ids ^ LAST_ID)


@triton.jit
def id_of(key):
    """The token that has it."""
    return (key & LAST_ID) ^ LAST_ID


@triton.jit
def weights_of(
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
