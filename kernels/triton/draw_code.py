"""Device code of sampling: takes the token, by bisection on whole numbers instead of a sort.

Tokens are ordered by a key that no two share (``key_of``), and the filters leave the first ones of
that order. So each stage of a draw asks the same: which is the first token through which the
measure of the tokens up to it exceeds a target? ``KTH`` measures tokens, for top-k; ``NUCLEUS``
mass, for top-p; ``PICK`` mass again, for the random number. Min-p needs no search: it leaves the
smaller of two masses.

A search goes through the tokens that lie in a row's list, in registers, and where they found no
room there, through the row as often as the bisection takes steps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sampling_code import (
    BASE_MASS,
    BASE_MEASURE,
    COUNT,
    DONE,
    FIELDS,
    GATHERED,
    ID_BITS,
    KEPT,
    KTH,
    NUCLEUS,
    PICK,
    STAGE,
    TARGET,
    id_of,
    key_of,
    weights_of,
)


@triton.jit
def draw_kernel(
    logits_ptr, best_ptr, bounds_ptr, settings_ptr, state_ptr, found_ptr, masses_ptr,
    floor_masses_ptr, tokens_ptr, row_stride, NUM_TOKENS: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS_TILE: tl.constexpr, ROOM: tl.constexpr, IS_FIRST: tl.constexpr,
    IS_LAST: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr,
    P4: tl.constexpr, P5: tl.constexpr, P6: tl.constexpr, P7: tl.constexpr,
):  # fmt: skip
    """All stages of a row whose field lies in its list.

    Of another row the first launch says what is looked for first, each later one takes one stage,
    and the last one all that are left.
    """
    row = tl.program_id(0).to(tl.int64)
    state_ptr += row * FIELDS
    stage = tl.load(state_ptr + STAGE)
    if stage != DONE:
        settings_ptr += row * 5
        scale = tl.load(settings_ptr)
        top_p = tl.load(settings_ptr + 2)
        uniform = tl.load(settings_ptr + 4)
        best = tl.load(bounds_ptr + row * 3)
        low = tl.load(bounds_ptr + row * 3 + 1)
        logits_ptr += row * row_stride
        best_ptr += row * CHUNKS
        chunks = tl.arange(0, CHUNKS_TILE)
        there = chunks < CHUNKS
        floor_mass_C = tl.load(floor_masses_ptr + row * CHUNKS + chunks, mask=there, other=0)
        floor_mass = tl.sum(floor_mass_C, axis=0)
        count = tl.load(state_ptr + COUNT)
        target = tl.load(state_ptr + TARGET)
        kept = tl.load(state_ptr + KEPT)
        if IS_FIRST:
            kept = tl.sum(tl.load(masses_ptr + row * CHUNKS + chunks, mask=there, other=0), axis=0)
            top_k = tl.load(settings_ptr + 1).to(tl.int64)
            stage, target = _stage_after(KTH, kept, floor_mass, top_p, uniform)
            if (top_k > 0) & (top_k < count):
                stage = tl.full((), KTH, dtype=tl.int64)
                target = top_k - 1
        listed = count
        is_whole = count <= ROOM
        base_mass = count * 0
        base_measure = count * 0
        if IS_FIRST == 0:
            listed = tl.load(state_ptr + GATHERED)
            base_mass = tl.load(state_ptr + BASE_MASS)
            base_measure = tl.load(state_ptr + BASE_MEASURE)
            is_whole = count < 0
        has_room = listed <= ROOM

        places = tl.arange(0, ROOM)
        there = has_room & (places < listed)
        ids = tl.load(found_ptr + row * ROOM + places, mask=there, other=0)
        logits = tl.load(logits_ptr + ids, mask=there, other=0.0)
        exponents = (tl.where(there, logits, best).to(tl.float64) - best.to(tl.float64)) * scale
        weights = weights_of(exponents, P1, P2, P3, P4, P5, P6, P7)
        weights = tl.where(there, weights, 0)
        keys = key_of(logits, ids)
        first_id = tl.zeros((), dtype=tl.int32)
        best_key = key_of(best, first_id)

        goes_on = is_whole | (IS_FIRST == 0) | IS_LAST
        while goes_on:
            by_count = stage == KTH
            if has_room:
                measures = tl.where(by_count, there.to(tl.int64), weights)
                lowest = tl.min(tl.where(there, keys, best_key), axis=0)
                highest = tl.max(tl.where(there, keys, lowest), axis=0)
                while lowest < highest:
                    middle = highest - ((highest - lowest) >> 1)
                    reached = tl.sum(tl.where(there & (keys >= middle), measures, 0), axis=0)
                    exceeds = base_measure + reached > target
                    lowest = tl.where(exceeds, middle, lowest)
                    highest = tl.where(exceeds, highest, middle - 1)
                cut = tl.where(by_count, (lowest >> ID_BITS) << ID_BITS, lowest)
                through = base_mass + tl.sum(tl.where(there & (keys >= cut), weights, 0), axis=0)
            else:
                lowest = (key_of(low, first_id) >> ID_BITS) << ID_BITS
                highest = best_key
                while lowest < highest:
                    middle = highest - ((highest - lowest) >> 1)
                    reached = _through(
                        logits_ptr, best_ptr, middle, by_count, best, low, scale, NUM_TOKENS,
                        CHUNKS, CHUNK, P1, P2, P3, P4, P5, P6, P7,
                    )  # fmt: skip
                    exceeds = reached > target
                    lowest = tl.where(exceeds, middle, lowest)
                    highest = tl.where(exceeds, highest, middle - 1)
                cut = tl.where(by_count, (lowest >> ID_BITS) << ID_BITS, lowest)
                through = _through(
                    logits_ptr, best_ptr, cut, stage == DONE, best, low, scale, NUM_TOKENS, CHUNKS,
                    CHUNK, P1, P2, P3, P4, P5, P6, P7,
                )  # fmt: skip
            if stage == PICK:
                tl.store(tokens_ptr + row, id_of(lowest))
                stage = tl.full((), DONE, dtype=tl.int64)
            else:
                kept = through
                stage, target = _stage_after(stage, kept, floor_mass, top_p, uniform)
            goes_on = (stage != DONE) & (is_whole | IS_LAST)
            has_room = is_whole
            base_mass = count * 0
            base_measure = count * 0
        tl.store(state_ptr + STAGE, stage)
        tl.store(state_ptr + TARGET, target)
        tl.store(state_ptr + KEPT, kept)
        tl.store(state_ptr + GATHERED, count * 0)


@triton.jit
def _stage_after(stage, kept, floor_mass, top_p, uniform):
    """What to look for next, and its target, once ``stage`` has left a mass of ``kept``."""
    limit = tl.maximum(tl.ceil(kept.to(tl.float64) * top_p).to(tl.int64), 1)
    mass = tl.minimum(kept, floor_mass)
    drawn = tl.minimum((mass.to(tl.float64) * uniform).to(tl.int64), mass - 1)
    has_nucleus = (stage < NUCLEUS) & (top_p < 1.0) & (limit <= kept)
    next_stage = tl.where(has_nucleus, NUCLEUS, PICK).to(tl.int64)
    return next_stage, tl.where(has_nucleus, limit - 1, drawn)


@triton.jit
def _through(
    logits_ptr, best_ptr, key, by_count, best, low, scale, NUM_TOKENS: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    P3: tl.constexpr, P4: tl.constexpr, P5: tl.constexpr, P6: tl.constexpr, P7: tl.constexpr,
):  # fmt: skip
    """The measure of a row's tokens down to a key, by a pass over its field."""
    total = tl.zeros((), dtype=tl.int64)
    for chunk in range(CHUNKS):
        if tl.load(best_ptr + chunk) >= low:
            ids = chunk * CHUNK + tl.arange(0, CHUNK)
            logits = tl.load(logits_ptr + ids, mask=ids < NUM_TOKENS, other=float("-inf"))
            reaches = (logits >= low) & (logits < float("inf")) & (key_of(logits, ids) >= key)
            exponents = tl.where(reaches, logits, best).to(tl.float64) - best.to(tl.float64)
            weights = weights_of(exponents * scale, P1, P2, P3, P4, P5, P6, P7)
            measures = tl.where(by_count, tl.full((CHUNK,), 1, dtype=tl.int64), weights)
            total += tl.sum(tl.where(reaches, measures, 0), axis=0)
    return total


@triton.jit
def draw_by_id_kernel(
    logits_ptr, bounds_ptr, settings_ptr, masses_ptr, tokens_ptr, row_stride,
    NUM_TOKENS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS_TILE: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr,
    P4: tl.constexpr, P5: tl.constexpr, P6: tl.constexpr, P7: tl.constexpr,
):  # fmt: skip
    """Rows that nothing filters: their tokens come in the order of the ids."""
    row = tl.program_id(0).to(tl.int64)
    settings_ptr += row * 5
    top_k = tl.load(settings_ptr + 1)
    top_p = tl.load(settings_ptr + 2)
    floor = tl.load(settings_ptr + 3)
    best = tl.load(bounds_ptr + row * 3)
    low = tl.load(bounds_ptr + row * 3 + 1)
    unfiltered = (top_k == 0.0) & (top_p >= 1.0) & (floor == float("-inf"))
    if unfiltered & (low == low):
        scale = tl.load(settings_ptr)
        uniform = tl.load(settings_ptr + 4)
        chunks = tl.arange(0, CHUNKS_TILE)
        mass_C = tl.load(masses_ptr + row * CHUNKS + chunks, mask=chunks < CHUNKS, other=0)
        mass = tl.sum(mass_C, axis=0)
        drawn = tl.minimum((mass.to(tl.float64) * uniform).to(tl.int64), mass - 1)
        chunk = tl.sum((tl.cumsum(mass_C, axis=0) <= drawn).to(tl.int32), axis=0)
        before = tl.sum(tl.where(chunks < chunk, mass_C, 0), axis=0)
        ids = chunk * CHUNK + tl.arange(0, CHUNK)
        logits = tl.load(
            logits_ptr + row * row_stride + ids, mask=ids < NUM_TOKENS, other=float("-inf")
        )
        reaches = logits >= low
        exponents = (tl.where(reaches, logits, best).to(tl.float64) - best.to(tl.float64)) * scale
        weights = tl.where(reaches, weights_of(exponents, P1, P2, P3, P4, P5, P6, P7), 0)
        sums = before + tl.cumsum(weights, axis=0)
        place = tl.sum((sums <= drawn).to(tl.int32), axis=0)
        tl.store(tokens_ptr + row, (chunk * CHUNK + place).to(tl.int64))
