"""Whether one request kept what its pool promises; pure, times are given in seconds."""

from __future__ import annotations

from dataclasses import dataclass

from .config import SloConfig

Verdicts = list[tuple[str, bool]]
"""Names of promises (``ttft``, ``first_answer``, ``inter_token``), each kept or not."""


@dataclass(slots=True)
class SloWatch:
    """One request's times, judged at its end.

    What never came because the request ended by its own limits (no answer behind a thought that
    ``max_tokens`` cut, a single token) is not judged. A request that the service failed has missed
    every promise that it had not kept by then. One whose client left is not judged at all.
    """

    _first: float | None = None
    _answer: float | None = None
    _pauses: float = 0.0
    _followers: int = 0

    def first_token(self, seconds: float) -> None:
        """The first token came, so long after the request's arrival."""
        self._first = seconds

    def first_answer(self, seconds: float) -> None:
        """The first token of the answer came, so long after the request's arrival."""
        self._answer = seconds

    def tokens(self, pause: float, count: int) -> None:
        """``count`` tokens of a choice came, ``pause`` seconds after the choice's last ones."""
        self._pauses += pause
        self._followers += count

    def finished(self, slo: SloConfig) -> Verdicts:
        """The verdicts of a request that came to its own end."""
        between = self._pauses / self._followers if self._followers else None
        measured = (
            ("ttft", self._first, slo.ttft_s),
            ("first_answer", self._answer, slo.first_answer_s),
            ("inter_token", between, slo.inter_token_s),
        )
        return [
            (name, value <= limit)
            for name, value, limit in measured
            if limit is not None and value is not None
        ]

    def failed(self, slo: SloConfig) -> Verdicts:
        """The verdicts of a request that the service ended early."""
        known = dict(self.finished(slo))
        if slo.inter_token_s is not None:
            known["inter_token"] = False  # the tokens that are missing never came
        if slo.ttft_s is not None:
            known.setdefault("ttft", False)
        if slo.first_answer_s is not None:
            known.setdefault("first_answer", False)
        return list(known.items())
