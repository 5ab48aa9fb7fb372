"""The decode side of handoffs: decides who prefills, and feeds the engine with what comes.

A handoff's life here:
1. the engine asks, in its own thread, whether a prompt should be prefilled elsewhere; ``decide``
   answers from rates that were measured and from the peers' latest reports;
2. the engine admits the sequence and wants its KV: a task begins to pull it, at most ``MAX_PULLS``
   at once;
3. each ticket goes to the engine's thread, which checks it and writes it into the sequence's own
   blocks; once the engine has taken it the other side is told, which then sends on;
4. ``end_import`` tells the engine that nothing more comes, with the reason where that is early.
   It computes what is missing. The engine itself ends what is late or not needed any longer.

Nothing that goes wrong here reaches a client: every failure is a counted reason and local work.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from ..workers.async_engine import AsyncEngine
from ..workers.kv.remote_prefill import PrefillDecision, PrefillInputs, RateMeter, decide
from ..workers.kv.ticket import layout_mismatch
from ..workers.types import EngineStats, PrefillRequest, RemoteQuery
from .config import RemotePrefillConfig
from .detached import detached
from .handoff_stats import HandoffStats, LastDecision, PeerReport
from .kv_transport import MAX_PULLS, Arrival, KVTransport
from .wire import route_hints

POLL_S = 1.0
"""Between two rounds of asking the peers for their numbers."""
BANDWIDTH_HALF_LIFE_S = 30.0
BANDWIDTH_FORGOTTEN_S = 300.0

Name = tuple[str, int]

logger = logging.getLogger(__name__)


class PeerRefusedError(RuntimeError):
    """A prefill replica whose KV does not fit answered."""


class KVSource:
    """Handoffs of one decode engine; lives in the loop of its service."""

    def __init__(
        self, engine: AsyncEngine, config: RemotePrefillConfig, transport: KVTransport
    ) -> None:
        self._engine = engine
        self._layout = engine.engine.kv_layout
        self._config = config
        self._transport = transport
        self._bandwidth = RateMeter(
            half_life_s=BANDWIDTH_HALF_LIFE_S, forget_s=BANDWIDTH_FORGOTTEN_S
        )
        self._places = asyncio.Semaphore(MAX_PULLS)
        self._pulls: dict[Name, asyncio.Task[None]] = {}
        self._num_in_place = 0
        self._background: set[asyncio.Task[None]] = set()
        self._peers: dict[str, PeerReport] = {}
        self._refused: dict[str, str] = {}
        self._asked_since_report = 0
        # Written by the engine's thread alone:
        self._decisions: Counter[tuple[str, str]] = Counter()
        self._last = LastDecision()
        # Written in the loop:
        self._totals: Counter[str] = Counter()
        self._pull_seconds = 0.0
        self._transfer_seconds = 0.0

    def start(self) -> None:
        """Begin to watch the peers and to answer the engine's questions."""
        engine = self._engine.engine
        engine.import_deadline_s = self._config.deadline_s
        engine.remote_prefill = self.decide
        self._in_background(self._watch_peers())

    def stop(self) -> None:
        """End every handoff."""
        for task in (*self._background, *self._pulls.values()):
            task.cancel()
        self._transport.close()

    # --- the decision, in the engine's thread ----------------------------------------------------

    def decide(self, query: RemoteQuery) -> bool:
        """Whether a prefill replica is to compute this prompt; counted with its reason."""
        inputs = self._inputs(query)
        decision = decide(inputs)
        self._decisions["remote" if decision.remote else "local", decision.reason] += 1
        self._last = _last_decision(inputs, decision)
        return decision.remote

    def _inputs(self, query: RemoteQuery) -> PrefillInputs:
        peers = tuple(self._peers.values())
        peer = min(peers, key=lambda p: p.stats.queued_prefill_tokens, default=None)
        num_tokens = query.num_prompt_tokens - 1  # the last one's logits are needed here
        here, there = self._engine.stats(), peer.stats if peer is not None else EngineStats()
        return PrefillInputs(
            when=self._config.when,
            has_peer=peer is not None,
            num_tokens=num_tokens,
            num_missing_here=max(0, num_tokens - query.num_cached_tokens),
            num_missing_there=_expected_missing(num_tokens, there),
            num_queued_here=query.num_queued_tokens,
            num_queued_there=there.queued_prefill_tokens
            + self._asked_since_report // max(1, len(peers)),
            tokens_per_s_here=here.prefill_tokens_per_s or None,
            tokens_per_s_there=there.prefill_tokens_per_s or None,
            bandwidth=self._bandwidth.rate(time.monotonic()),
            bytes_per_token=self._layout.bytes_per_block // self._layout.block_size,
            chunk_tokens=peer.chunk_tokens if peer is not None else num_tokens,
            num_imports=len(self._pulls),
        )

    # --- handoffs --------------------------------------------------------------------------------

    def take(self, wanted: Sequence[PrefillRequest], unwanted: Sequence[Name]) -> None:
        """What an engine step began and ended."""
        for request in wanted:
            name = (request.request_id, request.attempt)
            self._pulls[name] = detached(self._pull(name, request))
            self._asked_since_report += len(request.token_ids) - request.start
        for name in unwanted:
            task = self._pulls.pop(name, None)
            if task is not None:
                task.cancel()

    async def _pull(self, name: Name, request: PrefillRequest) -> None:
        begun = time.monotonic()
        reason: str | None = None
        try:
            async with asyncio.timeout(request.deadline_s), self._places:
                self._num_in_place += 1
                try:
                    await self._receive(request)
                finally:
                    self._num_in_place -= 1
        except TimeoutError:
            reason = "deadline"
        except Exception as error:
            reason = self._reason_of(error)
            logger.warning("the prefill of %s broke off (%s): %s", name[0], reason, error)
        finally:
            self._pulls.pop(name, None)
        seconds = time.monotonic() - begun
        if reason is None:
            self._totals["pulls_done"] += 1
            self._pull_seconds += seconds
        elif reason == "deadline":
            # Else a path too slow for any prompt would never be measured.
            self._bandwidth.add(0.0, seconds, time.monotonic())
        self._engine.end_import(*name, reason)

    def _reason_of(self, error: Exception) -> str:
        if isinstance(error, PeerRefusedError):
            return "peer_refused"
        return self._transport.failure_reason(error)

    async def _receive(self, request: PrefillRequest) -> None:
        hints = route_hints(request.token_ids, request.cache_salt)
        hints = replace(hints, avoid=tuple(self._refused))
        replica_id, count = "", 0
        async with aclosing(self._transport.pull(request, hints)) as stream:
            try:
                async for item in stream:
                    if not isinstance(item, Arrival):
                        replica_id = item
                        if replica_id in self._refused:
                            raise PeerRefusedError(self._refused[replica_id])
                        continue
                    await self._hand_over(request, item)
                    count += 1
                    self._in_background(self._acknowledge(request, count, replica_id))
            except Exception:
                self._lose(replica_id)
                raise

    async def _hand_over(self, request: PrefillRequest, arrival: Arrival) -> None:
        """Give a ticket to the engine and wait for the turn that takes it."""
        begun = time.monotonic()
        self._engine.import_ticket(request.request_id, request.attempt, arrival.buffer)
        await self._engine.health(request.deadline_s)
        seconds = arrival.seconds + time.monotonic() - begun
        self._bandwidth.add(arrival.buffer.nbytes, max(seconds, 1e-9), time.monotonic())
        self._totals["tickets"] += 1
        self._totals["ticket_bytes"] += arrival.buffer.nbytes
        self._transfer_seconds += seconds

    async def _acknowledge(self, request: PrefillRequest, count: int, replica_id: str) -> None:
        try:
            await self._transport.acknowledge(request, count, replica_id=replica_id)
        except Exception as error:
            # The replica is gone, which its stream says as well.
            logger.info("acknowledgement of %s not delivered: %s", request.request_id, error)

    # --- peers -----------------------------------------------------------------------------------

    async def _watch_peers(self) -> None:
        while True:
            try:
                reports = await self._transport.reports()
            except Exception as error:
                logger.info("no prefill replica answers: %s", error)
                reports = []
            self._meet(reports)
            await asyncio.sleep(POLL_S)

    def _meet(self, reports: Sequence[PeerReport]) -> None:
        """Take the peers' reports; one whose KV does not fit is refused for its lifetime."""
        for report in reports:
            mismatch = layout_mismatch(self._layout, report.layout)
            if mismatch is not None and report.replica_id not in self._refused:
                logger.error("prefill replica %s refused: %s", report.replica_id, mismatch)
                self._refused[report.replica_id] = mismatch
        found = {r.replica_id: r for r in reports if r.replica_id not in self._refused}
        self._totals["peers_lost"] += len(self._peers.keys() - found.keys())
        self._peers = found
        self._asked_since_report = 0

    def _lose(self, replica_id: str) -> None:
        """Ask a peer that failed for nothing before it has reported again."""
        if replica_id in self._peers:
            self._totals["peers_lost"] += 1
            self._peers = {k: v for k, v in self._peers.items() if k != replica_id}

    # --- views -----------------------------------------------------------------------------------

    def peers(self) -> dict[str, EngineStats]:
        """The prefill replicas' own numbers, by replica."""
        return {name: report.stats for name, report in self._peers.items()}

    def stats(self) -> HandoffStats:
        """Sizes now and totals since start."""
        return HandoffStats(
            peer_pool=self._config.pool,
            decisions=dict(self._decisions),
            last=self._last,
            pulls_running=self._num_in_place,
            pulls_waiting=len(self._pulls) - self._num_in_place,
            pulls_done=self._totals["pulls_done"],
            pull_seconds=self._pull_seconds,
            tickets=self._totals["tickets"],
            ticket_bytes=self._totals["ticket_bytes"],
            transfer_seconds=self._transfer_seconds,
            peers=len(self._peers),
            peers_refused=dict(self._refused),
            lent_bytes=sum(peer.lent_bytes for peer in self._peers.values()),
            peers_lost=self._totals["peers_lost"],
        )

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = detached(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _expected_missing(num_tokens: int, there: EngineStats) -> int | None:
    """Tokens that a peer must compute if this prompt hits its prefix cache as others did."""
    if not there.prefix_query_tokens:
        return None
    hit_rate = there.prefix_hit_tokens / there.prefix_query_tokens
    return round(num_tokens * (1 - hit_rate))


def _last_decision(inputs: PrefillInputs, decision: PrefillDecision) -> LastDecision:
    missing_there = inputs.num_missing_there
    return LastDecision(
        missing_tokens_here=inputs.num_missing_here,
        missing_tokens_there=inputs.num_tokens if missing_there is None else missing_there,
        queued_tokens_here=inputs.num_queued_here,
        queued_tokens_there=inputs.num_queued_there,
        tokens_per_s_here=inputs.tokens_per_s_here or 0.0,
        tokens_per_s_there=inputs.tokens_per_s_there or 0.0,
        bandwidth_bytes_per_s=inputs.bandwidth or 0.0,
        local_seconds=decision.local_s,
        remote_seconds=decision.remote_s,
    )
