"""The choice of a replica for one request: expected prefix hit against load; pure.

Cost of a replica, in prompt tokens; the lowest wins:

    LOAD_TOKENS · (sequences it runs or has waiting)
      - tokens of the prompt it is expected to hold, at most MAX_HIT_TOKENS
      - SESSION_TOKENS, where it is the session's home

One sequence more weighs as much as LOAD_TOKENS of prompt to compute. So a hot replica is not chosen
for a short prefix, and no prefix outweighs a difference of more than MAX_HIT_TOKENS / LOAD_TOKENS =
16 sequences; with a session, 24. A session's home is found by rendezvous hashing, so every router
finds the same one without having asked, and a replica that comes or goes moves only its own share.

Replicas whose KV is nearly all in use come after all that have room, for a sequence more there
preempts another. Those to avoid come last, the one that failed last at the very end. Equal costs
are broken by power of two choices: two are drawn by hash, the less loaded one goes first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from .wire import RouteHints

LOAD_TOKENS = 512
MAX_HIT_TOKENS = 8192
SESSION_TOKENS = 4096
FULL_RATIO = 0.95
"""Share of KV blocks in use from which a replica has no room."""


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """What a router believes of a replica at the moment of a choice."""

    replica_id: str
    load: float
    """Sequences that run or wait."""
    kv_used_ratio: float
    hit_tokens: int
    """Leading tokens of the prompt whose KV it is expected to hold."""


def rank(candidates: Sequence[ReplicaView], hints: RouteHints, seed: bytes) -> list[str]:
    """All candidates, the best first; ``seed`` decides between equals."""
    home = session_home([view.replica_id for view in candidates], hints.session)
    keys = {view.replica_id: _key(view, hints, home) for view in candidates}
    ordered = sorted(
        candidates,
        key=lambda view: (keys[view.replica_id], _draw(seed, view.replica_id), view.replica_id),
    )
    if len(ordered) > 1:
        first, second = ordered[:2]
        equal = keys[first.replica_id] == keys[second.replica_id]
        if equal and second.load < first.load:
            ordered[:2] = [second, first]
    return [view.replica_id for view in ordered]


def session_home(replica_ids: Sequence[str], session: str | None) -> str | None:
    """The replica that a session's requests go to while it has room."""
    if session is None or not replica_ids:
        return None
    name = session.encode("utf-8", "surrogatepass")
    return max(replica_ids, key=lambda replica_id: (_draw(name, replica_id), replica_id))


def cost(view: ReplicaView, *, is_home: bool) -> float:
    """What a request costs there, in prompt tokens."""
    saved = min(view.hit_tokens, MAX_HIT_TOKENS) + (SESSION_TOKENS if is_home else 0)
    return LOAD_TOKENS * view.load - saved


def _key(view: ReplicaView, hints: RouteHints, home: str | None) -> tuple[int, bool, float]:
    avoided = 1 + hints.avoid.index(view.replica_id) if view.replica_id in hints.avoid else 0
    is_full = view.kv_used_ratio >= FULL_RATIO
    return avoided, is_full, cost(view, is_home=view.replica_id == home)


def _draw(seed: bytes, replica_id: str) -> bytes:
    size = len(seed).to_bytes(8, "little")
    return hashlib.sha256(size + seed + replica_id.encode()).digest()
