"""Blocks of all ranks leave and come back together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

MakeDriver = Callable[..., Any]


@pytest.mark.parametrize("grid", [{"tensor": 2}, {"pipeline": 2}])
def test_a_returning_prompt_comes_back_to_every_rank(
    make_grid: MakeDriver, prompt: Callable[..., list[int]], grid: dict[str, int]
) -> None:
    driver = make_grid(parallel=grid, num_blocks=24, kv_paging={"host_bytes": 2**22})
    driver.engine._paging._prefill_rate = lambda: None  # else a tiny model may compute faster
    prompts = [prompt(200, seed) for seed in range(4)]
    for turn in ("first", "again"):
        for number, ids in enumerate(prompts):
            driver.add(f"{turn}{number}", ids, temperature=0.0, max_tokens=5, ignore_eos=True)
            driver.run()
    assert driver.engine.stats().kv_paging.restores == {"done": 4}
    for number in range(4):
        assert driver.tokens(f"again{number}") == driver.tokens(f"first{number}")
        assert driver.last(f"again{number}").usage.cached_tokens == 192
