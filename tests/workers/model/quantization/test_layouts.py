"""Readers of published layouts against what other libraries make of the same tensors.

``golden.safetensors`` was written by: bitsandbytes 0.50.2 (quantize_4bit and dequantize_4bit on the
CPU, with and without compress_statistics), AutoAWQ 0.2.7 (dequantize_gemm on random words),
AutoGPTQ 0.7.1 (qlinear_cuda's pack, and its unpacking in forward with an identity input),
transformers 5.23 (Fp8Dequantize, blocks of 4 by 4); seed 7, normal weights of deviation 0.05.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from inference_pio.workers.model.config import CheckpointError
from inference_pio.workers.model.quantization.detect import layout_of
from inference_pio.workers.model.quantization.layout import Layout

from .stored import PUBLISHED, InMemory

GPTQ = {"quant_method": "gptq", "group_size": 16}
NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_quant_storage": "uint8",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "bnb": NF4,
    "bnb_nested": NF4,
    "bnb_crossing": NF4,
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"},
    "gptq4": GPTQ | {"bits": 4},
    "gptq4_ordered": GPTQ | {"bits": 4, "desc_act": True},
    "gptq4_symmetric": GPTQ | {"bits": 4},
    "gptq8": GPTQ | {"bits": 8},
    "gptq8_asymmetric": GPTQ | {"bits": 8, "desc_act": True},
    "fp8": {"quant_method": "fp8", "weight_block_size": [4, 4]},
}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(Path(__file__).with_name("golden.safetensors"))


def layout(settings: dict[str, Any]) -> Layout:
    found = layout_of({"quantization_config": settings}, "config.json")
    assert found is not None
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_weights_are_what_the_writers_library_reads(name: str, golden: dict[str, Tensor]) -> None:
    expected = golden[f"{name}.dequantized"]
    tensors = InMemory(golden)
    reader = layout(SETTINGS[name])
    shape = tuple(expected.shape)
    assert reader.holds(tensors, name)
    for part, size in reader.expected(tensors, name, shape).items():
        assert size is None or tuple(golden[part].shape) == size
    weight = reader.read(tensors, name, shape)
    # bitsandbytes rounds to the dtype of the weight that it was given.
    got = weight.dequantize(torch.bfloat16).float() if "bnb" in name else weight.dequantize()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


def test_symmetric_weights_have_no_zero_points(golden: dict[str, Tensor]) -> None:
    tensors = InMemory(golden)
    for name in ("gptq4_symmetric", "gptq8"):
        weight = layout(SETTINGS[name]).read(tensors, name, (32, 32))
        assert weight.zeros_OG is None
        assert weight.column_groups_I is None


def test_the_first_gptq_format_borrows_across_zero_points(golden: dict[str, Tensor]) -> None:
    """Zero points of 0: the writer subtracts from the word, and the second format stores them."""
    zeros = torch.tensor([[0x0, 0x30, 0xF07, 0x10000000]] * 2, dtype=torch.int32)
    tensors = golden | {"gptq4.qzeros": zeros}
    second = layout(SETTINGS["gptq4"] | {"checkpoint_format": "gptq_v2"})
    expected = second.read(InMemory(tensors), "gptq4", (32, 32)).dequantize()
    tensors["gptq4.qzeros"] = zeros - 0x11111111
    got = layout(SETTINGS["gptq4"]).read(InMemory(tensors), "gptq4", (32, 32)).dequantize()
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "hqq"}, "quant_method is 'hqq'; read are inference-pio, fp8, gptq, awq"),
        ({}, "quant_method is None; read are"),
        (GPTQ | {"bits": 3}, "bits is 3; supported: 4, 8"),
        (GPTQ | {"bits": 4, "group_size": 0}, "group_size is 0; a number of columns"),
        (GPTQ | {"bits": 4, "checkpoint_format": "marlin"}, "'marlin'; supported: 'gptq', 'gptq_v"),
        (GPTQ | {"bits": 4, "dynamic": {"+:.*up.*": {"bits": 8}}}, "dynamic is .* are not read"),
        (SETTINGS["awq"] | {"version": "gemv"}, "version is 'gemv'; only the 'gemm'"),
        (SETTINGS["awq"] | {"bits": 8}, "bits is 8; supported: 4"),
        ({"quant_method": "fp8"}, "weight_block_size is None; two numbers"),
        ({"quant_method": "fp8", "weight_block_size": [128, "a"]}, "two numbers such as"),
        (NF4 | {"load_in_4bit": False}, "load_in_4bit is False; only 4-bit"),
        (NF4 | {"bnb_4bit_quant_type": "fp4"}, "'fp4'; supported: 'nf4'"),
        ({"quant_method": "inference-pio", "format": "int2"}, "'int2'; supported: 'int8'"),
    ],
)
def test_settings_that_are_not_read_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: quantization_config.*{message}"):
        layout(settings)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("awq", {"awq.scales": torch.zeros(2, 16, dtype=torch.int32)}, "stored as I32; F16"),
        ("gptq4_ordered", {"gptq4_ordered.g_idx": torch.full((32,), 2, dtype=torch.int32)},
         "names groups from 2 to 2; this linear has groups 0 to 1"),
        ("bnb", {"bnb.weight.quant_map": torch.zeros(16)}, "is not the table of NF4"),
        ("bnb", {"bnb.weight.absmax": torch.zeros(5)}, r"shape \[5\]; this linear has 6 blocks"),
        ("bnb_nested", {"bnb_nested.weight.nested_absmax": torch.zeros(2)}, "has 1 blocks"),
        ("bnb", {"bnb.weight.quant_state.bitsandbytes__nf4": torch.zeros(3, dtype=torch.uint8)},
         "is no JSON"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_are_named(
    name: str, change: dict[str, Tensor], message: str, golden: dict[str, Tensor]
) -> None:
    shape = tuple(golden[f"{name}.dequantized"].shape)
    with pytest.raises(CheckpointError, match=message):
        layout(SETTINGS[name]).read(InMemory(golden | change), name, shape)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("awq", (16, 40), "group_size is 16, which does not divide the 40 input"),
        ("awq", (12, 32), "12 output features; 8 codes share a word"),
        ("gptq 4 bits", (32, 12), "12 input features; 8 codes share a word"),
        ("gptq 8 bits", (30, 32), "30 output features; 4 codes share a word"),
    ],
)
def test_shapes_that_do_not_fit_a_layout_are_named(
    name: str, shape: tuple[int, int], message: str
) -> None:
    settings = PUBLISHED[name].settings | ({"group_size": 16} if name == "awq" else {})
    with pytest.raises(CheckpointError, match=message):
        layout(settings).expected(InMemory({}), "model.layers.0.mlp.up_proj", shape)
