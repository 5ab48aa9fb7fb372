"""The model in the simulator: K and V are one number a token, made from everything before it.

The number of a position is a hash of its token and of the numbers *read from the cache* for every
position before it, as attention reads them. So one wrong, stale or misplaced number changes all
that follow and the token that is chosen from the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import numpy as np
import torch
from torch import Tensor

from inference_pio.workers.kv.ticket import KVLayout
from inference_pio.workers.types import BlockId

STOP = 0
"""The token that ends an output."""
BLOCK = 2
LAYOUT = KVLayout(b"m" * 32, "float32", num_layers=1, num_kv_heads=1, head_dim=1, block_size=BLOCK)
"""One position is two words: the lower half of its number is its K, the upper half its V."""

_MAX_MEMORY = 100_000
_numbers: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = {}
_garbage = count(1)


def number_of(salt: str, token_id: int, before: tuple[int, ...]) -> int:
    """What the model computes for one position; hashes of integers are the same everywhere."""
    return hash((len(salt), token_id, before))


def true_numbers(salt: str, token_ids: Sequence[int]) -> tuple[int, ...]:
    """The right number of every position."""
    key = (salt, tuple(token_ids))
    found = _numbers.get(key)
    if found is None:
        before = true_numbers(salt, token_ids[:-1]) if len(token_ids) else ()
        found = (*before, number_of(salt, token_ids[-1], before)) if len(token_ids) else ()
        if len(_numbers) >= _MAX_MEMORY:
            _numbers.clear()
        _numbers[key] = found
    return found


def choose(number: int, index: int) -> int:
    """The token that choice ``index`` of a request goes on with."""
    drawn = (number ^ (index * 0x9E3779B97F4A7C15)) & (2**64 - 1)
    return STOP if drawn % 8 == 0 else 1 + drawn % 997


def unbroken(salt: str, prompt: Sequence[int], index: int, max_tokens: int) -> tuple[int, ...]:
    """The output of a run in which nothing happens: the oracle."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(choose(true_numbers(salt, tokens)[-1], index))
        if tokens[-1] == STOP:
            break
    return tuple(tokens[len(prompt) :])


class ValueExecutor:
    """A KV cache of numbers behind the executor's methods."""

    def __init__(self, num_blocks: int) -> None:
        # Memory that was never written holds something else each time.
        self.slots = [[-next(_garbage) for _ in range(BLOCK)] for _ in range(num_blocks)]
        self.fail_next = False
        """The next read or write of blocks raises, once."""

    def compute(
        self, table: Sequence[BlockId], salt: str, token_ids: Sequence[int], start: int
    ) -> int:
        """Compute ``token_ids[start:]`` into the cache; the number of the last one."""
        before = tuple(self.numbers(table, start))
        for position in range(start, len(token_ids)):
            number = number_of(salt, token_ids[position], before)
            self.slots[table[position // BLOCK]][position % BLOCK] = number
            before = (*before, number)
        return before[-1]

    def numbers(self, table: Sequence[BlockId], end: int) -> list[int]:
        """What the cache holds for the first ``end`` positions of a sequence."""
        slots = [slot for block_id in table[: -(-end // BLOCK)] for slot in self.slots[block_id]]
        return slots[:end]

    def copy_blocks(self, pairs: Sequence[tuple[BlockId, BlockId]]) -> None:
        """See ``Executor.copy_blocks``."""
        for source, destination in pairs:
            self.slots[destination] = list(self.slots[source])

    def read_blocks(self, block_ids: Sequence[BlockId], out_Ln2KSD: Tensor) -> None:
        """See ``Executor.read_blocks``."""
        self._maybe_fail()
        numbers = np.array([self.slots[block_id] for block_id in block_ids], dtype="<i8")
        words = numbers.view("<i4").reshape(-1, BLOCK, 2).transpose(0, 2, 1)
        blocks = torch.from_numpy(words.reshape(LAYOUT.shape(len(block_ids))))
        out_Ln2KSD.view(torch.int32).copy_(blocks)

    def write_blocks(self, block_ids: Sequence[BlockId], blocks_Ln2KSD: Tensor) -> None:
        """See ``Executor.write_blocks``."""
        self._maybe_fail()
        words = blocks_Ln2KSD.view(torch.int32).numpy().reshape(-1, 2, BLOCK).transpose(0, 2, 1)
        numbers = np.ascontiguousarray(words).view("<i8").reshape(-1, BLOCK).tolist()
        for block_id, slots in zip(block_ids, numbers, strict=True):
            self.slots[block_id] = slots

    def _maybe_fail(self) -> None:
        if self.fail_next:
            self.fail_next = False
            raise MemoryError("planned by the schedule")
