"""The handoff benchmark on real engines: what it measures, and that it refuses to misname it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from inference_pio.benchmarks.handoff import (
    HELD,
    LOCAL,
    OVERLAPPED,
    FirstToken,
    HandoffBench,
    break_even,
    measure,
    rows,
)
from inference_pio.benchmarks.handoff_peer import PrefillPeer
from inference_pio.workers.config import EngineConfig
from inference_pio.workers.engine import Engine

CONFIG = EngineConfig(
    model="embedded",
    block_size=16,
    kv_cache_bytes=16 * 2**20,
    max_batched_tokens=64,
    max_num_seqs=16,
    num_threads=1,
    prefix_caching=False,
)


class Remote:
    """One method of an actor, called here: its answers are made as they are asked for."""

    def __init__(self, method: Any) -> None:
        self._method = method

    def remote(self, *arguments: Any) -> Any:
        return self._method(*arguments)


class Here:
    """A peer in this process."""

    def __init__(self, peer: PrefillPeer) -> None:
        self.prefill, self.send = Remote(peer.prefill), Remote(peer.send)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[HandoffBench]:
    """The benchmark with its peer in this process: only the object store is left out."""
    import ray

    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(ray, "wait", lambda streams, timeout: (streams, []))
    engine, peer = Engine(CONFIG), PrefillPeer(CONFIG)
    yield HandoffBench(engine, Here(peer), 64)
    engine.check_integrity()
    assert not engine.has_work


def test_every_figure_of_a_round_is_measured(bench: HandoffBench) -> None:
    rates, times = measure(bench, [33, 200], 1, lambda _: None)
    (rate,) = rates
    assert set(rate) == {"memory copy", "memory copy, cold", "export", "transfer", "import"}
    assert all(np.isfinite(value) and value > 0 for value in rate.values())
    ways = {(name, length, load) for name, length, load in times}
    assert ways == {
        (way.name, length, load)
        for way in (LOCAL, OVERLAPPED, HELD)
        for length in (33, 200)
        for load in (0, 8)
        if not (way is HELD and load)
    }
    found = rows(rates, times, "bfloat16", "the command")
    assert {row.unit for row in found} == {"GB/s", "ms", "tok/s", "ratio"}
    assert all(row.low <= row.median <= row.high for row in found)


def test_the_others_get_tokens_while_a_prompt_is_prefilled(bench: HandoffBench) -> None:
    assert bench.first_token(LOCAL, 200, load=8).others_per_s > 0
    assert bench.first_token(LOCAL, 200, load=0).others_per_s == 0


def test_a_prompt_that_was_not_handed_over_is_no_remote_figure(
    bench: HandoffBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HandoffBench, "_feed", _give_up)
    with pytest.raises(RuntimeError, match="0 of 200 tokens were handed over"):
        bench.first_token(OVERLAPPED, 200, load=0)


def _give_up(self: HandoffBench, tickets: Any, request_id: str, attempt: int) -> bool:
    self._engine.end_import(request_id, attempt, "refused")
    return True


def test_the_break_even_is_the_length_from_which_on_remote_wins() -> None:
    def took(seconds: float) -> list[FirstToken]:
        return [FirstToken(seconds, 0.0)]

    lengths = [64, 128, 256, 512]
    local = [1.0, 2.0, 4.0, 8.0]

    def found(remote: list[float]) -> int | None:
        times = {(LOCAL.name, n, 0): took(s) for n, s in zip(lengths, local, strict=True)}
        times |= {(OVERLAPPED.name, n, 0): took(s) for n, s in zip(lengths, remote, strict=True)}
        return break_even(times, lengths, 0)

    assert found([0.5, 1.0, 2.0, 4.0]) == 64
    assert found([0.5, 3.0, 3.0, 4.0]) == 256
    assert found([0.5, 1.0, 2.0, 9.0]) is None
