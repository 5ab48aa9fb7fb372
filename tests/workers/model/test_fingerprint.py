"""Model fingerprints: equal for equal models, different for any other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from inference_pio.workers.model.config import CheckpointError
from inference_pio.workers.model.fingerprint import model_fingerprint

MakeCheckpoint = Callable[..., Path]


def test_a_copy_has_the_same_fingerprint(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint()
    shutil.copytree(folder, tmp_path / "copy")
    fingerprint = model_fingerprint(folder)
    assert len(fingerprint) == 32
    assert model_fingerprint(tmp_path / "copy") == fingerprint


def test_what_differs_shows(make_checkpoint: MakeCheckpoint) -> None:
    folders = [
        make_checkpoint(),
        make_checkpoint(seed=1),
        make_checkpoint(torch_dtype="bfloat16"),
        make_checkpoint(max_shard_bytes=100_000),
    ]
    changed = make_checkpoint()
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"rope_theta": 5e6}))
    last_byte = make_checkpoint()
    weights = bytearray((last_byte / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (last_byte / "model.safetensors").write_bytes(weights)
    fingerprints = {model_fingerprint(f) for f in [*folders, changed, last_byte]}
    assert len(fingerprints) == 6


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has neither"):
        model_fingerprint(tmp_path)


def test_weights_that_are_made_on_load_are_others(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    names = ("none", "int8", "w8a8", "int4", "w4a8", "nf4")
    fingerprints = {model_fingerprint(folder, quantization=name) for name in names}
    assert len(fingerprints) == len(names)
    assert model_fingerprint(folder) in fingerprints


def test_kv_in_other_codes_is_other_kv(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    formats = ("auto", "int8", "fp8")
    fingerprints = {model_fingerprint(folder, kv_cache_dtype=name) for name in formats}
    fingerprints |= {model_fingerprint(folder, quantization="int8")}
    assert len(fingerprints) == 4
    assert model_fingerprint(folder) in fingerprints
