"""One KV block's bookkeeping, and the chained hash that names its content.

The name of a full block is SHA-256 over its parent's name and its own token ids. The chain starts
from a root over the model fingerprint and the cache salt, so two blocks have one name only if the
model, the tenant and every token up to the block's end are the same.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from ..types import BlockHash, BlockId


class IntegrityError(RuntimeError):
    """A store's books do not add up: a fault in the engine, never in a request."""


@dataclass(slots=True)
class Block:
    """The state of one block of the pool.

    ``epoch`` counts how often the block was handed out, so a late reader can tell its own block
    from the next owner's. ``hash`` and ``tokens`` are set together, while the prefix index points
    at this block.
    """

    ref_count: int = 0
    epoch: int = 0
    hash: BlockHash | None = None
    tokens: bytes = b""


@dataclass(frozen=True, slots=True)
class EvictedBlock:
    """A block that left the prefix index for a new owner; its content is there until that writes.

    ``name`` and ``tokens`` are what the index had.
    """

    block_id: BlockId
    name: BlockHash
    tokens: bytes


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian uint32, the same on every machine."""
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def root_hash(fingerprint: bytes, cache_salt: str) -> BlockHash:
    """The parent of every first block. Lengths are hashed too: no pair runs into another."""
    salt = cache_salt.encode("utf-8", "surrogatepass")
    head = struct.pack("<QQ", len(fingerprint), len(salt))
    return BlockHash(hashlib.sha256(head + fingerprint + salt).digest())


def chain_hash(parent: BlockHash, tokens: bytes) -> BlockHash:
    """The name of the block that holds ``tokens`` (packed) after the block named ``parent``."""
    return BlockHash(hashlib.sha256(parent + tokens).digest())
