"""The native attention under windows and pages: what it gives, and what it does not touch."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inference_pio.kernels.context import NO_BLOCK, ContextItem, build_context
from inference_pio.kernels.native.attention import AttentionPool
from inference_pio.kernels.native.library import KernelError, Library
from inference_pio.kernels.native.pages import bound_pages
from inference_pio.kernels.pattern import FULL, AttentionPattern, page_bounds
from inference_pio.kernels.reference import ReferenceKernels

from ..coded_samples import coded
from ..pattern_samples import (
    BATCHES,
    CPU,
    EVERYTHING,
    PAGES,
    PART,
    WINDOWS,
    PatternCase,
    close,
    sample,
)

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def pools(library: Library) -> list[AttentionPool]:
    """Of teams of one, two and three threads."""
    return [AttentionPool(library, library.team(threads)) for threads in (1, 2, 3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", list(BATCHES))
def test_is_the_reference_in_any_number_of_threads(
    pools: list[AttentionPool], batch: str, dtype: torch.dtype
) -> None:
    for pattern in [*WINDOWS[::3], *PAGES]:
        case, expected = sample(batch, pattern, dtype)
        first, *others = (
            pool.plan(case.context)(case.q, case.cache, case.bounds) for pool in pools
        )
        close(first, expected.double())
        for got in others:
            assert torch.equal(got, first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", list(BATCHES))
def test_a_pattern_that_hides_nothing_is_full_attention_bit_for_bit(
    pools: list[AttentionPool], batch: str, dtype: torch.dtype
) -> None:
    for pattern in EVERYTHING[1:]:
        case, _ = sample(batch, pattern, dtype)
        got = pools[1].plan(case.context)(case.q, case.cache, case.bounds)
        full = pools[1].plan(case.context_with(FULL))(case.q, case.cache)
        assert torch.equal(got, full)


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 900), st.integers(1, 60)), min_size=1, max_size=3),
    pattern=st.one_of(
        st.builds(AttentionPattern, st.integers(1, 600), st.integers(0, 600)),
        st.builds(AttentionPattern, pages=st.integers(1, 5)),
    ),
    group=st.integers(1, 5),
    dim=st.integers(1, 70),
    block_size=st.integers(1, 40),
    prompt_len=st.integers(1, 900),
)
def test_any_shape(
    pools: list[AttentionPool],
    lengths: list[tuple[int, int]],
    pattern: AttentionPattern,
    group: int,
    dim: int,
    block_size: int,
    prompt_len: int,
) -> None:
    heads = (2 * group, 2, dim)
    case = PatternCase(lengths, pattern, heads, block_size=block_size, prompt_len=prompt_len)
    expected = ReferenceKernels().plan_attention(case.context)(case.q, case.clean)
    close(pools[1].plan(case.context)(case.q, case.cache, case.bounds), expected.double())


@pytest.mark.parametrize(
    "pattern",
    [AttentionPattern(50), AttentionPattern(PART + 60, 7), AttentionPattern(pages=2)],
    ids=str,
)
def test_a_float32_row_is_the_same_alone_and_in_any_chunk(
    pools: list[AttentionPool], pattern: AttentionPattern
) -> None:
    """Prompt and generated tokens at once, in chunks, token by token: the same bits."""
    length, prompt_len = 2 * PART + 70, PART
    case = PatternCase([(0, length), (30, 1)], pattern, (4, 2, 40), prompt_len=prompt_len)
    whole = pools[0].plan(case.context)(case.q, case.cache, case.bounds)[:length]
    for step in (1, 9, 33):
        for start in range(length - 70, length, step):
            end = min(start + step, length)
            item = ContextItem(case.tables[0], start, end - start, prompt_len)
            context = build_context([item], 16, CPU, pattern)
            got = pools[1].plan(context)(case.q[start:end], case.cache, case.bounds)
            assert torch.equal(got, whole[start:end]), (step, start)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sinks", [0, 5])
def test_keys_outside_the_window_are_not_visited(
    pools: list[AttentionPool], sinks: int, dtype: torch.dtype
) -> None:
    """But for those that share a granule or, with sinks, a part with visible ones."""
    case = PatternCase([(4990, 11)], AttentionPattern(128, sinks), (2, 1, 16), dtype)
    expected = pools[0].plan(case.context)(case.q, case.cache)
    first = (4990 + 1 - 128) // 64 * 64
    for number in range(PART // 16 if sinks else 0, first // 16):
        case.cache[case.tables[0][number]] = float("nan")
    for pool in pools:
        assert torch.equal(pool.plan(case.context)(case.q, case.cache), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", list(BATCHES))
def test_blocks_that_were_given_back_are_not_read(
    pools: list[AttentionPool], batch: str, dtype: torch.dtype
) -> None:
    """And what is computed in the place of their keys changes no bit."""
    for pattern in [*WINDOWS[::3], AttentionPattern(100, 300)]:
        case, _ = sample(batch, pattern, dtype)
        expected = pools[0].plan(case.context)(case.q, case.cache)
        context, cache = case.given_back(case.cache)
        for pool in pools[:2]:
            assert torch.equal(pool.plan(context)(case.q, cache), expected)


@pytest.mark.parametrize("kept_as", ["int8", "fp8"])
def test_codes_that_were_given_back_are_not_read(
    pools: list[AttentionPool], kept_as: Literal["int8", "fp8"]
) -> None:
    case = PatternCase([(700, 1), (3, 1), (560, 30)], AttentionPattern(100, 20))
    context, cache = case.given_back(case.clean)
    whole, holey = coded(case.clean, kept_as), coded(cache, kept_as)
    expected = pools[0].plan(case.context)(case.q, whole)
    assert not expected.isnan().any()
    assert torch.equal(pools[0].plan(context)(case.q, holey), expected)


def test_a_table_without_a_block_that_is_seen_is_refused(pools: list[AttentionPool]) -> None:
    case = PatternCase([(400, 1)], AttentionPattern(50, 20), (2, 1, 16))
    context, cache = case.given_back(case.cache)
    (table,) = context.block_tables
    for number in (0, 1, 21, 25):
        lacking = (*table[:number], NO_BLOCK, *table[number + 1 :])
        with pytest.raises(KernelError, match="a block table holds block -1"):
            pools[0].plan(replace(context, block_tables=(lacking,)))(case.q, cache)


def test_pages_that_are_not_chosen_are_not_visited(pools: list[AttentionPool]) -> None:
    case = PatternCase([(2000, 1)], AttentionPattern(pages=2), (2, 1, 16), prompt_len=40)
    bounds = case.bounds
    expected = pools[0].plan(case.context)(case.q, case.cache, bounds)
    keys = case.clean[case.tables[0], 0, 0].flatten(0, 1).double()
    seen = {position // 16 for position in case.seen(2000, case.q[0].double(), keys)}
    for number in set(range(125)) - seen:
        case.cache[case.tables[0][number]] = float("nan")
    assert torch.equal(pools[2].plan(case.context)(case.q, case.cache, bounds), expected)


def test_a_nan_in_a_query_stays_in_its_row(pools: list[AttentionPool]) -> None:
    case = PatternCase([(900, 3)], AttentionPattern(pages=2), (4, 2, 32), prompt_len=40)
    expected = pools[0].plan(case.context)(case.q, case.cache, case.bounds).view(-1, 4, 32)
    case.q[1, 3] = float("nan")
    got = pools[0].plan(case.context)(case.q, case.cache, case.bounds).view(-1, 4, 32)
    assert got[1, 3].isnan().all()
    assert torch.equal(got[[0, 2]], expected[[0, 2]])
    assert torch.equal(got[1, :2], expected[1, :2])  # the other KV head's choice is its own


@pytest.mark.parametrize("dtype", DTYPES)
def test_bounds_are_the_smallest_and_the_largest_keys(library: Library, dtype: torch.dtype) -> None:
    for shape in ((5, 2, 3, 16, 24), (4, 2, 1, 1, 7), (3, 2, 2, 64, 128)):
        cache = torch.randn(shape).to(dtype)
        found = torch.full((shape[0], 2, shape[2], shape[4]), 7, dtype=dtype)
        expected = found.clone()
        expected[[2, 0]] = page_bounds(cache[[2, 0], 0])
        bound_pages(library, library.team(2), cache, found, [2, 0])
        assert torch.equal(found, expected)


def test_errors_name_what_is_wrong(library: Library, pools: list[AttentionPool]) -> None:
    case = PatternCase([(200, 1)], AttentionPattern(pages=1), prompt_len=40)
    plan = pools[0].plan(case.context)
    with pytest.raises(ValueError, match="bounds are None; the pages of this cache have"):
        plan(case.q, case.cache)
    with pytest.raises(ValueError, match=r"bounds are torch\.float32 \[15, 2, 2, 24\]"):
        plan(case.q, case.cache, case.bounds[:-1])
    with pytest.raises(ValueError, match="blocks 3 to 16; the cache has 0 to 15"):
        bound_pages(library, library.team(1), case.cache, case.bounds, [3, 16])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_forty_thousand_positions(pools: list[AttentionPool], dtype: torch.dtype) -> None:
    for pattern in (AttentionPattern(4096, 4), AttentionPattern(pages=16)):
        lengths = [(40_959, 1), (40_900, 60)]
        case = PatternCase(lengths, pattern, (2, 1, 16), dtype, 64, prompt_len=40_940)
        expected = ReferenceKernels().plan_attention(case.context)(case.q, case.clean)
        got = pools[0].plan(case.context)(case.q, case.cache, case.bounds)
        close(got, expected.double())
        assert torch.equal(pools[2].plan(case.context)(case.q, case.cache, case.bounds), got)
