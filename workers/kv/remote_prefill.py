"""Where a prompt is prefilled: here or on a prefill engine, decided from measured rates.

Here, the prompt waits for the tokens queued before it and is computed. There, it waits for that
engine's queue; then chunk after chunk is computed, and each travels while the next is computed:

    compute  |--c--|--c--|--c--|
    transfer       |--t--|--t--|--t--|     c + all t, or all c + t, whichever is more

An engine's queue counts in tokens, the way it is measured; the faster answer wins, and a tie stays
here, where nothing can get lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

When = Literal["auto", "always", "never"]


@dataclass(frozen=True, slots=True)
class PrefillInputs:
    """What one decision is made from. A rate is ``None`` until it was measured."""

    when: When
    has_peer: bool
    """Whether there is a prefill engine to ask."""
    num_tokens: int
    """Prompt tokens whose KV is needed: all but the last."""
    num_missing_here: int
    """Those that no prefix hit covers here; so many travel from there."""
    num_missing_there: int | None
    """Those that no prefix hit covers there; ``None`` where that is unknown: all of them."""
    num_queued_here: int
    """Tokens to be computed here before this prompt."""
    num_queued_there: int
    tokens_per_s_here: float | None
    tokens_per_s_there: float | None
    bandwidth: float | None
    """Of the handoff, bytes/s."""
    bytes_per_token: int
    chunk_tokens: int
    """Tokens that travel together; ``num_tokens`` or more where nothing overlaps."""
    num_imports: int
    """Handoffs that this engine waits for now."""


@dataclass(frozen=True, slots=True)
class PrefillDecision:
    """The answer, why, and the estimated seconds until the KV is here; infinite if unknown."""

    remote: bool
    reason: str
    """``nothing_missing``, ``forced``, ``no_peer``, ``probe``, ``unmeasured``, ``faster``."""
    local_s: float
    remote_s: float


def decide(inputs: PrefillInputs) -> PrefillDecision:
    """Prefill here or there.

    Nothing to prefill, and no peer, is always here; ``always`` and ``never`` are obeyed otherwise.
    Unmeasured rates in ``auto``: what there is to measure over there is measured by one prompt at
    a time (``probe``), the others stay here; a rate missing only here is measured here.
    """
    local_s, remote_s = local_seconds(inputs), remote_seconds(inputs)

    def answer(remote: bool, reason: str) -> PrefillDecision:
        return PrefillDecision(remote, reason, local_s, remote_s)

    if inputs.num_missing_here == 0:
        return answer(False, "nothing_missing")
    if inputs.when == "never":
        return answer(False, "forced")
    if not inputs.has_peer:
        return answer(False, "no_peer")
    if inputs.when == "always":
        return answer(True, "forced")
    if inputs.tokens_per_s_there is None or inputs.bandwidth is None:
        probe = inputs.num_imports == 0
        return answer(probe, "probe" if probe else "unmeasured")
    if inputs.tokens_per_s_here is None:
        return answer(False, "unmeasured")
    return answer(remote_s < local_s, "faster")


def local_seconds(inputs: PrefillInputs) -> float:
    """Seconds until the missing tokens are computed here."""
    return _seconds(inputs.num_queued_here + inputs.num_missing_here, inputs.tokens_per_s_here)


def remote_seconds(inputs: PrefillInputs) -> float:
    """Seconds until the tokens missing here have been computed there and have come."""
    missing_there = inputs.num_missing_there
    if missing_there is None:
        missing_there = inputs.num_tokens
    rate, chunk = inputs.tokens_per_s_there, inputs.chunk_tokens
    queue = _seconds(inputs.num_queued_there, rate)
    compute, first = _seconds(missing_there, rate), _seconds(min(chunk, missing_there), rate)
    moved = inputs.num_missing_here * inputs.bytes_per_token
    last = min(chunk, inputs.num_missing_here) * inputs.bytes_per_token
    transfer, final = _seconds(moved, inputs.bandwidth), _seconds(last, inputs.bandwidth)
    return queue + max(first + transfer, compute + final)


def _seconds(amount: float, per_s: float | None) -> float:
    if amount == 0:
        return 0.0
    return amount / per_s if per_s else inf


class RateMeter:
    """Amount per second, with the past fading: what lies ``half_life_s`` back counts half.

    Only time in which something was being done counts, so idle time lowers no rate. What was
    measured last more than ``forget_s`` ago is forgotten: a peer that was slow is tried again.
    """

    def __init__(self, *, half_life_s: float, forget_s: float = inf) -> None:
        if half_life_s <= 0 or forget_s <= 0:
            raise ValueError(f"times are positive, got {half_life_s} and {forget_s}")
        self._half_life_s = half_life_s
        self._forget_s = forget_s
        self._amount = 0.0
        self._seconds = 0.0
        self._last = -inf

    def add(self, amount: float, seconds: float, now: float) -> None:
        """``amount`` took ``seconds`` until ``now``; an amount of 0 is a failure and counts too."""
        if amount < 0 or seconds <= 0:
            raise ValueError(f"a rate is measured over time, got {amount} in {seconds} s")
        keep = 0.0 if self.rate(now) is None else 0.5 ** ((now - self._last) / self._half_life_s)
        self._amount = self._amount * keep + amount
        self._seconds = self._seconds * keep + seconds
        self._last = now

    def rate(self, now: float) -> float | None:
        """Amount per second; ``None`` where nothing was measured or it is forgotten."""
        return (
            None
            if now - self._last > self._forget_s or not self._seconds
            else (self._amount / self._seconds)
        )
