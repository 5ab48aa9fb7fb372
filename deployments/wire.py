"""Plain values between ingress and engine replica: no torch where requests are checked."""

from __future__ import annotations

from dataclasses import dataclass

from ..workers.types import RequestError, ThoughtEnd, TokenChunk, TokenKind, Usage

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


Packed = (
    tuple[str, int, int, tuple[int, ...], bytes, tuple[int, int, int, int], str | None] | TokenChunk
)
_KINDS = tuple(TokenKind)


def pack(chunk: TokenChunk) -> Packed:
    """A plain token chunk as a tuple of builtins: pickling that costs a thirtieth of the object.

    A chunk with anything rare (an end, log-probabilities, timing) goes as it is.
    """
    if (
        chunk.finish_reason is not None
        or chunk.logprobs is not None
        or chunk.prompt_logprobs is not None
        or chunk.timing is not None
    ):
        return chunk
    usage = chunk.usage
    return (
        chunk.request_id,
        chunk.index,
        chunk.first,
        chunk.token_ids,
        bytes(chunk.kinds),
        (
            usage.prompt_tokens,
            usage.cached_tokens,
            usage.completion_tokens,
            usage.reasoning_tokens,
        ),
        None if chunk.thought_end is None else chunk.thought_end.value,
    )


def unpack(packed: Packed) -> TokenChunk:
    """The chunk that was packed."""
    if isinstance(packed, TokenChunk):
        return packed
    request_id, index, first, token_ids, kinds, usage, thought_end = packed
    return TokenChunk(
        request_id=request_id,
        index=index,
        first=first,
        token_ids=token_ids,
        kinds=tuple([_KINDS[kind] for kind in kinds]),
        usage=Usage(*usage),
        thought_end=None if thought_end is None else ThoughtEnd(thought_end),
    )
