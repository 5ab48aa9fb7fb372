"""Quantized checkpoints through the model: logits, shards, and what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inference_pio.kernels.context import ContextItem, build_context
from inference_pio.kernels.native.forward import NativeStack
from inference_pio.kernels.native.library import cpu_flags, usable
from inference_pio.kernels.native.linear_quantized import QuantizedLinear, QuantizedSwiGLU
from inference_pio.kernels.torch_quantized import (
    Int4Linear,
    Int8Linear,
    W4A8Linear,
    W8A8Linear,
)
from inference_pio.workers.model.config import CheckpointError
from inference_pio.workers.model.quantization.quantize import MADE_FORMATS, MadeFormat
from inference_pio.workers.model.quantization.write import write_quantized
from inference_pio.workers.model.qwen3 import Qwen3Model
from inference_pio.workers.model.shard import ShardSpec

from .stored import PUBLISHED, write_published

MakeCheckpoint = Callable[..., Path]
CPU = torch.device("cpu")
SHAPES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def logits(model: Qwen3Model, length: int = 20) -> Tensor:
    ids = torch.randint(128, (length,), generator=torch.Generator().manual_seed(3))
    cache = model.new_cache(2, 16)
    context = build_context([ContextItem([0, 1], 0, length)], 16, CPU)
    return model.logits(model.forward(ids, context, cache)).log_softmax(-1)


def load(folder: Path, **options: Any) -> Qwen3Model:
    return Qwen3Model.load(folder, **{"dtype": torch.float32, "device": CPU} | options)


@pytest.fixture(scope="module")
def source(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint(**SHAPES)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("tied", [True, False])
def test_a_published_layout_computes_what_its_floats_do(
    name: str, tied: bool, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint(**SHAPES, tie_word_embeddings=tied)
    quantized, plain = tmp_path / "quantized", tmp_path / "plain"
    write_published(source, quantized, plain, PUBLISHED[name])
    expected = logits(load(plain))
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(logits(load(quantized)), expected, rtol=0, atol=2e-4)
    in_bf16 = logits(load(quantized, dtype=torch.bfloat16))
    torch.testing.assert_close(in_bf16, expected, rtol=0, atol=0.15)


@pytest.mark.parametrize("name", PUBLISHED)
def test_shards_of_a_published_layout_are_parts_of_the_whole(
    name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERENCE_PIO_KERNELS", "reference")  # keeps weights as they come
    write_published(source, tmp_path / "quantized", tmp_path / "plain", PUBLISHED[name])
    check_shards(load(tmp_path / "quantized"), load(tmp_path / "quantized", shard=ShardSpec(1, 2)))


@pytest.mark.parametrize("format", MADE_FORMATS)
def test_shards_of_a_weight_made_on_load_are_parts_of_the_whole(
    format: MadeFormat, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERENCE_PIO_KERNELS", "reference")
    check_shards(
        load(source, quantization=format),
        load(source, quantization=format, shard=ShardSpec(1, 2)),
    )


def check_shards(whole: Any, second: Any) -> None:
    """The second of two ranks has the second half of every linear, exactly."""
    for ours, part in zip(whole.layers, second.layers, strict=True):
        q, k, v = ours.qkv.weight.split([128, 64, 64])
        assert torch.equal(part.qkv.weight, torch.cat((q[64:], k[32:], v[32:])))
        assert torch.equal(part.attention_out.weight, ours.attention_out.weight[:, 64:])
        assert torch.equal(part.gate_up.gate, ours.gate_up.gate[96:])
        assert torch.equal(part.gate_up.up, ours.gate_up.up[96:])
        assert torch.equal(part.down.weight, ours.down.weight[:, 96:])
    assert torch.equal(second.head.weight, whole.head.weight[64:])


@pytest.mark.parametrize("kernels", ["torch", "reference"])
@pytest.mark.parametrize("format", MADE_FORMATS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_written_checkpoint_is_the_one_made_on_load(
    format: MadeFormat,
    tied: bool,
    kernels: str,
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("INFERENCE_PIO_KERNELS", kernels)
    source = make_checkpoint(**SHAPES, tie_word_embeddings=tied)
    write_quantized(source, tmp_path / "out", format, max_file_bytes=40_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    for dtype in (torch.float32, torch.bfloat16):
        made = logits(load(source, dtype=dtype, quantization=format))
        assert torch.equal(logits(load(tmp_path / "out", dtype=dtype)), made)
    distance = (made - logits(load(source))).abs().mean()
    assert distance < {"int8": 0.05, "w8a8": 0.1, "int4": 0.5, "w4a8": 0.5, "nf4": 0.5}[format]


def test_torch_keeps_what_it_has_kernels_for(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERENCE_PIO_KERNELS", "torch")
    kinds = {"int8": Int8Linear, "w8a8": W8A8Linear, "int4": Int4Linear, "w4a8": W4A8Linear}
    for format, kind in kinds.items():
        model = load(source, dtype=torch.bfloat16, quantization=format)
        layer = model.layers[0]
        assert {type(part) for part in (layer.qkv, layer.attention_out, layer.down)} == {kind}
        assert type(layer.gate_up.gate) is kind
        assert type(model.head) is (W8A8Linear if format == "w4a8" else Int8Linear)


@pytest.mark.skipif(not usable(cpu_flags()), reason="no native kernels for this CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", ["int8", "int4", "w4a8", "nf4"])
def test_native_kernels_take_a_quantized_stack_whole(
    format: MadeFormat, dtype: torch.dtype, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERENCE_PIO_KERNELS", "native")
    model = load(source, dtype=dtype, quantization=format)
    layer = model.layers[0]
    parts = (layer.qkv, layer.attention_out, layer.down, model.head)
    assert {type(part) for part in parts} == {QuantizedLinear}
    assert type(layer.gate_up) is QuantizedSwiGLU
    assert isinstance(model._stack, NativeStack)


def test_a_quantized_checkpoint_is_not_quantized_again(source: Path, tmp_path: Path) -> None:
    write_quantized(source, tmp_path / "out", "int8")
    with pytest.raises(ValueError, match=r"quantization is 'int4', but .*out is quantized already"):
        load(tmp_path / "out", quantization="int4")
    with pytest.raises(CheckpointError, match=r"out is quantized already \(inference-pio\)"):
        write_quantized(tmp_path / "out", tmp_path / "again", "int4")


@pytest.mark.parametrize(
    ("name", "part", "change", "message"),
    [
        ("gptq 4 bits", "qzeros", None, r"q_proj\.qzeros \[4, 16\] is missing"),
        ("awq", "scales", lambda t: t[:-1], r"scales has shape \[7, 128\], .* \[8, 128\]"),
        ("fp8", "weight_scale_inv", None, r"q_proj\.weight_scale_inv \[6, 4\] is missing"),
        ("fp8", "weight", lambda t: t.to(torch.bfloat16), "stored as BF16; F8_E4M3 is expected"),
        ("nf4", "weight.absmax", None, r"q_proj\.weight\.absmax is missing"),
        ("nf4, nested", "weight.nested_absmax", None, r"nested_absmax is missing"),
        ("gptq 8 bits", "g_idx", lambda t: t.float(), r"g_idx is stored as F32; I32 or I64"),
    ],
)
def test_wrong_tensors_are_named(
    name: str,
    part: str,
    change: Callable[[Tensor], Tensor] | None,
    message: str,
    source: Path,
    tmp_path: Path,
) -> None:
    write_published(source, tmp_path / "out", tmp_path / "plain", PUBLISHED[name])
    rewrite(tmp_path / "out", f"model.layers.1.self_attn.q_proj.{part}", change)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "out")


def rewrite(folder: Path, name: str, change: Callable[[Tensor], Tensor] | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor).contiguous()
    save_file(tensors, folder / "model.safetensors")


def test_gptq_biases_of_zeros_are_ignored_and_others_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_published(source, out, tmp_path / "plain", PUBLISHED["gptq 4 bits"])
    tensors = load_file(out / "model.safetensors")
    bias = torch.zeros(64, dtype=torch.float16)
    name = "model.layers.0.self_attn.o_proj.bias"
    save_file(tensors | {name: bias}, out / "model.safetensors")
    before = logits(load(out))
    assert torch.equal(logits(load(tmp_path / "plain")).argmax(-1), before.argmax(-1))
    bias[5] = 1
    save_file(tensors | {name: bias}, out / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"o_proj\.bias is not zero"):
        load(out)


def test_codes_without_a_configuration_are_refused(source: Path, tmp_path: Path) -> None:
    """int8 codes are no weight: without their scales they would load as noise."""
    write_quantized(source, tmp_path / "out", "int8")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="weight_scale"):
        load(tmp_path / "out")
