"""Engines on a grid whose ranks are threads of this process: real groups, no start-up time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inference_pio.workers.parallel import grid
from inference_pio.workers.parallel.launcher import RankSpec
from inference_pio.workers.parallel.rank import run_rank

MakeDriver = Callable[..., Any]


class ThreadRank:
    """A rank in a thread; what it raised, and why it lost its group."""

    def __init__(self, spec: RankSpec) -> None:
        self.error: BaseException | None = None
        self.lost: list[str] = []
        self._thread = threading.Thread(target=self._run, args=(spec,), daemon=True)
        self._thread.start()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def kill(self) -> None:
        """A thread cannot be killed; it ends by itself when rank 0 has hung up."""
        self._thread.join(30)
        assert not self._thread.is_alive(), "a rank hangs"

    def _run(self, spec: RankSpec) -> None:
        try:
            run_rank(spec, self.lost.append)
        except BaseException as error:
            self.error = error


class ThreadRanks:
    """Starts ranks as threads; ``change`` is applied to each rank's configuration."""

    host = "127.0.0.1"

    def __init__(self, **change: Any) -> None:
        self.change = change
        self.started: list[ThreadRank] = []

    def start(self, specs: Sequence[RankSpec]) -> list[ThreadRank]:
        configs = [spec.config.model_copy(update=self.change) for spec in specs]
        changed = [replace(s, config=config) for s, config in zip(specs, configs, strict=True)]
        self.started = [ThreadRank(spec) for spec in changed]
        return self.started


@pytest.fixture
def thread_ranks() -> type[ThreadRanks]:
    """The launcher's class."""
    return ThreadRanks


@pytest.fixture
def make_grid(make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeDriver]:
    """``make_driver`` for engines with ``parallel=...``; they are closed at the end."""
    monkeypatch.setattr(grid, "LocalRanks", ThreadRanks)
    drivers: list[Any] = []

    def make(folder: Path | None = None, *, parallel: dict[str, Any], **options: Any) -> Any:
        drivers.append(make_driver(folder, parallel=parallel, **options))
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.engine.close()
        for rank in driver.engine.executor.ranks:
            assert not rank.is_alive()
            assert rank.error is None


@pytest.fixture
def loss_grid(make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeDriver]:
    """As ``make_grid``, for grids that do not end well."""
    monkeypatch.setattr(grid, "LocalRanks", ThreadRanks)
    drivers: list[Any] = []

    def make(*, parallel: dict[str, Any]) -> Any:
        drivers.append(make_driver(parallel=parallel))
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.engine.close()
        assert not any(rank.is_alive() for rank in driver.engine.executor.ranks)
