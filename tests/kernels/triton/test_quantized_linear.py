"""Triton's products with quantized weights against the weights' own definition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from inference_pio.kernels.quantized import (
    CODE_DTYPES,
    IMPLIED_ZERO,
    CodeFormat,
    QuantizedWeight,
    pack_pairs,
)
from inference_pio.kernels.torch_quantized import round_activations
from inference_pio.kernels.triton.quantized_linear import (
    FEW_ROWS,
    CodeLinear,
    Int8Linear,
    QuantizedSwiGLU,
    is_kept,
    pack,
    pack_swiglu,
    round_rows,
)
from inference_pio.kernels.triton_kernels import TritonKernels

from .samples import DOT_DTYPES, close

WEIGHTS: dict[str, tuple[CodeFormat, tuple[int, int], int, bool]] = {
    "int8 rows": ("int8", (37, 70), 70, False),
    "int8 groups with zeros": ("int8", (20, 70), 32, True),
    "int4 groups": ("int4", (37, 96), 32, False),
    "int4 groups with zeros": ("int4", (20, 70), 10, True),
    "int4 of odd width": ("int4", (20, 31), 64, False),
    "nf4": ("nf4", (37, 160), 64, False),
    "fp8 blocks": ("fp8", (20, 140), 128, False),
    "fp8 rows": ("fp8", (20, 40), 40, False),
}
ROWS = [1, FEW_ROWS, FEW_ROWS + 1, 40]


def random_weight(
    format: CodeFormat, shape: tuple[int, int], group: int, zeros: bool, seed: int = 0
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    if format == "fp8":
        codes = torch.randn(shape, generator=generator).mul_(20).to(CODE_DTYPES[format])
    elif format == "int8":
        codes = torch.randint(-127, 128, shape, generator=generator).to(torch.int8)
    else:
        codes = pack_pairs(torch.randint(0, 16, shape, generator=generator).to(torch.uint8))
    grid = rows, -(-columns // group)
    points = torch.randint(-3, 4, grid, generator=generator) + IMPLIED_ZERO.get(format, 0)
    return QuantizedWeight(
        format=format,
        shape=shape,
        codes=codes,
        scales_OG=torch.rand(grid, generator=generator) * 0.002 + 0.001,
        group_size=group,
        zeros_OG=points.to(torch.int8) if zeros else None,
    )


def normal(*size: int, dtype: torch.dtype = torch.float32, seed: int = 7) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("name", list(WEIGHTS))
@pytest.mark.parametrize("rows", ROWS)
def test_is_the_dequantized_linear(name: str, rows: int, device: torch.device) -> None:
    weight = random_weight(*WEIGHTS[name])
    linear = pack(weight.copied_to(device), None)
    assert isinstance(linear, CodeLinear)
    x = normal(rows, weight.shape[1])
    expected = x @ weight.dequantize().T
    close(linear(x.to(device)), expected)


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("name", ["int8 rows", "int4 groups with zeros"])
def test_dtypes_bias_and_residual(
    name: str, dtype: torch.dtype, rows: int, device: torch.device
) -> None:
    weight = random_weight(*WEIGHTS[name])
    outputs, inputs = weight.shape
    bias = normal(outputs, dtype=dtype, seed=1)
    linear = pack(weight.copied_to(device), bias.to(device))
    assert linear is not None
    wide = normal(rows, inputs + 2, dtype=dtype)
    x, residual = wide[:, :inputs], normal(rows, outputs, dtype=dtype, seed=2)
    moved = wide.to(device)[:, :inputs]
    expected = x.float() @ weight.dequantize().T + bias.float()
    close(linear(moved), expected.to(dtype))
    close(linear(moved, residual.to(device)), (expected + residual.float()).to(dtype))
    in_float32 = linear.in_float32(moved)
    assert in_float32.dtype == torch.float32
    close(in_float32.to(dtype), expected.to(dtype))


@pytest.mark.parametrize("rows", [1, 20])
def test_half_scales(rows: int, device: torch.device) -> None:
    weight = random_weight(*WEIGHTS["int4 groups"])
    weight = replace(weight, scales_OG=weight.scales_OG.half())
    linear = pack(weight.copied_to(device), None)
    assert linear is not None
    x = normal(rows, weight.shape[1])
    close(linear(x.to(device)), x @ weight.dequantize().T)


def test_every_fp8_code(device: torch.device) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256).view(torch.float8_e4m3fn)
    weight = QuantizedWeight("fp8", (1, 256), codes, torch.ones(1, 1), 256)
    finite = weight.dequantize().isfinite()
    # A column at a time; NaN anywhere would be in every sum.
    each = torch.eye(256)[finite[0]]
    expected = weight.dequantize()[finite]
    clean = replace(weight, codes=codes.view(torch.uint8).masked_fill(~finite, 0).view(codes.dtype))
    linear = pack(clean.copied_to(device), None)
    assert linear is not None
    assert torch.equal(linear(each.to(device))[:, 0].cpu(), expected)
    broken = pack(weight.copied_to(device), None)
    assert broken is not None
    assert broken(torch.ones(1, 256, device=device)).isnan().all()


def test_rounding_of_activations_is_torchs(device: torch.device) -> None:
    x = normal(6, 300) * torch.tensor([1e-6, 1e-3, 1, 50, 1e4, 0])[:, None]
    x[2, :6] = torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5])
    x[2] = x[2].clamp(-127, 127)  # a scale of 1: halves go to even
    codes, scales = round_rows(x.to(device))
    expected_codes, expected_scales = round_activations(x)
    assert torch.equal(scales.cpu(), expected_scales[:, 0])
    assert torch.equal(codes.cpu(), expected_codes)


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("rows", [1, 40])
def test_int8_activations(dtype: torch.dtype, rows: int, device: torch.device) -> None:
    weight = replace(random_weight(*WEIGHTS["int8 rows"]), int8_activations=True)
    outputs, inputs = weight.shape
    bias, x = normal(outputs, dtype=dtype), normal(rows, inputs, dtype=dtype)
    residual = normal(rows, outputs, dtype=dtype, seed=3)
    linear = pack(weight.copied_to(device), bias.to(device))
    assert isinstance(linear, Int8Linear)
    codes, scales = round_activations(x)
    exact = (codes.double() @ weight.codes.double().T) * scales * weight.scales_OG.view(-1)
    expected = exact.float() + bias.float()
    close(linear.in_float32(x.to(device)).to(dtype), expected.to(dtype))
    close(linear(x.to(device), residual.to(device)), (expected + residual.float()).to(dtype))


def test_swiglu(device: torch.device) -> None:
    gate, up = (random_weight(*WEIGHTS["int4 groups"], seed=seed) for seed in (0, 1))
    other = random_weight(*WEIGHTS["nf4"], seed=1).columns(range(96))
    x = normal(6, 96)
    for second, linears in ((up, 1), (other, 2)):
        packed = pack_swiglu(gate.copied_to(device), second.copied_to(device))
        assert isinstance(packed, QuantizedSwiGLU)
        assert len(packed.linears) == linears
        a, b = x @ gate.dequantize().T, x @ second.dequantize().T
        close(packed(x.to(device)), torch.nn.functional.silu(a) * b)


def test_what_has_no_kernel_is_dequantized_by_the_caller() -> None:
    weight = random_weight("int4", (4, 12), 4, False)
    kernels: Any = TritonKernels()
    assert is_kept(weight)
    shuffled = weight.columns(range(2, 12))
    assert shuffled.column_groups_I is not None
    odd = random_weight("int4", (4, 12), 3, False)
    for refused in (shuffled, odd):
        assert kernels.pack_quantized(refused, None, torch.float16) is None
        assert kernels.pack_quantized_swiglu(refused, refused, torch.float16) is None
        assert kernels.pack_quantized_swiglu(weight, odd, torch.float16) is None
