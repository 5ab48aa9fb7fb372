"""From a scheduled step to the lists of a forward pass."""

from __future__ import annotations

import torch

from inference_pio.kernels.context import build_context
from inference_pio.workers.batch import (
    BatchBuilder,
    ScheduledBatch,
    ScheduledSequence,
    UnreadTokens,
)
from inference_pio.workers.sequence import Sequence
from inference_pio.workers.types import BlockId, SamplingParams


def sequence(tokens: list[int], table: list[int]) -> Sequence:
    return Sequence(
        "r", SamplingParams(), tokens, 1, 100, block_table=[BlockId(block) for block in table]
    )


def test_lists_of_a_mixed_step() -> None:
    decode = sequence([1, 2, 3, 4, 5], [7, 3])
    chunk = sequence([10, 11, 12, 13, 14, 15], [2, 5])
    last_chunk = sequence([20, 21, 22], [9])
    batch = ScheduledBatch(
        (
            ScheduledSequence(decode, 4, 1, samples=True),
            ScheduledSequence(chunk, 2, 3, samples=False),
            ScheduledSequence(last_chunk, 0, 3, samples=True),
        )
    )
    inputs = BatchBuilder.from_batch(batch)
    assert batch.num_tokens == 7
    assert inputs.token_ids == [5, 12, 13, 14, 20, 21, 22]
    assert inputs.sample_rows == [0, 6]
    assert inputs.sampled == [decode, last_chunk]
    context = build_context(inputs.items, 4, torch.device("cpu"))
    assert context.positions_T.tolist() == [4, 2, 3, 4, 0, 1, 2]
    assert context.slots_T.tolist() == [12, 10, 11, 20, 36, 37, 38]
    assert context.query_starts == (0, 1, 4, 7)
    assert context.seq_lens == (5, 5, 3)


def test_an_empty_step_has_empty_lists() -> None:
    inputs = BatchBuilder.from_batch(ScheduledBatch())
    assert (inputs.token_ids, inputs.items, inputs.sample_rows, inputs.sampled) == ([], [], [], [])
    assert ScheduledBatch().num_tokens == 0


def test_tokens_that_are_not_read_yet_are_named_by_their_places() -> None:
    known = sequence([1, 2, 3], [7])
    one, other = sequence([4, 5], [3]), sequence([6], [2])
    batch = ScheduledBatch(
        (
            ScheduledSequence(one, 2, 1, samples=True),
            ScheduledSequence(known, 2, 1, samples=True),
            ScheduledSequence(other, 1, 1, samples=True),
        )
    )
    unread = UnreadTokens((other, known, one), torch.tensor([60, 0, 50]))
    inputs = BatchBuilder.from_batch(batch, unread)
    assert inputs.token_ids == [0, 3, 0]
    assert (inputs.unread_rows, inputs.unread_places) == ([0, 2], [2, 0])
    assert inputs.unread is unread
