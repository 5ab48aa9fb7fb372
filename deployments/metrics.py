"""What Prometheus reads: our own names and the vLLM names that existing dashboards know."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ..workers.types import EngineStats, ThoughtEnd, TokenChunk, TokenKind

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
ANSWER_KINDS = frozenset({TokenKind.CONTENT, TokenKind.TOOL_CALL})


LABELS = ("model_name", "engine")
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


def _names(name: str) -> list[str]:
    peer = PEER_NAMES.get(name)
    return [f"inference_pio_{name}", *([peer] if peer else [])]


class EngineCollector(Collector):
    """Shows the engine's own numbers as of the last scrape."""

    def __init__(self, model: str) -> None:
        self.stats: Mapping[str, EngineStats] = {}
        self._model = model

    def collect(self) -> Iterator[Metric]:
        """Yield every engine metric, under both names where there are two."""
        for name, text, value in GAUGES:
            for full in _names(name):
                yield self._fill(GaugeMetricFamily(full, text, labels=LABELS), value)
        for name, text, value in COUNTERS:
            for full in _names(name):
                yield self._fill(CounterMetricFamily(full, text, labels=LABELS), value)
        finished = CounterMetricFamily(
            "inference_pio_requests_finished", "Finished sequences", labels=(*LABELS, "reason")
        )
        for replica, stats in self.stats.items():
            for reason, count in stats.requests_finished.items():
                finished.add_metric((self._model, replica, reason), count)
        yield finished

    def _fill(self, family: Family, value: Callable[[EngineStats], float]) -> Family:
        for replica, stats in self.stats.items():
            family.add_metric((self._model, replica), value(stats))
        return family


class Metrics:
    """Counts and times of one ingress process."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self.engine = EngineCollector(model)
        self.registry.register(self.engine)
        self._model = model
        self.http_requests = Counter(
            "inference_pio_http_requests",
            "HTTP answers",
            ("route", "status"),
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "inference_pio_requests_in_flight", "Requests in the service", registry=self.registry
        )
        self.clients_left = Counter(
            "inference_pio_clients_left",
            "Requests whose client disconnected early",
            registry=self.registry,
        )
        self.unknown_chunks = Gauge(
            "inference_pio_unknown_chunks",
            "Chunks that came for no known request",
            registry=self.registry,
        )
        self._ttft = self._both("time_to_first_token_seconds", "Arrival to first token")
        self._itl = self._both("inter_token_latency_seconds", "Between tokens of a choice")
        self._e2e = self._both("e2e_request_latency_seconds", "Arrival to last token")
        self._decode = self._both("request_decode_time_seconds", "First to last token")
        self._queue = self._both("request_queue_time_seconds", "Arrival to admission")
        self._prefill = self._both("request_prefill_time_seconds", "Admission to first token")
        self._answer = self._ours(
            "time_to_first_answer_token_seconds", "Arrival to the first token after the thought"
        )
        self._thought = Histogram(
            "inference_pio_thought_tokens",
            "Tokens of a thought, by how it ended",
            ("model_name", "end"),
            buckets=(0, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
            registry=self.registry,
        )

    def timer(self) -> RequestTimer:
        """A stopwatch for a request that has just arrived."""
        return RequestTimer(self)

    def render(self, stats: Mapping[str, EngineStats]) -> bytes:
        """The Prometheus text, with the engines' numbers as given."""
        self.engine.stats = stats
        return generate_latest(self.registry)

    def observe_thought(self, tokens: int, end: ThoughtEnd | None) -> None:
        """One finished choice that thought."""
        self._thought.labels(self._model, end.value if end else "unfinished").observe(tokens)

    def _ours(self, name: str, text: str) -> list[Histogram]:
        return [self._histogram(f"inference_pio_{name}", text)]

    def _both(self, name: str, text: str) -> list[Histogram]:
        return [*self._ours(name, text), self._histogram(f"vllm:{name}", text)]

    def _histogram(self, name: str, text: str) -> Histogram:
        family = Histogram(name, text, ("model_name",), buckets=SECONDS, registry=self.registry)
        return family.labels(self._model)  # once: looking it up costs more than observing

    def observe(self, histograms: Sequence[Histogram], seconds: float) -> None:
        """Add one value under each name."""
        for histogram in histograms:
            histogram.observe(seconds)


@dataclass(slots=True)
class RequestTimer:
    """Times one client's request, chunk by chunk."""

    metrics: Metrics
    arrived: float = field(default_factory=time.monotonic)
    _first: float | None = None
    _answered: bool = False
    _last: dict[tuple[str, int], float] = field(default_factory=dict)

    def see(self, chunk: TokenChunk) -> None:
        """Take note of a chunk that has come from the engine."""
        now = time.monotonic()
        metrics = self.metrics
        if chunk.token_ids and self._first is None:
            self._first = now
            metrics.observe(metrics._ttft, now - self.arrived)
        if chunk.timing is not None:
            metrics.observe(metrics._queue, chunk.timing.queue)
            metrics.observe(metrics._prefill, chunk.timing.prefill)
        if not self._answered and ANSWER_KINDS.intersection(chunk.kinds):
            self._answered = True
            metrics.observe(metrics._answer, now - self.arrived)
        choice = (chunk.request_id, chunk.index)
        before = self._last.get(choice)
        if before is not None and chunk.token_ids:
            # Tokens of one chunk came together: the pause before them is shared out.
            pause = (now - before) / len(chunk.token_ids)
            for _ in chunk.token_ids:
                metrics.observe(metrics._itl, pause)
        self._last[choice] = now
        if chunk.finish_reason is not None and chunk.usage.reasoning_tokens:
            metrics.observe_thought(chunk.usage.reasoning_tokens, chunk.thought_end)

    def finish(self) -> None:
        """The last token has come."""
        now = time.monotonic()
        self.metrics.observe(self.metrics._e2e, now - self.arrived)
        if self._first is not None:
            self.metrics.observe(self.metrics._decode, now - self._first)
