"""Windows, sinks and pages: what a pattern says, and torch's and the reference's attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_pio.kernels.context import NO_BLOCK, ContextItem, build_context
from inference_pio.kernels.pattern import (
    FULL,
    AttentionPattern,
    choose_pages,
    page_bounds,
    page_scores,
)
from inference_pio.kernels.reference import ReferenceKernels
from inference_pio.kernels.torch_ops import TorchKernels

from .pattern_samples import BATCHES, CPU, EVERYTHING, PAGES, WINDOWS, PatternCase, close, sample

DTYPES = [torch.float32, torch.bfloat16]


@settings(deadline=None, max_examples=40)
@given(
    position=st.integers(0, 200),
    count=st.integers(1, 60),
    window=st.integers(1, 300),
    sinks=st.integers(0, 100),
    size=st.integers(1, 40),
)
def test_block_numbers_are_those_that_hold_a_visible_key(
    position: int, count: int, window: int, sinks: int, size: int
) -> None:
    pattern = AttentionPattern(window, sinks)
    last = position + count - 1
    rows = range(position, last + 1)
    seen = pattern.visible(torch.tensor(rows)[:, None], torch.arange(last + 1))
    by_hand = [
        [i - window < j <= i or j < min(sinks, i + 1) for j in range(last + 1)] for i in rows
    ]
    assert seen.tolist() == by_hand
    holding = {key // size for key, some in enumerate(seen.any(0).tolist()) if some}
    assert pattern.block_numbers(position, last, size) == sorted(holding)


@settings(deadline=None, max_examples=40)
@given(
    position=st.integers(0, 150),
    window=st.integers(1, 120),
    sinks=st.integers(0, 60),
    size=st.integers(1, 30),
)
def test_hidden_blocks_are_those_that_no_later_token_sees(
    position: int, window: int, sinks: int, size: int
) -> None:
    pattern = AttentionPattern(window, sinks)
    rows = torch.arange(position, position + window + 2 * size)  # behind them nothing is new
    keys = torch.arange(position // size * size)
    seen = pattern.visible(rows[:, None], keys).any(0).tolist()
    by_hand = [n for n in range(position // size) if not any(seen[n * size : (n + 1) * size])]
    assert list(pattern.hidden_blocks(position, size)) == by_hand


@pytest.mark.parametrize("pattern", [FULL, *PAGES], ids=str)
def test_nothing_is_hidden_for_good_without_a_window(pattern: AttentionPattern) -> None:
    assert not pattern.hidden_blocks(5000, 4)
    assert pattern.most_blocks(3, 5000, 9, 4) == 1250


@settings(deadline=None, max_examples=60)
@given(
    start=st.integers(0, 90),
    count=st.integers(1, 90),
    chunk=st.integers(1, 40),
    window=st.integers(1, 60),
    sinks=st.integers(0, 40),
    size=st.integers(1, 12),
    data=st.data(),
)
def test_a_sequence_never_needs_more_than_most_blocks(
    start: int, count: int, chunk: int, window: int, sinks: int, size: int, data: st.DataObject
) -> None:
    pattern, end = AttentionPattern(window, sinks), start + count
    most, position = pattern.most_blocks(start, end, chunk, size), start
    while position < end:
        new = data.draw(st.integers(1, min(chunk, end - position)))
        held = len(pattern.block_numbers(position, position + new - 1, size))
        assert held <= most
        position += new


def test_most_blocks_are_reached() -> None:
    """Window and chunk begin with a block's last token and end with a block's first."""
    pattern = AttentionPattern(window=6, sinks=5)
    assert pattern.most_blocks(0, 100, 5, 4) == 2 + 4
    assert len(pattern.block_numbers(20, 24, 4)) == 2 + 4


def test_a_table_without_a_block_that_is_seen_is_refused() -> None:
    pattern = AttentionPattern(window=8, sinks=3)  # token 30 sees 0 to 2, and 23 to 30
    table = [5, NO_BLOCK, NO_BLOCK, NO_BLOCK, NO_BLOCK, 9, 7, 8]
    build_context([ContextItem(table, 30, 2)], 4, CPU, pattern)
    for number in (0, 5, 6, 7):
        lacking = [*table[:number], NO_BLOCK, *table[number + 1 :]]
        with pytest.raises(ValueError, match="sequence 0 lacks a block that its tokens from 30"):
            build_context([ContextItem(lacking, 30, 2)], 4, CPU, pattern)
    with pytest.raises(ValueError, match="lacks a block"):
        build_context([ContextItem(table, 30, 2)], 4, CPU)


def test_a_generated_token_selects_once_there_are_more_pages_than_it_may_see() -> None:
    pattern = AttentionPattern(pages=2)  # with the first and the last two: five blocks of 4
    items = [ContextItem(range(9), 18, 9, prompt_len) for prompt_len in (5, 22, 40)]
    context = build_context(items, 4, CPU, pattern)
    assert context.select_starts == (20, 22, 40)
    assert [context.num_selecting(i) for i in range(3)] == [7, 5, 0]
    assert build_context(items, 4, CPU).num_selecting(0) == 0


def test_filled_blocks_are_those_whose_last_token_is_new() -> None:
    items = [ContextItem([5, 6, 7], 3, 6), ContextItem([1, 2], 4, 3), ContextItem([9], 0, 4)]
    assert build_context(items, 4, CPU).filled_blocks == (5, 6, 9)


def test_page_scores_bound_every_product() -> None:
    torch.manual_seed(0)
    keys, q = torch.randn(1, 7, 2, 16, 24), torch.randn(1, 2, 3, 24)
    scores = page_scores(q, page_bounds(keys[0])[None])
    products = torch.einsum("rkgd,rckld->rkcgl", q, keys).sum(3).amax(-1)
    assert scores.shape == (1, 2, 7)
    assert (scores >= products).all()
    alone = page_scores(q[:, :, :1], page_bounds(keys[0, :, :, :1])[None])  # exact for one key
    close(
        alone[0],
        torch.einsum("rkgd,rckld->kcgl", q[:, :, :1], keys[..., :1, :])[..., 0, 0].double(),
    )


def test_pages_are_chosen_among_those_that_are_not_always_seen() -> None:
    scores = torch.tensor([[[9.0, 1, 3, 2, 5, 8, 9, 9]], [[9, 1, 3, 2, 5, 8, 9, 9]]])
    chosen = choose_pages(scores, torch.tensor([6, 8]), 2)
    assert chosen.tolist() == [[[0, 2, 4, 5, 6]], [[0, 5, 6, 7, 8]]]


@pytest.mark.parametrize("batch", list(BATCHES))
@pytest.mark.parametrize("pattern", [*WINDOWS[::5], PAGES[1]], ids=str)
def test_reference_is_the_masked_softmax_in_float64(pattern: AttentionPattern, batch: str) -> None:
    case, got = sample(batch, pattern, torch.float32)
    close(got, case.masked())


@pytest.mark.parametrize("batch", list(BATCHES))
@pytest.mark.parametrize("pattern", [*WINDOWS[::2], *PAGES], ids=str)
def test_torch_is_the_reference(pattern: AttentionPattern, batch: str) -> None:
    for dtype in DTYPES:
        case, expected = sample(batch, pattern, dtype)
        attention = TorchKernels().plan_attention(case.context)
        for _ in range(2):  # a plan serves every layer
            got = attention(case.q, case.clean, case.bounds)
            close(got, expected.double())


@pytest.mark.parametrize("batch", list(BATCHES))
@pytest.mark.parametrize("pattern", EVERYTHING[1:], ids=str)
def test_a_pattern_that_hides_nothing_is_full_attention(
    pattern: AttentionPattern, batch: str
) -> None:
    case, by_reference = sample(batch, pattern, torch.float32)
    assert torch.equal(by_reference, sample(batch, FULL, torch.float32)[1])
    kernels, full = TorchKernels(), case.context_with(FULL)
    got = kernels.plan_attention(case.context)(case.q, case.clean, case.bounds)
    assert torch.equal(got, kernels.plan_attention(full)(case.q, case.clean))


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 200), st.integers(1, 160)), min_size=1, max_size=3),
    pattern=st.one_of(
        st.builds(AttentionPattern, st.integers(1, 200), st.integers(0, 60)),
        st.builds(AttentionPattern, pages=st.integers(1, 5)),
    ),
    block_size=st.integers(1, 30),
    prompt_len=st.integers(1, 300),
)
def test_torch_is_the_reference_on_any_shape(
    lengths: list[tuple[int, int]], pattern: AttentionPattern, block_size: int, prompt_len: int
) -> None:
    case = PatternCase(lengths, pattern, (4, 2, 8), block_size=block_size, prompt_len=prompt_len)
    expected = ReferenceKernels().plan_attention(case.context)(case.q, case.clean)
    got = TorchKernels().plan_attention(case.context)(case.q, case.clean, case.bounds)
    close(got, expected.double())


@pytest.mark.parametrize("batch", list(BATCHES))
@pytest.mark.parametrize("pattern", WINDOWS[1::5], ids=str)
def test_blocks_that_were_given_back_are_not_read(pattern: AttentionPattern, batch: str) -> None:
    for dtype in DTYPES:
        case, by_reference = sample(batch, pattern, dtype)
        context, cache = case.given_back(case.clean)
        whole = TorchKernels().plan_attention(case.context)(case.q, case.clean)
        assert torch.equal(TorchKernels().plan_attention(context)(case.q, cache), whole)
        assert torch.equal(ReferenceKernels().plan_attention(context)(case.q, cache), by_reference)


@pytest.mark.parametrize("pattern", [AttentionPattern(50), AttentionPattern(pages=2)], ids=str)
def test_blocks_that_are_not_seen_may_hold_anything(pattern: AttentionPattern) -> None:
    """So they are not gathered."""
    case = PatternCase([(400, 1)], pattern, (2, 1, 16), prompt_len=40)
    kernels, bounds = TorchKernels(), case.bounds
    expected = kernels.plan_attention(case.context)(case.q, case.clean, bounds)
    seen = case.seen(
        400, case.q[0].double(), case.clean[case.tables[0], 0, 0].flatten(0, 1).double()
    )
    hidden = set(range(26)) - {position // 16 for position in seen}
    assert len(hidden) > 15
    for number in hidden:
        case.clean[case.tables[0][number]] = float("nan")
    assert torch.equal(kernels.plan_attention(case.context)(case.q, case.clean, bounds), expected)
