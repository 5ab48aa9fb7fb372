"""The native attention against its definition, and what must never matter to its results."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from inference_pio.kernels.context import ContextItem, ForwardContext, build_context
from inference_pio.kernels.kv_layer import CodedKV, KVCodes, dequantize
from inference_pio.kernels.native.attention import AttentionPool
from inference_pio.kernels.native.instruction_sets import INSTRUCTION_SETS
from inference_pio.kernels.native.library import KernelError, cpu_flags, load, usable
from inference_pio.kernels.reference import ReferenceKernels

from ..coded_samples import FORMATS, coded, empty_layer, unused

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)
HEADS = [(6, 3, 24), (9, 1, 7), (4, 4, 80), (16, 8, 128)]
"""Query heads, KV heads and head_dim: odd groups, many rows for one token, ends of vectors."""
PART = 512
"""Keys whose softmax is computed at once: kPartKeys."""
BATCHES = {
    "one decode row": [(9, 1)],
    "first token": [(0, 1)],
    "an odd number of keys": [(0, 33)],
    "several blocks of rows": [(0, 300)],
    "chunk behind cached tokens": [(17, 140)],
    "decode rows of many lengths": [(5, 1), (300, 1), (6, 1), (0, 1), (64, 1), (299, 1), (15, 1)],
    "mixed": [(3, 1), (0, 20), (31, 1), (16, 16), (40, 3), (200, 1)],
    "at the ends of parts": [(PART - 1, 1), (PART, 1), (2 * PART - 1, 2), (PART - 20, 40)],
}


@pytest.fixture(params=[known.name for known in INSTRUCTION_SETS])
def pools(request: pytest.FixtureRequest) -> list[AttentionPool]:
    """Of teams of one, two and three threads."""
    if request.param not in usable(cpu_flags()):
        pytest.skip(f"this CPU has no {request.param}")
    library = load(request.param)
    return [AttentionPool(library, library.team(threads)) for threads in (1, 2, 3)]


class Case:
    """A random batch over a random cache; every slot that holds no token of it is NaN."""

    def __init__(
        self,
        heads: tuple[int, int, int],
        lengths: list[tuple[int, int]],
        dtype: torch.dtype,
        block_size: int = 16,
        codes: KVCodes | None = None,
    ) -> None:
        num_heads, kv_heads, dim = heads
        torch.manual_seed(0)
        need = [-(-(computed + new) // block_size) for computed, new in lengths]
        blocks = list(range(sum(need) + 3))
        random.Random(0).shuffle(blocks)
        items = [
            ContextItem([blocks.pop() for _ in range(count)], computed, new)
            for count, (computed, new) in zip(need, lengths, strict=True)
        ]
        self.context = build_context(items, block_size, CPU)
        numbers = torch.randn(sum(need) + 3, 2, kv_heads, block_size, dim).to(dtype)
        self.cache: Any = numbers if codes is None else coded(numbers, codes)
        # Wider than needed: queries are a view into the projection, as in the model.
        q = torch.randn(self.context.query_starts[-1], num_heads + 2, dim).to(dtype)
        self.q = q[:, :num_heads] * dim**-0.5
        # The reference multiplies hidden values with zero, so it gets a cache without NaN.
        self.expected = ReferenceKernels().plan_attention(self.context)(self.q, self.cache)
        used = torch.zeros(numbers.shape[0], block_size, dtype=torch.bool)
        for length, table in zip(self.context.seq_lens, self.context.block_tables, strict=True):
            for position in range(length):
                used[table[position // block_size], position % block_size] = True
        unused(self.cache, ~used)

    def by(self, pool: AttentionPool) -> Tensor:
        return pool.plan(self.context)(self.q, self.cache)


def close(got: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "codes"),
    [*((heads, None) for heads in HEADS), (HEADS[0], "int8"), (HEADS[1], "fp8")],
)
def test_is_the_reference_in_any_number_of_threads(
    pools: list[AttentionPool],
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    codes: KVCodes | None,
) -> None:
    for lengths in BATCHES.values():
        case = Case(heads, lengths, dtype, codes=codes)
        got = case.by(pools[0])
        close(got, case.expected)
        for pool in pools[1:]:
            assert torch.equal(case.by(pool), got)


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 12),
    dim=st.integers(1, 160),
    block_size=st.integers(1, 40),
    lengths=st.lists(st.tuples(st.integers(0, 600), st.integers(1, 60)), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    codes=st.sampled_from(FORMATS),
)
def test_any_shape(
    pools: list[AttentionPool],
    kv_heads: int,
    group: int,
    dim: int,
    block_size: int,
    lengths: list[tuple[int, int]],
    dtype: torch.dtype,
    codes: KVCodes | None,
) -> None:
    case = Case((kv_heads * group, kv_heads, dim), lengths, dtype, block_size, codes)
    close(case.by(pools[1]), case.expected)


@pytest.mark.parametrize("codes", FORMATS)
def test_a_float32_row_is_the_same_alone_and_in_any_chunk(
    pools: list[AttentionPool], codes: KVCodes | None
) -> None:
    """One prompt at once, in chunks, token by token: the same bits."""
    length = PART + 70
    case = Case((4, 2, 40), [(0, length), (30, 1)], torch.float32, codes=codes)
    whole = case.by(pools[0])[:length]
    table = case.context.block_tables[0]
    for step in (1, 9, 100):
        for start in range(PART - 40, length, step):
            end = min(start + step, length)
            context = build_context([ContextItem(table, start, end - start)], 16, CPU)
            got = pools[1].plan(context)(case.q[start:end], case.cache)
            assert torch.equal(got, whole[start:end]), (step, start)


def test_a_plan_serves_many_layers_and_another_one_may_come_between(
    pools: list[AttentionPool],
) -> None:
    first = Case((4, 2, 32), [(3 * PART, 1)], torch.float32)
    second = Case((4, 2, 32), BATCHES["mixed"], torch.float32)
    pool = pools[2]
    plans = [(case, pool.plan(case.context)) for case in (first, second)]
    for _ in range(3):
        for case, plan in plans:
            close(plan(case.q, case.cache), case.expected)
            close(plan(case.q, case.cache * 2 / 2), case.expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(pools: list[AttentionPool], dtype: torch.dtype) -> None:
    """Weights far below the smallest float32 are zero and the rest is exact."""
    case = Case((2, 1, 64), [(0, 40), (700, 1)], dtype)
    case.q *= 300
    clean = case.cache.nan_to_num()
    expected = ReferenceKernels().plan_attention(case.context)(case.q, clean)
    torch.testing.assert_close(case.by(pools[0]), expected, atol=4e-2, rtol=4e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_a_query_stays_in_its_row(pools: list[AttentionPool], dtype: torch.dtype) -> None:
    case = Case((4, 2, 32), [(600, 1), (0, 40), (20, 1)], dtype)
    expected = case.by(pools[0])
    case.q[5, 1] = float("nan")
    got = case.by(pools[0]).view(-1, 4, 32)
    assert got[5, 1].isnan().all()
    got[5, 1] = expected.view(-1, 4, 32)[5, 1]
    assert torch.equal(got.view_as(expected), expected)


@pytest.mark.parametrize("codes", ["int8", "fp8"])
def test_every_code_is_the_number_it_stands_for(pools: list[AttentionPool], codes: KVCodes) -> None:
    """A first token sees its own value alone, so what comes out is what the codes mean."""
    every = torch.arange(256).to(torch.uint8)
    every[[0x7F, 0xFF]] = 0  # e4m3's NaN
    every[0x80] = 0  # -128, which no number becomes
    layer = empty_layer((1, 2, 1, 256), codes, torch.float32)
    assert isinstance(layer, CodedKV)
    layer.codes_of(layer.data_N2KB)[0, :, :, 0] = every
    layer.scales_of(layer.data_N2KB)[...] = 0.75
    for group in (1, 9):  # straight from the codes, and widened for many rows
        context = build_context([ContextItem([0], 0, 1)], 1, CPU)
        got = pools[0].plan(context)(torch.randn(1, 2 * group, 256), layer)
        expected = dequantize(every, torch.tensor(0.75), codes)
        assert torch.equal(got.view(2 * group, 256), expected.expand(2 * group, 256))


@pytest.mark.parametrize("codes", ["int8", "fp8"])
def test_float32_over_codes_is_near_float64(pools: list[AttentionPool], codes: KVCodes) -> None:
    case = Case((6, 2, 48), BATCHES["mixed"], torch.float32, codes=codes)
    numbers = case.cache.dequantized(case.cache.data_N2KB).double()
    got = case.by(pools[0]).view(-1, 6, 48)
    context = case.context
    for i, table in enumerate(context.block_tables):
        kv_2LKD = numbers[list(table)].permute(1, 0, 3, 2, 4).flatten(1, 2)
        for row in range(*context.query_starts[i : i + 2]):
            length = context.seq_lens[i] - (context.query_starts[i + 1] - 1 - row)
            keys, values = kv_2LKD[:, :length].repeat_interleave(3, dim=2)
            scores = torch.einsum("hd,lhd->hl", case.q[row].double(), keys)
            expected = torch.einsum("hl,lhd->hd", scores.softmax(-1), values)
            torch.testing.assert_close(got[row].double(), expected, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize(
    ("dtype", "codes"),
    [
        *((dtype, None) for dtype in DTYPES),
        *(
            pytest.param(dtype, codes, marks=pytest.mark.slow)
            for dtype in DTYPES
            for codes in ("int8", "fp8")
        ),
    ],
)
def test_forty_thousand_positions(
    pools: list[AttentionPool], dtype: torch.dtype, codes: KVCodes | None
) -> None:
    case = Case((2, 1, 16), [(40_959, 1), (40_900, 60)], dtype, codes=codes)
    got = case.by(pools[0])
    close(got, case.expected)
    assert torch.equal(case.by(pools[2]), got)


def test_errors_name_what_is_wrong(pools: list[AttentionPool]) -> None:
    case = Case((4, 2, 32), [(5, 1)], torch.float32)
    plan = pools[0].plan(case.context)
    with pytest.raises(ValueError, match="2 queries over blocks of 16 tokens; the step has 1"):
        plan(torch.cat((case.q, case.q)), case.cache)
    with pytest.raises(ValueError, match=r"activations are torch\.float32"):
        plan(case.q, case.cache.bfloat16())
    with pytest.raises(ValueError, match=r"not in torch\.float16"):
        plan(case.q.half(), case.cache.half())
    with pytest.raises(ValueError, match="no gaps"):
        plan(case.q, case.cache.transpose(0, 1).contiguous().transpose(0, 1))
    with pytest.raises(KernelError, match="4 query heads over 3 KV heads"):
        plan(case.q, torch.zeros(9, 2, 3, 16, 32))
    foreign: ForwardContext = build_context([ContextItem([9], 5, 1)], 16, CPU)
    with pytest.raises(KernelError, match="holds block 9; the cache has blocks 0 to 3"):
        pools[0].plan(foreign)(case.q, case.cache)
    close(plan(case.q, case.cache), case.expected)
