"""How requests arrive: at random moments that wait for nobody, or in streams that never pause."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

Request = TypeVar("Request")
Result = TypeVar("Result")
Send = Callable[[Request], Awaitable[Result]]


def poisson_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds from the start at which ``count`` requests arrive, ``rate`` a second on average."""
    rng = random.Random(seed)
    now, times = 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        times.append(now)
    return times


async def open_loop(
    requests: Sequence[Request], arrivals: Sequence[float], send: Send[Request, Result]
) -> list[Result]:
    """Send each request at its time, whatever became of the earlier ones.

    Only so a slow server shows: a loop that waits for answers slows its questions down as well.
    """
    loop = asyncio.get_running_loop()
    start = loop.time()

    async def at(moment: float, request: Request) -> Result:
        await asyncio.sleep(max(0.0, start + moment - loop.time()))
        return await send(request)

    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(at(moment, request))
            for moment, request in zip(arrivals, requests, strict=True)
        ]
    return [task.result() for task in tasks]


async def closed_loop(
    requests: Sequence[Request], streams: int, send: Send[Request, Result]
) -> list[Result]:
    """Keep ``streams`` requests under way until all are answered; results in order of arrival."""
    waiting = iter(requests)
    results: list[Result] = []

    async def stream() -> None:
        for request in waiting:
            results.append(await send(request))

    async with asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(stream())
    return results
