"""The size of the KV pool."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from inference_pio.workers import memory
from inference_pio.workers.memory import free_bytes, num_kv_blocks


def blocks(**changes: int | float | None) -> int:
    values = {
        "bytes_per_block": 100,
        "told_bytes": None,
        "free": 10_000,
        "share": 0.5,
        "most_blocks": 1000,
    }
    return num_kv_blocks(**(values | changes))  # type: ignore[arg-type]


def test_a_share_of_the_free_memory_unless_told() -> None:
    assert blocks() == 50
    assert blocks(told_bytes=799) == 7
    assert blocks(told_bytes=20_000) == 200


def test_never_more_than_a_full_batch_can_fill() -> None:
    assert blocks(most_blocks=3) == 3
    assert blocks(told_bytes=10**9, most_blocks=3) == 3


@pytest.mark.parametrize("changes", [{"told_bytes": 99}, {"free": 199}])
def test_less_than_a_block_is_refused_with_the_numbers(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"99 bytes .* one block of 100 bytes; raise"):
        blocks(**changes)


@pytest.mark.parametrize(
    ("limit", "used", "room"),
    [
        ("5000", "2000", 3000),
        ("5000\n", "5000\n", 0),
        ("5000", "6000", 0),
        ("max", "6000", None),
        ("999999999999999999", "0", None),
    ],
)
def test_the_cgroup_narrows_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, used: str, room: int | None
) -> None:
    (tmp_path / "memory.max").write_text(limit)
    (tmp_path / "memory.current").write_text(used)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    free = free_bytes(torch.device("cpu"))
    if room is None:
        assert 0 < free <= psutil.virtual_memory().total
    else:
        assert free == room


def test_a_host_without_cgroup_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "none")
    assert 0 < free_bytes(torch.device("cpu")) <= psutil.virtual_memory().total
