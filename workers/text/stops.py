"""Stop strings, found across token borders.

Every stop string is followed by its own Knuth-Morris-Pratt automaton, so each character costs one
step a stop string, however the text is cut. The match that ends first wins; of several that end
at one character, the longest.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Follows one text. ``held`` characters at its end may still become a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string is empty")
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._fallbacks = [_fallbacks(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._first = frozenset(stop[0] for stop in self._stops)
        self.matched: str | None = None

    @property
    def held(self) -> int:
        """Length of the longest end of the text so far that begins a stop string."""
        return max(self._states, default=0)

    def feed(self, text: str, *, may_stop: bool = True) -> int | None:
        """Follow ``text``; where a stop string ends in it, how much of ``text`` that takes.

        After a match, ``matched`` names the stop string and nothing more is followed. Without
        ``may_stop`` a stop string that ends in ``text`` is passed over.
        """
        if self.matched is not None or (self.held == 0 and self._first.isdisjoint(text)):
            return None
        for position, character in enumerate(text):
            for number, stop in enumerate(self._stops):
                state = _step(stop, self._fallbacks[number], self._states[number], character)
                if state == len(stop):
                    if may_stop:
                        self.matched = stop
                        return position + 1
                    state = self._fallbacks[number][state]
                self._states[number] = state
        return None

    def reset(self) -> None:
        """Begin a new text; what was held is no part of it."""
        self._states = [0] * len(self._stops)


def _step(stop: str, fallbacks: Sequence[int], state: int, character: str) -> int:
    while state and stop[state] != character:
        state = fallbacks[state]
    return state + 1 if stop[state] == character else 0


def _fallbacks(stop: str) -> list[int]:
    """For each length, the longest shorter prefix of ``stop`` that also ends its prefix so long."""
    table = [0, 0]
    state = 0
    for character in stop[1:]:
        while state and stop[state] != character:
            state = table[state]
        if stop[state] == character:
            state += 1
        table.append(state)
    return table
