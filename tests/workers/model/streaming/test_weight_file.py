"""The nameless file: what is written comes back, and what cannot be is said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from inference_pio.workers.model.streaming.errors import WeightReadError
from inference_pio.workers.model.streaming.layer_stream import aligned_memory
from inference_pio.workers.model.streaming.weight_file import BLOCK, CHUNK, WeightFile

LAYER = CHUNK + 3 * BLOCK


def layer(seed: int, size: int = LAYER) -> Tensor:
    memory = aligned_memory(size)
    generator = torch.Generator().manual_seed(seed)
    return memory.copy_(torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator))


def read(file: WeightFile, index: int) -> Tensor:
    into = aligned_memory(file.layer_bytes)
    file.read(index, into.numpy().data, lambda: False)
    return into


@pytest.mark.parametrize("direct", [True, False])
def test_layers_come_back_as_they_were_written(
    direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not direct:
        monkeypatch.setattr(os, "O_DIRECT", 0)
    file = WeightFile(tmp_path / "new" / "folder", num_layers=2, layer_bytes=LAYER)
    if not direct:
        assert not file.is_direct
    for index in range(2):
        file.write(index, layer(index).numpy().data)
    for index in (1, 0):
        assert torch.equal(read(file, index), layer(index))
    file.close()


def test_the_file_has_no_name(tmp_path: Path) -> None:
    file = WeightFile(tmp_path, num_layers=1, layer_bytes=BLOCK)
    assert list(tmp_path.iterdir()) == []
    file.close()


def test_a_file_that_was_cut_off_is_named(tmp_path: Path) -> None:
    file = WeightFile(tmp_path, num_layers=2, layer_bytes=2 * BLOCK)
    os.ftruncate(file.fileno(), 3 * BLOCK)
    read(file, 0)
    with pytest.raises(WeightReadError, match=f"{tmp_path} ended at byte {3 * BLOCK}"):
        read(file, 1)
    file.close()
    with pytest.raises(WeightReadError, match=f"{tmp_path} cannot be read: .*Bad file"):
        read(file, 0)


def test_reading_ends_where_it_is_stopped(tmp_path: Path) -> None:
    file = WeightFile(tmp_path, num_layers=1, layer_bytes=LAYER)
    file.write(0, layer(0).numpy().data)
    into = aligned_memory(LAYER)
    answers = iter([False, True])
    file.read(0, into.numpy().data, lambda: next(answers))
    assert torch.equal(into[:CHUNK], layer(0)[:CHUNK])
    assert not into[CHUNK:].any()
    file.close()


def test_a_disk_without_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} has no room for {2**60} bytes"):
        WeightFile(tmp_path, num_layers=2**20, layer_bytes=2**40)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_memory_is_refused() -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or not any(
        line.split()[1:3] == [str(shared), "tmpfs"]
        for line in Path("/proc/mounts").read_text().splitlines()
    ):
        pytest.skip(f"no file system in memory at {shared}")
    with pytest.raises(ValueError, match=r"is in memory \(tmpfs\).*XDG_CACHE_HOME"):
        WeightFile(shared / "inference-pio-test", num_layers=1, layer_bytes=BLOCK)
