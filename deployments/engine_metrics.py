"""The engines' own numbers for Prometheus, as of the last scrape, under our and vLLM's names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..workers.types import EngineStats
from .metric_table import Measure, TableCollector, counter, counters_by, gauge, gauges_by

LABELS = ("model_name", "pool", "engine")
TABLE: tuple[Measure[EngineStats], ...] = (
    gauge(
        "requests_running", "Sequences in the batch", lambda s: s.running, "num_requests_running"
    ),
    gauge("requests_waiting", "Requests that wait", lambda s: s.waiting, "num_requests_waiting"),
    gauge(
        "kv_cache_used_ratio",
        "Share of KV blocks in use",
        lambda s: s.kv_blocks_used / max(1, s.kv_blocks_total),
        "kv_cache_usage_perc",
    ),
    gauge("kv_blocks_cached", "Free KV blocks that hold a prefix", lambda s: s.kv_blocks_cached),
    gauge(
        "queued_prefill_tokens",
        "Prompt tokens known and not computed",
        lambda s: s.queued_prefill_tokens,
    ),
    gauge("prefill_tokens_per_second", "Measured prefill rate", lambda s: s.prefill_tokens_per_s),
    gauge("kv_imports_running", "Prompts another engine computes", lambda s: s.kv_imports_running),
    gauge("kv_exports_running", "Prompts computed for others", lambda s: s.kv_exports_running),
    counter(
        "prefix_query_tokens",
        "Prompt tokens looked up",
        lambda s: s.prefix_query_tokens,
        "prefix_cache_queries",
    ),
    counter(
        "prefix_hit_tokens",
        "Prompt tokens found cached",
        lambda s: s.prefix_hit_tokens,
        "prefix_cache_hits",
    ),
    counter("prompt_tokens", "Prompt tokens", lambda s: s.prompt_tokens, "prompt_tokens"),
    counter(
        "generated_tokens", "Generated tokens", lambda s: s.generated_tokens, "generation_tokens"
    ),
    counter("thinking_tokens", "Thought tokens", lambda s: s.thinking_tokens),
    counter("budget_ends", "Thoughts ended by their budget", lambda s: s.budget_ends),
    counter("loops_cut", "Thoughts ended for looping", lambda s: s.loops_cut),
    counter("preemptions", "Sequences preempted", lambda s: s.preemptions),
    counter("engine_steps", "Engine steps", lambda s: s.steps),
    counter(
        "kv_imported_tokens", "Tokens whose KV another engine sent", lambda s: s.kv_imported_tokens
    ),
    counter(
        "kv_exported_tokens", "Tokens whose KV was sent to others", lambda s: s.kv_exported_tokens
    ),
    counter(
        "weight_bytes_streamed",
        "Bytes of weights read from the disk",
        lambda s: s.weight_bytes_streamed,
    ),
    counter(
        "weight_wait_seconds",
        "Time for which steps waited for weights",
        lambda s: s.weight_wait_s,
    ),
    counters_by("requests_finished", "Finished sequences", "reason", lambda s: s.requests_finished),
    counters_by(
        "kv_import_ends", "Ended prefills by another engine", "reason", lambda s: s.kv_import_ends
    ),
    counters_by(
        "kv_tickets_ignored", "KV tickets passed over", "reason", lambda s: s.kv_tickets_ignored
    ),
    gauges_by(
        "kv_tier_bytes",
        "Bytes of KV blocks behind the pool",
        "tier",
        lambda s: {"host": p.host_bytes, "disk": p.disk_bytes} if (p := s.kv_paging) else {},
    ),
    gauge(
        "kv_pages_writing",
        "KV blocks on their way to the disk",
        lambda s: p.pages_writing if (p := s.kv_paging) else 0,
    ),
    counter(
        "kv_spilled_blocks",
        "Evicted KV blocks that were kept",
        lambda s: p.spilled_blocks if (p := s.kv_paging) else 0,
    ),
    counters_by(
        "kv_tier_hit_tokens",
        "Tokens whose KV came back instead of being computed",
        "tier",
        lambda s: p.hit_tokens if (p := s.kv_paging) else {},
    ),
    counters_by(
        "kv_restores",
        "Prompts that a tier had blocks of",
        "reason",
        lambda s: p.restores if (p := s.kv_paging) else {},
    ),
    counters_by(
        "kv_tier_drops",
        "KV blocks lost from the tiers",
        "reason",
        lambda s: p.drops if (p := s.kv_paging) else {},
    ),
)


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


class EngineCollector(TableCollector[EngineStats]):
    """Shows the readings it was given last."""

    def __init__(self) -> None:
        super().__init__(LABELS, TABLE)

    def show(self, readings: Sequence[EngineReading]) -> None:
        """Take the readings of one scrape."""
        self.sources = [(reading.labels, reading.stats) for reading in readings]
