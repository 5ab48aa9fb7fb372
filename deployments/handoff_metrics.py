"""The handoffs of decode replicas for Prometheus, as of the last scrape.

How handoffs ended, by reason, is among the engine's own numbers (``kv_import_ends``). Prefill
replicas are scraped through the decode replicas that ask them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from .engine_metrics import LABELS, EngineReading
from .handoff_stats import DecodeStats, HandoffStats

Value = Callable[[HandoffStats], float]
GAUGES: tuple[tuple[str, str, Value], ...] = (
    ("handoffs_running", "Prompts whose KV is coming", lambda s: s.pulls_running),
    ("handoffs_waiting", "Handoffs that wait for a place", lambda s: s.pulls_waiting),
    ("prefill_peers", "Prefill replicas that answer and fit", lambda s: s.peers),
    ("prefill_peers_refused", "Prefill replicas that do not fit", lambda s: len(s.peers_refused)),
    (
        "prefill_lent_bytes",
        "Tickets that prefill replicas keep for readers",
        lambda s: s.lent_bytes,
    ),
)
COUNTERS: tuple[tuple[str, str, Value], ...] = (
    ("handoffs_done", "Handoffs that brought every token", lambda s: s.pulls_done),
    ("handoff_seconds", "Time of those, from asking to the end", lambda s: s.pull_seconds),
    ("handoff_tickets", "KV tickets that came", lambda s: s.tickets),
    ("handoff_bytes", "Their size", lambda s: s.ticket_bytes),
    ("handoff_transfer_seconds", "Time to move and import them", lambda s: s.transfer_seconds),
    ("prefill_peers_lost", "Prefill replicas that stopped answering", lambda s: s.peers_lost),
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


class HandoffCollector(Collector):
    """Shows the readings it was given last, of those replicas that hand over."""

    def __init__(self) -> None:
        self.readings: tuple[EngineReading, ...] = ()

    def collect(self) -> Iterator[Metric]:
        """Yield every handoff metric."""
        found = [
            (reading.labels, reading.stats.handoff)
            for reading in self.readings
            if isinstance(reading.stats, DecodeStats)
        ]
        for name, text, value in GAUGES:
            gauge = GaugeMetricFamily(f"inference_pio_{name}", text, labels=LABELS)
            for labels, stats in found:
                gauge.add_metric(labels, value(stats))
            yield gauge
        for name, text, value in COUNTERS:
            counter = CounterMetricFamily(f"inference_pio_{name}", text, labels=LABELS)
            for labels, stats in found:
                counter.add_metric(labels, value(stats))
            yield counter
        decisions = CounterMetricFamily(
            "inference_pio_prefill_decisions",
            "Prompts by where they are prefilled and why",
            labels=(*LABELS, "where", "reason"),
        )
        inputs = GaugeMetricFamily(
            "inference_pio_prefill_decision_input",
            "What the last decision was made from, and its estimates in seconds",
            labels=(*LABELS, "input"),
        )
        for labels, stats in found:
            for (where, reason), count in stats.decisions.items():
                decisions.add_metric((*labels, where, reason), count)
            for name, amount in asdict(stats.last).items():
                inputs.add_metric((*labels, name), amount)
        yield decisions
        yield inputs
