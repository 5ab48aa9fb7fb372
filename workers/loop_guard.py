"""Finds the moment a run of tokens starts going in circles."""

from __future__ import annotations

from typing import Self

import numpy as np

from .config import LoopGuardConfig


class LoopGuard:
    """Watches a growing list of token ids for copies of one run, back to back, at its end.

    A list ends in a loop of period ``p`` when its last ``n`` tokens each equal the token ``p``
    places before, for ``n + p >= max(min_repeats * p, min_tokens)``. One token costs a handful of
    vector operations over ``max_period`` counters, whatever the length of the list.
    """

    __slots__ = ("_needed", "_next", "_runs", "_window")

    def __init__(self, config: LoopGuardConfig):
        size = config.max_period
        # Index i stands for period size - i, so that runs line up with a window oldest first.
        periods = np.arange(size, 0, -1, dtype=np.int64)
        self._needed = np.maximum(config.min_repeats * periods, config.min_tokens) - periods
        self._runs = np.zeros(size, dtype=np.int64)
        # Every token is written twice, size apart: the last size tokens are always one slice.
        self._window = np.full(2 * size, -1, dtype=np.int64)
        self._next = 0

    def append(self, token_id: int) -> bool:
        """Take the next token; true when the list now ends in a loop."""
        size = len(self._runs)
        past = self._window[self._next : self._next + size]
        self._runs += 1
        self._runs *= past == token_id
        self._window[self._next] = self._window[self._next + size] = token_id
        self._next = (self._next + 1) % size
        return bool((self._runs >= self._needed).any())

    def fork(self) -> Self:
        """An independent guard that has seen the same tokens."""
        other = object.__new__(type(self))
        other._needed = self._needed
        other._runs = self._runs.copy()
        other._window = self._window.copy()
        other._next = self._next
        return other
