"""The operations that turn logits into tokens: one signature each, whatever computes them.

Every implementation gives the same tokens and log-sums, bit for bit: probabilities are whole
numbers (see ``weights``), so their sums are exact in any order, on any number of threads.

Shapes: R rows, V vocabulary rows with padding, N tokens that exist (``num_tokens``; padding rows
are never looked at), E entries, K best tokens. Logits are float32 [R, V], each row without gaps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..host_copy import copied_to
from .logprobs import LaunchedLogprobs, Logprobs
from .weights import log_sum_of

MAX_TOKENS = 1 << 18
"""So many weights of the best token's size sum up below 2 ** 63."""


class Fault(IntEnum):
    """In the place of a token: why a row gives none."""

    NAN = -1
    INFINITY = -2
    NO_TOKEN = -3
    """Every token is at minus infinity."""


class Draw(NamedTuple):
    """How one row's token is drawn: numbers of the host, the same for every implementation.

    The filters come in the order of transformers: top-k (all equals of the k-th best stay), top-p,
    min-p. Each sees what the one before it left. Tokens are in canonical order: best first, equals
    by id; where nothing is filtered, in the order of their ids.
    """

    scale: float = 0.0
    """log2(e) / temperature: logits times it are exponents of 2. 0: the best token is taken."""
    top_k: int = 0
    """0: all tokens."""
    top_p: float = 1.0
    """From 1 on: all tokens."""
    floor: float = -math.inf
    """log2(min_p): how far below the best token's an exponent may lie."""
    uniform: float = 0.0
    """The row's random number in [0, 1)."""

    @classmethod
    def of(cls, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float) -> Draw:
        """From sampling values; the temperature is above 0, ``min_p`` 0 filters nothing."""
        floor = math.log2(min_p) if min_p > 0 else -math.inf
        return cls(math.log2(math.e) / temperature, top_k, top_p, floor, uniform)

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken; of equals the one with the lowest id."""
        return self.scale == 0

    @property
    def unfiltered(self) -> bool:
        """Whether every token may come."""
        return self.top_k == 0 and self.top_p >= 1 and self.floor == -math.inf


class EditKind(IntEnum):
    """What an edit does to the logits of its entries."""

    PENALISE = 0
    """Divided by the value where positive, multiplied by it elsewhere."""
    ADD = 1
    """The value is added."""
    KEEP = 2
    """They stay; all others of a row that has entries fall to minus infinity."""
    BAN = 3
    """They fall to minus infinity."""


@dataclass(frozen=True, slots=True)
class UnreadEntries:
    """What an edit does about a token of each row that the host has not read yet.

    It is one more entry of its row, unless the row has one of that id, which then has another
    value.
    """

    tokens_N: Tensor
    """Where the logits are, int64; what is below 0 is no token and changes nothing."""
    places_R: NDArray[np.int64]
    """Each row's place in ``tokens_N``; -1 where it has none."""
    values_R: NDArray[np.float32]
    """The value of a token without an entry."""
    values_E: NDArray[np.float32]
    """Each entry's value where it is the token's."""


@dataclass(frozen=True, slots=True)
class Edit:
    """One change of some rows' logits, in place.

    Only banned ids may repeat within a row. ``KEEP`` and ``BAN`` read no values and have no
    ``unread``.
    """

    kind: EditKind
    starts: NDArray[np.int64]
    """R + 1 prefix sums of each row's entries."""
    ids: NDArray[np.int64]
    """E token ids in [0, V)."""
    values: NDArray[np.float32]
    """E values, or none."""
    unread: UnreadEntries | None = None


class PendingTokens(Protocol):
    """Tokens that the device may still have to draw."""

    @property
    def on_device_R(self) -> Tensor | None:
        """Each row's token or ``Fault`` where the logits are, int64 [R], without a wait for it.

        ``None`` where the host takes part in drawing.
        """
        ...

    def read(self) -> list[int]:
        """The tokens and faults, once they are there."""
        ...

    def read_logprobs(self) -> list[Logprobs | None]:
        """Each row's, ``None`` where it has none; not defined for a row at fault."""
        ...


class DrawnTokens:
    """Tokens that the host has already."""

    on_device_R: Tensor | None = None

    def __init__(self, tokens: list[int], logprobs: list[Logprobs | None]) -> None:
        self._tokens = tokens
        self._logprobs = logprobs

    def read(self) -> list[int]:
        """See ``PendingTokens.read``."""
        return self._tokens

    def read_logprobs(self) -> list[Logprobs | None]:
        """See ``PendingTokens.read_logprobs``."""
        return self._logprobs


class SamplingKernels(Protocol):
    """One implementation of every operation."""

    def launch(
        self,
        logits_RV: Tensor,
        num_tokens: int,
        draws: Sequence[Draw],
        edits: Sequence[Edit],
        tops: Sequence[int | None],
    ) -> PendingTokens:
        """``sample`` whose tokens are read later; ``logits_RV`` is left alone until then.

        ``tops``: for each row ``None``, or of how many best tokens it wants the log-probabilities
        beside its own token's, all of the logits before the edits. An implementation that cannot
        draw without the host has drawn when this returns.
        """
        raw = RawLogits.of(logits_RV, tops)
        tokens_R = self.sample(logits_RV, num_tokens, draws, edits)
        found = raw.launch(self, num_tokens, tokens_R)
        return DrawnTokens(tokens_R.tolist(), raw.by_row(found))

    def sample(
        self, logits_RV: Tensor, num_tokens: int, draws: Sequence[Draw], edits: Sequence[Edit]
    ) -> Tensor:
        """The token of each row or its ``Fault``, int64 [R].

        The edits are made in their order and change ``logits_RV``. A row that is at fault before
        them stays at fault, whatever they change.
        """
        ...

    def weight_sums(self, logits_RV: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Each row's best logit, float32 [R], and the sum of its weights at the scale log2(e).

        The sum is int64 [R], in units of 2 ** -44 of the best token's weight. The best logit of a
        row with NaN is NaN; the sum of a row at fault is not defined.
        """
        ...

    def log_sums(self, logits_RV: Tensor, num_tokens: int) -> Tensor:
        """The logarithm of each row's sum of exponentials, float64 [R] on the host.

        A token's log-probability is its logit minus that. NaN for a row at fault.
        """
        best_R, total_R = self.weight_sums(logits_RV, num_tokens)
        # The logarithm of a device may round otherwise.
        return log_sum_of(best_R.cpu(), total_R.cpu())

    def launch_logprobs(
        self, logits_RV: Tensor, num_tokens: int, tokens_R: Tensor, tops: Sequence[int]
    ) -> LaunchedLogprobs:
        """Log-probabilities of each row's token, int64 [R] where the logits are, and of the
        ``tops[r]`` best, to be read later. A fault stands for token 0."""
        ids_R1 = tokens_R.clamp(min=0).unsqueeze(1)
        return LaunchedLogprobs(
            logits_RV.gather(1, ids_R1).squeeze(1),
            *self.weight_sums(logits_RV, num_tokens),
            *self.top_tokens(logits_RV, num_tokens, max(tops, default=0)),
            tops,
        )

    def top_tokens(self, logits_RV: Tensor, num_tokens: int, count: int) -> tuple[Tensor, Tensor]:
        """The ``count`` best tokens in canonical order: values float32 [R, K], ids int64 [R, K].

        K is ``min(count, num_tokens)``. What comes of a row with NaN is not defined, but for the
        ids being tokens.
        """
        ...


class RawLogits:
    """Copies of the logits of those rows that want log-probabilities, from before the edits."""

    def __init__(
        self, logits_LV: Tensor, numbers: Sequence[int], tops: Sequence[int | None]
    ) -> None:
        self._logits_LV = logits_LV
        self._numbers = numbers
        self._tops = tops

    @classmethod
    def of(cls, logits_RV: Tensor, tops: Sequence[int | None]) -> RawLogits:
        """See ``SamplingKernels.launch`` for ``tops``."""
        numbers = [number for number, top in enumerate(tops) if top is not None]
        if not numbers:
            return cls(logits_RV[:0], numbers, tops)
        index_L = copied_to(numbers, torch.int64, logits_RV.device)
        return cls(logits_RV.index_select(0, index_L), numbers, tops)

    def launch(
        self, kernels: SamplingKernels, num_tokens: int, tokens_R: Tensor
    ) -> LaunchedLogprobs | None:
        """See ``SamplingKernels.launch_logprobs``; ``None`` where no row wants any."""
        if not self._numbers:
            return None
        index_L = copied_to(self._numbers, torch.int64, tokens_R.device)
        tops = [top for top in self._tops if top is not None]
        tokens_L = tokens_R.index_select(0, index_L)
        return kernels.launch_logprobs(self._logits_LV, num_tokens, tokens_L, tops)

    def by_row(self, found: LaunchedLogprobs | None) -> list[Logprobs | None]:
        """What came of ``launch``, for every row."""
        rows: list[Logprobs | None] = [None] * len(self._tops)
        for number, one in zip(self._numbers, found.read() if found else (), strict=True):
            rows[number] = one
        return rows
