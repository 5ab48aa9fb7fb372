"""Tests of real items need the task sets; those of rules do not."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def task_sets(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of task sets, named as the commands expect it; skips where it is absent."""
    monkeypatch.setenv("INFERENCE_PIO_DATA", str(data_dir))
    return data_dir / "bench"
