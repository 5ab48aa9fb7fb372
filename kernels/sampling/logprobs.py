"""Log-probabilities on their way to the host, where the logarithms are taken.

Shapes: R rows, K best tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..host_copy import HostArrival
from .weights import log_sum_of


class Logprobs(NamedTuple):
    """Of one row: its token's, and the best tokens with theirs. NaN for a row at fault."""

    chosen: float
    top: tuple[tuple[int, float], ...]


class LaunchedLogprobs:
    """What log-probabilities are made of, wherever it still has to be computed.

    ``chosen_R`` are the logits of the rows' tokens, ``best_R`` and ``total_R`` what
    ``SamplingKernels.weight_sums`` gives, ``values_RK`` and ``ids_RK`` the best tokens, of which
    row r wants ``tops[r]``.
    """

    def __init__(
        self,
        chosen_R: Tensor,
        best_R: Tensor,
        total_R: Tensor,
        values_RK: Tensor,
        ids_RK: Tensor,
        tops: Sequence[int],
    ) -> None:
        self._tops = tops
        self._arrivals = [
            HostArrival(part) for part in (chosen_R, best_R, total_R, values_RK, ids_RK)
        ]

    def read(self) -> list[Logprobs]:
        """One for each row; waits until they are there, and for nothing that was queued later."""
        chosen_R, best_R, total_R, values_RK, ids_RK = (one.read() for one in self._arrivals)
        sums_R = log_sum_of(best_R, total_R)
        chosen = (chosen_R.double() - sums_R).tolist()
        best = (values_RK.double() - sums_R.unsqueeze(1)).tolist()
        rows = zip(chosen, ids_RK.tolist(), best, self._tops, strict=True)
        return [
            Logprobs(logprob, tuple(zip(ids[:top], values[:top], strict=True)))
            for logprob, ids, values, top in rows
        ]
