"""The pools as one ingress sees them, for Prometheus, as of the last scrape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .metric_table import Measure, TableCollector, counter, counters_by, gauge


@dataclass(frozen=True, slots=True)
class PoolReading:
    """One pool: requests inside and how many it may hold, what its streams brought late, and the
    requests that lost their replica, by what became of them."""

    pool: str
    inside: int
    limit: int
    stale_chunks: int
    migrations: Mapping[str, int]


TABLE: tuple[Measure[PoolReading], ...] = (
    gauge("pool_requests_in_flight", "Requests in a pool", lambda r: r.inside),
    gauge("pool_requests_limit", "Requests a pool may hold", lambda r: r.limit),
    counter("stale_chunks", "Chunks of attempts given up before", lambda r: r.stale_chunks),
    counters_by(
        "migrations",
        "Requests that lost their replica, by what became of them",
        "outcome",
        lambda r: r.migrations,
    ),
)


class PoolCollector(TableCollector[PoolReading]):
    """Shows the readings it was given last."""

    def __init__(self) -> None:
        super().__init__(("pool",), TABLE)

    def show(self, readings: Iterable[PoolReading]) -> None:
        """Take the readings of one scrape."""
        self.sources = [((reading.pool,), reading) for reading in readings]
