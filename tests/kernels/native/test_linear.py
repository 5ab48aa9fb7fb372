"""The native linears against float64 products, in every instruction set that this CPU has."""

from __future__ import annotations

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inference_pio.kernels.native.library import KernelError, Library, check
from inference_pio.kernels.native.linear import NativeLinear, NativeSwiGLU, matrix

from .linear_samples import DTYPES, SETS, built, random

# Around the edges of tiles (6, 16 and 32 rows), blocks of rows (96, 512), panels (64 columns) and
# chunks along k (128 steps: 128 float32 or 256 bf16).
ROWS = (1, 2, 5, 6, 7, 16, 17, 32, 33, 97)
SHAPES = ((1, 1), (63, 31), (64, 32), (65, 33), (130, 257), (320, 1024), (17, 2050))


def assert_product(out: Tensor, x: Tensor, weight: Tensor, added: Tensor | float = 0.0) -> None:
    """``out`` is the product within the error of a float32 sum, and its own dtype's rounding."""
    exact = x.double() @ weight.double().T
    # Each product and each of the K additions may be wrong by half a unit of float32.
    scale = x.double().abs() @ weight.double().abs().T
    bound = scale * weight.shape[1] * 2.0**-24 + (exact + added).abs() * unit(out.dtype) + 1e-30
    error = (out.double() - exact - added).abs()
    assert bool((error <= bound).all()), float((error / bound).max())


def unit(dtype: torch.dtype) -> float:
    """Half a unit in the last place, with a little room for sums beside a tie."""
    return {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}[dtype] * 1.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_product(library: Library, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = random(*shape, dtype, 0)
    bias = random(1, shape[0], torch.float32, 1)[0]
    linear = NativeLinear(library, library.team(2), weight, bias)
    for rows in ROWS:
        x = random(rows, shape[1], dtype, rows)
        assert_product(linear(x), x, weight, bias)
        assert_product(linear.in_float32(x), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adds_a_residual(library: Library, dtype: torch.dtype) -> None:
    weight, x, residual = (random(*s, dtype, s[0]) for s in ((70, 90), (11, 90), (11, 70)))
    linear = NativeLinear(library, library.team(2), weight)
    assert_product(linear(x, residual), x, weight, residual.double())
    stream = random(11, 70, torch.float32, 5)
    before = stream.double()
    linear.add_to_stream(x, stream)
    assert_product(stream, x, weight, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("intermediate", [1, 31, 32, 33, 100])
def test_swiglu(library: Library, intermediate: int, dtype: torch.dtype) -> None:
    gate, up = (random(intermediate, 48, dtype, seed) for seed in (0, 1))
    linear = NativeSwiGLU(library, library.team(2), gate, up)
    for rows in (1, 6, 40):
        x = random(rows, 48, dtype, rows)
        exact = torch.nn.functional.silu(x.double() @ gate.double().T) * (
            x.double() @ up.double().T
        )
        tolerance = 2 * unit(dtype)
        torch.testing.assert_close(linear(x).double(), exact, rtol=tolerance, atol=1e-4)


def test_silu_of_every_magnitude(library: Library) -> None:
    gates = torch.cat((torch.linspace(-120, 120, 4001), torch.tensor([1e-30, -1e38, 1e38, 0.0])))
    gate, up = gates[:, None], torch.ones(len(gates), 1)
    out = NativeSwiGLU(library, library.team(1), gate, up)(torch.ones(1, 1))[0]
    exact = torch.nn.functional.silu(gates.double())
    torch.testing.assert_close(out.double(), exact, rtol=4e-7, atol=1e-35)


def test_silu_of_what_is_not_finite(library: Library) -> None:
    gates = torch.tensor([float("inf"), float("nan"), float("-inf")])
    out = NativeSwiGLU(library, library.team(1), gates[:, None], torch.ones(3, 1))(torch.ones(1, 1))
    torch.testing.assert_close(out[0], torch.nn.functional.silu(gates), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_others_or_on_threads(
    library: Library, dtype: torch.dtype
) -> None:
    weight, x = random(200, 777, dtype, 0), random(700, 777, dtype, 1)
    expected = NativeLinear(library, library.team(1), weight).in_float32(x)
    linear = NativeLinear(library, library.team(3), weight)
    for start, end in ((0, 700), (0, 1), (699, 700), (3, 9), (1, 34), (5, 520)):
        assert torch.equal(linear.in_float32(x[start:end]), expected[start:end])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_lies_behind_a_row_is_not_read_into_it(library: Library, dtype: torch.dtype) -> None:
    whole = random(9, 100, dtype, 0)
    whole[:, 37:] = float("nan")
    out = torch.full((9, 80), 7.0)
    x, weight = whole[:, :37], random(50, 37, dtype, 1)
    linear = NativeLinear(library, library.team(2), weight)
    assert_product(linear.in_float32(x), x, weight)
    check(
        library.cdll.pio_linear_store_float(
            library.team(2), int(dtype == torch.bfloat16), linear.handle, matrix(x),
            matrix(out[:, 10:60]),
        )
    )  # fmt: skip
    assert_product(out[:, 10:60], x, weight)
    assert bool((out[:, :10] == 7).all() and (out[:, 60:] == 7).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_a_number_stays_in_its_row(library: Library, dtype: torch.dtype) -> None:
    weight, x = random(70, 64, dtype, 0), random(33, 64, dtype, 1)
    x[4, 5] = float("nan")
    x[20, 0] = float("inf")
    out = NativeLinear(library, library.team(2), weight)(x)
    assert bool(out[4].isnan().all())
    assert not bool(out[20].isfinite().any())
    rest = [row for row in range(33) if row not in (4, 20)]
    assert_product(out[rest], x[rest], weight)


def test_no_rows(library: Library) -> None:
    linear = NativeLinear(library, library.team(2), random(10, 10, torch.float32, 0))
    assert linear(torch.empty(0, 10)).shape == (0, 10)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(SETS),
    st.sampled_from(DTYPES),
    st.integers(1, 80),
    st.integers(1, 200),
    st.integers(1, 700),
    st.integers(1, 3),
)
def test_any_shape(
    name: str, dtype: torch.dtype, rows: int, columns: int, features: int, threads: int
) -> None:
    library = built(name)
    weight, x = random(columns, features, dtype, 0), random(rows, features, dtype, 1)
    linear = NativeLinear(library, library.team(threads), weight)
    assert_product(linear.in_float32(x), x, weight)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4096, 1024), (1024, 3072), (2560, 9728)])
@pytest.mark.parametrize("rows", [1, 48, 600])
def test_real_shapes(
    library: Library, shape: tuple[int, int], rows: int, dtype: torch.dtype
) -> None:
    weight, x = random(*shape, dtype, 0), random(rows, shape[1], dtype, 1)
    linear = NativeLinear(library, library.team(2), weight)
    assert_product(linear(x), x, weight)


def test_errors_say_what_is_wrong(library: Library) -> None:
    team, weight = library.team(1), random(8, 8, torch.float32, 0)
    with pytest.raises(ValueError, match="float16"):
        NativeLinear(library, team, weight.half())
    with pytest.raises(ValueError, match="bias"):
        NativeLinear(library, team, weight, torch.zeros(7))
    with pytest.raises(ValueError, match="one shape"):
        NativeSwiGLU(library, team, weight, weight[:7])
    linear = NativeLinear(library, team, weight)
    with pytest.raises(ValueError, match="the weight"):
        linear(torch.zeros(1, 8, dtype=torch.bfloat16))
    with pytest.raises(KernelError, match="another width"):
        linear(torch.zeros(1, 9))
    with pytest.raises(KernelError, match="residual"):
        linear(torch.zeros(2, 8), torch.zeros(1, 8))
    with pytest.raises(ValueError, match="dtype"):
        linear(torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.bfloat16))


def test_the_packed_weight_ends_with_its_object(library: Library) -> None:
    weight = random(4096, 2048, torch.float32, 0)
    before = psutil.Process().memory_info().rss
    for _ in range(6):
        linear = NativeLinear(library, library.team(1), weight)
        assert linear.num_bytes == weight.nbytes
    del linear
    assert psutil.Process().memory_info().rss - before < 3 * weight.nbytes


def test_float32_results_take_no_new_memory_and_none_for_no_rows(library: Library) -> None:
    weight = torch.randn(48, 32)
    linear = NativeLinear(library, library.team(1), weight)
    assert linear.in_float32(torch.randn(0, 32)).shape == (0, 48)
    first = linear.in_float32(torch.randn(5, 32))
    assert linear.in_float32(torch.randn(3, 32)).data_ptr() == first.data_ptr()
    x = torch.randn(9, 32)
    assert_product(linear.in_float32(x), x, weight)
