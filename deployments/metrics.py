"""What Prometheus reads: our own names and the vLLM names that existing dashboards know.

Every label has a bounded set of values: models, pools, modes and reasons come from the
configuration and the code, never from a request.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..workers.types import ThoughtEnd, TokenChunk, TokenKind
from .config import SloConfig
from .engine_metrics import EngineCollector, EngineReading
from .handoff_metrics import HandoffCollector, with_peers
from .pool_metrics import PoolCollector, PoolReading
from .routing.classifier import Route
from .slo import SloWatch

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
TOKENS = (0, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
SCORES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
ANSWER_KINDS = frozenset({TokenKind.CONTENT, TokenKind.TOOL_CALL})


class Metrics:
    """Counts and times of one ingress process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._engines, self._handoffs = EngineCollector(), HandoffCollector()
        self._pools = PoolCollector()
        for collector in (self._engines, self._handoffs, self._pools):
            self.registry.register(collector)
        self.http_requests = Counter(
            "inference_pio_http_requests",
            "HTTP answers",
            ("route", "status"),
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "inference_pio_requests_in_flight", "Requests in the service", registry=self.registry
        )
        self.refusals = Counter(
            "inference_pio_refusals",
            "Requests that were answered with an error, by its code",
            ("reason",),
            registry=self.registry,
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
        self._routes = Counter(
            "inference_pio_routes",
            "Requests by what served them and why",
            ("model_name", "pool", "mode", "reason"),
            registry=self.registry,
        )
        self._complexity = Histogram(
            "inference_pio_request_complexity",
            "Complexity of requests, as the classifier sees it",
            ("model_name",),
            buckets=SCORES,
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
            ("model_name", "pool", "end"),
            buckets=TOKENS,
            registry=self.registry,
        )
        self._slo = Counter(
            "inference_pio_slo_requests",
            "Requests that kept or missed what their pool promises",
            ("pool", "slo", "result"),
            registry=self.registry,
        )

    def pool(self, model: str, pool: str, slo: SloConfig) -> PoolMetrics:
        """What is counted for one pool; made once, for looking labels up costs more than adding."""
        for promise, limit in slo:
            if limit is not None:
                for result in ("kept", "missed"):
                    self._slo.labels(pool, promise.removesuffix("_s"), result)

        def bound(families: Sequence[Histogram]) -> list[Histogram]:
            return [family.labels(model, pool) for family in families]

        return PoolMetrics(
            model=model,
            pool=pool,
            slo=slo,
            ttft=bound(self._ttft),
            itl=bound(self._itl),
            e2e=bound(self._e2e),
            decode=bound(self._decode),
            queue=bound(self._queue),
            prefill=bound(self._prefill),
            answer=bound(self._answer),
            thought=self._thought,
            slo_counter=self._slo,
        )

    def routed(self, route: Route, pool: str) -> None:
        """A request got its pool."""
        self._routes.labels(route.model, pool, route.mode.value, route.reason_kind).inc()
        self._complexity.labels(route.model).observe(route.complexity)

    def render(self, readings: Iterable[EngineReading], pools: Iterable[PoolReading]) -> bytes:
        """The Prometheus text, with the engines' and pools' numbers as given."""
        engines = with_peers(readings)
        self._pools.show(pools)
        self._engines.show(engines)
        self._handoffs.show(engines)
        return generate_latest(self.registry)

    def _ours(self, name: str, text: str) -> list[Histogram]:
        return [self._histogram(f"inference_pio_{name}", text)]

    def _both(self, name: str, text: str) -> list[Histogram]:
        return [*self._ours(name, text), self._histogram(f"vllm:{name}", text)]

    def _histogram(self, name: str, text: str) -> Histogram:
        labels = ("model_name", "pool")
        return Histogram(name, text, labels, buckets=SECONDS, registry=self.registry)


@dataclass(frozen=True, slots=True)
class PoolMetrics:
    """The histograms and counters of one pool, each under all of its names."""

    model: str
    pool: str
    slo: SloConfig
    ttft: list[Histogram]
    itl: list[Histogram]
    e2e: list[Histogram]
    decode: list[Histogram]
    queue: list[Histogram]
    prefill: list[Histogram]
    answer: list[Histogram]
    thought: Histogram
    slo_counter: Counter

    def timer(self, arrived: float) -> RequestTimer:
        """A stopwatch for a request that came at ``arrived``, on the monotonic clock."""
        return RequestTimer(self, arrived)

    def observe_thought(self, tokens: int, end: ThoughtEnd | None) -> None:
        """One finished choice that thought."""
        ended = end.value if end else "unfinished"
        self.thought.labels(self.model, self.pool, ended).observe(tokens)

    def count_slo(self, verdicts: Iterable[tuple[str, bool]]) -> None:
        """What one request's ``SloWatch`` found."""
        for promise, kept in verdicts:
            self.slo_counter.labels(self.pool, promise, "kept" if kept else "missed").inc()


@dataclass(slots=True)
class RequestTimer:
    """Times one client's request, chunk by chunk; ends with ``finish`` or ``fail``."""

    metrics: PoolMetrics
    arrived: float
    _watch: SloWatch = field(default_factory=SloWatch)
    _first: float | None = None
    _answered: bool = False
    _last: dict[tuple[str, int], float] = field(default_factory=dict)

    def see(self, chunk: TokenChunk) -> None:
        """Take note of a chunk that has come from the engine."""
        now = time.monotonic()
        metrics = self.metrics
        if chunk.token_ids and self._first is None:
            self._first = now
            self._watch.first_token(now - self.arrived)
            _observe(metrics.ttft, now - self.arrived)
        if chunk.timing is not None:
            _observe(metrics.queue, chunk.timing.queue)
            _observe(metrics.prefill, chunk.timing.prefill)
        if not self._answered and ANSWER_KINDS.intersection(chunk.kinds):
            self._answered = True
            self._watch.first_answer(now - self.arrived)
            _observe(metrics.answer, now - self.arrived)
        choice = (chunk.request_id, chunk.index)
        before = self._last.get(choice)
        if before is not None and chunk.token_ids:
            # Tokens of one chunk came together: the pause before them is shared out.
            pause = (now - before) / len(chunk.token_ids)
            self._watch.tokens(now - before, len(chunk.token_ids))
            for _ in chunk.token_ids:
                _observe(metrics.itl, pause)
        self._last[choice] = now
        if chunk.finish_reason is not None and chunk.usage.reasoning_tokens:
            metrics.observe_thought(chunk.usage.reasoning_tokens, chunk.thought_end)

    def finish(self) -> None:
        """The last token has come."""
        now = time.monotonic()
        _observe(self.metrics.e2e, now - self.arrived)
        if self._first is not None:
            _observe(self.metrics.decode, now - self._first)
        self.metrics.count_slo(self._watch.finished(self.metrics.slo))

    def fail(self) -> None:
        """The service ended the request before its last token."""
        self.metrics.count_slo(self._watch.failed(self.metrics.slo))


def _observe(histograms: Sequence[Histogram], seconds: float) -> None:
    for histogram in histograms:
        histogram.observe(seconds)
