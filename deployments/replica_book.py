"""What one router knows of its replicas: what they report, what it sent since, which prefixes.

1. ``rank`` forgets replicas that are gone, and the prefixes of one that has a new epoch.
2. It adds to each reported load what was sent there after the report, and ranks them.
3. ``note`` writes down where a request goes, before anybody else chooses.
Reports come every second or so, and not at all at first: until then a replica's load is what this
router sent there in the last ``RECENT_S`` seconds. Reports and sends are compared by wall clock, so
a clock that is off by a second counts a second's requests twice, or not at all.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from typing import Any

from ..workers.kv.block import IntegrityError
from .prefix_index import PrefixIndex
from .replica_choice import ReplicaView, rank
from .wire import ROUTE_BLOCK_TOKENS, RouteHints, RoutingStats

RECENT_S = 30.0
"""A request sent longer ago than this counts only where the replica reports it."""
NO_STATS = RoutingStats(at=0.0, load=0, kv_used_ratio=0.0, kv_tokens=0, epoch="")

logger = logging.getLogger(__name__)


class _Sends:
    """Sequences sent to one replica, with their times."""

    def __init__(self) -> None:
        self.total = 0
        self._times: deque[tuple[float, int]] = deque()

    def add(self, now: float, sequences: int) -> None:
        self._times.append((now, sequences))
        self.total += sequences

    def drop_before(self, time: float) -> None:
        while self._times and self._times[0][0] <= time:
            self.total -= self._times.popleft()[1]

    def check_integrity(self) -> None:
        if self.total != sum(sequences for _, sequences in self._times):
            raise IntegrityError(f"{self.total} sends are counted, {list(self._times)} are listed")


class ReplicaBook:
    """One router's view of the replicas of one pool; lives in one event loop."""

    def __init__(self) -> None:
        self.bad_reports = 0
        """Routing statistics that could not be read; their replicas count as unreported."""
        self._prefixes = PrefixIndex()
        self._sends: dict[str, _Sends] = {}
        self._epochs: dict[str, str] = {}
        self._num_ranked = 0

    def rank(
        self, reports: Mapping[str, Mapping[str, Any]], hints: RouteHints, now: float
    ) -> list[str]:
        """Every replica of ``reports``, the best for a request first."""
        self._retain(reports)
        views = []
        for replica_id, report in reports.items():
            stats = self._read(replica_id, report)
            sends = self._sends.setdefault(replica_id, _Sends())
            sends.drop_before(max(stats.at, now - RECENT_S))
            held = self._prefixes.num_held(replica_id, hints.prefix)
            views.append(
                ReplicaView(
                    replica_id,
                    load=stats.load + sends.total,
                    kv_used_ratio=stats.kv_used_ratio,
                    hit_tokens=held * ROUTE_BLOCK_TOKENS,
                )
            )
        self._num_ranked += 1
        return rank(views, hints, self._num_ranked.to_bytes(8, "little"))

    def note(
        self, replica_id: str, report: Mapping[str, Any], hints: RouteHints, now: float
    ) -> None:
        """A request goes to this replica."""
        capacity = self._read(replica_id, report).kv_tokens // ROUTE_BLOCK_TOKENS
        self._prefixes.record(replica_id, hints.prefix, capacity or None)
        self._sends.setdefault(replica_id, _Sends()).add(now, hints.sequences)

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` where counts and lists disagree."""
        self._prefixes.check_integrity()
        for sends in self._sends.values():
            sends.check_integrity()

    def _retain(self, reports: Mapping[str, Mapping[str, Any]]) -> None:
        self._prefixes.retain(reports.keys())
        for books in (self._sends, self._epochs):
            for gone in books.keys() - reports.keys():
                del books[gone]

    def _read(self, replica_id: str, report: Mapping[str, Any]) -> RoutingStats:
        if not report:
            return NO_STATS
        try:
            stats = RoutingStats.from_dict(report)
        except ValueError as error:
            self.bad_reports += 1
            logger.warning("the routing statistics of %s are wrong: %s", replica_id, error)
            return NO_STATS
        if self._epochs.setdefault(replica_id, stats.epoch) != stats.epoch:
            self._epochs[replica_id] = stats.epoch
            self._prefixes.forget(replica_id)
        return stats
