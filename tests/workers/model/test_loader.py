"""Checkpoint folders: what loads, and what is said about those that do not."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from inference_pio.workers.model.config import CheckpointError
from inference_pio.workers.model.loader import INDEX_FILE, Checkpoint, LoadProgress
from inference_pio.workers.model.qwen3 import Qwen3Model
from inference_pio.workers.model.safetensors_file import SafetensorsFile

MakeCheckpoint = Callable[..., Path]
CPU = torch.device("cpu")


def load(folder: Path, max_positions: int | None = None) -> Qwen3Model:
    return Qwen3Model.load(folder, dtype=None, device=CPU, max_positions=max_positions)


@pytest.fixture
def folder(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint()


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_tensors_equal_those_of_safetensors(make_checkpoint: MakeCheckpoint) -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        folder = make_checkpoint(torch_dtype=dtype)
        checkpoint = Checkpoint(folder)
        for name, tensor in load_file(folder / "model.safetensors").items():
            assert checkpoint.view(name).dtype == tensor.dtype
            assert torch.equal(checkpoint.view(name), tensor)
            checkpoint.release(name)
            assert torch.equal(checkpoint.view(name), tensor)  # released pages come back


def test_unaligned_tensors_are_read(tmp_path: Path) -> None:
    values = torch.arange(6, dtype=torch.float32)
    header = {"x": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    encoded = json.dumps(header).encode()
    encoded += b" " * (3 - len(encoded) % 4)  # the data starts one byte before a boundary
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + values.numpy().tobytes())
    assert torch.equal(SafetensorsFile(path).view("x"), values.view(2, 3))


def test_sharded_equals_single(make_checkpoint: MakeCheckpoint) -> None:
    single, sharded = make_checkpoint(), make_checkpoint(max_shard_bytes=100_000)
    assert len(list(sharded.glob("model-*-of-*.safetensors"))) > 2
    ids = torch.arange(10)
    outcomes = []
    for folder in (single, sharded):
        model = load(folder)
        outcomes.append(model.logits(torch.nn.functional.embedding(ids, model.embedding)))
    assert torch.equal(*outcomes)


def test_a_tied_checkpoint_may_carry_its_head(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert load(folder).config.tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"model\.norm\.weight \[72\] is missing"),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(100, 71)}),
            r"up_proj\.weight has shape \[100, 71\], config\.json asks for \[100, 72\]",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(144)}),
            r"1 tensors have no place in this architecture, the first is .*q_proj\.bias",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(72, dtype=torch.int8)}),
            "stored as I8; supported are F32, BF16, F16",
        ),
    ],
)
def test_wrong_tensors_are_named(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_files_are_refused(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        load(folder)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{no json}", "no safetensors file"),
        (b"[1, 2]", "header is no object"),
        (b'{"x": {"dtype": "F32"}}', "header entry of x is broken"),
        (b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}', "entry of x is broken"),
        (b'{"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', "x has 8 bytes"),
    ],
)
def test_broken_headers_are_refused(tmp_path: Path, header: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(path)


def test_an_index_is_held_to_its_folder(folder: Path) -> None:
    (folder / INDEX_FILE).write_text(
        json.dumps({"weight_map": {"x": "../elsewhere/model.safetensors"}})
    )
    with pytest.raises(CheckpointError, match=r"names '\.\./elsewhere/model\.safetensors'"):
        load(folder)


def test_a_missing_shard_is_named(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(max_shard_bytes=100_000)
    next(folder.glob("model-00002-*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-.* does not exist"):
        load(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, which is never loaded"):
        load(folder)


def test_folders_without_a_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load(tmp_path / "nowhere")
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="the folder may be incomplete"):
        load(tmp_path)


def test_max_positions_narrows_the_limit(folder: Path) -> None:
    assert load(folder).max_positions == 40960
    assert load(folder, 100).max_positions == 100
    with pytest.raises(ValueError, match=r"it lies in \[1, 40960\]"):
        load(folder, 40961)


@pytest.mark.parametrize(("seconds", "shown"), [(1.0, False), (2.5, True)])
def test_the_bar_appears_after_two_seconds(seconds: float, shown: bool) -> None:
    now = 0.0
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=80)
    with LoadProgress(100, "Loading x", console=console, clock=lambda: now) as progress:
        progress.advance(50)
        now = seconds
        progress.advance(50)
    assert ("Loading x" in output.getvalue()) == shown
