"""What a sequence has said so far, kept ready for the three penalties."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ..types import TokenKind
from .resolve import RepetitionWindow

_PHASE_WINDOWS = {
    TokenKind.THOUGHT: RepetitionWindow.THOUGHT,
    TokenKind.CONTENT: RepetitionWindow.ANSWER,
    TokenKind.TOOL_CALL: RepetitionWindow.ANSWER,
}
"""Tags and the last token are of no phase: no penalty keeps a thought from ending."""


class TokenCounts:
    """A multiset of token ids as two arrays that grow in place: distinct ids and their counts."""

    __slots__ = ("_counts", "_ids", "_slots")

    def __init__(self, token_ids: Iterable[int] = ()):
        self._slots: dict[int, int] = {}
        self._ids = np.zeros(64, dtype=np.int64)
        self._counts = np.zeros(64, dtype=np.int64)
        for token_id in token_ids:
            self.add(token_id)

    def add(self, token_id: int) -> None:
        """Count one more of ``token_id``; constant time, amortised."""
        slot = self._slots.setdefault(token_id, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        self._ids[slot] = token_id
        self._counts[slot] += 1

    @property
    def ids(self) -> NDArray[np.int64]:
        """The distinct ids in order of appearance: a view, valid until the next ``add``."""
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> NDArray[np.int64]:
        """How often each of ``ids`` was added: a view, valid until the next ``add``."""
        return self._counts[: len(self._slots)]

    def copy(self) -> Self:
        """An independent copy."""
        other = object.__new__(type(self))
        other._slots = self._slots.copy()
        other._ids = self._ids.copy()
        other._counts = self._counts.copy()
        return other


class PenaltyState:
    """The tokens that penalties count: generated ones, those of each phase, prompt and output."""

    __slots__ = ("_prompt", "_windows", "generated")

    def __init__(self, prompt_token_ids: Sequence[int]):
        self._prompt = prompt_token_ids
        self.generated = TokenCounts()
        # The window with the prompt in it is built when a penalty first asks for it: a long prompt
        # takes milliseconds to count, and most requests have no such penalty.
        self._windows = {
            RepetitionWindow.THOUGHT: TokenCounts(),
            RepetitionWindow.ANSWER: TokenCounts(),
        }

    def append(self, token_id: int, kind: TokenKind) -> None:
        """Count one generated token."""
        self.generated.add(token_id)
        window = _PHASE_WINDOWS.get(kind)
        if window is not None:
            self._windows[window].add(token_id)
        if RepetitionWindow.SEQUENCE in self._windows:
            self._windows[RepetitionWindow.SEQUENCE].add(token_id)

    @staticmethod
    def counts_in(window: RepetitionWindow, kind: TokenKind) -> bool:
        """Whether ``window`` counts tokens of that kind."""
        return window is RepetitionWindow.SEQUENCE or _PHASE_WINDOWS.get(kind) is window

    def window(self, window: RepetitionWindow) -> TokenCounts:
        """The tokens a repetition penalty over ``window`` counts."""
        if window not in self._windows:
            counts = TokenCounts(self._prompt)
            for token_id in self.generated.ids.tolist():
                counts.add(token_id)
            self._windows[window] = counts
        return self._windows[window]

    def fork(self) -> Self:
        """An independent state with the same counts."""
        other = object.__new__(type(self))
        other._prompt = self._prompt
        other.generated = self.generated.copy()
        other._windows = {key: counts.copy() for key, counts in self._windows.items()}
        return other
