"""``bench paging``: prompts are driven out of the pool and come back from where they should."""

from __future__ import annotations

from typing import Any

from inference_pio.benchmarks import paging
from inference_pio.workers.engine import Engine

BASE: dict[str, Any] = {"model": "embedded", "block_size": 16}


def test_each_tier_gives_the_prompt_back() -> None:
    for tier in paging.TIERS:
        engine = Engine(paging.engine_config(BASE, tier, 512, _block_bytes()))
        if engine._paging is not None:
            engine._paging._prefill_rate = lambda: None  # else a tiny model may compute faster
        bench = paging.PagingBench(engine, tier, 512)
        found = [bench.round() for _ in range(5)]
        engine.close()
        assert found[-1][1] is not None  # it raises where the prompt came from elsewhere


def test_times_become_rows() -> None:
    measured: paging.Measured = {("host", 64): paging.Times([1.0, 2.0], [0.5, 0.5])}
    rows = {row.case: row for row in paging.rows(measured, "float32", "bench")}
    assert rows["first token, 64 tokens, new"].median == 1500
    assert rows["first token, 64 tokens, returning / new"].median == 0.375


def _block_bytes() -> int:
    engine = Engine(paging.engine_config(BASE, "off", 64, 2**20))
    return engine.kv_layout.bytes_per_block
