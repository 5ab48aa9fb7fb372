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
from numpy.typing import NDArray
from torch import Tensor

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
class Edit:
    """One change of some rows' logits, in place.

    Only banned ids may repeat within a row. ``KEEP`` and ``BAN`` read no values.
    """

    kind: EditKind
    starts: NDArray[np.int64]
    """R + 1 prefix sums of each row's entries."""
    ids: NDArray[np.int64]
    """E token ids in [0, V)."""
    values: NDArray[np.float32]
    """E values, or none."""


class PendingTokens(Protocol):
    """Tokens that the device may still have to draw."""

    @property
    def on_device_R(self) -> Tensor | None:
        """Each row's token or ``Fault`` where the logits are, int64 [R], without a wait for it.

        ``None`` where the host takes part in drawing.
        """
        ...

    @property
    def redrawn(self) -> frozenset[int]:
        """Rows that ``read`` had to draw: ``on_device_R`` has something else for them."""
        ...

    def read(self) -> list[int]:
        """The tokens and faults, once they are there."""
        ...


class DrawnTokens:
    """Tokens that the host has already."""

    on_device_R: Tensor | None = None
    redrawn: frozenset[int] = frozenset()

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def read(self) -> list[int]:
        """See ``PendingTokens.read``."""
        return self._tokens


class SamplingKernels(Protocol):
    """One implementation of every operation."""

    def launch(
        self, logits_RV: Tensor, num_tokens: int, draws: Sequence[Draw], edits: Sequence[Edit]
    ) -> PendingTokens:
        """``sample`` whose tokens are read later; ``logits_RV`` is left alone until then.

        An implementation that cannot draw without the host has drawn when this returns.
        """
        return DrawnTokens(self.sample(logits_RV, num_tokens, draws, edits).tolist())

    def sample(
        self, logits_RV: Tensor, num_tokens: int, draws: Sequence[Draw], edits: Sequence[Edit]
    ) -> Tensor:
        """The token of each row or its ``Fault``, int64 [R].

        The edits are made in their order and change ``logits_RV``. A row that is at fault before
        them stays at fault, whatever they change.
        """
        ...

    def log_sums(self, logits_RV: Tensor, num_tokens: int) -> Tensor:
        """The logarithm of each row's sum of exponentials, float64 [R].

        A token's log-probability is its logit minus that. NaN for a row at fault.
        """
        ...

    def top_tokens(self, logits_RV: Tensor, num_tokens: int, count: int) -> tuple[Tensor, Tensor]:
        """The ``count`` best tokens in canonical order: values float32 [R, K], ids int64 [R, K].

        K is ``min(count, num_tokens)``. What comes of a row with NaN is not defined, but for the
        ids being tokens.
        """
        ...
