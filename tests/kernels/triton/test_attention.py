"""Triton's paged attention against its definition, and what must never matter to its results."""

from __future__ import annotations

import pytest
import torch

from inference_pio.kernels.context import ContextItem, build_context
from inference_pio.kernels.torch_ops import TorchKernels
from inference_pio.kernels.triton.attention import (
    MAX_SPLITS,
    MIN_SPLIT,
    SPLIT_BUCKETS,
    SPLIT_TILE,
    plan_batches,
    split_bucket,
    split_length,
    takes_cache,
)
from inference_pio.kernels.triton.step_attention import TritonAttention

from .samples import CPU, DOT_DTYPES, Case, Heads, Lengths, attention_case, close, on_device

HEADS: list[Heads] = [(5, 1, 64), (4, 2, 128)]
BATCHES: dict[str, Lengths] = {
    "one decode row": [(9, 1)],
    "first token": [(0, 1)],
    "fresh prompt": [(0, 33)],
    "chunk behind cached tokens": [(17, 50)],
    "decode rows of many lengths": [(5, 1), (150, 1), (0, 1), (127, 1), (128, 1)],
    "mixed": [(3, 1), (0, 20), (31, 1), (16, 16), (40, 3), (140, 1)],
}


def by_triton(case: Case) -> torch.Tensor:
    return TritonAttention(case.context, no_other)(case.q, case.cache)


def no_other(context: object) -> TritonAttention:
    raise AssertionError("these kernels take this batch")


@pytest.mark.parametrize("batch", list(BATCHES))
def test_is_the_reference(batch: str, device: torch.device) -> None:
    case = attention_case((6, 2, 24), BATCHES[batch], torch.float32, device)
    attention = TritonAttention(case.context, no_other)
    close(attention(case.q, case.cache), case.expected)


def test_a_plan_serves_every_layer(device: torch.device) -> None:
    case = attention_case((2, 1, 16), [(3, 1), (2, 5)], torch.float32, device)
    attention = TritonAttention(case.context, no_other)
    for _ in range(2):
        close(attention(case.q, case.cache), case.expected)


@pytest.mark.parametrize("heads", HEADS)
def test_heads(heads: Heads, device: torch.device) -> None:
    case = attention_case(heads, BATCHES["mixed"], torch.float32, device)
    close(by_triton(case), case.expected)


@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    case = attention_case((4, 2, 64), BATCHES["mixed"], dtype, device, block_size=64)
    close(by_triton(case), case.expected)


@pytest.mark.parametrize("block_size", [1, 24, 64, 128])
def test_block_sizes(block_size: int, device: torch.device) -> None:
    case = attention_case((4, 2, 32), BATCHES["mixed"], torch.float32, device, block_size)
    close(by_triton(case), case.expected)


@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_large_scores(dtype: torch.dtype, device: torch.device) -> None:
    """Weights far below the smallest float32 are zero and the rest is exact."""
    case = attention_case((2, 1, 64), [(0, 40), (150, 1)], dtype, device, scale=300)
    torch.testing.assert_close(by_triton(case).cpu(), case.expected, atol=4e-2, rtol=4e-2)


def test_more_keys_than_splits_of_the_least_length(device: torch.device) -> None:
    longest = MAX_SPLITS * MIN_SPLIT + 70
    case = attention_case((2, 1, 16), [(longest, 1), (3, 1)], torch.float32, device, 256)
    close(by_triton(case), case.expected)


def test_a_row_does_not_depend_on_its_batch(device: torch.device) -> None:
    """Alone, where few splits are launched, and beside a row that needs many: the same bits."""
    lengths = [(100, 1), (200, 1), (20, 5)]
    together = attention_case((4, 2, 32), lengths, torch.float32, device)
    got = by_triton(together)
    buckets = set()
    for i, (computed, new) in enumerate(lengths):
        context = build_context(
            [ContextItem(together.context.block_tables[i], computed, new)], 16, CPU
        )
        alone = TritonAttention(on_device(context, device), no_other)
        rows = slice(*together.context.query_starts[i : i + 2])
        assert torch.equal(alone(together.q[rows], together.cache), got[rows])
        buckets.add(split_bucket([computed + new]))
    assert len(buckets) > 1


def test_a_row_does_not_depend_on_its_chunk(device: torch.device) -> None:
    """One prompt at once and in chunks of two tokens or more: the same bits.

    But for the interpreter, whose products are numpy's: they depend on a row's place in the tile.
    """
    tolerance = {"rtol": 0.0, "atol": 0.0 if device.type == "cuda" else 1e-6}
    case = attention_case((4, 2, 32), [(0, 70)], torch.float32, device)
    whole = by_triton(case)
    for start, end in ((0, 2), (2, 35), (35, 70)):
        item = ContextItem(case.context.block_tables[0], start, end - start)
        chunk = on_device(build_context([item], 16, CPU), device)
        got = TritonAttention(chunk, no_other)(case.q[start:end], case.cache)
        torch.testing.assert_close(got, whole[start:end], **tolerance)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_in_a_query_stays_in_its_row(device: torch.device) -> None:
    case = attention_case((4, 2, 32), [(150, 1), (0, 20), (20, 1)], torch.float32, device)
    expected = by_triton(case)
    case.q[5, 1] = float("nan")
    got = by_triton(case).view(-1, 4, 32)
    assert got[5, 1].isnan().all()
    got[5, 1] = expected.view(-1, 4, 32)[5, 1]
    assert torch.equal(got.view_as(expected), expected)


def test_what_the_kernels_do_not_take_goes_the_other_way(device: torch.device) -> None:
    case = attention_case((4, 2, 32), BATCHES["mixed"], torch.float32, device)
    cache = case.cache.nan_to_num().bfloat16()
    assert takes_cache(case.cache, torch.float32, 6)
    assert not takes_cache(cache, torch.float32, 6)
    assert not takes_cache(case.cache, torch.float32, 5)
    assert not takes_cache(case.cache.transpose(0, 1), torch.float32, 6)
    assert not takes_cache(torch.empty(1, 2, 1, 16, 512), torch.float32, 6)
    calls = []

    def other(context: object) -> TorchKernels:
        calls.append(context)
        return lambda q, kv, bounds: q.flatten(1)  # type: ignore[return-value]

    attention = TritonAttention(case.context, other)  # type: ignore[arg-type]
    for _ in range(2):
        assert torch.equal(attention(case.q, cache), case.q.flatten(1))
    assert calls == [case.context]


def test_splits_cover_every_length() -> None:
    for length in [*range(1, 300), *range(MIN_SPLIT * MAX_SPLITS - 70, 5000, 7), 262_144]:
        part = split_length(length)
        assert part >= MIN_SPLIT
        assert part % SPLIT_TILE == 0
        assert part * MAX_SPLITS >= length
        bucket = split_bucket([1, length])
        assert part * bucket >= length
        assert bucket in SPLIT_BUCKETS


def test_decode_rows_come_first_in_a_plan() -> None:
    case = attention_case((4, 2, 32), BATCHES["mixed"], torch.float32, CPU)
    decode, prefill = plan_batches(case.context)
    assert decode is not None
    assert prefill is not None
    assert decode.rows_B.tolist() == [0, 21, 41]
    assert decode.seq_lens_B.tolist() == [4, 32, 141]
    assert prefill.query_starts_B.tolist() == [1, 22, 38]
    assert prefill.num_new_B.tolist() == [20, 16, 3]
    assert prefill.most_new == 20
    tables = case.context.block_tables
    for starts, order in ((decode.table_starts_B, (0, 2, 5)), (prefill.table_starts_B, (1, 3, 4))):
        for start, i in zip(starts.tolist(), order, strict=True):
            assert tuple(decode.tables[start:][: len(tables[i])].tolist()) == tables[i]
