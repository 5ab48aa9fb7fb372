"""What flash-attn is called with, and its answers on a device that has it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from inference_pio.kernels.triton import flash
from inference_pio.kernels.triton.attention import plan_batches
from inference_pio.kernels.triton.step_attention import TritonAttention

from .samples import CPU, attention_case, close

LENGTHS = [(3, 1), (200, 1), (0, 20), (250, 30), (30, 2)]


def documented(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    block_table: Tensor,
) -> Tensor:
    """``flash_attn_varlen_func`` as its documentation has it, a sequence at a time."""
    assert causal
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == block_table.dtype == torch.int32
    assert k.stride(-1) == v.stride(-1) == q.stride(-1) == 1
    assert len(cu_seqlens_q) == len(cu_seqlens_k) == len(block_table) + 1
    assert block_table.shape[1] * k.shape[1] >= max_seqlen_k
    assert int(cu_seqlens_q[-1]) == len(q)
    out = torch.empty_like(q)
    for i, table in enumerate(block_table.long()):
        rows = slice(int(cu_seqlens_q[i]), int(cu_seqlens_q[i + 1]))
        length = int(cu_seqlens_k[i + 1] - cu_seqlens_k[i])
        count = rows.stop - rows.start
        assert count <= max_seqlen_q
        assert length <= max_seqlen_k
        keys, values = (
            pages[table]
            .flatten(0, 1)[:length]
            .float()
            .repeat_interleave(q.shape[1] // k.shape[2], 1)
            for pages in (k, v)
        )
        scores = torch.einsum("qhd,lhd->hql", q[rows].float(), keys) * softmax_scale
        # Aligned at the last query and the last key.
        hidden = torch.ones(count, length, dtype=torch.bool).triu(length - count + 1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[rows] = torch.einsum("hql,lhd->qhd", weights, values).to(q.dtype)
    return out


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """flash-attn as documented; the list gets the number of queries of each call."""
    calls: list[int] = []

    def called(q: Tensor, *args: Any, **options: Any) -> Tensor:
        calls.append(len(q))
        return documented(q, *args, **options)

    monkeypatch.setattr(flash, "varlen_function", lambda: called)
    return calls


def no_other(context: object) -> Any:
    raise AssertionError("these kernels take this batch")


@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[2:3]])
def test_prefill_goes_to_flash_attn(
    lengths: list[tuple[int, int]], installed: list[int], device: torch.device
) -> None:
    if device.type == "cuda":
        pytest.skip("the real one is tested there")
    case = attention_case((4, 2, 16), lengths, torch.float16, device, block_size=256)
    close(TritonAttention(case.context, no_other)(case.q, case.cache), case.expected)
    assert installed == [sum(new for _, new in lengths if new > 1)]


def test_rows_that_lie_apart_and_other_pages_stay_with_triton(installed: list[int]) -> None:
    case = attention_case((4, 2, 16), LENGTHS, torch.float16, CPU, block_size=256)
    _, batch = plan_batches(case.context)
    assert batch is not None
    assert batch.rows == slice(2, 54)
    assert batch.longest == 280
    assert flash.takes(case.q, case.cache, batch)
    assert not flash.takes(case.q.float(), case.cache.float(), batch)
    assert not flash.takes(case.q, case.cache.view(-1, 2, 2, 64, 16), batch)
    apart = attention_case((4, 2, 16), [(0, 2), (3, 1), (0, 2)], torch.float16, CPU, 256)
    _, batch = plan_batches(apart.context)
    assert batch is not None
    assert batch.rows is None
    assert not flash.takes(apart.q, apart.cache, batch)
    assert not flash.takes(case.q, case.cache, replace(batch, rows=None))


def test_without_the_package_triton_attends() -> None:
    flash.varlen_function.cache_clear()
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        assert flash.varlen_function() is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flash_attn_is_the_reference(dtype: torch.dtype) -> None:
    pytest.importorskip("flash_attn")
    case = attention_case((16, 8, 128), LENGTHS, dtype, torch.device("cuda"), block_size=256)
    _, batch = plan_batches(case.context)
    assert batch is not None
    cache = case.cache.nan_to_num()  # it multiplies what lies behind a sequence's end with zero
    assert flash.takes(case.q, cache, batch)
    close(TritonAttention(case.context, no_other)(case.q, cache), case.expected)
