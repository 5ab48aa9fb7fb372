"""What a decode replica and its prefill peers say about handoffs: plain values for metrics."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from ..workers.kv.ticket import KVLayout
from ..workers.types import EngineStats


@dataclass(frozen=True, slots=True)
class PeerReport:
    """A prefill replica's word about itself."""

    replica_id: str
    layout: KVLayout
    chunk_tokens: int
    """Tokens it computes in one step, and so sends in one ticket."""
    stats: EngineStats
    lent_bytes: int = 0
    """Of tickets that lie in its own memory until their readers have read them."""


@dataclass(frozen=True, slots=True)
class LastDecision:
    """The inputs and estimates of the decision that was made last; 0 for a rate not measured."""

    missing_tokens_here: int = 0
    missing_tokens_there: int = 0
    queued_tokens_here: int = 0
    queued_tokens_there: int = 0
    tokens_per_s_here: float = 0.0
    tokens_per_s_there: float = 0.0
    bandwidth_bytes_per_s: float = 0.0
    local_seconds: float = 0.0
    remote_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class HandoffStats:
    """Sizes now and totals since start of one decode replica's handoffs.

    How handoffs ended is in ``EngineStats.kv_import_ends``.
    """

    peer_pool: str = ""
    """The prefill pool's name."""
    decisions: dict[tuple[str, str], int] = field(default_factory=dict)
    """Prompts by where they are prefilled (``remote``, ``local``) and why."""
    last: LastDecision = LastDecision()
    pulls_running: int = 0
    pulls_waiting: int = 0
    pulls_done: int = 0
    """Handoffs that brought every token."""
    pull_seconds: float = 0.0
    """Time those took, from asking to the last ticket."""
    tickets: int = 0
    ticket_bytes: int = 0
    transfer_seconds: float = 0.0
    """Time tickets took from the other side's memory into this engine's blocks."""
    peers: int = 0
    """Prefill replicas that answer and whose KV fits."""
    peers_refused: dict[str, str] = field(default_factory=dict)
    """Those whose KV does not fit, by replica, and why."""
    lent_bytes: int = 0
    """Of tickets that those keep in their own memory until their readers have read them."""
    peers_lost: int = 0
    """Prefill replicas that stopped answering, since start."""


@dataclass(frozen=True, slots=True)
class DecodeStats(EngineStats):
    """A decode replica's engine with its handoffs and the engines of its prefill peers."""

    handoff: HandoffStats = HandoffStats()
    peers: dict[str, EngineStats] = field(default_factory=dict)

    @staticmethod
    def of(stats: EngineStats, handoff: HandoffStats, peers: dict[str, EngineStats]) -> DecodeStats:
        """``stats`` with the rest added."""
        own = {item.name: getattr(stats, item.name) for item in fields(EngineStats)}
        return DecodeStats(**own, handoff=handoff, peers=peers)
