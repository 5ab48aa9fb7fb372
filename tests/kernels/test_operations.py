"""The fast operations against their definition, over odd shapes and mixed batches."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from inference_pio.kernels.api import Kernels
from inference_pio.kernels.context import ContextItem, ForwardContext, build_context
from inference_pio.kernels.dispatch import select_kernels
from inference_pio.kernels.kv_layer import CodedKV, KVCodes
from inference_pio.kernels.reference import ReferenceKernels
from inference_pio.kernels.rope import inverse_frequencies, rope_cos_sin
from inference_pio.kernels.torch_cpu import TorchCPUKernels
from inference_pio.kernels.torch_ops import TorchKernels

from .coded_samples import FORMATS, coded, empty_layer

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
DTYPES = list(TOLERANCE)
HEADS = [(6, 3, 24), (5, 1, 32), (4, 4, 80), (16, 8, 128)]


def fast_kernels(dtype: torch.dtype) -> list[Kernels]:
    """The default of this machine (the native kernels, where they were built) and torch's."""
    return [select_kernels(CPU, dtype), TorchCPUKernels(dtype), TorchKernels()]


def close(got: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 130])
def test_linear(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(37, 50).to(dtype) * 0.1, torch.randn(37).to(dtype)
    x, residual = torch.randn(rows, 50).to(dtype), torch.randn(rows, 37).to(dtype)
    reference = ReferenceKernels().pack_linear(weight, bias)
    for kernels in fast_kernels(dtype):
        packed = kernels.pack_linear(weight, bias)
        close(packed(x), reference(x))
        close(packed(x, residual), reference(x, residual))
        wide = packed.in_float32(x)
        assert wide.dtype == torch.float32
        close(wide.to(dtype), reference(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_weight_is_a_copy(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 8).to(dtype)
    x = torch.randn(2, 8).to(dtype)
    for kernels in [*fast_kernels(dtype), ReferenceKernels()]:
        packed = kernels.pack_linear(weight)
        before = packed(x)
        weight.neg_()  # what happens to the checkpoint's memory no longer matters
        assert torch.equal(packed(x), before)
        weight.neg_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 70])
def test_swiglu(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(45, 36).to(dtype) * 0.2 for _ in range(2))
    x = torch.randn(rows, 36).to(dtype)
    expected = ReferenceKernels().pack_swiglu(gate, up)(x)
    for kernels in fast_kernels(dtype):
        close(kernels.pack_swiglu(gate, up)(x), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 100).to(dtype) * 3, torch.randn(100).to(dtype)
    kept = x.clone()
    for kernels in fast_kernels(dtype):
        close(kernels.rms_norm(x, weight, 1e-6), ReferenceKernels().rms_norm(x, weight, 1e-6))
        assert torch.equal(x, kept)
        wide = x.float() * 1.001  # of a float32 residual stream
        expected = ReferenceKernels().rms_norm(wide, weight, 1e-6)
        close(kernels.rms_norm(wide, weight, 1e-6), expected)


@dataclass(frozen=True)
class Case:
    """A random batch over a random cache."""

    context: ForwardContext
    cache: Any
    q: Tensor


def make_case(
    heads: tuple[int, int, int],
    lengths: list[tuple[int, int]],
    block_size: int,
    dtype: torch.dtype,
    codes: KVCodes | None = None,
) -> Case:
    num_heads, kv_heads, dim = heads
    rng = random.Random(0)
    torch.manual_seed(0)
    need = [-(-(computed + new) // block_size) for computed, new in lengths]
    blocks = list(range(sum(need) + 3))
    rng.shuffle(blocks)
    items = [
        ContextItem([blocks.pop() for _ in range(count)], computed, new)
        for count, (computed, new) in zip(need, lengths, strict=True)
    ]
    context = build_context(items, block_size, CPU)
    cache = torch.randn(sum(need) + 3, 2, kv_heads, block_size, dim).to(dtype)
    # Wider than needed: queries are a view into the projection, as in the model.
    q = torch.randn(context.query_starts[-1], num_heads + 2, dim).to(dtype)[:, :num_heads]
    return Case(context, cache if codes is None else coded(cache, codes), q * dim**-0.5)


BATCHES = {
    "one decode row": [(9, 1)],
    "first token": [(0, 1)],
    "fresh prompt": [(0, 33)],
    "fresh prompt over several query chunks": [(0, 300)],
    "chunk behind cached tokens": [(17, 140)],
    "decode rows of many lengths": [(5, 1), (300, 1), (6, 1), (0, 1), (64, 1), (299, 1), (15, 1)],
    "mixed": [(3, 1), (0, 20), (31, 1), (16, 16), (40, 3), (200, 1)],
}


@pytest.mark.parametrize("codes", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("batch", list(BATCHES))
def test_attention(
    dtype: torch.dtype, heads: tuple[int, int, int], batch: str, codes: KVCodes | None
) -> None:
    case = make_case(heads, BATCHES[batch], 16, dtype, codes)
    expected = ReferenceKernels().plan_attention(case.context)(case.q, case.cache)
    for kernels in fast_kernels(dtype):
        attention = kernels.plan_attention(case.context)
        close(attention(case.q, case.cache), expected)
        close(attention(case.q, case.cache), expected)  # a plan serves every layer


def test_attention_takes_key_heads_in_turns_where_scores_are_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("inference_pio.kernels.torch_attention.MAX_SCORES", 128 * 2 * 100)
    case = make_case((6, 3, 24), [(50, 200)], 16, torch.float32)
    expected = ReferenceKernels().plan_attention(case.context)(case.q, case.cache)
    close(TorchKernels().plan_attention(case.context)(case.q, case.cache), expected)


def test_attention_is_deaf_to_foreign_blocks() -> None:
    """Blocks outside the tables may hold anything, NaN included."""
    case = make_case((6, 3, 24), BATCHES["mixed"], 16, torch.float32)
    expected = TorchKernels().plan_attention(case.context)(case.q, case.cache)
    used = {block for table in case.context.block_tables for block in table}
    for block in set(range(case.cache.shape[0])) - used:
        case.cache[block] = float("nan")
    got = TorchKernels().plan_attention(case.context)(case.q, case.cache)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_qk_norm_rope_write(dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    num_heads, kv_heads, dim = heads
    torch.manual_seed(0)
    context = build_context([ContextItem([4, 1], 14, 5), ContextItem([3], 2, 1)], 16, CPU)
    cos, sin = rope_cos_sin(context.positions_T + 9000, inverse_frequencies(1e6, dim, CPU))
    qkv = torch.randn(6, (num_heads + 2 * kv_heads) * dim).to(dtype)
    weight = torch.randn(num_heads + kv_heads, dim)
    outcomes = []
    for kernels in [ReferenceKernels(), *fast_kernels(dtype)]:
        cache = torch.zeros(6, 2, kv_heads, 16, dim, dtype=dtype)
        q = kernels.qk_norm_rope_write(qkv.clone(), weight, cos, sin, cache, context.slots_T, 1e-6)
        outcomes.append((q.clone(), cache))
    for q, cache in outcomes[1:]:
        close(q, outcomes[0][0])
        close(cache, outcomes[0][1])
    written = outcomes[0][1].abs().sum(dim=(1, 2, 4)).nonzero()
    assert written.tolist() == [[1, 0], [1, 1], [1, 2], [3, 2], [4, 14], [4, 15]]


@pytest.mark.parametrize("codes", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_qk_norm_rope_write_of_codes(dtype: torch.dtype, codes: KVCodes) -> None:
    num_heads, kv_heads, dim = 6, 3, 24
    torch.manual_seed(0)
    context = build_context([ContextItem([4, 1], 14, 5), ContextItem([3], 2, 1)], 16, CPU)
    cos, sin = rope_cos_sin(context.positions_T + 9000, inverse_frequencies(1e6, dim, CPU))
    qkv = torch.randn(6, (num_heads + 2 * kv_heads) * dim).to(dtype)
    weight = torch.randn(num_heads + kv_heads, dim)
    outcomes = []
    for kernels in [ReferenceKernels(), *fast_kernels(dtype)]:
        layer = empty_layer((6, kv_heads, 16, dim), codes, dtype)
        assert isinstance(layer, CodedKV)
        q = kernels.qk_norm_rope_write(qkv.clone(), weight, cos, sin, layer, context.slots_T, 1e-6)
        outcomes.append((q.clone(), layer.dequantized(layer.data_N2KB)))
    step = outcomes[0][1].abs().amax(-1, keepdim=True) / (127 if codes == "int8" else 14)
    for q, numbers in outcomes[1:]:
        close(q, outcomes[0][0])
        assert torch.equal(numbers[:, 1], outcomes[0][1][:, 1])
        # The reference rounds what the norm gives to the dtype; torch's kernels do not.
        most = 1.01 if dtype == torch.float32 else 2.0
        assert ((numbers - outcomes[0][1]).abs() <= step * most).all()
