"""``inference-pio quantize``: whole or not at all, with everything else of the folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from inference_pio.workers.model.config import CheckpointError, read_json
from inference_pio.workers.model.quantization.write import write_quantized

MakeCheckpoint = Callable[..., Path]


def test_everything_but_weights_is_copied(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"old")
    write_quantized(source, tmp_path / "out", "int4")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}
    assert read_json(tmp_path / "out" / "config.json")["quantization_config"] == {
        "quant_method": "inference-pio",
        "format": "int4",
        "group_size": 32,
        "head_format": "int8",
    }
    stored = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(source / "model.safetensors")
    assert stored["model.layers.0.mlp.down_proj.weight"].shape == (72, 50)
    assert stored["model.layers.0.mlp.down_proj.weight_scale"].shape == (72, 4)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(stored[name], before[name])


def test_a_failed_run_leaves_nothing(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][3, 3] = float("nan")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.down_proj\.weight .* not finite"):
        write_quantized(source, tmp_path / "out", "int8", max_file_bytes=10_000)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists; a new folder is expected"):
        write_quantized(make_checkpoint(), tmp_path, "int8")
