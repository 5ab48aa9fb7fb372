"""The parts of a step: every token once, in order, each behind what it may see."""

from __future__ import annotations

import random

import pytest

from inference_pio.kernels.context import ContextItem
from inference_pio.workers.parallel.micro_batches import num_micro_batches, split_step


@pytest.mark.parametrize(
    ("num_tokens", "stages", "told", "parts"),
    [
        (1, 2, None, 1),
        (8, 2, None, 1),
        (127, 2, None, 1),
        (128, 2, None, 2),
        (1024, 2, None, 4),
        (1024, 4, None, 8),
        (1024, 1, None, 1),
        (1024, 1, 5, 1),
        (1024, 2, 5, 5),
        (3, 2, 5, 3),
    ],
)
def test_as_many_parts_as_the_tokens_are_worth(
    num_tokens: int, stages: int, told: int | None, parts: int
) -> None:
    assert num_micro_batches(num_tokens, stages, told) == parts


@pytest.mark.parametrize("seed", range(200))
def test_the_parts_are_the_step(seed: int) -> None:
    rng = random.Random(seed)
    items = [
        ContextItem((i,), rng.randrange(5), rng.randint(1, 9)) for i in range(rng.randint(1, 6))
    ]
    num_tokens = sum(item.num_new for item in items)
    parts = split_step(items, rng.randint(1, num_tokens))
    sizes = [part.num_tokens for part in parts]
    assert [part.start for part in parts] == [sum(sizes[:i]) for i in range(len(sizes))]
    assert max(sizes) - min(sizes) <= 1
    assert [sum(item.num_new for item in part.items) for part in parts] == sizes
    flat = [
        (item.block_table, item.num_computed + i)
        for part in parts
        for item in part.items
        for i in range(item.num_new)
    ]
    assert flat == [(i.block_table, i.num_computed + n) for i in items for n in range(i.num_new)]
