"""The handoffs of decode replicas for Prometheus, as of the last scrape.

How handoffs ended, by reason, is among the engine's own numbers (``kv_import_ends``). Prefill
replicas are scraped through the decode replicas that ask them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict

from prometheus_client.core import CounterMetricFamily

from .engine_metrics import LABELS, EngineReading
from .handoff_stats import DecodeStats, HandoffStats
from .metric_table import Measure, TableCollector, counter, gauge, gauges_by

TABLE: tuple[Measure[HandoffStats], ...] = (
    gauge("handoffs_running", "Prompts whose KV is coming", lambda s: s.pulls_running),
    gauge("handoffs_waiting", "Handoffs that wait for a place", lambda s: s.pulls_waiting),
    gauge("prefill_peers", "Prefill replicas that answer and fit", lambda s: s.peers),
    gauge(
        "prefill_peers_refused", "Prefill replicas that do not fit", lambda s: len(s.peers_refused)
    ),
    counter("handoffs_done", "Handoffs that brought every token", lambda s: s.pulls_done),
    counter("handoff_seconds", "Time of those, from asking to the end", lambda s: s.pull_seconds),
    counter("handoff_tickets", "KV tickets that came", lambda s: s.tickets),
    counter("handoff_bytes", "Their size", lambda s: s.ticket_bytes),
    counter(
        "handoff_transfer_seconds", "Time to move and import them", lambda s: s.transfer_seconds
    ),
    counter(
        "prefill_peers_lost", "Prefill replicas that stopped answering", lambda s: s.peers_lost
    ),
    Measure(
        CounterMetricFamily,
        ("inference_pio_prefill_decisions",),
        "Prompts by where they are prefilled and why",
        ("where", "reason"),
        lambda s: dict(s.decisions.items()),
    ),
    gauges_by(
        "prefill_decision_input",
        "What the last decision was made from, and its estimates in seconds",
        "input",
        lambda s: asdict(s.last),
    ),
)


def with_peers(readings: Iterable[EngineReading]) -> tuple[EngineReading, ...]:
    """The readings, and one for each prefill replica that they tell of."""
    own = tuple(readings)
    peers = {
        name: EngineReading(reading.model, reading.stats.handoff.peer_pool, name, stats)
        for reading in own
        if isinstance(reading.stats, DecodeStats)
        for name, stats in reading.stats.peers.items()
    }
    return (*own, *peers.values())


class HandoffCollector(TableCollector[HandoffStats]):
    """Shows the readings it was given last, of those replicas that hand over."""

    def __init__(self) -> None:
        super().__init__(LABELS, TABLE)

    def show(self, readings: Sequence[EngineReading]) -> None:
        """Take the readings of one scrape."""
        self.sources = [
            (reading.labels, reading.stats.handoff)
            for reading in readings
            if isinstance(reading.stats, DecodeStats)
        ]
