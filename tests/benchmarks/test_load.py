from __future__ import annotations

import asyncio
import statistics

import pytest

from inference_pio.benchmarks.load import closed_loop, open_loop, poisson_arrivals


def test_arrivals_are_poisson_and_repeatable() -> None:
    times = poisson_arrivals(rate=5.0, count=4000, seed=1)
    assert times == poisson_arrivals(rate=5.0, count=4000, seed=1)
    assert times == sorted(times)
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    # An exponential distribution: mean and standard deviation are both 1 / rate.
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.06)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.06)


def test_an_open_loop_does_not_wait_for_answers() -> None:
    under_way = most = 0

    async def run() -> list[int]:
        everyone = asyncio.Event()

        async def send(number: int) -> int:
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            if under_way == 20:
                everyone.set()
            await everyone.wait()
            return number

        return await open_loop(range(20), poisson_arrivals(1000.0, 20, seed=0), send)

    assert asyncio.run(run()) == list(range(20))
    assert most == 20


def test_a_closed_loop_keeps_exactly_that_many_under_way() -> None:
    under_way = most = 0

    async def send(number: int) -> int:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0)
        under_way -= 1
        return number

    results = asyncio.run(closed_loop(range(50), 7, send))
    assert sorted(results) == list(range(50))
    assert most == 7
