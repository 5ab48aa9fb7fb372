"""Fixtures that every test may use."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent

# Triton decides once, when a kernel is defined, whether it is interpreted. Without a device this
# process interprets; with one it does where TRITON_INTERPRET=1 asks for it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


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


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where Triton's kernels run: interpreted on the CPU by default, on a device with ``-m gpu``.

    Skips where Triton is not installed.
    """
    pytest.importorskip("triton")
    if request.param == "interpreter":
        if not INTERPRETED:
            pytest.skip("kernels are compiled in this process; TRITON_INTERPRET=1 interprets")
        return torch.device("cpu")
    if INTERPRETED:
        pytest.skip("kernels are interpreted in this process: there is no CUDA device")
    return torch.device("cuda")


def pytest_collection_finish() -> None:
    """Leave modules and tests out of every later collection of garbage: they live to the end.

    There are some million of them, and looking through all takes half a second each time.
    """
    gc.collect()
    gc.freeze()


_left_out: list[pytest.Item] = []


def pytest_deselected(items: list[pytest.Item]) -> None:
    _left_out.extend(item for item in items if _markers_that_leave_out(item))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name every test that its marker left out, so that none is forgotten."""
    if _left_out:
        terminalreporter.section("left out by marker")
    for item in _left_out:
        terminalreporter.line(f"{'/'.join(_markers_that_leave_out(item))}: {item.nodeid}")


def _markers_that_leave_out(item: pytest.Item) -> list[str]:
    markers = ("slow", "gpu", "cluster")
    return [name for name in markers if item.get_closest_marker(name) is not None]
