"""The paged KV cache: one preallocated tensor for every layer's keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.pattern import FULL, AttentionPattern, bound_pages
from .config import ModelConfig


class KVCache:
    """``num_blocks`` blocks of ``block_size`` tokens.

    ``blocks_LN2KSD``: layers, blocks, key and value, KV heads, tokens of a block, head_dim. Block
    ``n`` of the whole model is ``blocks_LN2KSD[:, n]``; a layer sees its own ``layers[l]``.
    ``bounds`` has each layer's ``bounds_N2KD`` where ``pattern`` has pages, else nothing.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        pattern: AttentionPattern = FULL,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"a KV cache has at least one block of one token, got {num_blocks} of {block_size}"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        # zeros() maps pages only when they are first written; touching them here keeps page faults
        # out of the first steps and makes a lack of memory show now.
        self.blocks_LN2KSD = torch.empty(
            config.num_layers,
            num_blocks,
            2,
            config.num_kv_heads,
            block_size,
            config.head_dim,
            dtype=dtype,
            device=device,
        ).zero_()
        self.layers: tuple[Tensor, ...] = tuple(self.blocks_LN2KSD.unbind(0))
        self.bounds: tuple[Tensor, ...] = ()
        if pattern.pages is not None:
            shape = (config.num_layers, num_blocks, 2, config.num_kv_heads, config.head_dim)
            self.bounds = torch.zeros(shape, dtype=dtype, device=device).unbind(0)

    @staticmethod
    def bytes_per_block(
        config: ModelConfig,
        block_size: int,
        dtype: torch.dtype,
        pattern: AttentionPattern = FULL,
    ) -> int:
        """Memory of one block over all layers, with its bounds where ``pattern`` has pages."""
        per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
        bounds = 0 if pattern.pages is None else 1  # the smallest and the largest key: a token's
        return per_token * (block_size + bounds) * dtype.itemsize

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies whole blocks, (source, destination), as if all at once."""
        if not pairs:
            return
        sources, destinations = zip(*pairs, strict=True)
        self.write_blocks(destinations, self._gather(sources))

    def read_blocks(self, blocks: Sequence[int], out_Ln2KSD: Tensor) -> None:
        """Copies whole blocks into contiguous memory of the host.

        Raises ``ValueError`` where that has another shape.
        """
        shape = (len(self.layers), len(blocks), *self.blocks_LN2KSD.shape[2:])
        if tuple(out_Ln2KSD.shape) != shape:
            raise ValueError(f"room of shape {list(out_Ln2KSD.shape)}; {list(shape)} are read")
        if self.blocks_LN2KSD.is_cpu:
            torch.index_select(self.blocks_LN2KSD, 1, self._index(blocks), out=out_Ln2KSD)
        else:
            out_Ln2KSD.copy_(self._gather(blocks))

    def write_blocks(self, blocks: Sequence[int], blocks_Ln2KSD: Tensor) -> None:
        """Overwrites whole blocks."""
        # One by one: indexed assignment moves single elements, at a third of the speed.
        for number, block in enumerate(blocks):
            self.blocks_LN2KSD[:, block].copy_(blocks_Ln2KSD[:, number])
        for layer, bounds_N2KD in enumerate(self.bounds):
            bound_pages(self.layers[layer], bounds_N2KD, blocks)

    def _gather(self, blocks: Sequence[int]) -> Tensor:
        return self.blocks_LN2KSD.index_select(1, self._index(blocks))

    def _index(self, blocks: Sequence[int]) -> Tensor:
        return torch.tensor(blocks, dtype=torch.int64, device=self.blocks_LN2KSD.device)

    def clear_blocks(self, blocks: Sequence[int]) -> None:
        """Zeroes blocks that are about to be filled in part.

        Attention may load the rest of a block at weight zero; an infinity or NaN left there by its
        last owner would still spread.
        """
        if blocks:
            self.blocks_LN2KSD[:, list(blocks)] = 0
