"""Triton's norms, rotation, cache writes and activation against their definition."""

from __future__ import annotations

import pytest
import torch

from inference_pio.kernels.context import ContextItem, build_context
from inference_pio.kernels.reference import ReferenceKernels
from inference_pio.kernels.rope import inverse_frequencies, rope_cos_sin
from inference_pio.kernels.triton.rows import (
    add_rms_norm,
    qk_norm_rope_write,
    rms_norm,
    silu_mul,
)

from .samples import CPU, DTYPES, Heads, close

HEADS = [(5, 1, 24), (2, 2, 128)]
EPS = 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 100, 256])
def test_rms_norm(dtype: torch.dtype, width: int, device: torch.device) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, width + 3).to(dtype)[:, :width] * 3, torch.randn(width).to(dtype)
    expected = ReferenceKernels().rms_norm(x, weight, EPS)
    moved, kept = x.to(device), x.clone()
    close(rms_norm(moved, weight.to(device), EPS), expected)
    assert torch.equal(moved.cpu(), kept)
    wide = x.float() * 1.001  # of a float32 residual stream
    expected = ReferenceKernels().rms_norm(wide, weight, EPS)
    close(rms_norm(wide.to(device), weight.to(device), EPS), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adding_to_the_residual_stream(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    stream, delta = torch.randn(3, 100) * 4, torch.randn(3, 100).to(dtype)
    weight = torch.randn(100).to(dtype)
    total = stream + delta.float()
    moved = stream.to(device)
    normed = add_rms_norm(moved, delta.to(device), weight.to(device), EPS)
    close(moved, total)
    close(normed, ReferenceKernels().rms_norm(total, weight, EPS))


def test_a_stream_of_another_form_is_refused(device: torch.device) -> None:
    stream, weight = torch.zeros(3, 8, device=device), torch.ones(8, device=device)
    with pytest.raises(ValueError, match="float32 rows are needed"):
        add_rms_norm(stream.bfloat16(), stream, weight, EPS)
    with pytest.raises(ValueError, match=r"\[2, 8\] is added to a stream of \[3, 8\]"):
        add_rms_norm(stream, stream[:2], weight, EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [45, 1030])
def test_silu_mul(dtype: torch.dtype, width: int, device: torch.device) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2 * width).to(dtype) * 4
    gate, up = x.float().chunk(2, dim=1)
    expected = (torch.nn.functional.silu(gate) * up).to(dtype)
    close(silu_mul(x.to(device)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("num_new", [5, 64])
def test_qk_norm_rope_write(
    dtype: torch.dtype, heads: Heads, num_new: int, device: torch.device
) -> None:
    num_heads, kv_heads, dim = heads
    torch.manual_seed(0)
    items = [ContextItem([4, 1, 0, 2, 5], 14, num_new), ContextItem([3], 2, 1)]
    context = build_context(items, 16, CPU)
    cos, sin = rope_cos_sin(context.positions_T + 9000, inverse_frequencies(1e6, dim, CPU))
    qkv = torch.randn(num_new + 1, (num_heads + 2 * kv_heads) * dim).to(dtype)
    weight = torch.randn(num_heads + kv_heads, dim)
    cache = torch.zeros(6, 2, kv_heads, 16, dim, dtype=dtype)
    expected = cache.clone()
    slots = context.slots_T
    q = ReferenceKernels().qk_norm_rope_write(qkv.clone(), weight, cos, sin, expected, slots, EPS)
    operands = [tensor.to(device) for tensor in (qkv, weight, cos, sin, cache, slots)]
    got = qk_norm_rope_write(*operands, EPS)
    close(got, q)
    close(operands[4], expected)


def test_rows_that_fill_a_batch_up_write_nothing(device: torch.device) -> None:
    qkv = torch.ones(3, 4 * 16, device=device)
    cache = torch.zeros(2, 2, 1, 8, 16, device=device)
    slots = torch.tensor([-1, 9, -1], device=device)
    weight, angles = torch.ones(3, 16, device=device), torch.ones(3, 8, device=device)
    qk_norm_rope_write(qkv, weight, angles, angles, cache, slots, EPS)
    written = cache.abs().sum(dim=(1, 2, 4)).nonzero()
    assert written.tolist() == [[1, 1]]


def test_shapes_that_do_not_fit_are_refused(device: torch.device) -> None:
    qkv, slots = torch.ones(1, 64, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    weight, angles = torch.ones(3, 16, device=device), torch.ones(1, 8, device=device)
    cache = torch.zeros(2, 2, 1, 8, 16, device=device)
    with pytest.raises(ValueError, match="without gaps is needed"):
        qk_norm_rope_write(qkv, weight, angles, angles, cache.bfloat16(), slots, EPS)
    with pytest.raises(ValueError, match=r"does not hold 2 \+ 2 \* 1 heads of 16"):
        qk_norm_rope_write(qkv[:, :48], weight, angles, angles, cache, slots, EPS)
