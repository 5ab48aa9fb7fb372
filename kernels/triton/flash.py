"""Prefill by the package flash-attn, where it is installed and takes the cache's pages.

It is ahead of Triton on long prompts. Its paged functions want blocks of a multiple of 256 tokens
and half precision; decode stays with the split kernels, which are captured in graphs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .attention import PrefillBatch

PAGE_TOKENS = 256


def takes(q_THD: Tensor, kv_N2KSD: Tensor, batch: PrefillBatch) -> bool:
    """Whether flash-attn attends for this batch over this cache."""
    _, _, _, block_size, head_dim = kv_N2KSD.shape
    return (
        batch.rows is not None
        and q_THD.dtype in (torch.float16, torch.bfloat16)
        and block_size % PAGE_TOKENS == 0
        and head_dim % 8 == 0
        and varlen_function() is not None
    )


def attend(q_THD: Tensor, kv_N2KSD: Tensor, batch: PrefillBatch, out_TC: Tensor) -> None:
    """Writes the rows of the batch's tokens; for what it ``takes``."""
    function, block_size = varlen_function(), kv_N2KSD.shape[3]
    assert function is not None
    assert batch.rows is not None
    # Blocks behind a sequence's last are never read: any that exist may stand there.
    columns = torch.arange(-(-batch.longest // block_size), device=q_THD.device)
    places_BM = batch.table_starts_B[:, None] + columns
    table_BM = batch.tables[places_BM.clamp_(max=len(batch.tables) - 1)]
    # [N, 2, K, S, D] as pages [N, S, K, D] of keys and of values: strides alone.
    keys_NSKD, values_NSKD = kv_N2KSD.transpose(2, 3).unbind(1)
    out_THD = function(
        q_THD[batch.rows],
        keys_NSKD,
        values_NSKD,
        cu_seqlens_q=_prefix_sums(batch.num_new_B),
        cu_seqlens_k=_prefix_sums(batch.seq_lens_B),
        max_seqlen_q=batch.most_new,
        max_seqlen_k=batch.longest,
        softmax_scale=1.0,
        causal=True,
        block_table=table_BM,
    )
    out_TC[batch.rows] = out_THD.flatten(1)


@cache
def varlen_function() -> Callable[..., Tensor] | None:
    """``flash_attn_varlen_func``; ``None`` where the package is not installed."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    from flash_attn import flash_attn_varlen_func

    function: Callable[..., Tensor] = flash_attn_varlen_func
    return function


def _prefix_sums(counts_B: Tensor) -> Tensor:
    """int32 [B + 1], from 0."""
    sums_B = counts_B.cumsum(0, dtype=torch.int32)
    return torch.nn.functional.pad(sums_B, (1, 0))
