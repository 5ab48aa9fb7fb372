"""How codes of the KV cache lie in memory: what every process that sees their bytes must know.

One head's keys, or values, in one block are ``block_size`` rows of ``head_dim`` codes of one byte,
filled up to a multiple of four bytes, then a float32 scale for each row. The standard library only.
"""

from __future__ import annotations

from typing import Literal

KVCodes = Literal["int8", "fp8"]

SCALE_BYTES = 4


def code_bytes(block_size: int, head_dim: int) -> int:
    """Bytes from a head's first code in a block to its first scale, which is aligned."""
    return -(-block_size * head_dim // SCALE_BYTES) * SCALE_BYTES


def head_bytes(block_size: int, head_dim: int) -> int:
    """Bytes of one head's keys, or values, in one block: codes and scales."""
    return code_bytes(block_size, head_dim) + block_size * SCALE_BYTES
