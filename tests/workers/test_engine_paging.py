"""Blocks that the KV pool has no room for come back from the tiers, and give the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inference_pio.workers.config import EngineConfig
from inference_pio.workers.types import FinishReason, KVPagingStats

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
        if (desk := made[-1].engine._paging) is not None:
            desk._prefill_rate = lambda: None  # else a tiny model may compute faster
        return made[-1]

    yield build
    for driver in made:
        driver.engine.close()


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


def test_a_returning_prompt_comes_back_from_the_disk(make: Any, tmp_path: Path) -> None:
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


def test_damage_on_the_way_changes_no_token(make: Any) -> None:
    driver = make(kv_paging={"host_bytes": 4 * MIB})
    prompts = [random_prompt(200 + n, seed=n) for n in range(6)]
    first = [ask(driver, f"a{n}", prompt) for n, prompt in enumerate(prompts)]
    driver.engine._paging._store._pages[:, 100] ^= 1
    assert [ask(driver, f"b{n}", prompt) for n, prompt in enumerate(prompts)] == first
    assert paging(driver).drops["checksum"] >= 4


def test_an_abort_and_a_deadline_during_a_restore_leave_nothing(make: Any) -> None:
    # A step restores four blocks of twelve, so that both come in the middle.
    driver = make(kv_paging={"host_bytes": 4 * MIB}, max_batched_tokens=64)
    prompts = [random_prompt(200, seed=n) for n in range(6)]
    for n, prompt in enumerate(prompts):
        ask(driver, f"a{n}", prompt)
    driver.add("aborted", prompts[0], max_tokens=4)
    driver.step()
    driver.engine.abort("aborted")
    driver.run()
    driver.add("late", prompts[1], max_tokens=4, deadline_s=0.0)
    driver.run()
    assert driver.end("aborted") is FinishReason.ABORT
    assert driver.end("late") is FinishReason.ERROR
    assert paging(driver).restores["released"] == 1


def test_an_engine_that_dies_ends_its_thread(make: Any, tmp_path: Path) -> None:
    driver = make(kv_paging={"host_bytes": MIB, "disk_bytes": MIB, "folder": str(tmp_path)})
    driver.add("open", random_prompt(100), max_tokens=4)
    driver.step()
    driver.engine.fail_all("a test")
    driver.engine.close()
    assert not driver.engine._paging._store._file.is_alive
    assert list(tmp_path.iterdir()) == []


def test_a_preempted_request_comes_back_from_memory(make: Any) -> None:
    driver = make(num_blocks=14, kv_paging={"host_bytes": 4 * MIB})
    alone = make(num_blocks=64)
    prompt = random_prompt(100)
    for one in (driver, alone):
        one.add("a", prompt, temperature=0.0, max_tokens=20, ignore_eos=True)
        for _ in range(4):
            one.step()
    driver.add("urgent", random_prompt(180, seed=1), priority=-5, max_tokens=2)
    driver.run()
    alone.run()
    assert driver.engine.stats().preemptions == 1
    assert driver.tokens("a") == alone.tokens("a")
    assert paging(driver).hit_tokens["host"] == 64


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"host_bytes": 100}, "host_bytes is 100; one KV block takes"),
        ({"host_bytes": MIB, "disk_bytes": 100}, "disk_bytes is 100; one KV block takes"),
        ({"host_bytes": 2**60}, "bytes of memory are free"),
        ({"host_bytes": MIB, "disk_bytes": 2**60}, "bytes free; lower it"),
        ({"host_bytes": MIB, "disk_bytes": MIB, "folder": "/dev/null/x"}, "cannot be used"),
        ({"disk_bytes": MIB}, "needs host_bytes"),
    ],
)
def test_budgets_that_cannot_be_met_are_named(make: Any, sizes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(kv_paging=sizes)


def test_paging_needs_the_prefix_cache() -> None:
    with pytest.raises(ValueError, match="prefix_caching is off"):
        EngineConfig(prefix_caching=False, kv_paging={"host_bytes": MIB})
