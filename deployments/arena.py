"""Places within one stretch of memory. Pure bookkeeping: nothing here touches the memory."""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise

from ..workers.kv.block import IntegrityError

ALIGNMENT = 64
"""Places begin at multiples of this, as well aligned as the memory itself."""


class Arena:
    """First fit over ``[0, size)``; neighbouring gaps become one again as places are freed."""

    def __init__(self, size: int) -> None:
        if size <= 0 or size % ALIGNMENT:
            raise ValueError(f"an arena has a positive multiple of {ALIGNMENT} bytes, got {size}")
        self.size = size
        self._gaps: list[tuple[int, int]] = [(0, size)]  # begin and end, in order
        self._taken: dict[int, int] = {}  # begin to end

    @property
    def used(self) -> int:
        """Bytes of all places that are taken, with what alignment adds."""
        return sum(end - begin for begin, end in self._taken.items())

    def take(self, num_bytes: int) -> int | None:
        """Where ``num_bytes`` may lie from now on; ``None`` while no gap is large enough."""
        if num_bytes <= 0:
            raise ValueError(f"a place has at least one byte, got {num_bytes}")
        length = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        for index, (begin, end) in enumerate(self._gaps):
            if end - begin >= length:
                self._gaps[index : index + 1] = [(begin + length, end)] * (end - begin > length)
                self._taken[begin] = begin + length
                return begin
        return None

    def free(self, begin: int) -> None:
        """Give a place back. Raises ``KeyError`` for one that is not taken."""
        end = self._taken.pop(begin)
        index = bisect_left(self._gaps, (begin, end))
        if index < len(self._gaps) and self._gaps[index][0] == end:
            end = self._gaps.pop(index)[1]
        if index and self._gaps[index - 1][1] == begin:
            index -= 1
            begin = self._gaps.pop(index)[0]
        self._gaps.insert(index, (begin, end))

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` unless gaps and places cover everything once, gaps joined."""
        whole = sorted([*self._gaps, *self._taken.items()])
        edges = [0, *(end for _, end in whole)]
        if [begin for begin, _ in whole] != edges[:-1] or edges[-1] != self.size:
            raise IntegrityError(f"gaps and places do not cover 0 to {self.size} once: {whole}")
        if any(left[1] == right[0] for left, right in pairwise(self._gaps)):
            raise IntegrityError(f"gaps lie side by side: {self._gaps}")
