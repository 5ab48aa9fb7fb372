"""Small sound tickets for the tests of tickets and handoffs."""

from __future__ import annotations

import numpy as np

from inference_pio.workers.kv.ticket import (
    Buffer,
    Expected,
    KVLayout,
    TicketHeader,
    Words,
    encode_ticket,
    request_digest,
)
from inference_pio.workers.kv.token_chain import TokenChain

FINGERPRINT = bytes(range(32))
LAYOUT = KVLayout(FINGERPRINT, "bfloat16", num_layers=2, num_kv_heads=2, head_dim=2, block_size=4)
TOKENS = tuple(range(100, 119))
"""A prompt of four full blocks and three tokens more."""
ATTEMPT, EPOCH = 7, 2**62 + 1


def chain_of(tokens: tuple[int, ...] = TOKENS, salt: str = "salt") -> TokenChain:
    return TokenChain(tokens, LAYOUT.block_size, FINGERPRINT, salt)


def words(num_blocks: int, layout: KVLayout = LAYOUT, seed: int = 0) -> Words:
    """Random elements, none of them zero."""
    most = 2**8 if layout.in_codes else 2**15 - 1
    drawn = np.random.default_rng(seed).integers(1, most, layout.shape(num_blocks))
    return drawn.astype(layout.words)


def header(start: int = 4, end: int = 12, **changes: object) -> TicketHeader:
    fields: dict[str, object] = {
        "layout": LAYOUT,
        "request_id_digest": request_digest("r"),
        "attempt": ATTEMPT,
        "epoch": EPOCH,
        "start": start,
        "end": end,
        "chain": chain_of().at(end) if end <= len(TOKENS) else bytes(32),
    }
    return TicketHeader(**{**fields, **changes})  # type: ignore[arg-type]


def encoded(header: TicketHeader, blocks_Ln2KSD: Words) -> Buffer:
    """A ticket of given blocks, in memory of its own."""
    buffer = np.full(header.num_bytes, 0xA5, np.uint8)
    encode_ticket(header, buffer, lambda out: np.copyto(out, blocks_Ln2KSD))
    return buffer


def ticket(start: int = 4, end: int = 12, **changes: object) -> Buffer:
    made = header(start, end, **changes)
    return encoded(made, words(made.num_blocks, made.layout))


def expected(start: int = 4, limit: int = len(TOKENS), **changes: object) -> Expected:
    fields: dict[str, object] = {
        "layout": LAYOUT,
        "request_id_digest": request_digest("r"),
        "attempt": ATTEMPT,
        "epoch": EPOCH,
        "start": start,
        "limit": limit,
        "chain_at": chain_of().at,
    }
    return Expected(**{**fields, **changes})  # type: ignore[arg-type]
