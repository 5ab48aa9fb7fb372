"""Random numbers by counter: the same seed and step give the same number, in any batch.

The mixer is the output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
"""

from __future__ import annotations

import hashlib

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd: SplitMix64's own increment


def _mix(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def uniform(seed: int, step: int) -> float:
    """The number in [0, 1), of 53 random bits, that belongs to (seed, step)."""
    # The seed is mixed first, so that neighbouring seeds are not neighbouring counters.
    return (_mix(_mix(seed + _GAMMA) + (step + 1) * _GAMMA) >> 11) * 2.0**-53


def choice_seed(seed: int | None, index: int, *, engine_seed: int = 0, request_id: str = "") -> int:
    """The 64-bit seed of choice ``index`` of a request.

    A request's own seed decides alone; without one the engine's seed and the request's id do.
    """
    if seed is None:
        digest = hashlib.sha256(f"{engine_seed}:{request_id}".encode()).digest()
        seed = int.from_bytes(digest[:8], "little")
    return _mix(_mix(seed) + index * _GAMMA)
