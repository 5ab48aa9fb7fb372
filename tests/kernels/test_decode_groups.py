"""Grouping of decode rows: everything once, little padding, bounded memory."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from inference_pio.kernels.context import ContextItem, ForwardContext, build_context
from inference_pio.kernels.torch_gather import (
    BLOCKS_PER_GROUP,
    MAX_GATHERED_TOKENS,
    Row,
    decode_groups,
)

BLOCK_SIZE = 64


def context_of(blocks: list[int]) -> ForwardContext:
    items = [ContextItem(range(count), count * BLOCK_SIZE - 1, 1) for count in blocks]
    return build_context(items, BLOCK_SIZE, torch.device("cpu"))


def groups_of(blocks: list[int]) -> list[list[int]]:
    rows = [Row(i, i, count * BLOCK_SIZE - 1) for i, count in enumerate(blocks)]
    return [[row.sequence for row in group] for group in decode_groups(context_of(blocks), rows)]


@given(st.lists(st.integers(1, 600), min_size=1, max_size=40))
def test_groups_cover_all_rows_within_their_bounds(blocks: list[int]) -> None:
    groups = groups_of(blocks)
    assert sorted(row for group in groups for row in group) == list(range(len(blocks)))
    for group in groups:
        sizes = [blocks[row] for row in group]
        padded = max(sizes) * len(sizes)
        # A row may join where it and all shorter ones together waste little.
        assert padded - sum(sizes) <= BLOCKS_PER_GROUP * len(sizes)
        assert len(group) == 1 or padded * BLOCK_SIZE <= MAX_GATHERED_TOKENS


def test_equal_lengths_stay_together_in_batch_order() -> None:
    assert groups_of([3] * 8) == [list(range(8))]


def test_a_long_sequence_does_not_pad_the_short_ones() -> None:
    assert groups_of([1, 200, 1, 1]) == [[1], [0, 2, 3]]
