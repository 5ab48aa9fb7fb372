"""Which keys a token attends to: all before it, or an approximation that leaves some out.

Three ways of leaving keys out, alone or (the first two) together:

- ``window``: token i sees the keys of tokens (i - window, i];
- ``sinks``: beside a window, also those of the first so many tokens, at their own positions;
- ``pages``: a generated token sees some cache blocks only: the first, its own, the one before that,
  and as many others as ``pages`` says, chosen by its queries for each KV head. Prompts are
  attended to in full.

Choosing for each KV head keeps the heads' choices apart, as their keys are, and needs no word
between tensor ranks. The query heads of a KV head choose together: they read the same keys.

A block is judged by an upper bound of what its keys can score: per channel the smallest and the
largest of its keys, times the query (Quest, https://arxiv.org/abs/2406.10774). A generated token is
one behind its sequence's prompt, whether it is computed alone or, after a preemption or a move,
again in a chunk: what a token sees depends on its position alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .kv_layer import KVLayer, read_blocks

FIRST_PAGES = 1
"""Leading blocks that are always seen."""
LAST_PAGES = 2
"""Last blocks that are always seen: with one, a token that begins a block would see itself only."""


@dataclass(frozen=True, slots=True)
class AttentionPattern:
    """Of a whole engine; the default leaves nothing out. Counts are at least 1 where they are set.

    ``sinks`` come with a window, ``pages`` with neither.
    """

    window: int | None = None
    sinks: int = 0
    pages: int | None = None

    def __post_init__(self) -> None:
        assert self.window is None or self.window >= 1
        assert self.sinks == 0 or self.window is not None
        assert self.pages is None or (self.pages >= 1 and self.window is None)

    @property
    def num_pages(self) -> int | None:
        """Blocks that a token sees which selects them."""
        return None if self.pages is None else FIRST_PAGES + self.pages + LAST_PAGES

    def selects_from(self, prompt_len: int, block_size: int) -> int | None:
        """The first position that selects pages: generated, with more blocks than it may see."""
        if self.num_pages is None:
            return None
        return max(prompt_len, self.num_pages * block_size)

    def block_numbers(self, first: int, last: int, block_size: int) -> list[int]:
        """Blocks that hold a key which some token of positions [first, last] sees, ascending.

        Pages are not looked at.
        """
        hidden = self.hidden_blocks(first, block_size)
        return [*range(hidden.start), *range(hidden.stop, last // block_size + 1)]

    def hidden_blocks(self, position: int, block_size: int) -> range:
        """Numbers of the blocks of which neither the token at ``position`` nor a later one sees
        a key. Pages are not looked at: whatever they leave out, a later token may see."""
        if self.window is None:
            return range(0)
        end = max(0, position - self.window + 1) // block_size
        return range(min(end, self._sink_blocks(block_size)), end)

    def most_blocks(self, start: int, end: int, chunk: int, block_size: int) -> int:
        """The most blocks that a sequence needs at once while it grows from ``start`` computed
        tokens to ``end``, at most ``chunk`` tokens a step."""
        whole = -(-end // block_size) - len(self.hidden_blocks(start, block_size))
        if self.window is None:
            return whole
        keys = self.window - 1 + min(chunk, end - start)  # from any place in a block on
        return min(whole, self._sink_blocks(block_size) + (keys + 2 * block_size - 2) // block_size)

    def _sink_blocks(self, block_size: int) -> int:
        return -(-self.sinks // block_size)

    def visible(self, rows_Q: Tensor, keys_L: Tensor) -> Tensor:
        """Whether the tokens at ``rows`` see the keys at ``keys``; shapes are broadcast.

        Pages are not looked at.
        """
        seen = keys_L <= rows_Q
        if self.window is not None:
            seen = seen & ((keys_L > rows_Q - self.window) | (keys_L < self.sinks))
        return seen


FULL = AttentionPattern()


def page_bounds(keys_NKSD: Tensor) -> Tensor:
    """The smallest and the largest key of every block and channel, [N, 2, K, D]."""
    return torch.stack(torch.aminmax(keys_NKSD, dim=2), dim=1)


def bound_pages(kv_N2KSD: KVLayer, bounds_N2KD: Tensor, blocks: Sequence[int]) -> None:
    """Writes the bounds of ``blocks``, which are full."""
    if blocks:
        index_B = torch.tensor(blocks, device=kv_N2KSD.device)
        bounds_N2KD[index_B] = page_bounds(read_blocks(kv_N2KSD, blocks)[:, 0]).to(
            bounds_N2KD.dtype
        )


def page_scores(q_RKGD: Tensor, bounds_RC2KD: Tensor) -> Tensor:
    """Upper bounds of the products of queries with the keys of C blocks, float32 [R, K, C].

    Summed over the queries of a KV head, of which only the sums of positive and of negative parts
    are then needed.
    """
    q = q_RKGD.float()
    parts_R2KD = torch.stack((q.clamp(max=0).sum(2), q.clamp(min=0).sum(2)), dim=1)
    return torch.einsum("rpkd,rcpkd->rkc", parts_R2KD, bounds_RC2KD.float())


def choose_pages(scores_RKC: Tensor, last_R: Tensor, pages: int) -> Tensor:
    """Numbers of the blocks that tokens see, ascending, [R, K, FIRST_PAGES + pages + LAST_PAGES].

    ``scores`` has the blocks from 0; ``last`` is each token's own block, and those behind it
    are never chosen.
    """
    numbers_C = torch.arange(scores_RKC.shape[2], device=scores_RKC.device)
    begin_R = last_R - (LAST_PAGES - 1)
    open_RC = (numbers_C >= FIRST_PAGES) & (numbers_C < begin_R[:, None])
    scores_RKC = scores_RKC.masked_fill(~open_RC[:, None], float("-inf"))
    chosen_RKP = scores_RKC.topk(pages, dim=2).indices.sort(dim=2).values
    num_heads = scores_RKC.shape[1]
    first = numbers_C[:FIRST_PAGES].expand(*chosen_RKP.shape[:2], -1)
    last_RM = begin_R[:, None] + torch.arange(LAST_PAGES, device=last_R.device)
    return torch.cat((first, chosen_RKP, last_RM[:, None].expand(-1, num_heads, -1)), dim=2)
