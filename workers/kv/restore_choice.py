"""How much of a prompt comes back from the tiers, and how much is computed: by measured rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from math import inf

from .tier import TierName


def num_worth_restoring(
    tiers: Sequence[TierName],
    restore_s: Mapping[TierName, float | None],
    compute_s: float | None,
) -> int:
    """How many leading blocks to restore of those that the tiers have; the others are computed.

    ``tiers`` says where each block lies, ``restore_s`` how long one takes from there and
    ``compute_s`` how long computing one takes. What was never measured is tried: only so is it
    measured; a tier that does not answer takes for ever. A later block can only be restored where
    all before it are, so the best place to stop is found over all of them; of two equally good ones
    the earlier.
    """
    if compute_s is None:
        return sum(1 for _ in takewhile(lambda tier: restore_s[tier] != inf, tiers))
    best = count = 0
    saved = most_saved = 0.0
    for count, tier in enumerate(tiers, start=1):
        saved += compute_s - (restore_s[tier] or 0.0)
        if saved > most_saved:
            best, most_saved = count, saved
    return best
