"""The engine on Triton's kernels: the tokens of the reference, however the steps come about."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from inference_pio.kernels.dispatch import OVERRIDE

MakeDriver = Callable[..., Any]
Prompt = Callable[..., list[int]]

TOLERANCE = 2e-4
GREEDY: dict[str, Any] = {
    "temperature": 0.0,
    "ignore_eos": True,
    "loop_guard": False,
    "logprobs": 2,
}


class Engines:
    """Makes the same engine twice: on Triton's kernels and on the reference."""

    def __init__(
        self, make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch, device: torch.device
    ) -> None:
        self._make, self._monkeypatch, self._device = make_driver, monkeypatch, device

    def agree(self, run: Callable[[Any], None], folder: Path | None = None, **options: Any) -> Any:
        """Runs both; returns Triton's driver after comparing all that came out of them."""
        drivers = {}
        for name in ("reference", "triton"):
            self._monkeypatch.setenv(OVERRIDE, name)
            place = self._device.type if name == "triton" else "cpu"
            driver = self._make(folder, device=place, dtype="float32", **options)
            assert driver.engine.loaded.model.kernels.name == name
            run(driver)
            drivers[name] = driver
        expected, got = drivers["reference"], drivers["triton"]
        assert got.chunks.keys() == expected.chunks.keys()
        for request, index in expected.chunks:
            assert got.tokens(request, index) == expected.tokens(request, index)
            pairs = zip(
                got.logprobs(request, index), expected.logprobs(request, index), strict=True
            )
            for mine, theirs in pairs:
                assert mine.logprob == pytest.approx(theirs.logprob, abs=TOLERANCE)
        return got


@pytest.fixture
def engines(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> Engines:
    return Engines(make_driver, monkeypatch, device)


def test_mixed_batches_and_prefix_hits(engines: Engines, prompt: Prompt) -> None:
    shared = prompt(33)

    def run(driver: Any) -> None:
        driver.add("first", shared, max_tokens=5, **GREEDY)
        for _ in range(3):
            driver.step()
        driver.add("hit", [*shared[:32], *prompt(5, 1)], max_tokens=3, **GREEDY)
        driver.add("other", prompt(20, 2), max_tokens=2, **GREEDY)
        driver.run()
        assert driver.last("hit").usage.cached_tokens == 32

    driver = engines.agree(run, max_batched_tokens=24)
    stack = driver.engine.loaded.model._stack
    assert stack._graphs.captured, "some steps were of decode rows alone"


def test_preemption(engines: Engines, prompt: Prompt) -> None:
    def run(driver: Any) -> None:
        driver.add("low", prompt(28), max_tokens=6, priority=5, **GREEDY)
        for _ in range(3):
            driver.step()
        driver.add("high", prompt(30), max_tokens=2, priority=0, **GREEDY)
        driver.run()
        assert driver.engine.stats().preemptions == 1

    engines.agree(run, num_blocks=4)


def test_the_embedded_model(engines: Engines, embedded_dir: Path, prompt: Prompt) -> None:
    def run(driver: Any) -> None:
        driver.add("a", prompt(9), max_tokens=4, **GREEDY)
        driver.add("b", prompt(6, 1), max_tokens=2, **GREEDY)
        driver.run()

    engines.agree(run, embedded_dir)


@pytest.mark.parametrize(
    "options",
    [{"attention": "sink_window:12+3"}, {"attention": "top_pages:1"}, {"kv_cache_dtype": "int8"}],
    ids=str,
)
def test_what_the_kernels_do_not_take(
    engines: Engines, prompt: Prompt, options: dict[str, str]
) -> None:
    def run(driver: Any) -> None:
        driver.add("a", prompt(70), max_tokens=3, **GREEDY)
        driver.add("b", prompt(7, 1), max_tokens=2, **GREEDY)
        driver.run()

    driver = engines.agree(run, **options)
    stack = driver.engine.loaded.model._stack
    assert not stack._graphs.captured, "a graph would attend to all"
