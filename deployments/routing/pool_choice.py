"""Which pool serves a route: one that serves its mode and is the least full. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...workers.types import ThinkingMode
from ..config import Mode


@dataclass(frozen=True, slots=True)
class PoolLoad:
    """A pool that may serve: the requests inside it now, and how many it may hold."""

    inside: int
    limit: int


def named_modes(modes: Sequence[Mode]) -> frozenset[ThinkingMode]:
    """The modes that a pool serves to whoever asks for one, or gets one by default."""
    return frozenset(ThinkingMode(mode) for mode in modes if mode != "auto")


def open_modes(modes: Sequence[Mode]) -> frozenset[ThinkingMode]:
    """The modes that a pool serves where complexity decides; a pool of ``auto`` alone: both."""
    return (named_modes(modes) or frozenset(ThinkingMode)) if "auto" in modes else frozenset()


def serves(modes: Sequence[Mode], mode: ThinkingMode, *, is_open: bool) -> bool:
    """Whether a pool takes a request of ``mode``; ``is_open``: complexity decided it."""
    return mode in (open_modes(modes) if is_open else named_modes(modes))


def least_full(loads: Sequence[PoolLoad]) -> int | None:
    """The place in ``loads`` of the pool with the smallest share of its limit in use.

    The first one of several; ``None`` where all are full.
    """
    open_ones = [place for place, load in enumerate(loads) if load.inside < load.limit]
    return min(open_ones, key=lambda place: loads[place].inside / loads[place].limit, default=None)
