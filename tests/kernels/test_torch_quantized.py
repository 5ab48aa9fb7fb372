"""Torch's packed linears against the definition, and the definition's own slices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_pio.kernels.quantized import (
    CODE_DTYPES,
    IMPLIED_ZERO,
    CodeFormat,
    QuantizedWeight,
    pack_pairs,
    stacked,
    unpack_pairs,
)
from inference_pio.kernels.torch_cpu import TorchCPUKernels
from inference_pio.kernels.torch_quantized import (
    FEW_ROWS_INT4,
    Int4Linear,
    Int8Linear,
    W4A8Linear,
    W8A8Linear,
    pack,
    panel_width,
)

FORMATS: tuple[CodeFormat, ...] = ("int8", "int4", "nf4", "fp8")


def random_weight(
    format: CodeFormat,
    shape: tuple[int, int],
    group: int,
    seed: int = 0,
    *,
    zeros: bool = False,
    shuffled: bool = False,
    int8_activations: bool = False,
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    if format == "fp8":
        codes = torch.randn(shape, generator=generator).to(CODE_DTYPES[format])
    elif format == "int8":
        codes = torch.randint(-127, 128, shape, generator=generator).to(torch.int8)
    else:
        codes = pack_pairs(torch.randint(0, 16, shape, generator=generator).to(torch.uint8))
    grid = (rows, -(-columns // group))
    points = torch.randint(-3, 4, grid, generator=generator) + IMPLIED_ZERO.get(format, 0)
    order = torch.randperm(columns, generator=generator)
    return QuantizedWeight(
        format=format,
        shape=shape,
        codes=codes,
        scales_OG=torch.rand(grid, generator=generator) * 0.01 + 0.001,
        group_size=group,
        zeros_OG=points.to(torch.int8) if zeros else None,
        column_groups_I=(torch.arange(columns)[order] // group).int() if shuffled else None,
        int8_activations=int8_activations,
    )


def by_hand(weight: QuantizedWeight, row: int, column: int) -> float:
    """One element of ``int8`` or ``int4``, from the formula."""
    group = column // weight.group_size
    if weight.column_groups_I is not None:
        group = int(weight.column_groups_I[column])
    code = int(weight.code_values()[row, column])
    zero = IMPLIED_ZERO[weight.format]
    if weight.zeros_OG is not None:
        zero = int(weight.zeros_OG[row, group])
    return (code - zero) * float(weight.scales_OG[row, group])


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("shuffled", [False, True])
def test_elements_follow_the_formula(format: CodeFormat, zeros: bool, shuffled: bool) -> None:
    weight = random_weight(format, (3, 11), 4, zeros=zeros, shuffled=shuffled)
    dense = weight.dequantize()
    for row in range(3):
        for column in range(11):
            expected = pytest.approx(by_hand(weight, row, column), rel=1e-6, abs=1e-9)
            assert float(dense[row, column]) == expected


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_slices_are_slices_of_the_dense_weight(data: st.DataObject) -> None:
    format = data.draw(st.sampled_from(FORMATS))
    shape = (data.draw(st.integers(1, 6)), data.draw(st.integers(1, 40)))
    zeros = format in IMPLIED_ZERO and data.draw(st.booleans())
    weight = random_weight(
        format,
        shape,
        data.draw(st.integers(1, 48)),
        data.draw(st.integers(0, 99)),
        zeros=zeros,
        shuffled=data.draw(st.booleans()),
    )
    dense = weight.dequantize()
    spans = []
    for size in (*shape, shape[1]):
        start = data.draw(st.integers(0, size - 1))
        spans.append(range(start, data.draw(st.integers(start + 1, size))))
    rows, columns, _ = spans
    part = weight.rows(rows).columns(columns)
    expected = dense[rows.start : rows.stop, columns.start : columns.stop]
    assert torch.equal(part.dequantize(), expected)
    inner = range(data.draw(st.integers(0, len(columns) - 1)), len(columns))
    assert torch.equal(part.columns(inner).dequantize(), expected[:, inner.start :])


@pytest.mark.parametrize("format", FORMATS)
def test_stacked_weights_are_stacked_rows(format: CodeFormat) -> None:
    zeros = format in IMPLIED_ZERO
    first = random_weight(format, (3, 20), 8, 1)
    second = random_weight(format, (4, 20), 8, 2, zeros=zeros)
    joined = stacked([first, second])
    assert joined is not None
    expected = torch.cat((first.dequantize(), second.dequantize()))
    assert torch.equal(joined.dequantize(), expected)


def test_weights_of_other_groups_are_not_stacked() -> None:
    one = random_weight("int4", (3, 20), 8)
    assert stacked([one, random_weight("int4", (3, 20), 4)]) is None
    assert stacked([one, random_weight("nf4", (3, 20), 8)]) is None
    assert stacked([one, random_weight("int4", (3, 20), 8, shuffled=True)]) is None


@given(columns=st.integers(1, 33), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_pairs_come_back(columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (3, columns), generator=generator).to(torch.uint8)
    assert torch.equal(unpack_pairs(pack_pairs(codes), columns), codes)


# Row counts on both sides of the change from one kernel to the other.
ROWS = (1, 2, 16, 17, FEW_ROWS_INT4, FEW_ROWS_INT4 + 1, 70)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("weight", "dtype", "kind"),
    [
        (random_weight("int8", (192, 96), 96), torch.bfloat16, Int8Linear),
        (random_weight("int8", (1050, 50), 50), torch.float32, Int8Linear),
        (random_weight("int4", (192, 96), 32), torch.bfloat16, Int4Linear),
        (random_weight("int4", (1088, 128), 64, zeros=True), torch.bfloat16, Int4Linear),
        (random_weight("int4", (192, 96), 32, zeros=True), torch.float16, Int4Linear),
    ],
)
@pytest.mark.parametrize("extras", [False, True])
def test_packed_linears_compute_the_dense_product(
    weight: QuantizedWeight, dtype: torch.dtype, kind: type, rows: int, extras: bool
) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, weight.shape[1], generator=generator).to(dtype)
    bias = torch.randn(weight.shape[0], generator=generator).to(dtype) if extras else None
    residual = torch.randn(rows, weight.shape[0], generator=generator).to(dtype)
    linear = pack(weight, bias, dtype)
    assert type(linear) is kind
    expected = x.float() @ weight.dequantize().T
    if bias is not None:
        expected = expected + bias.float() + residual.float()
    got = linear(x, residual if extras else None)
    assert got.dtype == dtype
    # bfloat16 rounds scales, codes times scales and sums to 8 bits.
    tolerance = 1e-5 if dtype == torch.float32 else 0.01
    assert float((got.float() - expected).norm() / expected.norm()) < tolerance


def test_residuals_and_inputs_are_left_alone() -> None:
    linear = pack(random_weight("int8", (64, 64), 64), None, torch.bfloat16)
    assert linear is not None
    x, residual = torch.ones(2, 64).bfloat16(), torch.ones(2, 64).bfloat16()
    linear(x, residual)
    assert bool((x == 1).all())
    assert bool((residual == 1).all())


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_w8a8_rounds_each_token_by_its_own_scale(rows: int) -> None:
    weight = random_weight("int8", (64, 96), 96, int8_activations=True)
    linear = pack(weight, None, torch.float32)
    assert type(linear) is W8A8Linear
    x = torch.randn(rows, 96) * torch.logspace(-2, 2, rows)[:, None]
    scale = x.abs().amax(1, keepdim=True) / 127
    expected = ((x / scale).round() * scale) @ weight.dequantize().T
    # In units of each token's scale: sums of whole numbers lose digits where they cancel.
    torch.testing.assert_close(linear(x) / scale, expected / scale, rtol=1e-4, atol=1e-3)
    assert bool((linear(torch.zeros(2, 96)) == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "columns", "group_size"), [(1, 96, 32), (7, 90, 64), (40, 64, 64)]
)
def test_w4a8_rounds_each_token_by_its_own_scale(
    rows: int, columns: int, group_size: int, dtype: torch.dtype
) -> None:
    weight = random_weight("int4", (600, columns), group_size, int8_activations=True)
    bias = torch.randn(600).to(dtype)
    linear = pack(weight, bias, dtype)
    assert type(linear) is W4A8Linear
    x = (torch.randn(rows, columns) * torch.logspace(-2, 2, rows)[:, None]).to(dtype)
    scale = x.float().abs().amax(1, keepdim=True) / 127
    expected = ((x.float() / scale).round() * scale) @ weight.dequantize().T + bias.float()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.01, torch.float16: 2e-3}[dtype]
    got = linear(x)
    assert got.dtype == dtype
    assert float((got.float() - expected).norm() / expected.norm()) < tolerance


def test_swiglu_of_quantized_weights() -> None:
    gate, up = (random_weight("int8", (64, 32), 32, seed) for seed in (1, 2))
    packed = TorchCPUKernels(torch.float32).pack_quantized_swiglu(gate, up, torch.float32)
    assert packed is not None
    x = torch.randn(3, 32)
    expected = torch.nn.functional.silu(x @ gate.dequantize().T) * (x @ up.dequantize().T)
    torch.testing.assert_close(packed(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("weight", "dtype"),
    [
        (random_weight("nf4", (64, 64), 64), torch.bfloat16),
        (random_weight("fp8", (64, 64), 64), torch.bfloat16),
        (random_weight("int8", (64, 64), 32), torch.bfloat16),
        (random_weight("int8", (64, 64), 64, zeros=True), torch.bfloat16),
        (random_weight("int8", (64, 64), 64), torch.float16),
        (random_weight("int4", (64, 64), 32), torch.float32),
        (random_weight("int4", (63, 64), 32), torch.bfloat16),
        (random_weight("int4", (64, 64), 16), torch.bfloat16),
        (random_weight("int4", (64, 64), 32, shuffled=True), torch.bfloat16),
    ],
)
def test_what_torch_has_no_kernel_for_is_declined(
    weight: QuantizedWeight, dtype: torch.dtype
) -> None:
    assert pack(weight, None, dtype) is None


def test_the_int4_layout_of_this_cpu_is_known() -> None:
    assert panel_width() in (0, 32, 64)
    if "avx2" in torch.backends.cpu.get_cpu_capability().lower():
        assert panel_width() == 32
    if "avx512" in torch.backends.cpu.get_cpu_capability().lower():
        assert panel_width() == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(3, 11)}, r"codes of an int8 weight \[3, 10\] are torch.int8"),
        ({"group_size": 0}, "group_size is 0"),
        ({"scales_OG": torch.ones(3, 2)}, r"in groups of 4 are \[3, 3\], got \[3, 2\]"),
        ({"zeros_OG": torch.ones(3, 2)}, r"zero points are \[3, 3\]"),
        ({"column_groups_I": torch.zeros(3)}, r"column_groups are \[10\], got \[3\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: dict[str, object], message: str) -> None:
    parts: dict[str, object] = {
        "format": "int8",
        "shape": (3, 10),
        "codes": torch.zeros(3, 10, dtype=torch.int8),
        "scales_OG": torch.ones(3, 3),
        "group_size": 4,
    }
    with pytest.raises(ValueError, match=message):
        QuantizedWeight(**(parts | change))  # type: ignore[arg-type]
