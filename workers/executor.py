"""Where a step is computed: on one device, or on a grid of ranks that answer as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..kernels.context import build_context
from ..kernels.host_copy import copied_to
from ..kernels.sampling.api import SamplingKernels
from .batch import BatchInputs
from .config import KVCacheDType
from .model.cache import KVCache
from .model.qwen3 import Qwen3Model
from .model.streaming.layer_stream import StreamStats
from .types import BlockId


class GroupLostError(RuntimeError):
    """A rank is dead or silent, so the whole group is gone; only a new engine helps."""


class Executor(Protocol):
    """A model with its KV cache. One thread calls it; every method is done when it returns.

    One that ``is_asynchronous`` may only have queued its work by then, which it does in the order
    of the calls. Methods of one with several ranks raise ``GroupLostError`` once one of them is
    gone.
    """

    @property
    def vocab_size(self) -> int:
        """Rows of the logits, padding included."""
        ...

    @property
    def is_asynchronous(self) -> bool:
        """Whether the host may go on while ``forward`` and the sampling of its logits run."""
        ...

    @property
    def sampling(self) -> SamplingKernels:
        """What samples the logits that ``forward`` gives."""
        ...

    def copy_blocks(self, pairs: Sequence[tuple[BlockId, BlockId]]) -> None:
        """Copy whole KV blocks, (source, destination), as if all at once."""
        ...

    def forward(self, inputs: BatchInputs) -> Tensor:
        """Run a step; the logits of ``inputs.sample_rows``, float32 [R, vocab_size].

        They are there until the next call of ``forward`` or ``logits``.
        """
        ...

    def logits(self, rows: Sequence[int]) -> Tensor:
        """Logits of other rows of the step that ``forward`` ran last, float32 [R, vocab_size]."""
        ...

    def read_blocks(self, block_ids: Sequence[BlockId], out_Ln2KSD: Tensor) -> None:
        """Copy KV blocks of the whole model into ``out_Ln2KSD``, which is contiguous host memory.

        Raises ``ValueError`` where that has another shape.
        """
        ...

    def write_blocks(self, block_ids: Sequence[BlockId], blocks_Ln2KSD: Tensor) -> None:
        """Overwrite whole KV blocks of the model from host memory, which is not kept."""
        ...

    def check(self) -> None:
        """Raise ``GroupLostError`` if it can compute no more; may be called by any thread."""
        ...

    def stream_stats(self) -> StreamStats:
        """What streaming this process's layers from the disk has cost so far."""
        ...

    def close(self) -> None:
        """End what the executor started."""
        ...


class LocalExecutor:
    """The whole model in this process."""

    def __init__(
        self,
        model: Qwen3Model,
        *,
        num_blocks: int,
        block_size: int,
        kv_cache_dtype: KVCacheDType = "auto",
    ) -> None:
        self.model = model
        self.cache: KVCache = model.new_cache(num_blocks, block_size, kv_cache_dtype)
        self._hidden_TC = torch.empty(0)

    @property
    def vocab_size(self) -> int:
        """See ``Executor.vocab_size``."""
        return self.model.config.vocab_size

    @property
    def is_asynchronous(self) -> bool:
        """See ``Executor.is_asynchronous``: CUDA queues what it is given."""
        return self.model.device.type == "cuda"

    @property
    def sampling(self) -> SamplingKernels:
        """See ``Executor.sampling``."""
        return self.model.kernels.sampling

    def copy_blocks(self, pairs: Sequence[tuple[BlockId, BlockId]]) -> None:
        """See ``Executor.copy_blocks``."""
        self.cache.copy_blocks(pairs)

    def forward(self, inputs: BatchInputs) -> Tensor:
        """See ``Executor.forward``."""
        device = self.model.device
        token_ids_T = copied_to(inputs.token_ids, torch.int64, device)
        if inputs.unread is not None and inputs.unread_rows:
            rows, places = (
                copied_to(numbers, torch.int64, device)
                for numbers in (inputs.unread_rows, inputs.unread_places)
            )
            # A fault is no id; what is computed of its sequence is thrown away.
            found = inputs.unread.tokens_R.index_select(0, places).clamp(min=0)
            token_ids_T.index_copy_(0, rows, found)
        context = build_context(inputs.items, self.cache.block_size, device, self.model.pattern)
        self._hidden_TC = self.model.forward(token_ids_T, context, self.cache)
        return self.logits(inputs.sample_rows)

    def logits(self, rows: Sequence[int]) -> Tensor:
        """See ``Executor.logits``."""
        rows_R = copied_to(rows, torch.int64, self.model.device)
        return self.model.logits(self._hidden_TC.index_select(0, rows_R))

    def read_blocks(self, block_ids: Sequence[BlockId], out_Ln2KSD: Tensor) -> None:
        """See ``Executor.read_blocks``."""
        self.cache.read_blocks(block_ids, out_Ln2KSD)

    def write_blocks(self, block_ids: Sequence[BlockId], blocks_Ln2KSD: Tensor) -> None:
        """See ``Executor.write_blocks``."""
        self.cache.write_blocks(block_ids, blocks_Ln2KSD)

    def check(self) -> None:
        """It lives as long as its process."""

    def stream_stats(self) -> StreamStats:
        """See ``Executor.stream_stats``."""
        return self.model.stream_stats()

    def close(self) -> None:
        """See ``Executor.close``."""
        self.model.close()
