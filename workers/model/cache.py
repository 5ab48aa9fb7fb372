"""The paged KV cache: one preallocated tensor for every layer's keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.host_copy import copied_to
from ...kernels.kv_bytes import head_bytes
from ...kernels.kv_layer import CodedKV, KVLayer
from ...kernels.pattern import FULL, AttentionPattern, bound_pages
from ..config import KVCacheDType
from .config import ModelConfig
from .huge_pages import zeros_on_huge_pages


class KVCache:
    """``num_blocks`` blocks of ``block_size`` tokens.

    ``blocks_LN2KSD``: layers, blocks, key and value, KV heads, tokens of a block, head_dim; of a
    cache in codes the last two are one, the bytes of a head in a block (see ``kv_layer``). Block
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
        kv_cache_dtype: KVCacheDType = "auto",
        pattern: AttentionPattern = FULL,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"a KV cache has at least one block of one token, got {num_blocks} of {block_size}"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        head: tuple[int, ...] = (block_size, config.head_dim)
        stored = dtype
        if kv_cache_dtype != "auto":
            head, stored = (head_bytes(block_size, config.head_dim),), torch.uint8
        shape = (config.num_layers, num_blocks, 2, config.num_kv_heads)
        # zeros() maps pages only when they are first written; touching them here keeps page faults
        # out of the first steps and makes a lack of memory show now.
        self.blocks_LN2KSD = (
            zeros_on_huge_pages((*shape, *head), stored)
            if device.type == "cpu"
            else torch.empty(*shape, *head, dtype=stored, device=device).zero_()
        )
        layers = self.blocks_LN2KSD.unbind(0)
        self.layers: tuple[KVLayer, ...] = layers
        if kv_cache_dtype != "auto":
            self.layers = tuple(
                CodedKV(layer, kv_cache_dtype, block_size, config.head_dim) for layer in layers
            )
        self.bounds: tuple[Tensor, ...] = ()
        if pattern.pages is not None:
            bounds = torch.zeros(*shape, config.head_dim, dtype=dtype, device=device)
            self.bounds = bounds.unbind(0)

    @staticmethod
    def bytes_per_block(
        config: ModelConfig,
        block_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: KVCacheDType = "auto",
        pattern: AttentionPattern = FULL,
    ) -> int:
        """Memory of one block over all layers, with its bounds where ``pattern`` has pages.

        ``dtype`` is the model's.
        """
        token = config.head_dim * dtype.itemsize
        size = block_size * token
        if kv_cache_dtype != "auto":
            size = head_bytes(block_size, config.head_dim)
        if pattern.pages is not None:
            size += token  # the smallest and the largest key: as much as a token's key and value
        return 2 * config.num_layers * config.num_kv_heads * size

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
        return copied_to(blocks, torch.int64, self.blocks_LN2KSD.device)

    def clear_blocks(self, blocks: Sequence[int]) -> None:
        """Zeroes blocks that are about to be filled in part.

        Attention may load the rest of a block at weight zero; an infinity or NaN left there by its
        last owner would still spread.
        """
        if self.blocks_LN2KSD.is_cpu:
            for block in blocks:  # as in write_blocks
                self.blocks_LN2KSD[:, block].zero_()
        elif blocks:
            self.blocks_LN2KSD.index_fill_(1, self._index(blocks), 0)
