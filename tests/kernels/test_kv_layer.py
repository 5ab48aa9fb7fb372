"""What codes of the KV cache stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from inference_pio.kernels.kv_bytes import KVCodes, code_bytes, head_bytes
from inference_pio.kernels.kv_layer import (
    CodedKV,
    dequantize,
    gather_heads,
    layer_shape,
    quantize,
    read_blocks,
    write_tokens,
)

from .coded_samples import coded, empty_layer

CODES: list[KVCodes] = ["int8", "fp8"]


def round_trip(x: Tensor, codes: KVCodes) -> Tensor:
    return dequantize(*quantize(x, codes), codes)


@given(
    seed=st.integers(0, 2**16),
    dim=st.integers(1, 200),
    exponent=st.integers(-30, 30),
    codes=st.sampled_from(CODES),
)
def test_a_number_comes_back_within_half_a_step(
    seed: int, dim: int, exponent: int, codes: KVCodes
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(5, 3, dim) * 2.0**exponent
    scale = x.abs().amax(-1, keepdim=True) / (127 if codes == "int8" else 448)
    # e4m3 has 3 bits of mantissa down to 2 ** -6, and steps of 2 ** -9 below.
    step = scale if codes == "int8" else torch.maximum(x.abs() / 8, scale * 2.0**-9)
    assert ((round_trip(x, codes) - x).abs() <= step / 2 * 1.0001).all()


@pytest.mark.parametrize("codes", CODES)
def test_the_largest_number_of_a_row_is_exact(codes: KVCodes) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 128)
    place = x.abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(round_trip(x, codes).gather(-1, place), x.gather(-1, place))


@pytest.mark.parametrize("codes", CODES)
def test_rows_of_extremes(codes: KVCodes) -> None:
    zeros, tiny, huge = torch.zeros(4), torch.full((4,), 1e-40), torch.full((4,), 3e38)
    assert torch.equal(round_trip(zeros, codes), zeros)
    assert round_trip(tiny, codes).abs().max() <= 1e-30
    torch.testing.assert_close(round_trip(huge, codes), huge)
    for poison in (float("nan"), float("inf"), -float("inf")):
        rows = torch.stack((torch.tensor([1.0, poison, 2.0]), torch.ones(3)))
        back = round_trip(rows, codes)
        assert back[0].isnan().all()
        assert torch.equal(back[1], rows[1])


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize(("block_size", "dim"), [(1, 7), (5, 3), (16, 24), (64, 128)])
def test_tokens_are_written_to_their_slots_alone(codes: KVCodes, block_size: int, dim: int) -> None:
    torch.manual_seed(0)
    layer = empty_layer((6, 3, block_size, dim), codes, torch.float32)
    assert isinstance(layer, CodedKV)
    assert layer_shape(layer) == (6, 3, block_size, dim)
    slots = torch.randperm(6 * block_size)[:4]
    tokens = torch.randn(4, 2, 3, dim)
    write_tokens(layer, slots, tokens)
    by_slot = layer.dequantized(layer.data_N2KB).permute(0, 3, 1, 2, 4).flatten(0, 1)
    assert torch.equal(by_slot[slots], round_trip(tokens, codes))
    others = torch.ones(6 * block_size, dtype=torch.bool)
    others[slots] = False
    assert not by_slot[others].any()


@pytest.mark.parametrize("codes", CODES)
def test_blocks_and_heads_are_gathered_as_numbers(
    codes: KVCodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    numbers = torch.randn(5, 2, 3, 8, 20)
    layer = coded(numbers, codes)
    expected = round_trip(numbers, codes)
    assert torch.equal(read_blocks(layer, [4, 0, 4]), expected[[4, 0, 4]])
    monkeypatch.setattr("inference_pio.kernels.kv_layer._MAX_NUMBERS", 3 * 8 * 20)
    rows = torch.tensor([0, 7, 29, 3])
    out = torch.empty(4, 8, 20, dtype=torch.bfloat16)
    gather_heads(layer, rows, out)
    assert torch.equal(out, expected.flatten(0, 2)[rows].bfloat16())


@given(block_size=st.integers(1, 100), dim=st.integers(1, 200))
def test_scales_lie_aligned_behind_the_codes(block_size: int, dim: int) -> None:
    assert code_bytes(block_size, dim) % 4 == 0
    assert 0 <= code_bytes(block_size, dim) - block_size * dim < 4
    assert head_bytes(block_size, dim) == code_bytes(block_size, dim) + 4 * block_size


def test_data_of_another_layout_is_refused() -> None:
    for data in (
        torch.zeros(3, 2, 4, 16 * 8 + 63, dtype=torch.uint8),
        torch.zeros(3, 1, 4, 16 * 8 + 64, dtype=torch.uint8),
        torch.zeros(3, 2, 4, 16 * 8 + 64, dtype=torch.int8),
        torch.zeros(2, 4, 16 * 8 + 64, dtype=torch.uint8),
    ):
        with pytest.raises(ValueError, match=r"torch.uint8 \[N, 2, K, 192\]"):
            CodedKV(data, "int8", 16, 8)
