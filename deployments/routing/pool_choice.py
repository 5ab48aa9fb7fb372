"""Which pool serves a route: one that serves its mode and is the least full. Pure.

A pool without a replica, as while its last one is being replaced, comes behind all that have one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ...workers.types import ThinkingMode
from ..config import Mode

Hindrance = Literal["full", "unavailable"]


@dataclass(frozen=True, slots=True)
class PoolLoad:
    """A pool that may serve: the requests inside it now, how many it may hold, and whether a
    replica is there to take one more."""

    inside: int
    limit: int
    has_replica: bool = True


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

    The first one of several, those with a replica before those without; ``None`` where all are
    full.
    """
    open_ones = [place for place, load in enumerate(loads) if load.inside < load.limit]
    return min(
        open_ones,
        key=lambda place: (not loads[place].has_replica, loads[place].inside / loads[place].limit),
        default=None,
    )


def hindrance(loads: Sequence[PoolLoad]) -> Hindrance | None:
    """What keeps a request out of all these pools at this moment; ``None``: nothing does."""
    open_ones = [load for load in loads if load.inside < load.limit]
    if not open_ones:
        return "full"
    return None if any(load.has_replica for load in open_ones) else "unavailable"


def in_turn(hindrances: Sequence[Hindrance | None]) -> list[int]:
    """The routes to try, by their places: those that nothing keeps out, in their order.

    Where there are none, the first one whose pools have room: a replica may come while the request
    waits. Where all are full, the first of all.
    """
    free = [place for place, kept in enumerate(hindrances) if kept is None]
    waiting = [place for place, kept in enumerate(hindrances) if kept == "unavailable"]
    return free or waiting[:1] or [0]
