"""What of a client's request goes on at another replica; pure.

A replica that dies has told some tokens of some choices. What it has not told is asked for again:
each request with an open choice is sent once more, and says for each of those how far it has come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..workers.types import FinishReason, GenerateRequest, Resumption, TokenChunk

Choice = tuple[str, int]
"""A request's id and one of its choices."""

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0


def all_choices(requests: Sequence[GenerateRequest]) -> list[Choice]:
    """Every choice that is asked for."""
    return [
        (request.request_id, index) for request in requests for index in range(request.params.n)
    ]


def remaining_requests(
    requests: Sequence[GenerateRequest],
    received: Mapping[Choice, Sequence[int] | None],
    deadline_s: float,
) -> list[GenerateRequest]:
    """The requests that finish what is open, with ``deadline_s`` seconds for it.

    ``received`` holds the tokens of every open choice, ``None`` for one of which no chunk has come;
    the prompt's log-probabilities come with the first chunk and are asked for only where one is
    missing.
    """
    remaining = []
    for request in requests:
        open_indices = [
            index for index in range(request.params.n) if (request.request_id, index) in received
        ]
        if not open_indices:
            continue
        so_far = {index: received[request.request_id, index] for index in open_indices}
        begun = len(open_indices) < request.params.n or any(so_far.values())
        resume = tuple(Resumption(index, tuple(so_far[index] or ())) for index in open_indices)
        params = request.params
        if None not in so_far.values():
            params = replace(params, prompt_logprobs=None)
        remaining.append(
            replace(request, params=params, deadline_s=deadline_s, resume=resume if begun else ())
        )
    return remaining


def loses_its_replica(chunk: TokenChunk) -> bool:
    """Whether a chunk says that its engine is gone, and not that its request is wrong.

    Nobody but the ingress aborts a request, and it no longer listens then: an abort that is told
    comes from a replica that stops.
    """
    if chunk.finish_reason is FinishReason.ERROR:
        return chunk.error is not None and chunk.error.code == "engine_dead"
    return chunk.finish_reason is FinishReason.ABORT


def pause_s(failures: int) -> float:
    """How long to wait before the attempt after so many failures; a replica restarts in seconds."""
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(failures - 1, 16))
