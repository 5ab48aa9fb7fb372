"""Which replica holds which prefixes, as far as one router can know.

It knows what it sent where, and not what an engine has evicted since: for each replica it keeps the
most recent blocks, as many as fit the replica's KV pool, in the order in which an LRU cache would
drop them. Hashes are chained, so a block is only of use with all blocks before it. They are touched
from the last to the first, and therefore leave in that order: what is held is always whole prefixes
and a binary search finds how much of one is held.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

from ..workers.kv.block import IntegrityError

MAX_BLOCKS = 32_768
"""Blocks remembered of one replica, 2 million tokens; about 6 MB."""


class PrefixIndex:
    """For each replica, the hashes of the prompt blocks it was sent last."""

    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        self._max_blocks = max_blocks
        self._of: dict[str, OrderedDict[bytes, bytes | None]] = {}
        """Replica to block hash to the hash before it, oldest use first."""

    def record(self, replica_id: str, prefix: Sequence[bytes], capacity: int | None = None) -> None:
        """A prompt goes to a replica that can hold ``capacity`` blocks."""
        held = self._of.setdefault(replica_id, OrderedDict())
        for position in range(len(prefix) - 1, -1, -1):
            held[prefix[position]] = prefix[position - 1] if position else None
            held.move_to_end(prefix[position])
        limit = self._max_blocks if capacity is None else min(capacity, self._max_blocks)
        while len(held) > limit:
            held.popitem(last=False)

    def num_held(self, replica_id: str, prefix: Sequence[bytes]) -> int:
        """How many leading blocks of ``prefix`` the replica is expected to hold."""
        held = self._of.get(replica_id)
        if not held:
            return 0
        low, high = 0, len(prefix)  # prefix[:low] is held, prefix[high:] is not
        while low < high:
            middle = (low + high) // 2
            if prefix[middle] in held:
                low = middle + 1
            else:
                high = middle
        return low

    def forget(self, replica_id: str) -> None:
        """A replica has lost its cache."""
        self._of.pop(replica_id, None)

    def retain(self, replica_ids: Collection[str]) -> None:
        """Forget every replica but these."""
        for gone in self._of.keys() - set(replica_ids):
            del self._of[gone]

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` for more blocks than may be, or one without its parent."""
        for replica_id, held in self._of.items():
            if len(held) > self._max_blocks:
                raise IntegrityError(
                    f"{len(held)} blocks of {replica_id} are held, {self._max_blocks} are allowed"
                )
            newer: set[bytes] = set()
            for name, parent in reversed(held.items()):
                if parent is not None and parent not in newer:
                    raise IntegrityError(
                        f"block {name.hex()} of {replica_id} is held, and is to be dropped after "
                        f"its parent {parent.hex()}"
                    )
                newer.add(name)
