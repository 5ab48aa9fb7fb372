"""Plain values between ingress and engine replica: no torch where requests are checked."""

from __future__ import annotations

from dataclasses import dataclass

from ..workers.types import RequestError

HEARTBEAT_S = 2.0
"""A silent subscription yields an empty batch this often, so its reader can tell it is alive."""


class WrongReplicaError(RuntimeError):
    """A call aimed at another replica, which is gone."""


@dataclass(frozen=True, slots=True)
class SubmitReply:
    """Who took the requests; with ``error`` nobody did."""

    replica_id: str
    error: RequestError | None = None


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Limits of the model as one engine replica has loaded it.

    ``checkpoint`` is its folder. ``num_tokens`` counts the tokens that exist; ids from there up
    are padding rows.
    """

    replica_id: str
    checkpoint: str
    max_model_len: int
    num_tokens: int
