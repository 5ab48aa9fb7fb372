"""The native linears of quantized weights, in every instruction set that this CPU has.

Weights in groups are compared with the dense linear of the dequantized weight, bit for bit: only
what is read from memory differs. With AVX2 alone that is the weight in float32, whatever the
activations are. int8 with one scale a row is compared with float64 sums.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inference_pio.kernels.native.library import KernelError, Library
from inference_pio.kernels.native.linear import NativeLinear, NativeSwiGLU
from inference_pio.kernels.native.linear_quantized import (
    QuantizedLinear,
    QuantizedSwiGLU,
    are_alike,
    is_kept,
)
from inference_pio.kernels.native_kernels import NativeKernels
from inference_pio.kernels.quantized import CodeFormat, QuantizedWeight, pack_pairs
from inference_pio.kernels.torch_quantized import round_activations

from .linear_samples import DTYPES, SETS, built, random

UNIT = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}

# Around the edges of panels (64 columns), groups, blocks (2 inputs) and chunks (64 and 128 steps of
# 1 or 2 inputs).
SHAPES = ((1, 1), (63, 31), (65, 33), (130, 257), (96, 512), (17, 2050))
ROWS = (1, 3, 6, 17, 40)


def quantized(
    format: CodeFormat,
    shape: tuple[int, int],
    group_size: int,
    *,
    zeros: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> QuantizedWeight:
    """Random codes, every one of them possible, scales of both signs, any zero points."""
    generator = torch.Generator().manual_seed(seed)
    grid = (shape[0], -(-shape[1] // group_size))
    if format == "int8":
        codes = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
        zero_points = torch.randint(-128, 128, grid, generator=generator, dtype=torch.int8)
    else:
        codes = pack_pairs(torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8))
        zero_points = torch.randint(0, 17, grid, generator=generator, dtype=torch.int8)
    return QuantizedWeight(
        format=format,
        shape=shape,
        codes=codes,
        scales_OG=(torch.randn(grid, generator=generator) / 16).to(scale_dtype),
        group_size=group_size,
        zeros_OG=zero_points if zeros else None,
    )


def number_dtype(library: Library, dtype: torch.dtype) -> torch.dtype:
    """What codes are multiplied as, with activations of ``dtype``."""
    return torch.float32 if library.name == "avx2" else dtype


def assert_scaled_sums(out: Tensor, x: Tensor, weight: QuantizedWeight, added: Tensor) -> None:
    """``out`` is the float32 sum of codes, scaled: nothing is rounded to the activations' dtype."""
    exact_OI = weight.dequantize(torch.float64)
    exact = x.double() @ exact_OI.T
    sums = x.double().abs() @ exact_OI.abs().T
    bound = sums * (weight.shape[1] + 2) * 2.0**-24
    bound += (exact + added).abs() * 1.01 * UNIT[out.dtype] + 1e-30
    assert bool(((out.double() - exact - added).abs() <= bound).all())


def has_row_scales(weight: QuantizedWeight) -> bool:
    one_group = weight.group_size >= weight.shape[1]
    return weight.format == "int8" and one_group and weight.zeros_OG is None


KINDS: tuple[tuple[CodeFormat, int, bool, torch.dtype], ...] = (
    ("int4", 32, False, torch.float16),
    ("int4", 64, True, torch.float16),
    ("int4", 10**6, False, torch.bfloat16),
    ("int4", 6, True, torch.float16),
    ("nf4", 64, False, torch.float32),
    ("int8", 32, False, torch.float16),
    ("int8", 128, True, torch.float32),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
def test_in_groups_equals_the_dequantized_weight(
    library: Library, kind: tuple[CodeFormat, int, bool, torch.dtype], dtype: torch.dtype
) -> None:
    format, group_size, zeros, scale_dtype = kind
    for shape in SHAPES:
        weight = quantized(format, shape, group_size, zeros=zeros, scale_dtype=scale_dtype)
        if has_row_scales(weight):
            continue
        bias = random(1, shape[0], torch.float32, 1)[0]
        team = library.team(2)
        packed = QuantizedLinear(library, team, weight, bias, dtype)
        numbers = number_dtype(library, dtype)
        dense = NativeLinear(library, team, weight.dequantize(numbers), bias)
        x = random(max(ROWS), shape[1], dtype, 2)
        expected = dense.in_float32(x.to(numbers))
        for rows in ROWS:
            assert torch.equal(packed.in_float32(x[:rows]), expected[:rows]), (shape, rows)


TILED: tuple[tuple[CodeFormat, int, bool, torch.dtype], ...] = (
    ("int4", 32, False, torch.float16),
    ("int4", 64, True, torch.float32),
    ("int4", 128, True, torch.float16),
    ("nf4", 10**6, False, torch.float32),
    ("int8", 32, True, torch.float16),
    ("int8", 128, False, torch.float16),
)


@pytest.mark.parametrize("kind", TILED, ids=lambda kind: f"{kind[0]}-{kind[1]}")
def test_rows_around_the_edges_of_tiles(
    library: Library, kind: tuple[CodeFormat, int, bool, torch.dtype]
) -> None:
    """With AMX, up to 16, up to 32 and more rows are multiplied in three ways, which agree; with
    AVX2 alone, up to 4 and more in two."""
    format, group_size, zeros, scale_dtype = kind
    shape = (145, 289)
    weight = quantized(format, shape, group_size, zeros=zeros, scale_dtype=scale_dtype)
    packed = QuantizedLinear(library, library.team(3), weight, None, torch.bfloat16)
    numbers = number_dtype(library, torch.bfloat16)
    dense = NativeLinear(library, library.team(1), weight.dequantize(numbers))
    x = random(33, shape[1], torch.bfloat16, 2)
    expected = dense.in_float32(x.to(numbers))
    for rows in (1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33):
        assert torch.equal(packed.in_float32(x[:rows]), expected[:rows]), rows
        assert torch.equal(packed(x[:rows]), expected[:rows].bfloat16()), rows
    for row in (15, 16, 32):
        assert torch.equal(packed.in_float32(x[row : row + 1]), expected[row : row + 1]), row


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
def test_a_scale_a_row_multiplies_the_sum(
    library: Library, dtype: torch.dtype, scale_dtype: torch.dtype
) -> None:
    for shape in SHAPES:
        weight = quantized("int8", shape, shape[1], scale_dtype=scale_dtype)
        bias = random(1, shape[0], torch.float32, 1)[0]
        packed = QuantizedLinear(library, library.team(2), weight, bias, dtype)
        x = random(max(ROWS), shape[1], dtype, 2)
        in_float32 = packed.in_float32(x)
        assert_scaled_sums(in_float32, x, weight, bias)
        for rows in ROWS:
            assert torch.equal(packed(x[:rows]), in_float32[:rows].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_adds_a_residual(library: Library, format: CodeFormat, dtype: torch.dtype) -> None:
    weight = quantized(format, (70, 96), 32)
    x, residual = random(11, 96, dtype, 1), random(11, 70, dtype, 2)
    packed = QuantizedLinear(library, library.team(2), weight, None, dtype)
    numbers = number_dtype(library, dtype)
    dense = NativeLinear(library, library.team(2), weight.dequantize(numbers))
    sums = dense(x.to(numbers), residual.to(numbers))
    assert torch.equal(packed(x, residual), sums.to(dtype))
    stream, expected = random(11, 70, torch.float32, 5), random(11, 70, torch.float32, 5)
    packed.add_to_stream(x, stream)
    dense.add_to_stream(x.to(numbers), expected)
    assert torch.equal(stream, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("intermediate", [1, 32, 33, 100])
def test_swiglu(library: Library, intermediate: int, dtype: torch.dtype) -> None:
    gate, up = (quantized("int4", (intermediate, 160), 32, seed=seed) for seed in (0, 1))
    packed = QuantizedSwiGLU(library, library.team(2), gate, up, dtype)
    numbers = number_dtype(library, dtype)
    dense = NativeSwiGLU(library, library.team(2), gate.dequantize(numbers), up.dequantize(numbers))
    for rows in ROWS:
        x = random(rows, 160, dtype, rows)
        assert torch.equal(packed(x), dense(x.to(numbers)).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("intermediate", [1, 33, 100])
def test_swiglu_with_a_scale_a_row(library: Library, intermediate: int, dtype: torch.dtype) -> None:
    shape = (intermediate, 160)
    gate, up = (quantized("int8", shape, 160, scale_dtype=torch.float32, seed=s) for s in (0, 1))
    gate, up = (replace(weight, scales_OG=weight.scales_OG / 64) for weight in (gate, up))
    packed = QuantizedSwiGLU(library, library.team(2), gate, up, dtype)
    for rows in ROWS:
        x = random(rows, 160, dtype, rows)
        exact = [x.double() @ weight.dequantize(torch.float64).T for weight in (gate, up)]
        expected = torch.nn.functional.silu(exact[0]) * exact[1]
        torch.testing.assert_close(packed(x).double(), expected, rtol=2 * UNIT[dtype], atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, 777])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_row_does_not_depend_on_others_or_on_threads(
    library: Library, format: CodeFormat, group_size: int, dtype: torch.dtype
) -> None:
    weight = quantized(format, (200, 777), group_size, scale_dtype=torch.float32)
    x = random(700, 777, dtype, 1)
    expected = QuantizedLinear(library, library.team(1), weight, None, dtype).in_float32(x)
    packed = QuantizedLinear(library, library.team(3), weight, None, dtype)
    for start, end in ((0, 700), (0, 1), (699, 700), (7, 10), (3, 9), (1, 34), (5, 520)):
        assert torch.equal(packed.in_float32(x[start:end]), expected[start:end])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_what_lies_behind_a_row_is_not_read_into_it(
    library: Library, format: CodeFormat, dtype: torch.dtype
) -> None:
    whole = random(9, 100, dtype, 0)
    whole[:, 37:] = float("nan")
    weight = quantized(format, (50, 37), 32)
    packed = QuantizedLinear(library, library.team(2), weight, None, dtype)
    numbers = number_dtype(library, dtype)
    dense = NativeLinear(library, library.team(2), weight.dequantize(numbers))
    clean = whole[:, :37].to(numbers, copy=True)
    for rows in (9, 2):
        assert torch.equal(packed.in_float32(whole[:rows, :37]), dense.in_float32(clean[:rows]))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(SETS),
    st.sampled_from(DTYPES),
    st.sampled_from(["int8", "int4", "nf4"]),
    st.booleans(),
    st.sampled_from([torch.float16, torch.float32]),
    st.integers(1, 50),
    st.integers(1, 200),
    st.integers(1, 700),
    st.integers(1, 200).map(lambda half: 2 * half),
)
def test_any_shape(
    name: str,
    dtype: torch.dtype,
    format: CodeFormat,
    zeros: bool,
    scale_dtype: torch.dtype,
    rows: int,
    columns: int,
    features: int,
    group_size: int,
) -> None:
    library = built(name)
    shape, zeros = (columns, features), zeros and format != "nf4"
    weight = quantized(format, shape, group_size, zeros=zeros, scale_dtype=scale_dtype)
    x = random(rows, features, dtype, 1)
    out = QuantizedLinear(library, library.team(2), weight, None, dtype).in_float32(x)
    if has_row_scales(weight):
        assert_scaled_sums(out, x, weight, torch.zeros(()))
    else:
        numbers = number_dtype(library, dtype)
        dense = NativeLinear(library, library.team(2), weight.dequantize(numbers))
        assert torch.equal(out, dense.in_float32(x.to(numbers)))


@pytest.mark.parametrize(("format", "bits"), [("int8", 8), ("int4", 4.5), ("nf4", 4.5)])
def test_the_packed_weight_is_as_small_as_its_codes(
    library: Library, format: CodeFormat, bits: float
) -> None:
    group_size = 512 if format == "int8" else 32
    weight = quantized(format, (256, 512), group_size)
    packed = QuantizedLinear(library, library.team(1), weight, None, torch.bfloat16)
    assert packed.num_bytes == 256 * 512 * bits / 8


def test_what_is_not_kept() -> None:
    weight = quantized("int4", (8, 96), 32)
    assert is_kept(weight)
    assert is_kept(quantized("int4", (8, 33), 33)), "one group is a whole row"
    assert not is_kept(quantized("int4", (8, 96), 33))
    assert not is_kept(replace(weight, column_groups_I=torch.zeros(96, dtype=torch.int32)))
    fp8 = torch.zeros(8, 96, dtype=torch.float8_e4m3fn)
    assert not is_kept(QuantizedWeight("fp8", (8, 96), fp8, weight.scales_OG, 32))
    assert are_alike(weight, quantized("int4", (8, 96), 32, seed=1))
    assert not are_alike(weight, quantized("int4", (8, 96), 32, zeros=True))
    assert not are_alike(weight, quantized("int4", (8, 96), 32, scale_dtype=torch.float32))
    assert not are_alike(weight, quantized("nf4", (8, 96), 32))


def test_kernels_leave_what_they_do_not_keep(library: Library) -> None:
    kernels = NativeKernels(library, 1)
    odd, even = quantized("int4", (8, 96), 33), quantized("int4", (8, 96), 32)
    assert kernels.pack_quantized(odd, None, torch.float32) is None
    assert kernels.pack_quantized_swiglu(odd, odd, torch.float32) is None
    nf4 = quantized("nf4", (8, 96), 32)
    assert kernels.pack_quantized_swiglu(even, nf4, torch.float32) is None
    assert isinstance(kernels.pack_quantized(even, None, torch.float32), QuantizedLinear)
    assert isinstance(kernels.pack_quantized_swiglu(even, even, torch.bfloat16), QuantizedSwiGLU)


def test_errors_say_what_is_wrong(library: Library) -> None:
    team, weight = library.team(1), quantized("int4", (8, 96), 32)
    with pytest.raises(ValueError, match="float16"):
        QuantizedLinear(library, team, weight, None, torch.float16)
    with pytest.raises(ValueError, match="bias"):
        QuantizedLinear(library, team, weight, torch.zeros(7), torch.float32)
    with pytest.raises(KernelError, match="even number"):
        QuantizedLinear(library, team, quantized("int4", (8, 96), 33), None, torch.float32)
    with pytest.raises(KernelError, match="alike"):
        QuantizedSwiGLU(library, team, weight, quantized("nf4", (9, 96), 32), torch.float32)


def rounded_product(x: Tensor, weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """What int8 activations give, in float64, and the sum of its terms' magnitudes."""
    codes_TC, scales_T1 = round_activations(x)
    sums_TO = codes_TC.double() @ weight.codes.double().T
    exact_TO = sums_TO * scales_T1.double() * weight.scales_OG.double().view(-1)
    return exact_TO, exact_TO.abs()


def with_int8_activations(shape: tuple[int, int], seed: int = 0) -> QuantizedWeight:
    weight = quantized("int8", shape, shape[1], scale_dtype=torch.float32, seed=seed)
    return replace(weight, int8_activations=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_activations_equal_exact_sums_scaled(library: Library, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        weight = with_int8_activations(shape)
        bias = random(1, shape[0], torch.float32, 1)[0]
        packed = QuantizedLinear(library, library.team(2), weight, bias, dtype)
        x = random(max(ROWS), shape[1], dtype, 2)
        x[3] = 0
        x[4] *= 1e-20
        exact, magnitude = rounded_product(x, weight)
        in_float32 = packed.in_float32(x)
        # Conversion, two products and the bias are each wrong by half a unit of float32.
        bound = (magnitude * 4 + bias.abs()) * 2.0**-24 + 1e-37
        assert bool(((in_float32.double() - exact - bias).abs() <= bound).all()), shape
        for rows in ROWS:
            assert torch.equal(packed(x[:rows]), in_float32[:rows].to(dtype)), (shape, rows)


def test_int8_activations_of_many_rows_and_threads(library: Library) -> None:
    weight, x = with_int8_activations((200, 2100)), random(700, 2100, torch.bfloat16, 1)
    expected = QuantizedLinear(library, library.team(1), weight, None, torch.bfloat16)
    packed = QuantizedLinear(library, library.team(3), weight, None, torch.bfloat16)
    exact, magnitude = rounded_product(x, weight)
    out = packed.in_float32(x)
    assert bool(((out.double() - exact).abs() <= magnitude * 2.0**-22).all())
    for start, end in ((0, 700), (699, 700), (3, 9), (5, 520)):
        assert torch.equal(expected.in_float32(x[start:end]), out[start:end])


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_activations_in_a_swiglu(library: Library, dtype: torch.dtype) -> None:
    gate, up = with_int8_activations((100, 48), 0), with_int8_activations((100, 48), 1)
    packed = QuantizedSwiGLU(library, library.team(2), gate, up, dtype)
    x = random(40, 48, dtype, 2)
    exact = torch.nn.functional.silu(rounded_product(x, gate)[0]) * rounded_product(x, up)[0]
    torch.testing.assert_close(packed(x).double(), exact, rtol=2.1 * UNIT[dtype], atol=1e-4)


def test_what_is_not_finite_does_not_become_an_int8_code(library: Library) -> None:
    weight, x = with_int8_activations((70, 64)), random(33, 64, torch.float32, 1)
    packed = QuantizedLinear(library, library.team(2), weight, None, torch.float32)
    expected = packed(x)
    x[4, 5], x[20, 63] = float("nan"), float("inf")
    out = packed(x)
    assert bool(out[[4, 20]].isnan().all())
    rest = [row for row in range(33) if row not in (4, 20)]
    assert torch.equal(out[rest], expected[rest])


def int4_with_int8_activations(
    shape: tuple[int, int], group_size: int = 32, seed: int = 0
) -> QuantizedWeight:
    return replace(quantized("int4", shape, group_size, seed=seed), int8_activations=True)


def grouped_product(x: Tensor, weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """What int8 activations give, in float64, and the sum of its groups' magnitudes."""
    codes_TC, scales_T1 = round_activations(x)
    scales_T1, weight_OC = scales_T1.double(), weight.dequantize(torch.float64)
    magnitude_TO = torch.zeros(len(x), len(weight_OC), dtype=torch.float64)
    for start in range(0, x.shape[1], 32):
        part = slice(start, start + 32)
        magnitude_TO += (codes_TC[:, part].double() @ weight_OC[:, part].T).abs()
    exact_TO = codes_TC.double() @ weight_OC.T
    return exact_TO * scales_T1, magnitude_TO * scales_T1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, 64, 10**6])
def test_int4_with_int8_activations_adds_up_exact_groups(
    library: Library, group_size: int, dtype: torch.dtype
) -> None:
    for shape in SHAPES:
        weight = int4_with_int8_activations(shape, group_size)
        bias = random(1, shape[0], torch.float32, 1)[0]
        packed = QuantizedLinear(library, library.team(2), weight, bias, dtype)
        x = random(max(ROWS), shape[1], dtype, 2)
        x[3] = 0
        x[4] *= 1e-20
        exact, magnitude = grouped_product(x, weight)
        in_float32 = packed.in_float32(x)
        # Each group's sum is rounded once where it is added.
        bound = (magnitude * (shape[1] / 32 + 4) + bias.abs()) * 2.0**-24 + 1e-37
        assert bool(((in_float32.double() - exact - bias).abs() <= bound).all()), shape
        for rows in ROWS:
            assert torch.equal(packed(x[:rows]), in_float32[:rows].to(dtype)), (shape, rows)


def test_int4_sums_hold_the_largest_codes(library: Library) -> None:
    for code in (0, 15):
        weight = int4_with_int8_activations((64, 96))
        weight = replace(weight, codes=torch.full((64, 48), code * 17, dtype=torch.uint8))
        packed = QuantizedLinear(library, library.team(1), weight, None, torch.float32)
        for sign in (-1, 1):
            x = torch.full((5, 96), sign * 2.5)
            x[1, ::2] *= -1
            exact, magnitude = grouped_product(x, weight)
            difference = (packed.in_float32(x).double() - exact).abs()
            assert bool((difference <= magnitude * 2.0**-21).all()), (code, sign)


def test_int4_with_int8_activations_of_many_rows_and_threads(library: Library) -> None:
    weight, x = int4_with_int8_activations((200, 2100)), random(700, 2100, torch.bfloat16, 1)
    expected = QuantizedLinear(library, library.team(1), weight, None, torch.bfloat16)
    packed = QuantizedLinear(library, library.team(3), weight, None, torch.bfloat16)
    out = packed.in_float32(x)
    for start, end in ((0, 700), (699, 700), (0, 2), (3, 6), (3, 9), (5, 520)):
        assert torch.equal(expected.in_float32(x[start:end]), out[start:end])


@pytest.mark.parametrize("dtype", DTYPES)
def test_int4_with_int8_activations_in_a_swiglu(library: Library, dtype: torch.dtype) -> None:
    gate, up = (int4_with_int8_activations((100, 48), seed=seed) for seed in (0, 1))
    packed = QuantizedSwiGLU(library, library.team(2), gate, up, dtype)
    x = random(40, 48, dtype, 2)
    exact = torch.nn.functional.silu(grouped_product(x, gate)[0]) * grouped_product(x, up)[0]
    torch.testing.assert_close(packed(x).double(), exact, rtol=2.1 * UNIT[dtype], atol=1e-4)


def test_int4_with_int8_activations_reads_no_other_columns(library: Library) -> None:
    whole, weight = random(9, 100, torch.bfloat16, 0), int4_with_int8_activations((50, 37))
    whole[:, 37:] = float("nan")
    packed = QuantizedLinear(library, library.team(2), weight, None, torch.bfloat16)
    expected = packed.in_float32(whole[:, :37].clone())
    assert torch.equal(packed.in_float32(whole[:, :37]), expected)
    stream = random(9, 50, torch.float32, 5)
    wanted = stream + expected
    packed.add_to_stream(whole[:, :37], stream)
    assert torch.equal(stream, wanted)
    assert packed.num_bytes == 64 * 2 * (32 * 4.5) / 8


def test_which_int4_is_kept_for_int8_activations(library: Library) -> None:
    weight = int4_with_int8_activations((8, 96))
    assert is_kept(weight)
    assert is_kept(int4_with_int8_activations((8, 90), 90)), "one group is a whole row"
    assert not are_alike(weight, replace(weight, int8_activations=False))
    zeros = torch.zeros(8, 3, dtype=torch.int8)
    others = (
        int4_with_int8_activations((8, 96), 48),
        replace(weight, zeros_OG=zeros),
        replace(weight, scales_OG=weight.scales_OG.float()),
        replace(weight, column_groups_I=torch.zeros(96, dtype=torch.int32)),
    )
    for other in others:
        assert not is_kept(other)
    for other in others[:3]:
        with pytest.raises(KernelError, match="groups of 32 columns"):
            QuantizedLinear(library, library.team(1), other, None, torch.float32)
