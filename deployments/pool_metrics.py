"""The pools as one ingress sees them, for Prometheus, as of the last scrape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


@dataclass(frozen=True, slots=True)
class PoolReading:
    """One pool: requests inside and how many it may hold, what its streams brought late, and the
    requests that lost their replica, by what became of them."""

    pool: str
    inside: int
    limit: int
    stale_chunks: int
    migrations: Mapping[str, int]


class PoolCollector(Collector):
    """Shows the readings it was given last."""

    def __init__(self) -> None:
        self.readings: tuple[PoolReading, ...] = ()

    def collect(self) -> Iterator[Metric]:
        """Yield every pool metric."""
        inside = GaugeMetricFamily(
            "inference_pio_pool_requests_in_flight", "Requests in a pool", labels=("pool",)
        )
        limit = GaugeMetricFamily(
            "inference_pio_pool_requests_limit", "Requests a pool may hold", labels=("pool",)
        )
        stale = CounterMetricFamily(
            "inference_pio_stale_chunks", "Chunks of attempts given up before", labels=("pool",)
        )
        migrations = CounterMetricFamily(
            "inference_pio_migrations",
            "Requests that lost their replica, by what became of them",
            labels=("pool", "outcome"),
        )
        for reading in self.readings:
            inside.add_metric((reading.pool,), reading.inside)
            limit.add_metric((reading.pool,), reading.limit)
            stale.add_metric((reading.pool,), reading.stale_chunks)
            for outcome, count in reading.migrations.items():
                migrations.add_metric((reading.pool, outcome), count)
        yield from (inside, limit, stale, migrations)
