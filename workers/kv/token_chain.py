"""The name of any prefix of a token sequence: its full blocks' chain, and a partly filled tail."""

from __future__ import annotations

from collections.abc import Sequence

from ..types import BlockHash
from .block import chain_hash, pack_tokens, root_hash


class TokenChain:
    """Chained SHA-256 names over tokens that only grow, worked out as far as they were asked for.

    The names of full blocks are those of the prefix cache, so model and cache salt are in them.
    """

    def __init__(
        self, token_ids: Sequence[int], block_size: int, fingerprint: bytes, cache_salt: str
    ) -> None:
        self._token_ids = token_ids
        self._block_size = block_size
        self._names = [root_hash(fingerprint, cache_salt)]  # [k]: of the first k blocks

    def at(self, end: int) -> BlockHash:
        """The name of the first ``end`` tokens. Raises ``ValueError`` outside of them."""
        if not 0 <= end <= len(self._token_ids):
            raise ValueError(f"there are {len(self._token_ids)} tokens; {end} cannot be named")
        full = end // self._block_size
        while len(self._names) <= full:
            start = (len(self._names) - 1) * self._block_size
            block = self._token_ids[start : start + self._block_size]
            self._names.append(chain_hash(self._names[-1], pack_tokens(block)))
        tail = self._token_ids[full * self._block_size : end]
        return chain_hash(self._names[full], pack_tokens(tail)) if tail else self._names[full]
