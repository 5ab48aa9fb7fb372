"""Contexts: positions, slots and block tables of a step."""

from __future__ import annotations

import pytest
import torch

from inference_pio.kernels.context import ContextItem, build_context

CPU = torch.device("cpu")


def test_slots_follow_the_block_table() -> None:
    context = build_context([ContextItem([7, 2], 3, 3)], 4, CPU)
    assert context.positions_T.tolist() == [3, 4, 5]
    assert context.slots_T.tolist() == [7 * 4 + 3, 2 * 4, 2 * 4 + 1]
    assert context.block_tables == ((7, 2),)


def test_sequences_lie_one_after_the_other() -> None:
    context = build_context([ContextItem([0], 0, 2), ContextItem([1, 3, 9], 5, 1)], 4, CPU)
    assert context.query_starts == (0, 2, 3)
    assert context.seq_lens == (2, 6)
    assert context.last_token_rows == (1, 2)
    assert context.block_tables == ((0,), (1, 3))  # the block it does not need yet is cut off
    assert context.num_sequences == 2


@pytest.mark.parametrize(
    ("computed", "new", "expected"),
    [
        (0, 3, (5,)),  # enters the first block and leaves it partly filled
        (0, 4, ()),  # fills it
        (0, 5, (6,)),
        (3, 1, ()),  # fills a block it entered before
        (4, 1, (6,)),  # the first token of the second block
        (5, 1, ()),  # inside a block entered before
        (3, 3, (6,)),
    ],
)
def test_new_partial_blocks(computed: int, new: int, expected: tuple[int, ...]) -> None:
    context = build_context([ContextItem([5, 6], computed, new)], 4, CPU)
    assert context.new_partial_blocks == expected


def test_a_short_block_table_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 2 blocks of 4 for 5 tokens, its table has 1"):
        build_context([ContextItem([0], 4, 1)], 4, CPU)


def test_an_item_without_new_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one new token"):
        build_context([ContextItem([0], 4, 0)], 4, CPU)
