"""Rows of the embedding that are read as tokens come."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from inference_pio.workers.model.safetensors_file import SafetensorsFile
from inference_pio.workers.model.streaming.embedding_rows import EmbeddingRows
from inference_pio.workers.model.streaming.errors import WeightReadError


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_table(
    stored: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    table = torch.randn(100, 37).to(stored)
    path = tmp_path / "model.safetensors"
    save_file({"before": torch.zeros(3), "table": table, "then": torch.zeros(5)}, path)
    rows = EmbeddingRows(SafetensorsFile(path), "table", range(20, 90), dtype)
    ids = torch.randint(0, 70, (50,))
    for wanted in (ids, torch.tensor([69, 0, 69]), torch.tensor([], dtype=torch.int64)):
        found = rows.look_up(wanted)
        assert torch.equal(found, table[20:90].to(dtype)[wanted])
    rows.close()


def test_a_file_that_was_cut_off_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"table": torch.randn(100, 16)}, path)
    rows = EmbeddingRows(SafetensorsFile(path), "table", range(100), torch.float32)
    os.truncate(path, path.stat().st_size - 10 * 64)
    rows.look_up(torch.tensor([0, 89]))
    with pytest.raises(WeightReadError, match=f"{path} was cut off while it was in use"):
        rows.look_up(torch.tensor([0, 90]))
    rows.close()
