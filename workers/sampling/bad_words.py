"""Words that must not appear: which ids would complete one now."""

from __future__ import annotations

from collections.abc import Sequence


class BadWords:
    """Token id sequences, indexed by the token before their last.

    ``tail_length`` is how many generated tokens ``banned_after`` needs to see.
    """

    __slots__ = ("_by_previous", "_single", "tail_length")

    def __init__(self, words: Sequence[Sequence[int]]):
        self._single = tuple(word[0] for word in words if len(word) == 1)
        self._by_previous: dict[int, list[tuple[int, ...]]] = {}
        for word in words:
            if len(word) > 1:
                self._by_previous.setdefault(word[-2], []).append(tuple(word))
        self.tail_length = max((len(word) - 1 for word in words), default=0)

    def banned_after(self, generated: Sequence[int]) -> tuple[int, ...]:
        """The ids that would complete a word after ``generated`` (output only, not the prompt)."""
        if not generated or not self._by_previous:
            return self._single
        completing = tuple(
            word[-1]
            for word in self._by_previous.get(generated[-1], ())
            if len(generated) >= len(word) - 1
            and tuple(generated[len(generated) - len(word) + 1 :]) == word[:-1]
        )
        return self._single + completing
