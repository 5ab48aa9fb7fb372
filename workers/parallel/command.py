"""What rank 0 tells the other ranks, as flat int64 words: one command a message.

A message is ``[number of words, kind, time of sending, payload...]``. The time is rank 0's
monotonic clock in ns, which ranks on the same machine share.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain, islice

from ...kernels.context import ContextItem
from ..batch import BatchInputs

HEAD_WORDS = 3


class Kind(IntEnum):
    """What the ranks are to do."""

    STEP = 0
    LOGITS = 1
    COPY_BLOCKS = 2
    READ_BLOCKS = 3
    WRITE_BLOCKS = 4
    CONTROL_COST = 5
    CLOSE = 6


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What every rank needs of a step: see ``BatchInputs``."""

    token_ids: Sequence[int]
    items: Sequence[ContextItem]
    sample_rows: Sequence[int]

    @classmethod
    def of(cls, inputs: BatchInputs) -> StepInputs:
        """Without the sequences, which only rank 0 knows."""
        return cls(inputs.token_ids, inputs.items, inputs.sample_rows)


def command(kind: Kind, payload: Sequence[int] = ()) -> list[int]:
    """A message."""
    return [HEAD_WORDS + len(payload), kind, time.monotonic_ns(), *payload]


def encode_step(step: StepInputs) -> list[int]:
    """The payload of a ``STEP``."""
    items = step.items
    return [
        len(items),
        len(step.token_ids),
        len(step.sample_rows),
        *chain.from_iterable(
            (i.num_computed, i.num_new, i.prompt_len, len(i.block_table)) for i in items
        ),
        *chain.from_iterable(i.block_table for i in items),
        *step.token_ids,
        *step.sample_rows,
    ]


def decode_step(payload: Sequence[int]) -> StepInputs:
    """The step of a ``STEP``'s payload. Raises ``ValueError`` for one of another length."""
    words = iter(payload)
    num_items, num_tokens, num_rows = _take(words, 3)
    sizes = [_take(words, 4) for _ in range(num_items)]
    items = [ContextItem(_take(words, table), *counts) for *counts, table in sizes]
    step = StepInputs(_take(words, num_tokens), items, _take(words, num_rows))
    if next(words, None) is not None:
        raise ValueError(f"a step's message has more than its {num_items} items need")
    return step


def _take(words: Iterator[int], count: int) -> list[int]:
    taken = list(islice(words, count))
    if len(taken) != count:
        raise ValueError(f"a step's message ends {count - len(taken)} words early")
    return taken
