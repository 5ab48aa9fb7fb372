"""Where a step is computed: on one device, or on a grid of ranks that answer as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..kernels.context import build_context
from ..kernels.sampling.api import SamplingKernels
from .batch import BatchInputs
from .model.cache import KVCache
from .model.qwen3 import Qwen3Model
from .types import BlockId


class GroupLostError(RuntimeError):
    """A rank is dead or silent, so the whole group is gone; only a new engine helps."""


class Executor(Protocol):
    """A model with its KV cache. One thread calls it; every method is done when it returns.

    Methods of an executor with several ranks raise ``GroupLostError`` once one of them is gone.
    """

    @property
    def vocab_size(self) -> int:
        """Rows of the logits, padding included."""
        ...

    @property
    def sampling(self) -> SamplingKernels:
        """What samples the logits that ``forward`` gives."""
        ...

    def copy_blocks(self, pairs: Sequence[tuple[BlockId, BlockId]]) -> None:
        """Copy whole KV blocks, (source, destination), as if all at once."""
        ...

    def forward(self, inputs: BatchInputs) -> Tensor:
        """Run a step; the logits of ``inputs.sample_rows``, float32 [R, vocab_size]."""
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

    def close(self) -> None:
        """End what the executor started."""
        ...


class LocalExecutor:
    """The whole model in this process."""

    def __init__(self, model: Qwen3Model, *, num_blocks: int, block_size: int) -> None:
        self.model = model
        self.cache: KVCache = model.new_cache(num_blocks, block_size)
        self._hidden_TC = torch.empty(0)

    @property
    def vocab_size(self) -> int:
        """See ``Executor.vocab_size``."""
        return self.model.config.vocab_size

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
        token_ids_T = torch.tensor(inputs.token_ids, dtype=torch.int64, device=device)
        context = build_context(inputs.items, self.cache.block_size, device)
        self._hidden_TC = self.model.forward(token_ids_T, context, self.cache)
        return self.logits(inputs.sample_rows)

    def logits(self, rows: Sequence[int]) -> Tensor:
        """See ``Executor.logits``."""
        return self.model.logits(self._hidden_TC[list(rows)])

    def read_blocks(self, block_ids: Sequence[BlockId], out_Ln2KSD: Tensor) -> None:
        """See ``Executor.read_blocks``."""
        self.cache.read_blocks(block_ids, out_Ln2KSD)

    def write_blocks(self, block_ids: Sequence[BlockId], blocks_Ln2KSD: Tensor) -> None:
        """See ``Executor.write_blocks``."""
        self.cache.write_blocks(block_ids, blocks_Ln2KSD)

    def check(self) -> None:
        """It lives as long as its process."""

    def close(self) -> None:
        """Nothing was started."""
