"""What one rank computes: its stage of the pipeline, its share of every layer, its KV blocks.

A step's life on a rank:
1. its tokens are cut into parts that follow each other through the stages;
2. a part comes in as token ids (first stage) or hidden states (from the stage before);
3. it passes this stage's layers, by heads or by tokens;
4. it is sent on while the next part is computed, or, on the last stage, kept for ``logits``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.api import DecoderLayer
from ...kernels.context import build_context
from ..config import KVCacheDType, ParallelConfig
from ..loading import LoadedPart
from ..model.cache import KVCache
from ..model.qwen3 import ALONE, Exchange
from ..model.shard import ShardSpec, even_span
from ..types import BlockId
from .command import StepInputs
from .exchange import ByHeads, ByTokens, QKVColumns
from .groups import GridGroups
from .micro_batches import MicroBatch, num_micro_batches, split_step


class Stage:
    """One rank's model part and cache, joined to the other ranks by its groups.

    Every rank calls the same methods in the same order. Raises ``GroupLostError`` from any of them.
    """

    def __init__(
        self,
        part: LoadedPart,
        groups: GridGroups,
        parallel: ParallelConfig,
        *,
        num_blocks: int,
        block_size: int,
        kv_cache_dtype: KVCacheDType,
    ) -> None:
        self.model = part.model
        self.shard = part.model.shard
        self.groups = groups
        self.cache: KVCache = part.model.new_cache(num_blocks, block_size, kv_cache_dtype)
        self._parallel = parallel
        self._whole = part.whole_layers
        self._whole_layers: tuple[DecoderLayer, ...] = ()
        if part.whole_layers is not None:
            # Whole projections, but the norms of the heads that come back from the exchange.
            pairs = zip(part.whole_layers.layers, part.model.layers, strict=True)
            self._whole_layers = tuple(replace(w, qk_norm_AD=n.qk_norm_AD) for w, n in pairs)
            config, device = part.model.config, part.model.device
            self._columns = QKVColumns(config, self.shard.tp_size, device)
        tensor = groups.tensor
        self._by_heads: Exchange = ALONE if tensor is None else ByHeads(tensor)
        self._hidden_TC = torch.empty(0)

    # --- a step ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def forward(self, step: StepInputs) -> None:
        """Run this rank's share of a step; writes its KV."""
        count = num_micro_batches(
            len(step.token_ids), self.shard.pp_size, self._parallel.micro_batches
        )
        by_tokens = self._splits_tokens(step)
        kept: list[Tensor] = []
        sending: list[tuple[dist.Work, Tensor]] = []
        for part in split_step(step.items, count):
            hidden_TC = self._run_part(part, step.token_ids, by_tokens)
            if self.groups.after is not None:
                hidden_TC = hidden_TC.contiguous()
                sending.append((self.groups.after.start_broadcast(hidden_TC), hidden_TC))
            else:
                kept.append(self.model.normalise(hidden_TC))
        for work, _ in sending:
            assert self.groups.after is not None
            self.groups.after.wait(work)
        if kept:
            self._hidden_TC = kept[0] if len(kept) == 1 else torch.cat(kept)

    def _run_part(self, part: MicroBatch, token_ids: Sequence[int], by_tokens: bool) -> Tensor:
        model, device = self.model, self.model.device
        context = build_context(part.items, self.cache.block_size, device, model.pattern)
        rows = range(part.start, part.start + part.num_tokens)
        exchange, source = self._by_heads, model
        layers: tuple[DecoderLayer, ...] | None = None
        tensor = self.groups.tensor
        by_own: ByTokens | None = None
        if by_tokens and tensor is not None and part.num_tokens >= tensor.size:
            assert self._whole is not None
            by_own = ByTokens(tensor, self._columns, part.num_tokens)
            exchange, source, layers = by_own, self._whole, self._whole_layers
            own = even_span(part.num_tokens, tensor.size, tensor.rank)
            rows = range(part.start + own.start, part.start + own.stop)
        if self.groups.before is None:
            ids = torch.tensor(token_ids[rows.start : rows.stop], dtype=torch.int64, device=device)
            hidden_TC = exchange.total(source.embed(ids))
        else:
            hidden_TC = self.groups.before.broadcast(self._new_rows(len(rows)))
        hidden_TC = model.run_layers(hidden_TC, context, self.cache, exchange, layers)
        if by_own is not None and self.shard.is_last_stage:
            hidden_TC = by_own.all_tokens(hidden_TC)
        return hidden_TC

    def _splits_tokens(self, step: StepInputs) -> bool:
        if self._parallel.sequence_from is None:
            return False
        prefill = sum(item.num_new for item in step.items if item.num_new > 1)
        return prefill >= self._parallel.sequence_from

    def _new_rows(self, count: int) -> Tensor:
        model = self.model
        return torch.empty(count, model.config.hidden_size, dtype=model.dtype, device=model.device)

    @torch.inference_mode()
    def logits(self, rows: Sequence[int]) -> Tensor | None:
        """Logits of rows of the step before, float32 [R, vocab_size] on rank 0, none elsewhere."""
        group, model = self.groups.logits, self.model
        if group is None:
            return None
        widths = [
            len(ShardSpec(rank, self.shard.tp_size).vocabulary(model.config))
            for rank in range(self.shard.tp_size)
        ]
        padded = torch.zeros(len(rows), max(widths), device=model.device)
        if self.shard.is_last_stage:
            own = model.logits(self._hidden_TC[list(rows)])
            padded[:, : own.shape[1]] = own
        found = group.gather(padded)
        if not found:
            return None
        parts = found[-len(widths) :]  # rank 0 brings none of its own where it is another stage
        return torch.cat([p[:, :width] for p, width in zip(parts, widths, strict=True)], dim=1)

    # --- KV blocks ------------------------------------------------------------------------------

    def copy_blocks(self, pairs: Sequence[tuple[BlockId, BlockId]]) -> None:
        """See ``Executor.copy_blocks``."""
        self.cache.copy_blocks(pairs)

    @torch.inference_mode()
    def read_blocks(self, block_ids: Sequence[BlockId], out_Ln2KSD: Tensor | None) -> None:
        """See ``Executor.read_blocks``; rank 0 has the room, the others send theirs."""
        padded = self._host_blocks(len(block_ids))
        self.cache.read_blocks(block_ids, padded[: len(self.cache.layers)])
        parts = self.groups.grid.gather(padded)
        if out_Ln2KSD is None:
            return
        for rank, part in enumerate(parts):
            layers, heads = self._owned(rank)
            own = out_Ln2KSD[layers.start : layers.stop, :, :, heads.start : heads.stop]
            own.copy_(part[: len(layers)])

    @torch.inference_mode()
    def write_blocks(self, block_ids: Sequence[BlockId], blocks_Ln2KSD: Tensor | None) -> None:
        """See ``Executor.write_blocks``; rank 0 gives the blocks, the others get theirs."""
        parts = []
        if blocks_Ln2KSD is not None:
            for rank in range(self.shard.num_ranks):
                layers, heads = self._owned(rank)
                padded = self._host_blocks(len(block_ids))
                own = blocks_Ln2KSD[layers.start : layers.stop, :, :, heads.start : heads.stop]
                padded[: len(layers)] = own
                parts.append(padded)
        mine = self.groups.grid.scatter(self._host_blocks(len(block_ids)), parts)
        self.cache.write_blocks(block_ids, mine[: len(self.cache.layers)])

    def _owned(self, rank: int) -> tuple[range, range]:
        """The layers and KV heads of another rank."""
        config = self.model.config
        tp, pp = self.shard.tp_size, self.shard.pp_size
        shard = ShardSpec.of_rank(rank, tp_size=tp, pp_size=pp)
        return shard.layers(config), shard.kv_heads(config)

    def _host_blocks(self, count: int) -> Tensor:
        """Room for one rank's part of some blocks, of the same size on every rank.

        What lies behind a rank's own layers is sent along and never read.
        """
        most_layers = len(even_span(self.model.config.num_layers, self.shard.pp_size, 0))
        pool = self.cache.blocks_LN2KSD
        return torch.empty(most_layers, count, *pool.shape[2:], dtype=pool.dtype)
