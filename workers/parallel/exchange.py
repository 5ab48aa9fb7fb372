"""How the tensor ranks of a stage compute one layer together: by heads, or by tokens.

By heads (tensor parallel): every rank has all tokens and a slice of every matrix; what the
attention and MLP outputs give are terms of sums.

By tokens (sequence parallel): every rank has some tokens and whole matrices. Queries, keys and
values change hands so that each rank attends with its own heads over all tokens, and writes the
very cache that tensor parallel decoding goes on with; the attention's output goes back.
    rank 0: tokens 0 1, all heads  ──►  all tokens, heads of rank 0
    rank 1: tokens 2 3, all heads  ──►  all tokens, heads of rank 1
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.config import ModelConfig
from ..model.shard import ShardSpec, even_span
from .collectives import Group


class ByHeads:
    """The exchange of ranks that hold slices of a layer."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def to_heads(self, qkv_TC: Tensor) -> Tensor:
        """See ``Exchange.to_heads``."""
        return qkv_TC

    def to_tokens(self, out_TC: Tensor) -> Tensor:
        """See ``Exchange.to_tokens``."""
        return out_TC

    def residual(self, hidden_TC: Tensor) -> Tensor | None:
        """One rank adds it, so that the sum has it once."""
        return hidden_TC if self._group.rank == 0 else None

    def total(self, partial_TC: Tensor) -> Tensor:
        """See ``Exchange.total``."""
        return self._group.all_reduce(partial_TC)


class ByTokens:
    """The exchange of ranks that hold some tokens each: ``num_tokens`` in all, in rank order."""

    def __init__(self, group: Group, columns: QKVColumns, num_tokens: int) -> None:
        self._group = group
        self._columns = columns
        self._counts = [len(even_span(num_tokens, group.size, r)) for r in range(group.size)]

    def to_heads(self, qkv_TC: Tensor) -> Tensor:
        """See ``Exchange.to_heads``."""
        size, width, own = self._group.size, self._columns.width, qkv_TC.shape[0]
        by_rank = qkv_TC.index_select(1, self._columns.index).view(own, size, width)
        flat = by_rank.transpose(0, 1).flatten()
        received = [count * width for count in self._counts]
        return self._group.all_to_all(flat, [own * width] * size, received).view(-1, width)

    def to_tokens(self, out_TC: Tensor) -> Tensor:
        """See ``Exchange.to_tokens``."""
        size, width, own = self._group.size, out_TC.shape[1], self._counts[self._group.rank]
        sent = [count * width for count in self._counts]
        found = self._group.all_to_all(out_TC.flatten(), sent, [own * width] * size)
        return found.view(size, own, width).transpose(0, 1).reshape(own, size * width)

    def residual(self, hidden_TC: Tensor) -> Tensor | None:
        """See ``Exchange.residual``."""
        return hidden_TC

    def total(self, partial_TC: Tensor) -> Tensor:
        """See ``Exchange.total``."""
        return partial_TC

    def all_tokens(self, hidden_TC: Tensor) -> Tensor:
        """Every rank's rows on every rank, in order."""
        longest = max(self._counts)
        padded = hidden_TC.new_zeros(longest, hidden_TC.shape[1])
        padded[: hidden_TC.shape[0]] = hidden_TC
        found = self._group.all_gather(padded)
        return torch.cat([part[:count] for part, count in zip(found, self._counts, strict=True)])


class QKVColumns:
    """Which columns of a whole projection each rank's heads are, rank after rank.

    A KV head that several ranks share appears once for each.
    """

    def __init__(self, config: ModelConfig, tp_size: int, device: torch.device) -> None:
        keys, values = config.num_heads, config.num_heads + config.num_kv_heads
        heads: list[int] = []
        for rank in range(tp_size):
            shard = ShardSpec(rank, tp_size)
            kv_heads = shard.kv_heads(config)
            heads += shard.query_heads(config)
            heads += [keys + head for head in kv_heads] + [values + head for head in kv_heads]
        channels_HD = torch.arange((values + config.num_kv_heads) * config.head_dim)
        self.index = channels_HD.view(-1, config.head_dim)[heads].flatten().to(device)
        self.width = self.index.shape[0] // tp_size
