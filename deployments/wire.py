"""Plain values between ingress and engine replica: no torch where requests are checked."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..workers.kv.block import chain_hash, pack_tokens, root_hash
from ..workers.types import EngineStats, RequestError, ThoughtEnd, TokenChunk, TokenKind, Usage

HEARTBEAT_S = 2.0
"""A silent subscription yields an empty batch this often, so its reader can tell it is alive."""


ROUTE_BLOCK_TOKENS = 64
"""Tokens that one hash of a route's prefix stands for; independent of any engine's block size."""
MAX_ROUTE_BLOCKS = 128
"""Leading blocks of a prompt that a route looks at: 8192 tokens decide as well as more."""
_ROUTE_HASH_BYTES = 16


@dataclass(frozen=True, slots=True)
class RouteHints:
    """What the choice of a replica may know of a request.

    ``prefix`` holds the chained hashes of the prompt's leading full blocks of
    ``ROUTE_BLOCK_TOKENS`` tokens, ``session`` the caller's name for a conversation, ``avoid`` the
    ids of replicas that have just failed this request, the last one last, and ``sequences`` how
    many sequences it will run.
    """

    prefix: tuple[bytes, ...] = ()
    session: str | None = None
    avoid: tuple[str, ...] = ()
    sequences: int = 1


def route_hints(
    prompt_token_ids: Sequence[int], cache_salt: str = "", session: str | None = None
) -> RouteHints:
    """The hints for a prompt; two prompts share hashes as far as text and tenant are the same."""
    end = min(len(prompt_token_ids) // ROUTE_BLOCK_TOKENS, MAX_ROUTE_BLOCKS) * ROUTE_BLOCK_TOKENS
    parent = root_hash(b"route", cache_salt)
    prefix: list[bytes] = []
    for start in range(0, end, ROUTE_BLOCK_TOKENS):
        block = prompt_token_ids[start : start + ROUTE_BLOCK_TOKENS]
        parent = chain_hash(parent, pack_tokens(block))
        prefix.append(parent[:_ROUTE_HASH_BYTES])
    return RouteHints(tuple(prefix), session)


@dataclass(frozen=True, slots=True)
class RoutingStats:
    """What a replica reports to the routers, as Serve's ``record_routing_stats`` carries it.

    ``at`` is the wall-clock time of the report, ``load`` counts sequences that run or wait,
    ``kv_tokens`` is how many tokens the KV pool holds in all, and a new ``epoch`` says that the
    prefix cache has begun anew.
    """

    at: float
    load: int
    kv_used_ratio: float
    kv_tokens: int
    epoch: str

    @classmethod
    def of(cls, stats: EngineStats, block_size: int, replica_id: str, at: float) -> RoutingStats:
        """One engine's report; a new engine is a new replica, and so has a new id."""
        return cls(
            at=at,
            load=stats.running + stats.waiting,
            kv_used_ratio=stats.kv_blocks_used / max(1, stats.kv_blocks_total),
            kv_tokens=stats.kv_blocks_total * block_size,
            epoch=replica_id,
        )

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, report: Mapping[str, Any]) -> RoutingStats:
        """Raises ``ValueError`` for a report with a wrong key, type or value."""
        known = {part.name for part in fields(cls)}
        if report.keys() != known:
            raise ValueError(f"it has {sorted(report)}; {sorted(known)} are expected")
        stats = cls(**report)
        for name in ("at", "load", "kv_used_ratio", "kv_tokens"):
            value = getattr(stats, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name} is {value!r}, not a number")
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; it is at least 0")
        if not isinstance(stats.epoch, str):
            raise ValueError(f"epoch is {stats.epoch!r}, not a string")
        return stats


class WrongReplicaError(RuntimeError):
    """A call aimed at another replica, which is gone."""


class StreamSweptError(RuntimeError):
    """A subscription that comes after its requests were ended for want of a reader."""


class BatchLostError(RuntimeError):
    """A subscription that came without one of its batches."""


@dataclass(frozen=True, slots=True)
class SubmitReply:
    """Who took the requests; with ``error`` nobody did."""

    replica_id: str
    error: RequestError | None = None


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The model as one engine replica has loaded it.

    ``checkpoint`` is its folder. ``num_tokens`` counts the tokens that exist; ids from there up
    are padding rows. ``kernels`` names what computes it, ``attention`` which keys a token
    attends to (``AttentionConfig.label``): all but ``full`` are approximations.
    """

    replica_id: str
    checkpoint: str
    max_model_len: int
    num_tokens: int
    kernels: str
    attention: str


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


PackedBatch = tuple[int, list[Packed]]
"""One yield of a subscription: its number, and its chunks."""


async def pack_batches(
    batches: AsyncGenerator[list[TokenChunk], None],
) -> AsyncGenerator[PackedBatch, None]:
    """A subscription as it travels: packed and numbered from 0, empty batches too.

    Chunks are numbered themselves, but a request whose last chunk is lost has none behind it that
    would show the gap. The subscription goes on, so the next batch does, a heartbeat at the latest.
    """
    number = 0
    async with aclosing(batches):
        async for batch in batches:
            yield number, [pack(chunk) for chunk in batch]
            number += 1


async def unpack_batches(
    packed: AsyncIterator[PackedBatch],
) -> AsyncGenerator[list[TokenChunk], None]:
    """The batches that were packed. Raises ``BatchLostError`` where one is missing."""
    expected = 0
    async for number, chunks in packed:
        if number != expected:
            raise BatchLostError(f"batch {expected} of the stream was expected, {number} came")
        yield [unpack(chunk) for chunk in chunks]
        expected += 1
