"""Ranks that stream their own share of the layers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inference_pio.kernels.native.library import cpu_flags, usable

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "loop_guard": False}


@pytest.mark.skipif(not usable(cpu_flags()), reason="no native kernels for this CPU")
@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"pipeline": 2}])
def test_ranks_that_stream_write_the_same(
    parallel: dict[str, Any],
    make_text_checkpoint: Callable[..., Path],
    make_grid: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = make_text_checkpoint(num_hidden_layers=8)
    options: dict[str, Any] = {"parallel": parallel, "prefix_caching": False}
    resident = make_grid(folder, **options)
    streamed = make_grid(folder, weight_memory_bytes=400_000, **options)
    readers = [thread for thread in threading.enumerate() if thread.name == "weights"]
    assert len(readers) == 2, "each rank has its own"
    for driver in (resident, streamed):
        driver.add("a", list(range(1, 40)), max_tokens=12, **GREEDY)
        driver.add("b", [7, 8, 9], max_tokens=12, **GREEDY)
        driver.run()
    for request in ("a", "b"):
        assert streamed.tokens(request) == resident.tokens(request)
    assert streamed.engine.stats().weight_bytes_streamed > 0
    streamed.engine.close()
    assert not any(reader.is_alive() for reader in readers)
