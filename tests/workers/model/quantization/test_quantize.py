"""Rounding: how far a weight may be from what it was."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_pio.kernels.quantized import NF4_VALUES
from inference_pio.workers.model.quantization.quantize import (
    CODE_FORMATS,
    GROUP_SIZES,
    MADE_FORMATS,
    MadeFormat,
    quantize,
)

# Half of the largest step between neighbours, in units of a group's largest value: 1/127 for int8,
# 1/8 for int4, whose positive end may lie one step below it, and NF4's widest gap.
WIDEST_NF4 = max(b - a for a, b in pairwise(NF4_VALUES))
BOUNDS: dict[str, float] = {"int8": 0.5 / 127, "int4": 1 / 8, "nf4": WIDEST_NF4 / 2}
# Scales in float16 are off by 2 ** -11 of themselves, which moves the largest code by as much.
SLACK = 1.002


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 200))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(rows, columns, generator=generator) * 10 ** draw(st.floats(-3, 3))
    weight[draw(st.integers(0, rows - 1))] = 0
    return weight.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))


@settings(max_examples=60, deadline=None)
@given(weight=weights(), format=st.sampled_from(MADE_FORMATS))
def test_every_value_is_near(weight: torch.Tensor, format: MadeFormat) -> None:
    made = quantize(weight, format)
    group = GROUP_SIZES[format] or weight.shape[1]
    padded = torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % group))
    largest = padded.view(len(weight), -1, group).abs().amax(-1)
    bound = largest.repeat_interleave(group, 1)[:, : weight.shape[1]]
    error = (made.dequantize() - weight.float()).abs()
    # A search over clipped ranges may give up the largest value for the sum of squares of its
    # group: the values of 4-bit groups are only bounded together.
    if CODE_FORMATS[format] == "int4":
        squares = torch.nn.functional.pad(error.square(), (0, -weight.shape[1] % group))
        sums = squares.view(len(weight), -1, group).sum(-1)
        assert bool((sums <= group * (BOUNDS["int4"] * SLACK * largest) ** 2 + 1e-12).all())
    else:
        assert bool((error <= BOUNDS[CODE_FORMATS[format]] * SLACK * bound + 1e-7).all())


@settings(max_examples=30, deadline=None)
@given(weight=weights(), format=st.sampled_from(MADE_FORMATS), data=st.data())
def test_rows_are_rounded_on_their_own(
    weight: torch.Tensor, format: MadeFormat, data: st.DataObject
) -> None:
    """Tensor-parallel ranks cut rows before rounding and columns after it."""
    start = data.draw(st.integers(0, len(weight) - 1))
    rows = range(start, data.draw(st.integers(start + 1, len(weight))))
    first = data.draw(st.integers(0, weight.shape[1] - 1))
    columns = range(first, data.draw(st.integers(first + 1, weight.shape[1])))
    whole = quantize(weight, format)
    expected = whole.dequantize()[rows.start : rows.stop, columns.start : columns.stop]
    cut_before = quantize(weight[rows.start : rows.stop], format).columns(columns)
    assert torch.equal(cut_before.dequantize(), expected)
    assert torch.equal(whole.columns(columns).rows(rows).dequantize(), expected)


@pytest.mark.parametrize("format", MADE_FORMATS)
def test_zeros_stay_zeros(format: MadeFormat) -> None:
    weight = torch.zeros(3, 100)
    assert torch.equal(quantize(weight, format).dequantize(), weight)


def test_bits_of_a_weight() -> None:
    weight = torch.randn(64, 256)
    bits = {name: quantize(weight, name).num_bytes * 8 / weight.numel() for name in MADE_FORMATS}
    assert bits == {"int8": 8.125, "w8a8": 8.125, "int4": 4.5, "w4a8": 4.5, "nf4": 4.25}


@pytest.mark.parametrize("format", MADE_FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(format: MadeFormat, value: float) -> None:
    weight = torch.randn(4, 64)
    weight[2, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        quantize(weight, format)


@pytest.mark.parametrize("format", ["int4", "nf4"])
def test_values_beyond_a_float16_scale_are_refused(format: MadeFormat) -> None:
    with pytest.raises(ValueError, match=r"largest value is 1e\+07: beyond"):
        quantize(torch.full((1, 64), 1e7), format)


def test_int4_is_nearer_than_its_plain_rounding() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    scale = weight.view(64, 8, 32).abs().amax(-1, keepdim=True) / 7
    plain = ((weight.view(64, 8, 32) / scale).round() * scale).view(64, 256)
    made = quantize(weight, "int4").dequantize()
    assert (made - weight).norm() < 0.9 * (plain - weight).norm()
