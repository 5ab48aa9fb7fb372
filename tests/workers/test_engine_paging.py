"""Blocks that the KV pool has no room for come back from the tiers, and give the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from inference_pio.workers.types import KVPagingStats

from .conftest import Driver, MakeDriver, random_prompt

BLOCK = 16
MIB = 2**20


def paging(driver: Driver) -> KVPagingStats:
    found: KVPagingStats | None = driver.engine.stats().kv_paging
    assert found is not None
    return found


def settle(driver: Driver) -> None:
    """Until nothing is on its way to the disk."""
    while paging(driver).pages_writing:
        driver.step()


@pytest.fixture
def make(make_driver: MakeDriver) -> Iterator[Any]:
    made: list[Driver] = []

    def build(num_blocks: int = 24, **options: Any) -> Driver:
        made.append(make_driver(num_blocks=num_blocks, **options))
        return made[-1]

    yield build
    for driver in made:
        driver.engine.close()


def page_bytes(driver: Driver) -> int:
    return driver.engine.kv_layout.bytes_per_block


def ask(driver: Driver, name: str, prompt: list[int], **params: Any) -> list[int]:
    driver.add(name, prompt, temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=3, **params)
    driver.run()
    return driver.tokens(name)


def test_a_returning_prompt_comes_back_from_host_memory(make: Any) -> None:
    driver = make(kv_paging={"host_bytes": 4 * MIB})
    prompts = [random_prompt(200 + n, seed=n) for n in range(6)]
    first = [ask(driver, f"a{n}", prompt) for n, prompt in enumerate(prompts)]
    again = [ask(driver, f"b{n}", prompt) for n, prompt in enumerate(prompts)]
    assert again == first
    for n, prompt in enumerate(prompts):
        assert driver.logprobs(f"a{n}") == driver.logprobs(f"b{n}")
        assert driver.last(f"b{n}").usage.cached_tokens == (len(prompt) - 1) // BLOCK * BLOCK
    stats = paging(driver)
    assert stats.hit_tokens["host"] >= 4 * 192
    assert stats.restores == {"done": 6}
    assert not stats.drops


def test_a_returning_prompt_comes_back_from_the_disk(make: Any, tmp_path: Any) -> None:
    driver = make(
        kv_paging={"host_bytes": 400_000, "disk_bytes": 64 * MIB, "folder": str(tmp_path)}
    )
    prompts = [random_prompt(200 + n, seed=n) for n in range(12)]
    first = []
    for n, prompt in enumerate(prompts):
        first.append(ask(driver, f"a{n}", prompt))
        settle(driver)
    for n, prompt in enumerate(prompts):
        assert ask(driver, f"b{n}", prompt) == first[n]
        settle(driver)
    stats = paging(driver)
    assert stats.hit_tokens["disk"] > 1000
    assert stats.disk_bytes > stats.host_bytes
