"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real tokenizers, traces and tasks; skips where it is absent."""
    folder = Path(os.environ.get("INFERENCE_PIO_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder} (set INFERENCE_PIO_DATA to its folder)")
    return folder


@pytest.fixture(scope="session")
def embedded_dir() -> Path:
    """The embedded checkpoint."""
    return REPOSITORY / "embedded" / "checkpoint"
