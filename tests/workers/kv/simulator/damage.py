"""What the network and the store do to a ticket's bytes."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np

from inference_pio.workers.kv.handoff import KVImport
from inference_pio.workers.kv.ticket import (
    HEADER_BYTES,
    Buffer,
    read_header,
    request_digest,
)

from ..ticket_samples import encoded
from .values import LAYOUT


def corrupted(buffer: Buffer, rng: Random) -> Buffer:
    """Another array: bits flipped, cut, grown, zeroed, or with its payload's halves swapped."""
    kind = rng.randrange(5)
    if kind == 1:
        return buffer[: rng.randrange(buffer.size)].copy()
    if kind == 2:
        return np.concatenate([buffer, buffer[-rng.randint(1, 16) :]])
    other = buffer.copy()
    if kind == 3:
        start = rng.randrange(buffer.size)
        other[start : start + rng.randint(1, 64)] = 0
    elif kind == 4:
        other[HEADER_BYTES:] = np.roll(buffer[HEADER_BYTES:], (buffer.size - HEADER_BYTES) // 2)
    if kind == 0 or np.array_equal(other, buffer):
        for _ in range(rng.choice((1, 3))):  # an odd number cannot undo itself
            other[rng.randrange(buffer.size)] ^= 1 << rng.randrange(8)
    return other


def mislabelled(buffer: Buffer, target: KVImport, rng: Random) -> Buffer:
    """A well-formed ticket with these blocks whose header claims to be what ``target`` waits for.

    Its chain is still that of the tokens whose KV it holds: a faulty engine may confuse requests,
    it does not forge hashes.
    """
    header = read_header(buffer)
    span = header.end - header.start
    header = replace(
        header,
        request_id_digest=request_digest(target.request_id),
        attempt=target.attempt,
        epoch=target.epoch,
    )
    if rng.random() < 0.8 and target.next + span <= target.limit:
        header = replace(header, start=target.next, end=target.next + span)
    payload = buffer[HEADER_BYTES:].view(LAYOUT.words).reshape(LAYOUT.shape(header.num_blocks))
    return encoded(header, payload)
