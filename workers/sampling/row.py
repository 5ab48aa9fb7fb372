"""One row of a sampling pass: all that decides the next token of one sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ..types import TokenLogprob
from .penalties import PenaltyState
from .resolve import EffectiveSampling


class SamplingError(RuntimeError):
    """One row's logits give no token; the other rows of its batch are not touched by it."""

    def __init__(self, row: int, reason: str):
        super().__init__(f"row {row} of the sampling batch: {reason}")
        self.row = row
        self.reason = reason

    def __reduce__(self) -> tuple[type[Self], tuple[int, str]]:
        return type(self), (self.row, self.reason)


@dataclass(frozen=True, slots=True)
class TokenBias:
    """Added to the logits of ``ids`` (distinct), one value each."""

    ids: NDArray[np.int64]
    values: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What holds for one row of logits.

    ``seed`` and ``step`` (the output position) alone decide the row's chance. ``banned`` ids are
    never taken; where ``allowed`` is set, no others are. ``num_logprobs``: ``None`` for none, else
    the sampled token's and that many of the best.
    """

    sampling: EffectiveSampling
    seed: int
    step: int
    penalties: PenaltyState | None = None
    banned: tuple[int, ...] = ()
    bias: TokenBias | None = None
    allowed: NDArray[np.int64] | None = None
    num_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The token of one row, with its log-probabilities where the row asked for them."""

    token_id: int
    logprob: TokenLogprob | None = None
