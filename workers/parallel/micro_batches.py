"""Which tokens of a step go through the pipeline together: pure functions.

A step's tokens are cut in order. A later part of a sequence sees the keys of an earlier one, since
every stage computes the parts in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...kernels.context import ContextItem
from ..model.shard import even_span

WORTH_A_PART = 64
"""Tokens below which a part costs a stage as much as a smaller one: its weights are read anyway."""
PARTS_PER_STAGE = 2
"""Twice as many parts as stages leave at most a third of the pipeline idle; more gain little."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows ``[start, start + num_tokens)`` of a step, as items of their own."""

    start: int
    num_tokens: int
    items: tuple[ContextItem, ...]


def num_micro_batches(num_tokens: int, stages: int, told: int | None) -> int:
    """Parts of a step: as many as were told, else as its tokens are worth."""
    if stages == 1:
        return 1
    if told is not None:
        return min(told, num_tokens)
    return max(1, min(num_tokens // WORTH_A_PART, PARTS_PER_STAGE * stages))


def split_step(items: Sequence[ContextItem], count: int) -> list[MicroBatch]:
    """``count`` parts of nearly the same number of tokens, none empty."""
    num_tokens = sum(item.num_new for item in items)
    spans = [even_span(num_tokens, count, index) for index in range(count)]
    return [MicroBatch(span.start, len(span), _within(items, span)) for span in spans]


def _within(items: Sequence[ContextItem], span: range) -> tuple[ContextItem, ...]:
    parts = []
    row = 0
    for item in items:
        first, last = max(span.start, row), min(span.stop, row + item.num_new)
        if first < last:
            done = item.num_computed + first - row
            parts.append(ContextItem(item.block_table, done, last - first, item.prompt_len))
        row += item.num_new
    return tuple(parts)
