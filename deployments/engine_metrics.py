"""The engines' own numbers for Prometheus, as of the last scrape, under our and vLLM's names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ..workers.types import EngineStats

LABELS = ("model_name", "pool", "engine")
Family = TypeVar("Family", GaugeMetricFamily, CounterMetricFamily)
Value = Callable[[EngineStats], float]
GAUGES: tuple[tuple[str, str, Value], ...] = (
    ("requests_running", "Sequences in the batch", lambda s: s.running),
    ("requests_waiting", "Requests that wait", lambda s: s.waiting),
    (
        "kv_cache_used_ratio",
        "Share of KV blocks in use",
        lambda s: s.kv_blocks_used / max(1, s.kv_blocks_total),
    ),
    ("kv_blocks_cached", "Free KV blocks that hold a prefix", lambda s: s.kv_blocks_cached),
    (
        "queued_prefill_tokens",
        "Prompt tokens known and not computed",
        lambda s: s.queued_prefill_tokens,
    ),
    ("prefill_tokens_per_second", "Measured prefill rate", lambda s: s.prefill_tokens_per_s),
    ("kv_imports_running", "Prompts another engine computes", lambda s: s.kv_imports_running),
    ("kv_exports_running", "Prompts computed for others", lambda s: s.kv_exports_running),
)
COUNTERS: tuple[tuple[str, str, Value], ...] = (
    ("prefix_query_tokens", "Prompt tokens looked up", lambda s: s.prefix_query_tokens),
    ("prefix_hit_tokens", "Prompt tokens found cached", lambda s: s.prefix_hit_tokens),
    ("prompt_tokens", "Prompt tokens", lambda s: s.prompt_tokens),
    ("generated_tokens", "Generated tokens", lambda s: s.generated_tokens),
    ("thinking_tokens", "Thought tokens", lambda s: s.thinking_tokens),
    ("budget_ends", "Thoughts ended by their budget", lambda s: s.budget_ends),
    ("loops_cut", "Thoughts ended for looping", lambda s: s.loops_cut),
    ("preemptions", "Sequences preempted", lambda s: s.preemptions),
    ("engine_steps", "Engine steps", lambda s: s.steps),
    ("kv_imported_tokens", "Tokens whose KV another engine sent", lambda s: s.kv_imported_tokens),
    ("kv_exported_tokens", "Tokens whose KV was sent to others", lambda s: s.kv_exported_tokens),
)
BY_REASON: tuple[tuple[str, str, Callable[[EngineStats], Mapping[str, int]]], ...] = (
    ("requests_finished", "Finished sequences", lambda s: s.requests_finished),
    ("kv_import_ends", "Ended prefills by another engine", lambda s: s.kv_import_ends),
    ("kv_tickets_ignored", "KV tickets passed over", lambda s: s.kv_tickets_ignored),
)
PEER_NAMES = {
    "requests_running": "vllm:num_requests_running",
    "requests_waiting": "vllm:num_requests_waiting",
    "kv_cache_used_ratio": "vllm:kv_cache_usage_perc",
    "prefix_query_tokens": "vllm:prefix_cache_queries",
    "prefix_hit_tokens": "vllm:prefix_cache_hits",
    "prompt_tokens": "vllm:prompt_tokens",
    "generated_tokens": "vllm:generation_tokens",
}


@dataclass(frozen=True, slots=True)
class EngineReading:
    """One replica's numbers and whose they are."""

    model: str
    pool: str
    replica: str
    stats: EngineStats

    @property
    def labels(self) -> tuple[str, str, str]:
        """The values of ``LABELS``."""
        return self.model, self.pool, self.replica


class EngineCollector(Collector):
    """Shows the readings it was given last."""

    def __init__(self) -> None:
        self.readings: tuple[EngineReading, ...] = ()

    def collect(self) -> Iterator[Metric]:
        """Yield every engine metric, under both names where there are two."""
        for name, text, value in GAUGES:
            for full in _names(name):
                yield self._fill(GaugeMetricFamily(full, text, labels=LABELS), value)
        for name, text, value in COUNTERS:
            for full in _names(name):
                yield self._fill(CounterMetricFamily(full, text, labels=LABELS), value)
        for name, text, counts in BY_REASON:
            family = CounterMetricFamily(f"inference_pio_{name}", text, labels=(*LABELS, "reason"))
            for reading in self.readings:
                for reason, count in counts(reading.stats).items():
                    family.add_metric((*reading.labels, reason), count)
            yield family

    def _fill(self, family: Family, value: Value) -> Family:
        for reading in self.readings:
            family.add_metric(reading.labels, value(reading.stats))
        return family


def _names(name: str) -> list[str]:
    peer = PEER_NAMES.get(name)
    return [f"inference_pio_{name}", *([peer] if peer else [])]
