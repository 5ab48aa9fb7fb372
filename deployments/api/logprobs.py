"""Log-probabilities in the two forms of the OpenAI API."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ...workers.text.token_text import TokenText

FLOOR = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def chat_logprobs(entries: Iterable[TokenText], top: int) -> dict[str, Any]:
    """``choices[].logprobs`` of a chat completion, with ``top`` alternatives a token."""
    return {
        "content": [
            {**_entry(entry), "top_logprobs": [_entry(best) for best in entry.top[:top]]}
            for entry in entries
        ],
        "refusal": None,
    }


class CompletionLogprobs:
    """``choices[].logprobs`` of a completion; offsets count characters of the choice's text."""

    def __init__(self, top: int) -> None:
        self._top = top
        self._offset = 0

    def render(self, entries: Sequence[tuple[str, TokenText | None]]) -> dict[str, Any]:
        """The next tokens with their text; the first of an echoed prompt has no probability."""
        offsets = []
        for text, _ in entries:
            offsets.append(self._offset)
            self._offset += len(text)
        known = [entry for _, entry in entries]
        return {
            "tokens": [text for text, _ in entries],
            "token_logprobs": [None if e is None else finite(e.logprob) for e in known],
            "top_logprobs": [None if e is None else self._alternatives(e) for e in known],
            "text_offset": offsets,
        }

    def _alternatives(self, entry: TokenText) -> dict[str, float]:
        return {best.token: finite(best.logprob) for best in (*entry.top[: self._top], entry)}


def finite(value: float) -> float:
    """A number that JSON can carry."""
    return value if math.isfinite(value) else FLOOR


def _entry(entry: TokenText) -> dict[str, Any]:
    return {
        "token": entry.token,
        "logprob": finite(entry.logprob),
        "bytes": list(entry.data),
    }
